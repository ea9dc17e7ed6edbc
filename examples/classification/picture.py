"""What one head of a trained classifier looks at in a text: its scores through softmax, and through α-entmax."""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.patches import Rectangle
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adasplash.integrations.transformers import configure, record
from classifiers import load
from shared import style

_COLUMNS = 84  # letters a line


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


def draw(pieces: list[str], panels: dict[str, tuple[Tensor, str]], title: str, path: Path) -> None:
    """A text in each panel, given by its heading, with the weight (N,) of each token as the height of a bar under it,
    in the panel's colour. Where the weight is exactly zero a token is grey."""
    places, column, line = [], 0, 0
    for piece in pieces:
        if column + len(piece) > _COLUMNS:
            column, line = len(piece.lstrip()) - len(piece), line + 1  # no line begins with a space
        places.append((column, line))
        column += len(piece)
    size = (9, 0.5 + len(panels) * (0.5 + 0.32 * (line + 1)))
    with style.picture(path, len(panels), 1, figsize=size) as (figure, axes):
        for panel, (heading, (weights, colour)) in zip(axes[:, 0], panels.items(), strict=True):
            panel.set(xlim=(0, _COLUMNS), ylim=(line + 1, 0), xticks=[], yticks=[])
            panel.set_title(heading)
            panel.spines[:].set_visible(False)
            shares = (weights / weights.max()).tolist()
            for piece, (left, top), share in zip(pieces, places, shares, strict=True):
                if share > 0:
                    begin = left + (len(piece) - len(piece.lstrip()))  # a bar under letters only
                    height = 0.04 + 0.3 * share
                    width = max(1, left + len(piece) - begin)
                    panel.add_patch(Rectangle((begin, top + 0.62), width, height, color=colour, linewidth=0))
                ink = dict(color=colour) if share > 0 else dict(color=style.INK, alpha=0.75)
                for place, letter in enumerate(piece):  # a cell each, so that letters stand on their bar in any font
                    panel.text(
                        left + place + 0.5, top + 0.55, letter, family="monospace", fontsize=11,
                        ha="center", va="baseline", parse_math=False, **ink,
                    )  # fmt: skip
        figure.suptitle(title)


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
        f"softmax: all {(softmax > 0).sum()} tokens have weight": (softmax, style.SOFTMAX),
        f"α-entmax: {(entmax > 0).sum()} have weight, the others exactly 0": (entmax, style.ENTMAX),
    }
    looking = pieces[options.token].strip()
    title = f"One head's weights of what {looking!r} looks at, from the same scores (taken for {said!r})"
    draw(pieces, panels, title, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
