"""The project's Markdown: which pages there are, their blocks of code, headings and links.

An HTML comment on the line above a block says how tests treat it:

    <!-- not run: why -->      not at all
    <!-- heavy: why -->        by `make test-all` only
    <!-- torchrun: FILE -->    as that file, in two processes

A block of `text` directly behind one of Python is what that prints.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common import ROOT

PLACES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md", "[!.]*/README.md", "bench/results/*.md")
# No folder that begins with a dot: pytest leaves a README in its own.
PAGES = sorted({page for place in PLACES for page in ROOT.glob(place)})


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the page, where the code begins
    remark: str  # of the comment above: "heavy", "not run", …
    about: str  # … and what it says
    printed: str | None  # what the block prints, where the page says it


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    end = 0
    text = page.read_text()
    for fence in re.finditer(
        r"^(?:<!-- ([\w ]+): ([^\n]*) -->\n)?```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    ):
        remark, about, language, code = fence.groups()
        line = text.count("\n", 0, fence.start(4)) + 1
        if language == "text" and found and found[-1].language == "python" and not text[end : fence.start()].strip():
            found[-1] = found[-1]._replace(printed=code)
        found.append(Block(language, code, line, remark or "", about or "", None))
        end = fence.end()
    return found


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The page without its blocks, and without links that only stand in code within a line."""
    hidden = {ord(x): "_" for x in "[]()<>"}
    return re.sub(r"`[^`\n]*`", lambda code: code[0].translate(hidden), without_blocks(page))


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures."""
    yield from re.findall(r"\]\(([^()\s]+(?:\([^()\s]*\)[^()\s]*)*)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them: in small letters, spaces as hyphens, without punctuation."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", without_blocks(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}
