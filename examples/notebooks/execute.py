"""Makes first_look.ipynb from first_look.py, and runs it.

pip install nbclient ipykernel
python examples/notebooks/execute.py
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER / "first_look.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")


def cells_of(source: str) -> list[tuple[str, str]]:
    """The cells of a program in which each begins with a line `# %%`, or `# %% [markdown]` and a comment: what kind
    each is, "code" or "markdown", and its text."""
    cells = []
    for part in source.split("# %%")[1:]:
        first, _, text = part.partition("\n")
        if first.strip() == "[markdown]":
            lines = text.strip().splitlines()
            cells.append(("markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines)))
        else:
            cells.append(("code", text.strip()))
    return cells


def main() -> None:
    import nbclient
    import nbformat

    build = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}
    cells = [build[kind](text, id=f"cell-{place}") for place, (kind, text) in enumerate(cells_of(SOURCE.read_text()))]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbclient.NotebookClient(
        notebook, timeout=1800, resources={"metadata": {"path": str(FOLDER)}}, record_timing=False
    ).execute()
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size // 1000} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
