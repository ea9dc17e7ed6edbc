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

from byte_tokenizer import VOCABULARY
from continue_text import PROMPT

import adasplash.integrations.transformers  # noqa: F401  (models that were saved with it need it)
from export import export_aoti
from generate import continue_greedily
from serve import Failure, Verdict, build, verify


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


def serve(model: PreTrainedModel, prompt: bytes, count: int, folder: Path) -> Verdict:
    """Writes a package and builds programs in the folder; gives what C++ wrote and how Python agrees with it.

    Raises ValueError where the model's tokens are not bytes, Failure where C++ and Python disagree or nothing can be
    built.
    """
    logits = Logits(model.eval())
    folder.mkdir(parents=True, exist_ok=True)
    package = folder / "model.pt2"
    export_aoti(logits, package)
    programs = build(folder / "libtorch")
    eager = continue_greedily(logits, prompt, count, logits.context, model.device)
    return verify(programs / "generate_aoti", package, logits, prompt, count, eager)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--prompt", default=PROMPT, help="(default: the beginning of a program)")
    parser.add_argument("--bytes", type=int, default=100, help="how many it writes (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("served"), help="folder to write to (default: %(default)s)")
    options = parser.parse_args()
    if not options.model.is_dir():
        sys.exit(f"error: no such folder: {options.model}")
    model = AutoModelForCausalLM.from_pretrained(options.model).to(options.device)
    try:
        verdict = serve(model, options.prompt.encode(), options.bytes, options.out)
    except (ValueError, Failure) as error:
        sys.exit(f"error: {error}")
    print(f"{options.prompt}│{verdict.continuation.decode(errors='replace')}\n\n{verdict}")


if __name__ == "__main__":
    main()
