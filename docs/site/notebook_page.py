"""A notebook as a page: its text, its code, and what the cells printed and drew."""

import json
from collections.abc import Callable
from html import escape

from markdown_it import MarkdownIt


def html_of(text: str, highlight: Callable[[str, str], str], address: Callable[[str], str | None]) -> str:
    """HTML of a notebook; `address` gives a link's place on the site, or None if it has none there."""
    return "\n".join(
        markdown("".join(cell["source"]), address)
        if cell["cell_type"] == "markdown"
        else highlight("".join(cell["source"]), "python") + outputs(cell, highlight)
        for cell in json.loads(text)["cells"]
    )


def markdown(text: str, address: Callable[[str], str | None]) -> str:
    reader = MarkdownIt("commonmark").enable("table")
    tokens = reader.parse(text)
    for token in tokens:
        for part in token.children or ():
            if part.type == "link_open":
                place = address(str(part.attrs["href"]))
                part.attrs = {"href": place} if place else {}
    return reader.renderer.render(tokens, reader.options, {})


def outputs(cell: dict, highlight: Callable[[str, str], str]) -> str:
    found, printed = [], ""
    for output in [*cell["outputs"], {}]:
        if output.get("output_type") == "stream":
            printed += "".join(output["text"])
            continue
        if printed:
            found.append(highlight(printed, "text"))
            printed = ""
        if picture := output.get("data", {}).get("image/png"):
            alternative = escape("".join(output["data"].get("text/plain", "")))
            found.append(f'<p><img alt="{alternative}" src="data:image/png;base64,{"".join(picture).strip()}"></p>')
    return "\n".join(found)
