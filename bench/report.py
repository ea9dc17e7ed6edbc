"""Tables and plots from result files.

    python -m bench.report                  the newest results of the goals on this project's CPUs: all tables, printed
    python -m bench.report FILE …           those of the given files together (of one device)
    python -m bench.report --write          rewrites the block of docs/benchmarks.md, the plot, the page of all numbers
    python -m bench.report --models         what models give a GPU and which goals were reached: the newest results of
                                            the preset gpu-models and of bench.training_step, or those of FILE …;
                                            with --write a block of docs/benchmarks.md

The block lies in docs/benchmarks.md between the lines <!-- bench:cpu --> and <!-- /bench:cpu --> (or cuda), and shows
what bench/lib/blocks.py picks. Page and plot are bench/results/cpu.md and cpu.png; solver tables (`bench.solver`) are
added to the page where there are any.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import solver
from bench.lib import blocks, plots, results, tables
from bench.lib.results import FOLDER, Row

ROOT = FOLDER.parent.parent
BENCHMARKS = ROOT / "docs/benchmarks.md"


def page(rows: Sequence[Row]) -> str:
    """Everything the rows say, as a Markdown page."""
    device = rows[0]["device"]
    softmax, name = ("sdpa", "") if device == "cpu" else ("sdpa-flash", ", its flash backend: FlashAttention-2")
    beside = (
        f"Time as a share of that of softmax (torch `scaled_dot_product_attention`{name}), forward / "
        "forward + backward. Goals are those of the first column; bold: goal missed."
    )
    sections = {
        "Beside softmax": f"{beside}\n\n{tables.summary(rows, softmax)}",
        "Goals": tables.goals(rows),
        "Growth": tables.growth(rows),
        "Times": tables.times(rows),
    }
    base = tables.base_case(rows).title.split(", ", 1)[1]
    notes = (
        f"{tables.heading(rows)} Unless a line says otherwise: {base}. Medians; ratios are ours / theirs, medians of "
        "pairs that ran one after the other, with quartiles. Peak memory is that of a training step beyond inputs, "
        "output and gradients; ratios of it are with them.\n\n"
        "Inputs: σ = 1.5 stands for entries of query and key from N(0, 1.5²); structured 50% empty for keys in topics, "
        "such that half of the visible 64×64 tiles have no weight ([how](../README.md#inputs)); trained and "
        "captured for what trained models compute."
    )
    body = "\n\n".join(f"## {title}\n\n{table}" for title, table in sections.items() if table)
    return f"# Measured on a {'CPU' if device == 'cpu' else 'GPU'}\n\n{notes}\n\n{body}\n"


def solver_page() -> str:
    """The newest tables of `bench.solver`, empty if there are none."""
    file = results.latest("cpu", "solver")
    return f"\n## Threshold solvers\n\n{solver.page(results.read([file]))}\n" if file else ""


def replace_block(text: str, name: str, new: str) -> str:
    """text with what stands between the markers of `name` replaced; ValueError if it has no such markers."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"no lines {begin} and {end}")
    return f"{before}{begin}\n{new}\n{end}{after}"


def models_files() -> list[Path]:
    """The newest of the preset, and with it of `bench.training_step`."""
    first = results.latest("cuda", blocks.MODELS)
    step = results.latest("cuda", results.TRAINING_STEP_PRESET)
    return [file for file in (first, step) if file] if first else []


def models(files: Sequence[Path]) -> str:
    """The block of what models give a GPU. Without files it says that none of it was measured."""
    if not files:
        return f"Nothing was measured yet. On a GPU: `python -m bench.attention --preset {blocks.MODELS}`."
    return blocks.block(results.read(files), f"../bench/results/{files[0].name}", blocks.MODELS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="result files (default: the newest with the goals)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose newest (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks.md's block, the plot and the page")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write all plots there")
    parser.add_argument("--models", action="store_true", help="what models give a GPU, instead of all this")
    options = parser.parse_args(arguments)
    if options.models:
        text = models(options.files or models_files())
        if options.write:
            BENCHMARKS.write_text(replace_block(BENCHMARKS.read_text(), f"bench:{blocks.MODELS}", text))
        return print(f"Written: the block of {BENCHMARKS}" if options.write else text)
    files = options.files or [file for file in [results.latest(options.device, "targets")] if file]
    rows = results.read(files)
    if not rows:
        sys.exit(f"error: no results of the goals on {options.device} in {FOLDER}; run python -m bench.attention first")
    device = rows[0]["device"]
    if options.plots:
        for name, picture in (("overview", plots.overview), ("empty-tiles", plots.dial)):
            print(plots.save(picture(rows), options.plots / f"{device}-{name}.png"))
    if options.write:
        plot = plots.save(plots.overview(rows), FOLDER / f"{device}.png")
        full = FOLDER / f"{device}.md"
        title, rest = page(rows).split("\n\n", 1)
        picture = f"![Beside the peers]({plot.name})"
        full.write_text(f"{title}\n\n{picture}\n\n{rest}" + (solver_page() if device == "cpu" else ""))
        try:
            block = blocks.block(rows, f"../{full.relative_to(ROOT)}")
            BENCHMARKS.write_text(replace_block(BENCHMARKS.read_text(), f"bench:{device}", block))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {BENCHMARKS.name} was left as it is: {error}")
        print(f"Written: {plot}, {full}, the block of {BENCHMARKS}")
    elif not options.plots:
        print(page(rows))


if __name__ == "__main__":
    main()
