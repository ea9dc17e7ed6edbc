"""`.. cpp-header:: FILE`: the functions and types of a C++ header, each with the comment above it.

A header is read as this project writes them: `//` comments in plain text, directly above what they are about, where
indented lines are shapes or a list of names; declarations end with a semicolon. What follows another declaration
without a comment shares the one before."""

import re
from collections.abc import Iterator
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

FUNCTION = re.compile(r"^(.+?) (\w+\()")  # its type, its name
SHAPES = re.compile(r" {3,}")  # what stands between several on one line
LISTED = re.compile(r"  (\S+(?: \S+)*)  +(\S.*)")  # a name, two spaces or more, what it is


def read(text: str) -> Iterator[tuple[list[str], list[str]]]:
    """Pairs of a comment's lines and the declarations under it."""
    comment, declarations, open_declaration = [], [], ""
    for line in text.partition("namespace adasplash {")[2].partition("}  // namespace adasplash")[0].splitlines():
        if line.startswith("//") and not open_declaration:
            if declarations:
                yield comment, declarations
                comment, declarations = [], []
            comment.append(line[2:].removeprefix(" "))
        elif line.strip():
            open_declaration += " " + line.strip()
            if line.rstrip().endswith(";"):
                declarations.append(open_declaration.strip(" ;").removeprefix("ADASPLASH_API "))
                open_declaration = ""
        elif not declarations:
            comment = []  # about a section, or the file
    if declarations:
        yield comment, declarations


def paragraphs(comment: list[str]) -> Iterator[list[str]]:
    """The comment's lines, by paragraphs; indented lines are paragraphs of their own."""
    found: list[str] = []
    for line in comment:
        if found and (not line or line.startswith("  ") != found[0].startswith("  ")):
            yield found
            found = []
        if line:
            found.append(line)
    if found:
        yield found


def listed(lines: list[str]) -> nodes.definition_list:
    found: list[tuple[str, str]] = []
    for line in lines:
        item = LISTED.fullmatch(line)
        if item:
            found.append((item[1], item[2]))
        else:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    result = nodes.definition_list()
    for name, what in found:
        term = nodes.term("", "", nodes.literal("", name))
        result += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph("", what)))
    return result


def nodes_of(comment: list[str]) -> list[nodes.Node]:
    result: list[nodes.Node] = []
    for lines in paragraphs(comment):
        if not lines[0].startswith("  "):
            result.append(nodes.paragraph("", " ".join(lines)))
        elif LISTED.fullmatch(lines[0]) and any(line.startswith(" " * 10) for line in lines):
            result.append(listed(lines))
        else:
            result.append(nodes.literal_block("", "\n".join(SHAPES.split(" ".join(lines).strip())), language="text"))
    return result


class CppHeader(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        file = Path(self.env.srcdir) / self.arguments[0]
        self.env.note_dependency(str(file))
        result: list[nodes.Node] = []
        for comment, declarations in read(file.read_text()):
            types = [one.replace("using ", "adasplash::") for one in declarations if one.startswith("using ")]
            functions = [FUNCTION.sub(r"\1 adasplash::\2", one) for one in declarations if not one.startswith("using ")]
            if types:
                result += self.described("type", types, [])
            result += self.described("function", functions, nodes_of(comment))
        return result

    def described(self, kind: str, declarations: list[str], about: list[nodes.Node]) -> list[nodes.Node]:
        """Sphinx's own description of declarations that share a text."""
        begin = f".. cpp:{kind}:: "
        lines = [(" " * len(begin) if number else begin) + one for number, one in enumerate(declarations)]
        holder = nodes.Element()
        self.state.nested_parse(StringList([*lines, ""], source=self.arguments[0]), 0, holder)
        content = next(iter(holder.findall(addnodes.desc_content)))
        content += about
        return holder.children


def setup(app) -> dict:
    app.add_directive("cpp-header", CppHeader)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
