"""Pictures from rows of result files."""

import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))

from bench.lib import tables
from bench.lib.case import BOTH, FORWARD, Case
from bench.lib.results import PEAK_MEMORY, Row, case_of
from bench.peers import OURS, PEERS
from shared import style

COLOURS = {
    OURS: style.ENTMAX,
    "sdpa": style.SOFTMAX,
    "sdpa-flash": style.SOFTMAX,
    "sdpa-cudnn": style.LEARNED,
    "sdpa-efficient": style.OTHERS[1],
    "pypi-v2": style.OTHERS[0],
    "pypi-v1": style.INK,
}


def colour(peer: str) -> str:
    others = [name for name in PEERS if name not in COLOURS]
    return COLOURS.get(peer) or style.OTHERS[others.index(peer) % len(style.OTHERS)]


def _clean(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major")


def ratios(axes: Axes, rows: Sequence[Row], peer: str) -> None:
    """Bars of ours / peer for the Gaussian inputs of the base case, with the quartiles and, as ticks, the goals."""
    base = tables.base_case(rows)
    found = {
        (row["input"], row["what"]): row
        for row in rows
        if row["peer"] == peer and row["what"] in (FORWARD, BOTH) and row["input"].startswith("gaussian")
        if Case(**{**case_of(row).to_dict(), "input": base.input}) == base
    }
    if not found:
        return
    inputs = sorted({name for name, _ in found}, key=lambda name: -float(name.split(":")[1]))
    for k, (what, shade) in enumerate(((FORWARD, to_rgba(COLOURS[OURS], 0.5)), (BOTH, COLOURS[OURS]))):
        for i, name in enumerate(inputs):
            row = found[name, what]
            place, ratio = i + (k - 0.5) * 0.36, row["ratio"]
            spread = [[ratio - row["ratio_low"]], [row["ratio_high"] - ratio]]
            axes.barh(place, ratio - 1, 0.34, left=1, color=shade, label=what if i == 0 else None)
            axes.errorbar(ratio, place, xerr=spread, color=style.INK, linewidth=0.8, capsize=2)
            side, align = (row["ratio_low"] / 1.06, "right") if ratio < 1 else (row["ratio_high"] * 1.06, "left")
            axes.text(side, place, f"{ratio:.2f}", va="center", ha=align, fontsize=8)
            if row["goal"] is not None:
                label = "goal" if (k, i) == (1, 0) else None
                axes.plot([row["goal"]] * 2, [place - 0.17, place + 0.17], color=style.INK, linewidth=2, label=label)
    axes.axvline(1, color=COLOURS["sdpa"], linewidth=1.2)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low / 1.3, 0.1), max(high * 1.3, 10))
    axes.set_xlabel("← faster        slower →", fontsize=8)
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    labels = [
        f"{tables.input_name(name)}\n{tables.number(found[name, BOTH]['support'])} keys a query" for name in inputs
    ]
    axes.set_yticks(range(len(inputs)), labels)
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)
    size = f"N = {base.length:,}, D = {base.head_dim}, H = {base.heads}, {base.dtype}"
    _clean(axes, f"Time relative to {PEERS[peer].label}\n{size}")


def against_length(axes: Axes, rows: Sequence[Row], what: str, title: str, unit: str, shortest: int = 0) -> None:
    """Medians against the length, for the setting that was run at most lengths, with the fitted exponents."""
    found = tables.series(rows, what)
    if not found:
        axes.set_axis_off()
        return
    setting = max(found, key=lambda key: len(found[key]))[0]
    for (of, peer), points in found.items():
        if of != setting:
            continue
        points = [point for point in points if point[0] >= shortest and point[1] > 0]
        fitted = tables.exponent([point for point in points if point[0] >= 1024])
        label = PEERS[peer].label + ("" if math.isnan(fitted) else f", N^{fitted:.1f}")
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), "o-", color=colour(peer), markersize=3, linewidth=1.5, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}")
    axes.set_xlabel("N", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    _clean(axes, f"{title}\n{tables.input_name(setting.input)}, D = {setting.head_dim}, H = {setting.heads}")


def against_empty_tiles(axes: Axes, rows: Sequence[Row], what: str) -> None:
    """ours / peer against the measured share of empty tiles, for the structured inputs of the base case."""
    base = tables.base_case(rows)
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        same = Case(**{**case_of(row).to_dict(), "input": base.input}) == base
        if same and row["what"] == what and row["ratio"] is not None and row["input"].startswith("structured"):
            lines.setdefault(row["peer"], []).append((100 * row["empty_tiles"], row["ratio"]))
    for peer, points in lines.items():
        points = sorted(points)
        axes.plot(*zip(*points, strict=True), "o-", color=colour(peer), markersize=3, label=PEERS[peer].label)
    axes.axhline(1, color=style.INK, linewidth=0.8)
    axes.set_xlabel("empty tiles, %", fontsize=8)
    axes.set_ylabel("ours / theirs (below 1: faster)", fontsize=8)
    axes.set_ylim(bottom=0)
    if lines:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    _clean(
        axes,
        f"Time relative to others, {what}\nN = {base.length:,}, D = {base.head_dim}, H = {base.heads}, {base.dtype}",
    )


def _sign(figure: Figure, rows: Sequence[Row]) -> None:
    """What was measured where, below the axes; wrapped, as long text would widen the picture."""
    width = int(15 * figure.get_size_inches()[0])
    text = textwrap.fill(tables.heading(rows), width)
    figure.text(0.005, -0.01, text, fontsize=7, color=style.INK, verticalalignment="top")


@rc_context(style.RC)
def overview(rows: Sequence[Row]) -> Figure:
    """A page's picture: on the CPU the ratios by input, and time and memory against N; on a GPU the ratios by empty
    tiles, and time against N."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    if rows[0]["device"] == "cuda":
        against_empty_tiles(axes[0], rows, BOTH)
        against_empty_tiles(axes[1], rows, FORWARD)
        against_length(axes[2], rows, BOTH, "Forward + backward", "ms")
    else:
        ratios(axes[0], rows, "sdpa")
        against_length(axes[1], rows, BOTH, "Forward + backward", "ms")
        against_length(axes[2], rows, PEAK_MEMORY, "Peak memory beyond inputs, outputs, gradients", "MiB", 1024)
    _sign(figure, rows)
    return figure


@rc_context(style.RC)
def dial(rows: Sequence[Row]) -> Figure:
    """Ratios against the share of empty tiles, forward and forward + backward."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    against_empty_tiles(axes[0], rows, FORWARD)
    against_empty_tiles(axes[1], rows, BOTH)
    return figure


def save(figure: Figure, path: Path) -> Path:
    style.save(figure, path, bbox_inches="tight")
    return path
