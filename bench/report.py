"""Tables and plots from result files.

    python -m bench.report                  the newest results of the goals on this project's CPUs: all tables, printed
    python -m bench.report FILE …           those of the given files together (of one device)
    python -m bench.report --readme         rewrites the README's block and its plot, and the page with every number

The block lies in README.md between the lines <!-- bench:cpu --> and <!-- /bench:cpu --> (or cuda); plot and page are
bench/results/cpu.png and cpu.md, solver tables (`bench.solver`) are added to the page where there are any.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import plots, results, solver, tables
from bench.results import FOLDER, Row

ROOT = FOLDER.parent.parent
README = ROOT / "README.md"


def page(rows: Sequence[Row]) -> str:
    """Everything the rows say, as a Markdown page."""
    sections = {"Goals": tables.goals(rows), "Growth": tables.growth(rows), "Times": tables.times(rows)}
    base = tables.base_case(rows).title.split(", ", 1)[1]
    notes = (
        f"{tables.heading(rows)} Unless a line says otherwise: {base}. Medians; ratios are ours / theirs, medians of "
        "pairs that ran one after the other, with quartiles. Peak memory is that of a training step beyond inputs, "
        "output and gradients; ratios of it are with them."
    )
    body = "\n\n".join(f"## {name}\n\n{table}" for name, table in sections.items() if table)
    return f"# Measured\n\n{notes}\n\n{body}\n"


def solver_page() -> str:
    """The newest tables of `bench.solver`, empty if there are none."""
    file = results.latest("cpu", "solver")
    return f"\n## Threshold solvers\n\n{solver.page(results.read([file]))}\n" if file else ""


def block(rows: Sequence[Row], plot: Path, full: Path) -> str:
    """What the README says."""
    device = rows[0]["device"]
    peer = "sdpa" if device == "cpu" else "sdpa-flash"
    base = tables.base_case(rows).title.split(", ", 1)[1]
    goals = "on the right of the goals, 1.2 times them" if device == "cpu" else "goals are for the first column"
    backend = "" if device == "cpu" else ", its flash backend: FlashAttention-2"
    parts = [
        f"![Time{' and memory' if device == 'cpu' else ''} beside the peers]({plot.relative_to(ROOT)})",
        f"Time as a share of that of softmax attention (torch `scaled_dot_product_attention`{backend}), forward / "
        f"forward + backward; {base} unless said otherwise; σ: entries of query and key are from N(0, σ²). Bold: goal "
        f"missed ({goals}). [Every number]({full.relative_to(ROOT)}).",
        tables.summary(rows, peer),
        tables.other_goals(rows, peer),
        tables.heading(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def replace_block(text: str, name: str, new: str) -> str:
    """text with what stands between the markers of `name` replaced; ValueError if it has no such markers."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"no lines {begin} and {end}")
    return f"{before}{begin}\n{new}\n{end}{after}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="result files (default: the newest with the goals)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose newest (default: %(default)s)")
    parser.add_argument("--readme", action="store_true", help="write README.md's block, the plot and the page")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write all plots there")
    options = parser.parse_args(arguments)
    files = options.files or [file for file in [results.latest(options.device, "targets")] if file]
    rows = results.read(files)
    if not rows:
        sys.exit(f"error: no results of the goals on {options.device} in {FOLDER}; run python -m bench.attention first")
    device = rows[0]["device"]
    if options.plots:
        for name, picture in (("overview", plots.overview), ("empty-tiles", plots.dial)):
            print(plots.save(picture(rows), options.plots / f"{device}-{name}.png"))
    if options.readme:
        plot = plots.save(plots.overview(rows), FOLDER / f"{device}.png")
        full = FOLDER / f"{device}.md"
        full.write_text(page(rows) + (solver_page() if device == "cpu" else ""))
        try:
            README.write_text(replace_block(README.read_text(), f"bench:{device}", block(rows, plot, full)))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {README.name} was left as it is: {error}")
        print(f"Written: {plot}, {full}, the block of {README}")
    elif not options.plots:
        print(page(rows))


if __name__ == "__main__":
    main()
