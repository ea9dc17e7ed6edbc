"""The site, built by `make docs`. Its source folder is the repository's root, so that a link between two files is the
same in the repository and on the site; docs/index.md has the order of the pages."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "site"), str(HERE.parent)]

import adasplash  # noqa: E402  (the reference is made of its docstrings)

project = "torch-adasplash"
version = release = adasplash.__version__
copyright = "the authors of torch-adasplash, BSD-3-Clause"
html_title = f"torch-adasplash {version}"

root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/README.md",
    "bench/README.md",
    "bench/results/*.md",
]
exclude_patterns = ["build", "dist", ".*", "**/__pycache__"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "cpp_header",
    "mathml",
    "repository_files",
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub makes them, so that links to sections work in both places

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
cpp_maximum_signature_line_length = 88
napoleon_use_rtype = False
napoleon_use_param = False  # arguments with one text stay in one line
# `name` in a docstring is a name of this package if it is one, and else a word of code.
default_role = "py:obj"

# What other projects document. Their inventories would have to be fetched, and the site is built without a network.
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:class", r"collections\..*"),
    ("py:.*", r"(torch|transformers|nn|accelerate)\..*"),
    ("py:.*", r"(Tensor|Module|Config|Trainer|DeviceMesh|ProcessGroup|Cache|StaticCache|optional|callable|.*Callback)"),
    ("cpp:.*", r"(adasplash|int64_t|(at|c10|std)(::.*)?)"),
]

html_theme = "furo"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_extra_path = ["site/index.html"]  # the first page is docs/index.html
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"
pygments_style = "default"
pygments_dark_style = "github-dark"

linkcheck_ignore = ["repository:.*"]  # files, which the build itself has looked for
linkcheck_timeout = 15


def fill_the_navigation(app, docname, source) -> None:
    """The notes are listed by a table of their own."""
    if docname == "docs/notes/README":
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n2*\n```\n"


def link_pages(app, what, name, found, options, lines) -> None:
    """Docstrings name pages by their file."""
    lines[:] = [re.sub(r"docs/([\w/-]+)\.md", r":doc:`/docs/\1`", line) for line in lines]


def hide_private_arguments(app, what, name, found, options, signature, result) -> tuple[str | None, str | None]:
    return signature and re.sub(r",? _\w+(:[^,)]*)?", "", signature), result


def setup(app) -> None:
    app.connect("autodoc-process-signature", hide_private_arguments)
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("source-read", fill_the_navigation)
