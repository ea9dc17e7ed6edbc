"""Draws accuracy by length, a panel for each task, from the results that compare.py wrote; or, with --alphas, what α
each head learned."""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes

sys.path.append(str(Path(__file__).resolve().parents[1]))

from shared import style
from shared.results import FOLDER, Result, read

EXPERIMENT = Path(__file__).resolve().parent.name
COLORS = {"softmax": style.SOFTMAX, "entmax 1.5": style.ENTMAX, "learned": style.LEARNED}
LABELS = {"softmax": "softmax", "entmax 1.5": "α-entmax, α = 1.5", "learned": "α-entmax, learned α"}
TITLES = {"maximum": "maximum retrieval", "recall": "associative recall", "copying": "copying"}


def draw(results: list[Result], path: Path) -> None:
    """Means over seeds as lines, dashed where scores are scaled by length; bands reach from the worst to the best. Of a
    task that there are several settings of, the last is drawn."""
    curves: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in of_last_settings(results):
        curves[result.setting["task"]][result.attention].append(result)
    size = (max(7, 1 + 3.6 * len(curves)), 3.8)
    with style.picture(path, 1, len(curves), figsize=size, sharey=True) as (figure, (panels,)):
        for panel, (task, kinds) in zip(panels, curves.items(), strict=True):
            for attention, models in kinds.items():
                _draw_curve(panel, attention, models)
            trained = next(iter(kinds.values()))[0].setting["trained_length"]
            panel.axvline(trained, color=style.INK, linestyle=":", linewidth=1)
            panel.set(title=TITLES.get(task, task), xlabel=f"length (trained at {trained})")
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
            panel.grid()
        panels[0].set(ylabel="right answers", ylim=(0, 1.03))
        panels[0].yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        handles = {line.get_label(): line for panel in panels for line in panel.get_lines()[:-1]}  # not the dotted one
        labels = [label for kind in COLORS for label in _labels_of(kind) if label in handles]
        columns = -(-len(labels) // 2)  # with and without scaling one above the other
        figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=columns)


def of_last_settings(results: list[Result]) -> list[Result]:
    """Those of each task's last model and setting."""
    last = {result.setting["task"]: (result.model, result.setting) for result in results}
    return [result for result in results if (result.model, result.setting) == last[result.setting["task"]]]


def _labels_of(kind: str) -> tuple[str, str]:
    """Without and with scaling."""
    label = LABELS[kind]
    return label, f"{label}, scores scaled by length"


def _draw_curve(panel: Axes, attention: str, models: list[Result]) -> None:
    kind, _, scaled = attention.partition(", ")
    label = _labels_of(kind)[bool(scaled)]
    lengths = models[0].metrics["length"]
    shares = list(zip(*(model.metrics["accuracy"] for model in models), strict=True))  # by length
    means = [sum(each) / len(each) for each in shares]
    style = dict(color=COLORS[kind], linestyle="--" if scaled else "-", marker="o")
    (line,) = panel.plot(lengths, means, label=label, **style)
    lowest, highest = [min(each) for each in shares], [max(each) for each in shares]
    panel.fill_between(lengths, lowest, highest, color=line.get_color(), alpha=0.15, linewidth=0)


def draw_alphas(results: list[Result], path: Path) -> None:
    """The α at the end of training of models that learn it, without scaled scores: a panel for each task, and in each
    layer a row for each head, with a dot for each seed."""
    learned: dict[str, list[Result]] = defaultdict(list)
    for result in of_last_settings(results):
        if result.attention == "learned":
            learned[result.setting["task"]].append(result)
    size = (max(7, 1 + 3.2 * len(learned)), 3.2)
    with style.picture(path, 1, len(learned), figsize=size, sharex=True, sharey=True) as (figure, (panels,)):
        for panel, (task, models) in zip(panels, learned.items(), strict=True):
            for model in models:
                for layer, alphas in enumerate(model.metrics["alpha"]):
                    heights = [layer + 0.16 * (head - (len(alphas) - 1) / 2) for head in range(len(alphas))]
                    dots = dict(color=COLORS["learned"], markersize=6, markeredgewidth=0, alpha=0.7)
                    panel.plot(alphas, heights, "o", **dots)
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
    parser.add_argument("--attentions", nargs="+", metavar="NAME", help="kinds that are drawn (default: all)")
    parser.add_argument("--alphas", action="store_true", help="draw learned α instead")
    parser.add_argument("--results", type=Path, default=FOLDER, help="their folder (default: examples/results)")
    picture = Path("build") / f"{EXPERIMENT}.png"
    parser.add_argument("--out", type=Path, default=picture, help="picture to write (default: %(default)s)")
    options = parser.parse_args()
    results = read(EXPERIMENT, options.device, options.results)
    if options.alphas:
        options.attentions = ["learned"]
    if options.attentions:
        results = [result for result in results if result.attention in options.attentions]
    if not results:
        sys.exit(f"no such results for {options.device} in {options.results}; compare.py makes them")
    (draw_alphas if options.alphas else draw)(results, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
