"""Lets a model that compare.py saved go on with a text: greedily, by `generate` with a static cache."""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import adasplash.integrations.transformers  # noqa: F401  (models that were saved with it need it)

PROMPT = "import argparse\n\n\ndef main():\n    parser = argparse."


@torch.inference_mode()
def continue_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int, compiled: bool = False
) -> str:
    """The text of the `count` tokens that the model finds likeliest after the prompt, each after those before it."""
    tokens = tokenizer(prompt, return_tensors="pt").to(model.device)
    written = model.generate(
        **tokens,
        max_new_tokens=count,
        do_sample=False,
        cache_implementation="static",
        disable_compile=not compiled,
        pad_token_id=0,
    )
    return tokenizer.decode(written[0, tokens["input_ids"].shape[1] :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--prompt", default=PROMPT, help="(default: the beginning of a program)")
    parser.add_argument("--tokens", type=int, default=100, help="how many it writes (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="decodes with compiled code, on a GPU")
    options = parser.parse_args()
    if not options.model.is_dir():
        sys.exit(f"error: no such folder: {options.model}")
    model = AutoModelForCausalLM.from_pretrained(options.model).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    written = continue_text(model, tokenizer, options.prompt, options.tokens, options.compile)
    print(f"{options.prompt}│{written}")


if __name__ == "__main__":
    main()
