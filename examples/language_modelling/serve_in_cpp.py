"""Compiles a model that compare.py saved ahead of time, and lets a C++ program without Python continue a text with it.

The program is ../libtorch/generate_aoti.cpp, which knows nothing of this model: for both, a token is a byte. What it
writes must be what Python writes.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

sys.path.append(str(Path(__file__).resolve().parents[1] / "gpt"))

import adasplash.integrations.transformers  # noqa: F401  (models that were saved with it need it)
from byte_tokenizer import VOCABULARY
from continue_text import PROMPT
from export import compile_aoti, load
from generate import continue_greedily, export_program, gaps_to_likeliest
from serve import Failure, Verdict, build, judge, run_in_cpp


class Logits(nn.Module):
    """A language model as a function of tokens (1, N) alone, which gives logits (1, N, 256), for N up to `context`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        if model.config.vocab_size != VOCABULARY:
            raise ValueError(f"the C++ program reads bytes, but the model has {model.config.vocab_size:,} tokens")
        self.model = model
        self.context = model.config.n_positions

    def forward(self, tokens: Tensor) -> Tensor:
        # Without a mask, exported code would have to look for sequences that are packed.
        return self.model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits


def serve(model: PreTrainedModel, prompt: bytes, count: int, package: Path, programs: Path) -> Verdict:
    """Writes the package, a .pt2 file, and builds the programs in their folder, where they are not up to date; gives
    what C++ wrote and how Python agrees with it.

    Raises ValueError where the model's tokens are not bytes, Failure where C++ and Python disagree or nothing can be
    built.
    """
    logits = Logits(model.eval())
    package.parent.mkdir(parents=True, exist_ok=True)
    compile_aoti(export_program(logits), package, {"context": logits.context})
    build(programs)
    written = run_in_cpp(programs / "generate_aoti", package, count, prompt)
    rest = (prompt, count, logits.context, model.device)
    return judge(
        package.name,
        written,
        expected=continue_greedily(load(package), *rest),
        eager=continue_greedily(logits, *rest),
        gaps=lambda chosen: gaps_to_likeliest(logits, prompt, chosen, logits.context, model.device),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--prompt", default=PROMPT, help="(default: the beginning of a program)")
    parser.add_argument("--bytes", type=int, default=100, help="how many it writes (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--package", type=Path, help="file to write, .pt2 (default: model.pt2 in the model's folder)")
    parser.add_argument(
        "--programs", type=Path, default=Path("build/examples"), help="folder to build them in (default: %(default)s)"
    )
    options = parser.parse_args()
    if not options.model.is_dir():
        sys.exit(f"error: no such folder: {options.model}")
    model = AutoModelForCausalLM.from_pretrained(options.model).to(options.device)
    package = options.package or options.model / "model.pt2"
    try:
        verdict = serve(model, options.prompt.encode(), options.bytes, package, options.programs)
    except (ValueError, Failure) as error:
        sys.exit(f"error: {error}")
    print(f"{options.prompt}│{verdict.continuation.decode(errors='replace')}\n\n{verdict}")


if __name__ == "__main__":
    main()
