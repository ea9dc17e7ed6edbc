"""Draws what compare.py measured: held-out loss by time and by steps, and how sparse attention became."""

import argparse
import sys
from pathlib import Path

from matplotlib.axes import Axes

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import style
from shared.results import FOLDER, Result, read

EXPERIMENT = Path(__file__).resolve().parent.name
COLORS = {
    "softmax": style.SOFTMAX,
    "softmax, FlashAttention-2": style.SOFTMAX,
    "softmax, cuDNN": style.OTHERS[0],
    "entmax 1.5": style.ENTMAX,
    "softmax to entmax 1.5": style.LEARNED,
}


def draw(results: list[Result], path: Path) -> None:
    """Rows of one setting, a curve each."""
    with style.picture(path, 1, 3, figsize=(13, 4.2)) as (figure, ((by_time, by_step, sparsity),)):
        tiles = sparsity.twinx()
        for result in results:
            metrics, line = result.metrics, dict(color=COLORS.get(result.attention), marker="o")
            label = f"{result.attention}: {metrics['tokens_a_second']:,.0f} tokens/s"
            by_time.plot(metrics["seconds"], metrics["held_out_loss"], label=label, **line)
            label = f"{result.attention}: {metrics['bits_a_byte']:.3f} bits a byte at the end"
            by_step.plot(metrics["steps"], metrics["held_out_loss"], label=label, **line)
            if "support" in metrics:
                _draw_sparsity(sparsity, tiles, result)
        by_time.set(title="loss by time", xlabel="seconds of training", ylabel="held-out loss, nats a token")
        by_step.set(title="loss by steps", xlabel="step", ylabel="held-out loss, nats a token")
        visible = (results[-1].setting["context"] + 1) / 2
        sparsity.axhline(visible, color=style.INK, linestyle=":", label="all visible keys (softmax)")
        tiles.set(ylabel="dashed: share of empty tiles", ylim=(0, 1))
        tiles.spines["right"].set_visible(True)
        sparsity.set(title="what attention looks at", xlabel="step", ylabel="keys with weight", yscale="log")
        for panel in (by_time, by_step, sparsity):
            panel.grid()
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))
        setting = results[-1].setting
        figure.suptitle(f"{results[-1].model}, {setting['context']:,} tokens of {setting['text']}")


def _draw_sparsity(panel: Axes, tiles: Axes, result: Result) -> None:
    """Keys a query of each layer and of all, and on a scale of its own the share of empty tiles."""
    metrics, color = result.metrics, COLORS.get(result.attention)
    steps = metrics["recorded_steps"]
    for layer in metrics["support_of_layers"]:
        panel.plot(steps, layer, color=color, alpha=0.45, linewidth=0.8)
    panel.plot(steps, metrics["support"], color=color, label=f"{result.attention}: keys a query (thin: each layer)")
    tiles.plot(steps, metrics["empty_tiles"], color=color, linestyle="--")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="whose results: cpu or cuda (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=FOLDER, help="their folder (default: examples/results)")
    picture = Path("build") / f"{EXPERIMENT}.png"
    parser.add_argument("--out", type=Path, default=picture, help="picture to write (default: %(default)s)")
    options = parser.parse_args()
    results = read(EXPERIMENT, options.device, options.results)
    if not results:
        sys.exit(f"no results for {options.device} in {options.results}; compare.py makes them")
    last = results[-1]  # beside which only rows of the same setting are drawn
    which = last.model, last.setting, last.seed
    draw([result for result in results if (result.model, result.setting, result.seed) == which], options.out)
    print(options.out)


if __name__ == "__main__":
    main()
