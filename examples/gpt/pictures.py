"""Pictures of a training run: losses, support over training, where each head looks in a passage, and what is zero."""

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

import numpy
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm, to_rgba
from matplotlib.image import AxesImage
from matplotlib.ticker import LogLocator, NullFormatter

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import style
from support import attention_weights, model_attention, softmax_weights
from train import NOTICEABLE, Checkpoint

COLORS = {"entmax": style.ENTMAX, "softmax": style.SOFTMAX}
PAGE = "Blank: weight exactly zero; grey: the future, not visible"


def _name(kind: str, checkpoint: Checkpoint) -> str:
    return f"α-entmax, α = {checkpoint.config.alpha:g}" if kind == "entmax" else kind


def draw_losses(checkpoint: Checkpoint, path: Path) -> None:
    """Training losses, smoothed, and validation losses of both models."""
    history = checkpoint.history
    with style.picture(path, figsize=(8, 4.5)) as (_, ((panel,),)):
        for kind, losses in history.loss.items():
            label, color = _name(kind, checkpoint), COLORS[kind]
            smooth = _running_mean(losses, max(1, len(losses) // 50))
            panel.plot(range(1, len(smooth) + 1), smooth, color=color, alpha=0.5, label=f"{label}: training")
            measured = history.measured_loss[kind]
            panel.plot(history.measured_steps, measured, color=color, marker="o", label=f"{label}: validation")
        panel.set(title="Loss of the same model with two kinds of attention", xlabel="step", ylabel="nats a byte")
        panel.grid()
        panel.legend()


def draw_support(checkpoint: Checkpoint, path: Path) -> None:
    """How many keys a query weighs over training, one panel a layer: each head thin, their mean thick. Of softmax,
    which weighs all, those that get more than `NOTICEABLE`."""
    history, config = checkpoint.history, checkpoint.config
    curves = {
        "entmax": (history.measured_support, f"{_name('entmax', checkpoint)}: keys with weight"),
        "softmax": (history.measured_noticeable, f"softmax: keys with weight above {NOTICEABLE:g}"),
    }
    columns = min(4, config.layers)
    rows = -(-config.layers // columns)
    size = (1 + 2.6 * columns, 1.1 + 2.3 * rows)
    with style.picture(path, rows, columns, figsize=size, sharex=True, sharey=True) as (figure, axes):
        for panel in axes.flat[config.layers :]:
            panel.axis("off")
        for layer, panel in enumerate(axes.flat[: config.layers]):
            for kind, (measured, label) in curves.items():
                if measured:  # a checkpoint of before softmax was counted has none of it
                    keys = torch.stack(measured)[:, layer]
                    panel.plot(history.measured_steps, keys, color=COLORS[kind], alpha=0.45, linewidth=0.8)
                    panel.plot(history.measured_steps, keys.mean(1), color=COLORS[kind], linewidth=2.2, label=label)
            panel.axhline((config.context + 1) / 2, color=style.INK, linestyle=":", label="every visible key")
            panel.set(title=f"layer {layer + 1}", yscale="log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.grid()
        for panel in axes[:, 0]:
            panel.set_ylabel("keys, mean over queries")
        for panel in axes[-1]:
            panel.set_xlabel("step")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def draw_heads(checkpoint: Checkpoint, passage: bytes, path: Path, layer: int = -1) -> None:
    """Where each head of a layer looks in a passage: the model with softmax above, the one with α-entmax below."""
    config = checkpoint.config
    passage, tokens = _tokens(checkpoint, passage)
    size = (2.5 * config.heads + 1, 5.9)
    with style.picture(path, 2, config.heads, figsize=size, sharex=True, sharey=True) as (figure, axes):
        for row, kind in zip(axes, ("softmax", "entmax"), strict=True):
            weights = model_attention(checkpoint.models[kind], tokens)[layer][0]
            for head, (panel, seen) in enumerate(zip(row, weights, strict=True), 1):
                image = _weights(panel, seen, COLORS[kind])
                least, what = (0, "keys") if kind == "entmax" else (NOTICEABLE, f"above {NOTICEABLE:g}")
                panel.set_title(f"head {head}: {(seen > least).sum(-1).float().mean():.1f} {what}")
                panel.set(xticks=[], yticks=[])
            row[0].set_ylabel(f"{_name(kind, checkpoint)}\nbytes that look")
            figure.colorbar(image, ax=row, label="weight", extend="min", aspect=25)
        for panel in axes[-1]:
            panel.set_xlabel("bytes looked at")
        figure.suptitle(
            f"Heads of layer {range(1, config.layers + 1)[layer]} of {config.layers} of two models, on the same "
            f"{len(passage)} bytes. {PAGE}"
        )


def draw_attention(checkpoint: Checkpoint, passage: bytes, path: Path) -> None:
    """What each head of each layer looks at in a passage (some 64 bytes are legible). Zeros are left blank."""
    config = checkpoint.config
    passage, tokens = _tokens(checkpoint, passage)
    weights = model_attention(checkpoint.models["entmax"], tokens)
    size = (4 * config.heads + 1, 4 * config.layers + 1)
    with style.picture(path, config.layers, config.heads, figsize=size) as (figure, axes):
        for layer, row in enumerate(axes):
            for head, panel in enumerate(row):
                seen = weights[layer][0, head]
                image = _weights(panel, seen, style.ENTMAX)
                _letters(panel, passage, size=4.5)
                keys = (seen > 0).sum(-1).float().mean()
                panel.set_title(f"layer {layer + 1}, head {head + 1}: {keys:.1f} keys a byte")
        figure.supxlabel("bytes that are looked at")
        figure.supylabel("bytes that look")
        figure.suptitle(f"{_name('entmax', checkpoint)}, on {len(passage)} bytes of held-out text. {PAGE}")
        figure.colorbar(image, ax=axes, label="attention weight", shrink=0.4, aspect=40, extend="min")


@torch.no_grad()
def draw_zeros(checkpoint: Checkpoint, passage: bytes, path: Path, layer: int = -1, head: int = -1) -> None:
    """One head's scores of a passage through softmax and through α-entmax; the last layer's last head if not told."""
    model, config = checkpoint.models["entmax"], checkpoint.config
    passage, tokens = _tokens(checkpoint, passage)
    projected: list[tuple[torch.Tensor, ...]] = []
    hook = model.blocks[layer].attention.register_forward_pre_hook(
        lambda module, inputs: projected.append(module.project(*inputs))
    )
    model(tokens)
    hook.remove()
    query, key, value = (x[:, [head]] for x in projected[0])
    entmax = attention_weights(query, key, value, config.alpha)[0, 0]
    mean = (entmax > 0).sum(-1).float().mean().item()
    panels = {
        "softmax: every byte so far has weight": (softmax_weights(query, key)[0, 0], style.SOFTMAX),
        f"α-entmax, α = {config.alpha:g}: {mean:.1f} on average, the others exactly 0": (entmax, style.ENTMAX),
    }
    with style.picture(path, 1, 2, figsize=(11, 6.5)) as (figure, axes):
        for panel, (title, (weights, color)) in zip(axes[0], panels.items(), strict=True):
            image = _weights(panel, weights, color)
            _letters(panel, passage, size=6.5)
            panel.set_title(title)
            bar = dict(location="bottom", shrink=0.6, aspect=40, pad=0.02, extend="min")
            figure.colorbar(image, ax=panel, label="attention weight", **bar)
        axes[0, 0].set_ylabel("bytes that look")
        figure.suptitle(f"One trained head's scores, made weights in two ways. {PAGE}")


NAMES = ("loss", "support", "heads", "attention", "zeros")


def draw_all(
    checkpoint: Checkpoint,
    passage: bytes,
    folder: Path,
    *,
    names: Collection[str] = NAMES,
    layer: int = -1,
    head: int = -1,
) -> list[Path]:
    """Pictures as PNG files in the folder; returns their paths. Layer and head are those of `draw_heads` and
    `draw_zeros`."""
    drawings = {
        "loss": lambda path: draw_losses(checkpoint, path),
        "support": lambda path: draw_support(checkpoint, path),
        "heads": lambda path: draw_heads(checkpoint, passage, path, layer),
        "attention": lambda path: draw_attention(checkpoint, passage, path),
        "zeros": lambda path: draw_zeros(checkpoint, passage, path, layer, head),
    }
    paths = {name: folder / f"{name}.png" for name in names}
    for name, path in paths.items():
        drawings[name](path)
    return list(paths.values())


def _tokens(checkpoint: Checkpoint, passage: bytes) -> tuple[bytes, torch.Tensor]:
    """What of a passage fits the context, and the same as tokens (1, N) where the models are."""
    passage = passage[: checkpoint.config.context]
    return passage, torch.tensor([list(passage)], device=next(checkpoint.models["entmax"].parameters()).device)


def _running_mean(values: list[float], width: int) -> list[float]:
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _weights(panel: Axes, weights: torch.Tensor, color: str) -> AxesImage:
    """Weights (N, N) of a passage. Zeros are left blank, the future is grey."""
    seen = weights.float().cpu().numpy()
    future = numpy.ma.masked_equal(numpy.triu(numpy.ones_like(seen), 1), 0)
    panel.imshow(future, cmap=ListedColormap([to_rgba(style.INK, style.FAINT)]))
    return panel.imshow(numpy.ma.masked_equal(seen, 0), cmap=style.shades(color), norm=LogNorm(1e-3, 1))


def _letters(panel: Axes, passage: bytes, size: float) -> None:
    """The passage along both sides."""
    letters = [_visible(byte) for byte in passage]
    panel.set_xticks(range(len(passage)), letters, fontsize=size, family="monospace")
    panel.set_yticks(range(len(passage)), letters, fontsize=size, family="monospace")
    panel.tick_params(length=0, pad=1)


def _visible(byte: int) -> str:
    if byte == 10:
        return "↵"
    if byte == 32:
        return "␣"
    return chr(byte) if 33 <= byte < 127 else "·"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="what train.py wrote")
    parser.add_argument("passage", type=Path, help="a text file; the beginning of it is shown under attention")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder to write to (default: %(default)s)")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}"
    )
    parser.add_argument("--layer", type=int, default=0, help="of heads and zeros, from 1 (default: the last)")
    parser.add_argument("--head", type=int, default=0, help="of zeros, from 1 (default: the last)")
    options = parser.parse_args(arguments)
    checkpoint, passage = Checkpoint.load(options.checkpoint), options.passage.read_bytes()
    which = dict(names=options.only, layer=options.layer - 1, head=options.head - 1)
    for path in draw_all(checkpoint, passage, options.out, **which):
        print(path)


if __name__ == "__main__":
    main()
