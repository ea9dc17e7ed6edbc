"""Builds the C++ programs in ../libtorch and holds what they write against what Python computes."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import adasplash
from cached import CachedGPT
from engine import continue_all, gaps_to_likeliest
from export import Exported, load, shape_of
from model import GPT

SOURCES = Path(__file__).resolve().parent.parent / "libtorch"

# Two logits nearer than this are a tie. The compiled model sums in another order than the eager one, which moves logits
# by some 1e-6; where two bytes are as near as that, either is a right answer.
TIE = 1e-4


class Failure(Exception):
    """The C++ programs could not be built or run."""


class Mismatch(Failure):
    """C++ and Python disagree."""


@dataclass(frozen=True)
class Verdict:
    """What a C++ program wrote, and at how many of its bytes the eager model had a tie and took the other one."""

    continuation: bytes
    ties: int

    def __str__(self) -> str:
        text = f"These {len(self.continuation)} bytes equal those of Python running the same file"
        if not self.ties:
            return f"{text}, and those of the eager model."
        return (
            f"{text}. The eager model chose otherwise at {self.ties} of them, where two bytes tie: their logits are "
            f"less than {TIE:g} apart, which is within rounding."
        )


def build(folder: Path) -> Path:
    """Builds the programs through the installed CMake package; returns the folder that holds them."""
    if not shutil.which("cmake"):
        raise Failure("cmake is needed to build the C++ programs, and was not found")
    prefix = f"{adasplash.cmake_prefix_path};{torch.utils.cmake_prefix_path}"
    # -U forgets where the package was found when this folder was last built in.
    options = ["-UAdaSplash_DIR", "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={prefix}"]
    configure = ["cmake", "-S", str(SOURCES), "-B", str(folder), *options]
    for command in (configure, ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode:
            raise Failure(f"{' '.join(command)} failed:\n{done.stdout}")
    return folder


def run_in_cpp(program: Path, model: Path, count: int, given: bytes, *options: str) -> bytes:
    """Runs one of the programs on a model; returns the bytes that it wrote."""
    # As many threads as here: another number of them may round otherwise.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [str(program), str(model), str(count), *options]
    done = subprocess.run(command, input=given, capture_output=True, env=environment)
    if done.returncode:
        raise Failure(f"{' '.join(command)} failed:\n{done.stderr.decode(errors='replace')}")
    return done.stdout


def serve_in_cpp(program: Path, model: Path, prompts: list[bytes], count: int) -> list[bytes]:
    """What a server writes for each prompt. Several, which must be lines, are on their way at the same time."""
    if len(prompts) == 1:
        return [run_in_cpp(program, model, count, prompts[0])]
    written = [bytearray() for _ in prompts]
    for event in run_in_cpp(program, model, count, b"\n".join(prompts), "--lines").splitlines():
        number, byte = map(int, event.split())
        written[number].append(byte)
    return [bytes(each) for each in written]


def must_equal(text: bytes, other: bytes, otherwise: str) -> None:
    """Raises Mismatch, which says from where on two texts differ, if they do."""
    if text != other:
        at = next(i for i in range(max(len(text), len(other))) if text[i : i + 1] != other[i : i + 1])
        raise Mismatch(f"{otherwise} from byte {at} on:\n  {text[at:]!r}\n  {other[at:]!r}")


def judge(name: str, written: bytes, expected: bytes, eager: bytes, gaps: Callable[[bytes], list[float]]) -> Verdict:
    """Checks twice what C++ wrote with a saved model, called by a name.

    It must equal, byte for byte, what Python gets from the same saved model: the arithmetic is the same. And it must
    equal what the eager model gives, unless each byte that it would have chosen otherwise, after the very bytes that
    C++ wrote, is a tie (see TIE): `gaps` are how far it has their logits below the highest. Raises Mismatch if not.
    """
    must_equal(written, expected, f"C++ and Python continue {name} differently")
    if written == eager:
        return Verdict(written, ties=0)
    deficits = gaps(written)
    if max(deficits) > TIE:
        at = next(i for i, deficit in enumerate(deficits) if deficit > TIE)
        raise Mismatch(
            f"{name} does not compute what the model does: it chose {written[at : at + 1]!r} as byte {at}, "
            f"whose logit in the eager model is {deficits[at]:.2e} below the highest"
        )
    return Verdict(written, ties=sum(deficit > 0 for deficit in deficits))


def verify(
    program: Path, artifact: Path, model: CachedGPT, prompts: list[bytes], count: int, eager: list[bytes]
) -> list[Verdict]:
    """Lets a C++ server continue prompts together from the saved model, and judges what it wrote for each beside what
    the eager model gives (`eager`)."""
    shape, device = shape_of(model), next(model.parameters()).device
    written = serve_in_cpp(program, artifact, prompts, count)
    expected = continue_all(load(artifact), shape, prompts, count, device)
    return [
        judge(
            artifact.name, *texts, lambda chosen, prompt=prompt: gaps_to_likeliest(model, shape, prompt, chosen, device)
        )
        for prompt, *texts in zip(prompts, written, expected, eager, strict=True)
    ]


def verify_index(program: Path, artifact: Path, prompts: list[bytes], count: int, verdicts: list[Verdict]) -> None:
    """Lets a C++ server that keeps an index of the keys continue the same prompts: it must write the same bytes."""
    for written, verdict in zip(serve_in_cpp(program, artifact, prompts, count), verdicts, strict=True):
        must_equal(written, verdict.continuation, f"C++ continues {artifact.name} differently than without an index")


def lines_of(text: bytes, most: int = 4) -> list[bytes]:
    """Some lines of a text, as prompts of unequal lengths; at least two."""
    lines = [line for line in text.splitlines() if line.strip()][:most]
    return lines if len(lines) > 1 else [text[:1].replace(b"\n", b" "), text[:7].replace(b"\n", b" ")]


def verify_all(
    programs: Path, exported: Exported, indexed: Exported, model: GPT, prompt: bytes, count: int
) -> dict[str, Verdict]:
    """Both saved forms of the model, each with its program: the prompt alone, and lines of it as requests that are
    served together; and all of that with an index of the keys."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a few short sequences are too little work for more
    try:
        cached, lines, fewer = CachedGPT(model).eval(), lines_of(prompt), min(count, 40)
        device = next(model.parameters()).device
        eager = continue_all(cached, shape_of(cached), [prompt], count, device)
        eager_lines = continue_all(cached, shape_of(cached), lines, fewer, device)
        verdicts = {}
        for name, program, artifact, with_index in (
            ("TorchScript", programs / "serve_torchscript", exported.torchscript, indexed.torchscript),
            ("AOTInductor", programs / "serve_aoti", exported.aoti, indexed.aoti),
        ):
            alone = verify(program, artifact, cached, [prompt], count, eager)
            together = verify(program, artifact, cached, lines, fewer, eager_lines)
            verify_index(program, with_index, [prompt], count, alone)
            verify_index(program, with_index, lines, fewer, together)
            [verdicts[name]] = alone
        return verdicts
    finally:
        torch.set_num_threads(threads)


def check_gradients(programs: Path) -> str:
    """Runs the program that calls the operator from C++ and checks its gradients; returns what it printed."""
    done = subprocess.run([str(programs / "gradients")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Mismatch(f"gradients failed:\n{done.stdout}")
    return done.stdout
