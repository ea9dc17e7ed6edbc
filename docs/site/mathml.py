"""Formulas as MathML, which browsers show by themselves: no script, and nothing that is fetched."""

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def write_inline(writer, node) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def write_block(writer, node) -> None:
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app) -> dict:
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
