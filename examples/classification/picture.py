"""What one head of a trained classifier looks at in a text: its scores through softmax, and through α-entmax."""

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no screen needed

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adasplash.integrations.transformers import configure, record
from classifiers import load

_COLOUR = "#0b6e4f"
_COLUMNS = 88  # letters a line


@torch.no_grad()
def weights_of(model: PreTrainedModel, ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """The weights of one layer on a text by softmax and by α-entmax, (H, N, N) each, from the same scores: only the
    layer looked at is changed, and nothing that comes before it.

    Args:
        ids: (1, N).
    """
    with record(model) as seen:
        model(ids)
    alphas = [each.alpha.tolist() for each in seen.layers.values()]
    layer = range(len(alphas))[layer]
    configure(model, alpha=alphas, learn_alpha=False)
    entmax = model(ids, output_attentions=True).attentions[layer][0]
    heads = len(alphas[layer])
    configure(model, alpha=[[1.0] * heads if place == layer else a for place, a in enumerate(alphas)])
    softmax = model(ids, output_attentions=True).attentions[layer][0]
    configure(model, alpha=alphas)
    return softmax, entmax


def draw(pieces: list[str], panels: dict[str, Tensor], title: str, path: Path) -> None:
    """A text in each panel, behind whose tokens the weight (N,) is seen as colour; where it is exactly zero a token is
    grey on white."""
    places, column, line = [], 0, 0
    for piece in pieces:
        if column + len(piece) > _COLUMNS:
            column, line = 0, line + 1
        places.append((column, line))
        column += len(piece)
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 0.6 + len(panels) * (0.6 + 0.24 * (line + 1))))
    for panel, (name, weights) in zip(axes, panels.items(), strict=True):
        panel.set(xlim=(0, _COLUMNS), ylim=(line + 1, 0), xticks=[], yticks=[])
        panel.set_title(name, loc="left", fontsize=11)
        for spine in panel.spines.values():
            spine.set_visible(False)
        largest = weights.max().item()
        for piece, (left, top), weight in zip(pieces, places, weights.tolist(), strict=True):
            if weight > 0:
                shade = 0.08 + 0.77 * weight / largest
                panel.add_patch(Rectangle((left, top), len(piece), 0.9, color=_COLOUR, alpha=shade, linewidth=0))
            dark = "black" if weight < 0.6 * largest else "white"
            for place, letter in enumerate(piece):  # a cell each, so that letters stand on their colour in any font
                colour = dark if weight > 0 else "#b0b0b0"
                panel.text(
                    left + place + 0.5, top + 0.5, letter, family="monospace", fontsize=9, color=colour,
                    ha="center", va="center", parse_math=False,
                )  # fmt: skip
    figure.suptitle(title, fontsize=12)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def pieces_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What each token looks like, in one line."""
    return [tokenizer.decode([number]).replace("\n", " ") or "·" for number in ids]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder of train_classifier.py --save; entmax or learned")
    parser.add_argument("text", help="that is looked at, some 60 words at most")
    parser.add_argument("--layer", type=int, default=-1, help="(default: the last)")
    parser.add_argument("--head", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--token", type=int, default=0, help="whose weights are shown (default: 0, the first)")
    parser.add_argument("--out", type=Path, default=Path("head.png"), help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    model, tokenizer = load(str(options.model))
    if model.config._attn_implementation != "adasplash":
        sys.exit(f"error: {options.model} has softmax; take the model that was trained with entmax beside it")
    ids = tokenizer(options.text, truncation=True, return_tensors="pt").input_ids
    said = model.config.id2label[model(ids).logits.argmax().item()]
    softmax, entmax = (weights[options.head, options.token] for weights in weights_of(model, ids, options.layer))
    pieces = pieces_of(ids[0].tolist(), tokenizer)
    panels = {
        f"softmax: all {(softmax > 0).sum()} tokens have weight": softmax,
        f"α-entmax: {(entmax > 0).sum()} have weight, the others exactly 0": entmax,
    }
    looking = pieces[options.token].strip()
    title = f"What {looking!r} looks at: one head's scores, made weights in two ways (the text is taken for {said!r})"
    draw(pieces, panels, title, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
