"""Draws the α that each head learned, from the results that compare.py wrote."""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from plot import EXPERIMENT, TITLES, of_last_settings
from shared import style
from shared.results import FOLDER, Result, read

HEIGHTS = 0.16  # between two heads of a layer


def draw(results: list[Result], path: Path) -> None:
    """A panel for each task; in each layer a row for each head, with a dot for each seed."""
    learned: dict[str, list[Result]] = {}
    for result in of_last_settings(results):
        if result.attention == "learned":
            learned.setdefault(result.setting["task"], []).append(result)
    size = (max(7, 1 + 3.2 * len(learned)), 3.2)
    with style.picture(path, 1, len(learned), figsize=size, sharex=True, sharey=True) as (figure, (panels,)):
        for panel, (task, models) in zip(panels, learned.items(), strict=True):
            for model in models:
                for layer, alphas in enumerate(model.metrics["alpha"]):
                    heights = [layer + HEIGHTS * (head - (len(alphas) - 1) / 2) for head in range(len(alphas))]
                    panel.plot(alphas, heights, "o", color=style.LEARNED, markersize=6, alpha=0.7, markeredgewidth=0)
            layers = len(models[0].metrics["alpha"])
            panel.axvline(1.5, color=style.INK, linestyle=":", linewidth=1)
            panel.set_yticks(range(layers), [f"heads of\nlayer {layer + 1}" for layer in range(layers)])
            panel.set(title=TITLES.get(task, task), xlim=(0.98, 2.02), ylim=(layers - 0.5, -0.5))
            panel.grid(axis="x")
        label = "α at the end of training (it began at 1.5, dotted; 1 is softmax, 2 is sparsemax)"
        figure.supxlabel(label, fontsize=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="whose results: cpu or cuda (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=FOLDER, help="their folder (default: examples/results)")
    picture = Path("build") / f"{EXPERIMENT}_alphas.png"
    parser.add_argument("--out", type=Path, default=picture, help="picture to write (default: %(default)s)")
    options = parser.parse_args()
    results = read(EXPERIMENT, options.device, options.results)
    if not any(result.attention == "learned" for result in results):
        sys.exit(f"no results with a learned α for {options.device} in {options.results}; compare.py makes them")
    draw(results, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
