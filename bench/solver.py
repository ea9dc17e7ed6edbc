"""How many steps thresholds need: bisection, Halley–bisection, AdaSplash-2's histogram start, and this library's way.

    python -m bench.solver                  rows of 1k to 131k scores, several α and kinds of scores; about two minutes
    python -m bench.solver --lengths 1024 --alphas 1.5

A *step* is one update of a row's threshold, for which sums over scores are formed. Thresholds after every step are
judged in fp64: they are good once |Σp − 1| ≤ 1e-5, which is what the library promises. The methods are those of
bench/lib/solvers.py, which says what each of them does. The tables say

    steps     median (largest) number of steps until the threshold is good
    passes    scores that were looked at on the way, maximum and start included, as a multiple of the row's length
    growth    exponents of N fitted to the scores looked at (time) and to the largest number of scores or counters that
              a method keeps of a row, beside the row itself (memory)
"""

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bench.lib import machine, results, tables
from bench.lib.solvers import METHODS, Trace, offered

GOOD = 1e-5  # of |Σp − 1|


def draw(kind: str, rows: int, length: int, seed: int) -> NDArray[np.float64]:
    """Rows of scores, (rows, length)."""
    generator = np.random.default_rng([seed, length])
    name, _, setting = kind.partition(":")
    if name == "gaussian":  # the score of q and k from N(0, σ²) has deviation σ²
        return generator.normal(size=(rows, length)) * float(setting) ** 2
    if name == "uniform":
        return generator.uniform(0, float(setting), size=(rows, length))
    if name == "heavy":  # Student's t: a few scores far above all others
        return generator.standard_t(float(setting), size=(rows, length))
    if name == "topics":  # a share of keys that match, the others far below
        match = generator.uniform(size=(rows, length)) < float(setting)
        return 16.0 * match + generator.normal(size=(rows, length)) * 0.75
    raise ValueError(f"scores must be gaussian:σ, uniform:width, heavy:freedom or topics:share, got {kind!r}")


KINDS = ("gaussian:0.05", "gaussian:1", "gaussian:1.5", "gaussian:3", "uniform:1", "heavy:3", "topics:0.1")


def mass_error(z: NDArray[np.float64], alpha: float, gap: np.float32) -> float:
    """|Σp − 1| in fp64; z as a method gets it, but in fp64."""
    return abs(np.power(np.maximum(z - np.float64(gap), 0), 1 / (alpha - 1)).sum() - 1)


def steps_until_good(trace: Trace, z: NDArray[np.float64], alpha: float) -> int | None:
    """Number of steps after which the gap is good, None if it never is."""
    return next((i + 1 for i, gap in enumerate(trace.gap) if mass_error(z, alpha, gap) <= GOOD), None)


def measure(kind: str, length: int, alpha: float, rows: int, seed: int = 0) -> Iterator[results.Row]:
    """A result row for each method."""
    scores = draw(kind, rows, length, seed)
    z = (np.float32(alpha - 1) * scores.astype(np.float32)).astype(np.float32)
    z = z - z.max(1, keepdims=True)
    for name, method in METHODS.items():
        if not offered(name, alpha):
            continue
        steps, passes, kept, worst, support = [], [], [], 0.0, []
        for row in z:
            trace = method(row, alpha)
            needed = steps_until_good(trace, row.astype(np.float64), alpha)
            steps.append(math.inf if needed is None else needed)
            passes.append(trace.after[(needed or len(trace.gap)) - 1] / length)
            kept.append(trace.kept)
            worst = max(worst, mass_error(row.astype(np.float64), alpha, trace.gap[-1]))
            support.append(int((row > trace.gap[-1]).sum()))
        yield {
            "scores": kind,
            "length": length,
            "alpha": alpha,
            "rows": rows,
            "support": float(np.mean(support)),
            "method": name,
            "steps": median(steps) if all(map(math.isfinite, steps)) else None,
            "most_steps": max(steps) if all(map(math.isfinite, steps)) else None,
            "failed": sum(map(math.isinf, steps)),
            "passes": round(median(passes), 3),
            "kept": max(kept),
            "error": float(f"{worst:.1e}"),  # |Σp − 1| in the end
        }


def steps_table(rows: list[results.Row]) -> str:
    """Steps by scores, α and method: over all lengths, the median (largest); and the same for passes."""
    table = [["scores", "α", "keys", *(f"{name}" for name in METHODS)]]
    for kind, alpha in dict.fromkeys((row["scores"], row["alpha"]) for row in rows):
        found = [row for row in rows if (row["scores"], row["alpha"]) == (kind, alpha)]
        supports = [row["support"] for row in found]
        cells = [kind, f"{alpha:g}", f"{tables.number(min(supports))} – {tables.number(max(supports))}"]
        for name in METHODS:
            of = [row for row in found if row["method"] == name]
            failed = sum(row["failed"] for row in of)
            good = [row for row in of if row["steps"] is not None]
            if not of:
                cells.append("–")
            elif failed or not good:
                cells.append(f"{failed} of {sum(row['rows'] for row in of)} rows fail")
            else:
                steps, most = median(row["steps"] for row in good), max(row["most_steps"] for row in good)
                cells.append(f"{steps:g} ({most}), {median(row['passes'] for row in good):.3g} passes")
        table.append(cells)
    return tables.markdown(table)


def growth_table(rows: list[results.Row]) -> str:
    """Exponents of N: of the scores looked at (time) and of what is kept (memory)."""
    table = [["scores", "α", *METHODS]]
    for kind, alpha in dict.fromkeys((row["scores"], row["alpha"]) for row in rows):
        cells = [kind, f"{alpha:g}"]
        for name in METHODS:
            of = [row for row in rows if (row["scores"], row["alpha"], row["method"]) == (kind, alpha, name)]
            time = tables.exponent([(row["length"], row["passes"] * row["length"]) for row in of])
            memory = tables.exponent([(row["length"], row["kept"]) for row in of])
            cells.append("–" if math.isnan(time) else f"{time:.2f}, {memory:.2f}")
        table.append(cells)
    return tables.markdown(table)


def page(rows: list[results.Row]) -> str:
    """Both tables with their headings."""
    return (
        "### Steps: median (largest), and passes over the row\n\n"
        f"{steps_table(rows)}\n\n### Growth: time and memory as exponents of N\n\n{growth_table(rows)}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if a method of this library (newton-norm, candidates) failed on a row."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.solver", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[2**k for k in range(10, 18)], metavar="N")
    parser.add_argument("--alphas", nargs="+", type=float, default=[1.1, 1.25, 1.5, 2.0], metavar="A")
    parser.add_argument("--scores", nargs="+", default=list(KINDS), metavar="KIND", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=8, help="of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/DATE-cpu-solver.jsonl)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    facts = machine.facts("cpu")
    cases = [(k, n, a) for k in options.scores for a in options.alphas for n in options.lengths]
    rows = []
    for kind, length, alpha in tqdm(cases, disable=None, unit="case"):
        rows += measure(kind, length, alpha, options.rows)
    print(page(rows))
    if not options.no_file:
        file = options.out or results.path_of(facts, "solver")
        results.append(file, [{**facts, **row} for row in rows])
        print(f"\nWritten to {file}")
    ours = [row for row in rows if row["method"] in ("newton-norm", "candidates")]
    return 1 if any(row["failed"] for row in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
