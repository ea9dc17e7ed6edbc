"""Links from the pages to files and folders of the repository that are no pages: the site shows these too, so that it
needs no address on the web."""

import posixpath
from collections.abc import Iterator
from functools import partial
from html import escape
from pathlib import Path

import notebook_page
from docutils import nodes
from pygments.lexers import find_lexer_class_for_filename
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

SCHEME = "repository:"
SHOWN = "files/"  # the site's folder for them


def is_text(file: Path) -> bool:
    try:
        file.read_text()
    except UnicodeDecodeError:
        return False
    return True


def is_link(node: nodes.Node) -> bool:
    """Whether MyST took it for a download, or for a page that is missing."""
    kinds = (addnodes.download_reference, addnodes.pending_xref)
    return isinstance(node, kinds) and not node.get("refdomain") and bool(node.get("reftarget"))


class RepositoryLinks(SphinxTransform):
    default_priority = 100

    def apply(self, **_options) -> None:
        root = Path(self.env.srcdir).resolve()
        shown = self.env.metadata[self.env.docname].setdefault("repository_files", set())
        for node in [*self.document.findall(is_link)]:
            path = (root / self.env.docname).parent / node["reftarget"].partition("#")[0]
            path = path.resolve()
            if root in path.parents and (path.is_dir() or (path.is_file() and is_text(path))):
                name = path.relative_to(root).as_posix()
                shown.add(name)
                children = node.children if node.astext() else [nodes.Text(name)]
                node.replace_self(nodes.reference("", "", *children, internal=True, refuri=SCHEME + name))


def resolve(app, doctree, docname) -> None:
    if app.builder.format == "html":
        for node in doctree.findall(nodes.reference):
            if node.get("refuri", "").startswith(SCHEME):
                page = SHOWN + node["refuri"].removeprefix(SCHEME)
                node["refuri"] = app.builder.get_relative_uri(docname, page)


def pages(app) -> Iterator[tuple[str, dict, str]]:
    root = Path(app.srcdir)
    linked = set().union(*(data.get("repository_files", ()) for data in app.env.metadata.values()))
    folders = {name for name in linked if (root / name).is_dir()}
    files = linked - folders
    for folder in folders:
        files |= {path.relative_to(root).as_posix() for path in entries(root / folder) if path.is_file()}
    for name in sorted(folders):
        yield SHOWN + name, {"title": name, "body": listing(app, root, name, folders | files)}, "page.html"
    for name in sorted(files):
        text = (root / name).read_text()
        if name.endswith(".ipynb"):
            body = notebook_page.html_of(text, partial(highlighted, app), partial(place_of, app, name, folders | files))
        else:
            body = f"<h1>{escape(name)}</h1>\n{highlighted(app, text, language(name))}"
        yield SHOWN + name, {"title": name, "body": body}, "page.html"


def highlighted(app, text: str, language: str) -> str:
    return app.builder.highlighter.highlight_block(text, language, force=True)


def place_of(app, name: str, shown: set[str], link: str) -> str | None:
    """Where a link of the file `name` leads on the site: to a page, to a file or folder that it shows, or out of it."""
    if "://" in link:
        return link
    path, mark, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path))
    page = target.removesuffix(".md")
    if page in app.env.found_docs:
        return app.builder.get_relative_uri(SHOWN + name, page) + mark + anchor
    return app.builder.get_relative_uri(SHOWN + name, SHOWN + target) if target in shown else None


def entries(folder: Path) -> list[Path]:
    """What a folder shows: no build outputs, nothing hidden."""
    found = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__pycache__"))]
    return [path for path in found if path.is_dir() or is_text(path)]


def listing(app, root: Path, name: str, shown: set[str]) -> str:
    lines = []
    for path in entries(root / name):
        entry = path.relative_to(root).as_posix()
        text = f"<code>{escape(path.name)}{'/' if path.is_dir() else ''}</code>"
        if entry in shown:
            address = app.builder.get_relative_uri(SHOWN + name, SHOWN + entry)
            text = f'<a class="reference internal" href="{address}">{text}</a>'
        lines.append(f"<li>{text}</li>")
    return f"<h1>{escape(name)}/</h1>\n<ul>\n" + "\n".join(lines) + "\n</ul>"


def language(name: str) -> str:
    found = find_lexer_class_for_filename(name)
    return found.aliases[0] if found and found.aliases else "text"


def setup(app) -> dict:
    app.add_transform(RepositoryLinks)
    app.connect("doctree-resolved", resolve)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
