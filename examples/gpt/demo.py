"""The whole way on real text: train a small GPT with α-entmax attention, export it, and serve it from C++.

Trains a byte-level GPT with α-entmax attention and the same one with softmax, compares them, exports the first to
TorchScript and to an AOTInductor package, both with a cache, without and with an index of its keys, lets C++ servers
continue prompts from all of them and checks that they write the same bytes as Python, and draws pictures. Ends with an
error if anything disagrees.
"""

import argparse
import faulthandler
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data import Corpus
from export import export
from pictures import draw_all
from serve import Failure, build, check_gradients, verify_all
from train import add_options, train_from_options

STAGES = 5


@contextmanager
def stage(number: int, title: str) -> Iterator[None]:
    """Announces a part of the demo, and says afterwards how long it took."""
    print(f"\n[{number}/{STAGES}] {title}\n", flush=True)
    started = time.perf_counter()
    yield
    print(f"\n({time.perf_counter() - started:.0f} s)", flush=True)


def passage(corpus: Corpus, length: int) -> bytes:
    """`length` held-out bytes from the middle, if possible from the beginning of a line that is not indented."""
    held_out = bytes(corpus.validation.tolist())
    middle = (len(held_out) - length) // 2
    line = re.compile(rb"(?<=\n)\S").search(held_out, middle, len(held_out) - length)
    start = line.start() if line else middle
    return held_out[start : start + length]


def show(title: str, text: bytes) -> None:
    """Prints bytes as text, indented, whatever they are."""
    print(f"{title}:")
    for line in text.decode(errors="replace").split("\n"):
        print("    " + "".join(c if c.isprintable() else "·" for c in line.expandtabs(4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder to write to (default: %(default)s)")
    serving = parser.add_argument_group("serving")
    serving.add_argument("--prompt", help="text that C++ continues (default: held-out text)")
    serving.add_argument("--bytes", type=int, default=160, help="how many bytes it writes (default: %(default)s)")
    add_options(parser, minutes=2.5)
    options = parser.parse_args()
    if options.prompt is not None and len(os.fsencode(options.prompt)) < 2:
        parser.error("argument --prompt: must hold at least 2 bytes")
    if options.bytes < 1:
        parser.error("argument --bytes: must be above zero")
    started = time.perf_counter()
    options.out.mkdir(parents=True, exist_ok=True)

    with stage(1, "Training with α-entmax and with softmax attention"):
        checkpoint, corpus = train_from_options(options)
        checkpoint.save(options.out / "gpt.pt")
    model = checkpoint.models["entmax"]

    with stage(2, "Exporting the α-entmax model"):
        exported, indexed = (export(model, options.out, with_index) for with_index in (False, True))
        for each in (exported, indexed):
            print(f"TorchScript: {each.torchscript}\nAOTInductor: {each.aoti}")

    with stage(3, "Building the C++ programs through the installed CMake package"):
        programs = build(options.out / "libtorch")
        print(f"Programs: {programs}\n\n{programs / 'gradients'}, which calls the operator from C++, says:")
        print(check_gradients(programs).rstrip())

    with stage(4, "Continuing a prompt from C++, without Python, over a paged cache"):
        prompt = os.fsencode(options.prompt) if options.prompt else passage(corpus, max(2, model.context // 2))
        verdicts = verify_all(programs, exported, indexed, model, prompt, options.bytes)
        show("Prompt", prompt)
        for name, verdict in verdicts.items():
            show(f"\nC++ from {name}", verdict.continuation)
            print(verdict)
        print(
            "\nSo do those of several lines of the prompt, served together, and all of them with an index of the keys."
        )

    with stage(5, "Drawing pictures"):
        for path in draw_all(checkpoint, passage(corpus, 56), options.out):
            print(path)

    print(f"\nAll done in {time.perf_counter() - started:.0f} s. Everything is in {options.out.resolve()}")


if __name__ == "__main__":
    faulthandler.enable()  # a crash in compiled code says where it was
    try:
        main()
    except Failure as error:
        sys.exit(f"\nFAILED: {error}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
