"""Pictures of a training run: losses, support over training, where each head looks in a passage, and what is zero."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no screen needed

import matplotlib.pyplot as plt
import numpy
import torch
from matplotlib.colors import LogNorm
from matplotlib.image import AxesImage
from matplotlib.ticker import NullFormatter

from support import attention_weights, model_attention
from train import Checkpoint

COLORS = {"entmax": "#0b6e4f", "softmax": "#c8553d"}


def draw_losses(checkpoint: Checkpoint, path: Path) -> None:
    """Training losses, smoothed, and validation losses of both models."""
    history = checkpoint.history
    figure, axes = plt.subplots(figsize=(8, 5))
    for kind, losses in history.loss.items():
        label = f"α-entmax, α = {checkpoint.config.alpha:g}" if kind == "entmax" else "softmax"
        smooth = _running_mean(losses, max(1, len(losses) // 50))
        axes.plot(range(1, len(smooth) + 1), smooth, color=COLORS[kind], alpha=0.4, label=f"{label}: training")
        axes.plot(
            history.measured_steps,
            history.measured_loss[kind],
            color=COLORS[kind],
            marker="o",
            markersize=3,
            label=f"{label}: validation",
        )
    axes.set(title="Loss of the same model with two kinds of attention", xlabel="step", ylabel="nats per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_support(checkpoint: Checkpoint, path: Path) -> None:
    """Average support of each head over training, one panel a layer."""
    history, config = checkpoint.history, checkpoint.config
    support = torch.stack(list(history.measured_support))  # (measured, layers, heads)
    columns = min(3, config.layers)
    rows = -(-config.layers // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), sharex=True, sharey=True, squeeze=False)
    for layer, panel in enumerate(axes.flat):
        if layer >= config.layers:
            panel.axis("off")
            continue
        for head in range(config.heads):
            panel.plot(history.measured_steps, support[:, layer, head], label=f"head {head + 1}")
        panel.axhline((config.context + 1) / 2, color="black", linestyle=":", label="every visible key (softmax)")
        panel.set(title=f"layer {layer + 1}", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    for panel in axes[:, 0]:
        panel.set_ylabel("keys with weight")
    for panel in axes[-1]:
        panel.set_xlabel("step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=config.heads + 1)
    figure.suptitle(f"Average support of each head over training (context {config.context})")
    _save(figure, path)


def draw_attention(checkpoint: Checkpoint, passage: bytes, path: Path) -> None:
    """What each head of each layer looks at in a passage (some 64 bytes are legible). Zeros are left white."""
    model, config = checkpoint.models["entmax"], checkpoint.config
    length = min(len(passage), config.context)
    passage = passage[:length]
    weights = model_attention(model, torch.tensor([list(passage)], device=next(model.parameters()).device))
    size = (4 * config.heads + 1, 4 * config.layers + 1)
    figure, axes = plt.subplots(config.layers, config.heads, figsize=size, squeeze=False)
    for layer, row in enumerate(axes):
        for head, panel in enumerate(row):
            seen = weights[layer][0, head]
            image = _weights(panel, seen, passage)
            panel.set_title(f"layer {layer + 1}, head {head + 1}: {(seen > 0).sum(-1).float().mean():.1f} keys a byte")
    figure.supxlabel("bytes that are looked at")
    figure.supylabel("bytes that look")
    figure.suptitle(
        f"α-entmax attention (α = {config.alpha:g}) on {length} bytes of held-out text\n"
        "white: weight exactly zero; grey: the future, not visible"
    )
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.4, aspect=40, extend="min")
    _save(figure, path)


@torch.no_grad()
def draw_zeros(checkpoint: Checkpoint, passage: bytes, path: Path, layer: int = -1, head: int = -1) -> None:
    """One head's scores of a passage through softmax and through α-entmax; the last layer's last head if not told."""
    model, config = checkpoint.models["entmax"], checkpoint.config
    passage = passage[: config.context]
    projected: list[tuple[torch.Tensor, ...]] = []
    hook = model.blocks[layer].attention.register_forward_pre_hook(
        lambda module, inputs: projected.append(module.project(*inputs))
    )
    model(torch.tensor([list(passage)], device=next(model.parameters()).device))
    hook.remove()
    query, key, value = (x[:, [head]] for x in projected[0])
    future = torch.ones(len(passage), len(passage), dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(2, 3) / query.size(3) ** 0.5).masked_fill(future, -torch.inf)
    softmax, entmax = scores.softmax(-1), attention_weights(query, key, value, config.alpha)
    mean = (entmax > 0).sum(-1).float().mean().item()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.7))
    image = _weights(axes[0], softmax[0, 0], passage, letter_size=6)
    axes[0].set_title("softmax: every byte so far has weight", fontsize=11)
    axes[0].set_ylabel("bytes that look")
    _weights(axes[1], entmax[0, 0], passage, letter_size=6)
    axes[1].set_title(f"α-entmax, α = {config.alpha:g}: {mean:.1f} on average, the others exactly 0", fontsize=11)
    figure.supxlabel("bytes that are looked at")
    figure.suptitle("One trained head's scores, made weights in two ways (white: exactly zero, grey: the future)")
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8, extend="min")
    _save(figure, path)


def draw_all(checkpoint: Checkpoint, passage: bytes, folder: Path) -> list[Path]:
    """All four pictures, as PNG files in the folder; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("loss.png", "support.png", "attention.png", "zeros.png")]
    draw_losses(checkpoint, paths[0])
    draw_support(checkpoint, paths[1])
    draw_attention(checkpoint, passage, paths[2])
    draw_zeros(checkpoint, passage, paths[3])
    return paths


def _running_mean(values: list[float], width: int) -> list[float]:
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _weights(panel: plt.Axes, weights: torch.Tensor, passage: bytes, letter_size: float = 4.5) -> AxesImage:
    """Weights (N, N) of a passage, with its letters along both sides. Zeros are left white, the future is grey."""
    seen = weights.float().cpu().numpy()
    colors = plt.get_cmap("viridis_r").with_extremes(bad="white")
    image = panel.imshow(numpy.ma.masked_equal(seen, 0), cmap=colors, norm=LogNorm(1e-3, 1))
    future = numpy.ma.masked_equal(numpy.triu(numpy.ones_like(seen), 1), 0)
    panel.imshow(future, cmap="Greys", vmin=0, vmax=7)
    letters = [_visible(byte) for byte in passage]
    panel.set_xticks(range(len(passage)), letters, fontsize=letter_size, family="monospace")
    panel.set_yticks(range(len(passage)), letters, fontsize=letter_size, family="monospace")
    panel.tick_params(length=0, pad=1)
    return image


def _visible(byte: int) -> str:
    if byte == 10:
        return "↵"
    if byte == 32:
        return "␣"
    return chr(byte) if 33 <= byte < 127 else "·"


def _save(figure: plt.Figure, path: Path) -> None:
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="what train.py wrote")
    parser.add_argument("passage", type=Path, help="a text file; the end of it is shown under attention")
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder to write to (default: %(default)s)")
    options = parser.parse_args()
    passage = options.passage.read_bytes()
    for path in draw_all(Checkpoint.load(options.checkpoint), passage, options.out):
        print(path)


if __name__ == "__main__":
    main()
