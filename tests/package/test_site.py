"""The pages as a site: links between them lead somewhere, each has its place in the navigation, and the reference has
every public name. Nothing is built: that is `make docs`."""

import importlib
import json
import re
import sys

import pytest

import pages
from common import ROOT
from pages import PAGES, name_of

pytestmark = pytest.mark.backends("cpu")


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_links_lead_somewhere(page):
    for target in pages.links(page):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in pages.anchors(file), f"{name_of(page)} links to {target}, of {sorted(pages.anchors(file))}"


def test_every_page_is_in_the_navigation():
    trees = (block.code for block in pages.blocks(ROOT / "docs/index.md") if block.language == "{toctree}")
    lines = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    entries = [re.sub(r".*<(.*)>", r"\1", line) for line in lines]  # some have a title
    assert len(entries) == len(set(entries))
    places = (f"{entry[1:]}.md" if entry.startswith("/") else f"docs/{entry}.md" for entry in entries)
    listed = {page for place in places for page in ROOT.glob(place)}
    notes = {*(ROOT / "docs/notes").glob("2*.md")}  # docs/conf.py lists these
    assert listed | notes == {*PAGES} - {ROOT / "README.md", ROOT / "docs/index.md"}


def test_every_note_is_in_the_table():
    table = (ROOT / "docs/notes/README.md").read_text()
    assert [note.name for note in (ROOT / "docs/notes").glob("2*.md") if f"({note.name})" not in table] == []


@pytest.mark.parametrize("module", ["adasplash", "adasplash.distributed", "adasplash.integrations.transformers"])
def test_the_reference_has_every_public_name(module):
    if module.endswith("transformers"):
        pytest.importorskip("transformers")
    described = re.findall(
        r"^\.\. (?:auto\w+|data):: (\S+)$", (ROOT / "docs/reference/python.md").read_text(), re.MULTILINE
    )
    assert len(described) == len(set(described))
    names = {name for name in importlib.import_module(module).__all__ if not name.startswith("__")}
    assert {f"{module}.{name}" for name in names} <= set(described)


def test_the_readme_repeats_measured_rows():
    """What stands in its table stands so in docs/benchmarks.md."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "docs/benchmarks.md").read_text().splitlines()
        if line.startswith("|")
    ]
    readme = (ROOT / "README.md").read_text().partition("## How fast")[2].partition("\n## ")[0]
    shown = [line for line in readme.splitlines() if line.startswith("|")][2:]
    assert shown
    for line in shown:
        name, *numbers = (cell.strip() for cell in line.strip("|").split("|"))
        assert numbers in [row[2 : 2 + len(numbers)] for row in rows if row[0] == name], name
    told = " ".join(line for line in readme.splitlines() if not line.startswith("|"))
    measured = "".join((ROOT / "docs" / page).read_text() for page in ("benchmarks.md", "scaling.md"))
    for number in re.findall(r"(?<![\w.])\d+\.\d\d(?![\w.])", told):
        assert number in measured, number


def test_bug_reports_are_asked_what_is_installed():
    assert "python -m adasplash.info" in (ROOT / ".github/ISSUE_TEMPLATE/bug.md").read_text()


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_no_line_is_lost_as_a_comment(page):
    """A line that begins with % is text on GitHub, and a comment on the site."""
    assert [line for line in pages.without_blocks(page).splitlines() if line.startswith("%")] == []


def test_a_notebook_is_shown_as_a_page():
    """Its text, code, what was printed and drawn; a link without a place on the site stays as words."""
    pytest.importorskip("markdown_it")  # comes with what `make docs` needs
    sys.path.insert(0, str(ROOT / "docs/site"))
    import notebook_page

    cells = [
        {"cell_type": "markdown", "source": ["## Zeros\n", "[here](a.md), [there](b.md)"]},
        {
            "cell_type": "code",
            "source": ["print(1 < 2)"],
            "outputs": [
                {"output_type": "stream", "text": ["Tr"]},
                {"output_type": "stream", "text": ["ue\n"]},
                {"output_type": "display_data", "data": {"image/png": "AAAA\n", "text/plain": ["<a figure>"]}},
            ],
        },
    ]
    shown = notebook_page.html_of(
        json.dumps({"cells": cells}), "[{1}:{0}]".format, {"a.md": "a.html", "b.md": None}.__getitem__
    )
    assert "<h2>Zeros</h2>" in shown and '<a href="a.html">here</a>' in shown and 'href="b' not in shown
    assert "[python:print(1 < 2)]" in shown and "[text:True\n]" in shown
    assert '<img alt="&lt;a figure&gt;" src="data:image/png;base64,AAAA">' in shown
