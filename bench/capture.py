"""Takes query, key and value of every layer out of a model that the demo trained, as an input of the benchmark.

    python -m bench.capture gpt.pt captured.pt
    python -m bench.attention --inputs captured:captured.pt

The file holds query, key and value, (layers × windows, heads, N, D) float32, and the model's alpha. Rotary positions
are in them; windows come from the held-out part of the text that the model was trained on.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "gpt"


@torch.no_grad()
def capture(checkpoint: Path, text: Path | None, windows: int) -> dict[str, Tensor | float]:
    """Runs the checkpoint's entmax model over `windows` held-out windows of its context's length."""
    sys.path.insert(0, str(EXAMPLE))  # the example is a folder of programs, not a package
    from data import load_corpus
    from train import Checkpoint

    trained = Checkpoint.load(checkpoint)
    model, context = trained.models["entmax"], trained.config.context
    tokens, _ = load_corpus(text, context).validation_windows(windows, context)
    layers: list[tuple[Tensor, Tensor, Tensor]] = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda module, inputs: layers.append(module.project(*inputs)))
        for block in model.blocks
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    query, key, value = (torch.cat([layer[i] for layer in layers]).contiguous() for i in range(3))
    return {"query": query, "key": key, "value": value, "alpha": trained.config.alpha}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="what examples/gpt/train.py or the demo saved")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--text", type=Path, help="text of the windows (default: Python's own library)")
    parser.add_argument("--windows", type=int, default=1, help="windows a layer (default: %(default)s)")
    options = parser.parse_args()
    captured = capture(options.checkpoint, options.text, options.windows)
    torch.save(captured, options.out)
    print(f"{options.out}: query, key, value {tuple(captured['query'].shape)}, α = {captured['alpha']:g}")


if __name__ == "__main__":
    main()
