"""How the project's pictures look. They have no background of their own, and inks that are seen on a light page and on
a dark one: their contrast is above 3 on white and on #131416, that of text above 4."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
from matplotlib import rc_context
from matplotlib.colors import Colormap, ListedColormap, to_rgb
from matplotlib.figure import Figure
from PIL import Image

INK = "#787b80"  # of text, axes, and lines that are not about one of those below
SOFTMAX = "#cf5c36"
ENTMAX = "#108c66"
LEARNED = "#4a7fc1"
OTHERS = ("#b5823a", "#9a6fb0", "#7d8a3c", "#bf5b85", "#2a8fa3", "#97705a", INK)
FAINT = 0.25  # opacity of what is only there to be compared with

#: matplotlib's settings: `rcParams.update(RC)` takes them, for a notebook.
RC = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.dpi": 200,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "image.interpolation": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": FAINT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.titlesize": 12,
    "lines.linewidth": 1.8,
    "lines.markersize": 3,
}


@contextmanager
def picture(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[tuple[Figure, numpy.ndarray]]:
    """A figure and its axes, (rows, columns), which are written to a PNG file once they are drawn.

    Args:
        options: of `Figure.subplots`, and figsize.
    """
    with rc_context(RC):
        figure = Figure(figsize=options.pop("figsize", None), layout="constrained")  # no window, so no pyplot
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        save(figure, path)


@rc_context(RC)
def save(figure: Figure, path: Path, **options: Any) -> None:
    """Writes a figure as a PNG file of few bytes; options are those of `Figure.savefig`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, **options)
    with Image.open(path) as image:
        _with_a_palette(numpy.asarray(image.convert("RGBA"))).save(path, optimize=True)


def _with_a_palette(pixels: numpy.ndarray, most: int = 256) -> Image.Image:
    """Pixels (height, width, 4) by their most frequent colours, the others each by the nearest of these. Pictures have
    some hundreds of colours; Pillow's own palettes have few opacities."""
    packed = numpy.ascontiguousarray(pixels).view(numpy.uint32)  # a number for each, which is sorted faster
    numbers, place, count = numpy.unique(packed, return_inverse=True, return_counts=True)
    colours = numbers.view(numpy.uint8).reshape(-1, 4)
    order = numpy.argsort(-count, kind="stable")
    kept = colours[order[:most]]
    shown = [each[:, :3] * (each[:, 3:] / 255.0) for each in (colours, kept)]  # what hardly covers hardly differs
    shown = [numpy.concatenate([each, alpha[:, 3:]], 1) for each, alpha in zip(shown, (colours, kept), strict=True)]
    nearest = numpy.array([((shown[1] - colour) ** 2).sum(1).argmin() for colour in shown[0]], dtype=numpy.uint8)
    image = Image.fromarray(nearest[place].reshape(pixels.shape[:2]), "P")
    image.putpalette(kept.tobytes(), "RGBA")
    return image


def shades(colour: str) -> Colormap:
    """From nearly nothing to the colour, by opacity: on any page more weight is more colour, and what is masked is the
    page itself."""
    opacities = numpy.linspace(0.1, 1, 48)  # as many as an eye tells apart, and few enough for a palette
    return ListedColormap([(*to_rgb(colour), opacity) for opacity in opacities]).with_extremes(
        bad="none", under=(*to_rgb(colour), 0.1)
    )
