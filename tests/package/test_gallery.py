"""The pictures of docs/gallery: how large they are, where they are seen, and what makes them."""

import re
import shutil
import subprocess

import pytest

from common import ROOT

pytest.importorskip("matplotlib")

import numpy
from matplotlib import rc_context
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from shared import style

pytestmark = pytest.mark.backends("cpu")

PAGE = ROOT / "docs/gallery/index.md"
PICTURES = [PAGE.parent / path for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", PAGE.read_text())]
PAGES = ("#ffffff", "#131416")  # a light one, and the dark one of the furo theme


def luminance(colour):
    """Relative luminance, as the Web Content Accessibility Guidelines define it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("page", PAGES)
def test_inks_are_seen(page):
    assert contrast(style.INK, page) > 4
    for ink in (style.SOFTMAX, style.ENTMAX, style.LEARNED, *style.OTHERS):
        assert contrast(ink, page) > 3, ink


def test_a_picture_is_written_as_it_was_drawn(tmp_path):
    """A palette holds all colours of one kind of attention, in every opacity, and leaves their edges as they are."""
    figure = Figure(figsize=(2, 2))
    panel = figure.subplots()
    weights = numpy.ma.masked_less(numpy.linspace(-0.2, 1, 4900).reshape(70, 70), 0)
    panel.imshow(weights, cmap=style.shades(style.ENTMAX), interpolation="none")
    style.save(figure, tmp_path / "picture.png")
    with rc_context(style.RC):
        figure.savefig(tmp_path / "drawn.png")
    with Image.open(tmp_path / "picture.png") as written, Image.open(tmp_path / "drawn.png") as drawn:
        assert written.mode == "P"
        pages = [Image.new("RGBA", drawn.size, page) for page in PAGES for _ in range(2)]
        for page, each in zip(pages, (written, drawn) * 2, strict=True):
            page.alpha_composite(each.convert("RGBA"))
    for one, other in (pages[:2], pages[2:]):
        apart = numpy.abs(numpy.asarray(one, dtype=int) - numpy.asarray(other, dtype=int))
        assert apart.max() < 16 and (apart > 0).mean() < 0.05
    assert len(numpy.unique(numpy.asarray(pages[0]))) > 48


def test_pictures_are_small():
    assert len(PICTURES) > 5
    sizes = {picture: picture.stat().st_size for picture in PICTURES}
    assert max(sizes.values()) < 200_000 and sum(sizes.values()) < 1_200_000, sizes


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_pictures_have_no_background(picture):
    """What is opaque in them is of an ink that is seen on both pages, but for edges of letters."""
    with Image.open(picture) as image:
        counted = image.convert("RGBA").getcolors(image.width * image.height)
    total = sum(count for count, _ in counted)
    blank = sum(count for count, (*_, opacity) in counted if opacity == 0)
    assert blank > total / 4
    opaque = [(count, [c / 255 for c in colour]) for count, (*colour, opacity) in counted if opacity > 250]
    seen = sum(count for count, colour in opaque if min(contrast(colour, page) for page in PAGES) > 2.8)
    assert seen > 0.9 * sum(count for count, _ in opaque)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_commands_are_those_of_make():
    """What the page says makes a picture is what `make gallery` runs."""
    planned = subprocess.run(
        ["make", "--dry-run", "gallery", "IMAGES=docs/images"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.replace(".venv/bin/", "")
    planned = re.sub(r"\s*\\\n\s*", " ", planned).splitlines()
    blocks = re.findall(r"```sh\n(.+?)```", PAGE.read_text(), re.DOTALL)
    commands = re.sub(r"\s*\\\n\s*", " ", "".join(blocks)).splitlines()
    examples = [command for command in commands if command.startswith("python examples/")]
    assert len(examples) > 5
    assert not set(examples) - set(planned), planned
