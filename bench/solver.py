"""How many steps thresholds need: bisection, Halley–bisection, AdaSplash-2's histogram start, and this library's way.

    python -m bench.solver                  rows of 1k to 131k scores, several α and kinds of scores; about two minutes
    python -m bench.solver --lengths 1024 --alphas 1.5

A row of scores s has z = (α−1) s with largest m, and weights p = [z − τ]₊^(1/(α−1)). A *step* is one update of τ, for
which sums over scores are formed. All methods run in fp32, as the kernels do, and work on z − m; their τ after every
step is judged in fp64: it is good once |Σp − 1| ≤ 1e-5, which is what the library promises. The tables say

    steps     median (largest) number of steps until τ is good
    passes    scores that were looked at on the way, maximum and start included, as a multiple of the row's length
    growth    exponents of N fitted to the scores looked at (time) and to the largest number of scores or counters that
              a method keeps of a row, beside the row itself (memory)

The methods:

    bisection         of the bracket [m − 1, m − n^(1−α)]
    halley-bisection  Halley's steps, where they stay in the bracket, else its middle: AdaSplash (arXiv 2502.12082)
    histogram         AdaSplash-2: a histogram of [m − 1, m] in 8 bins (4 for long rows) gives a bracket of a bin's
                      width, then Halley–bisection; for α = 1.5 and 2, as in its code
    newton-norm       Newton's steps on ‖t‖_r − 1, t = [z − τ]₊, r = 1/(α−1), from τ = m − 1
    candidates        what csrc/cpu/candidates.h and threshold.h do: one pass that keeps candidates above a running
                      bound, then the same steps on the short list
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from bench import machine, results, tables

F32 = NDArray[np.float32]
GOOD = 1e-5  # of |Σp − 1|
MOST_STEPS = 64


@dataclass
class Trace:
    """What a method did on one row: τ − m after each step, and what that cost."""

    tau: list[np.float32] = field(default_factory=list)
    looked_at: int = 0  # scores, of the row or of its short list
    before: int = 0  # … up to the first step's start
    after: list[int] = field(default_factory=list)  # looked_at when each step was done
    kept: int = 0

    def step(self, tau: np.float32, looked_at: int) -> None:
        self.looked_at += looked_at
        self.tau.append(np.float32(tau))
        self.after.append(self.looked_at)


Method = Callable[[F32, float], Trace]


def powers(t: F32, exponent: float) -> F32:
    """t^exponent where t > 0, else 0, in fp32."""
    positive = t > 0
    return np.where(positive, np.power(np.where(positive, t, 1), np.float32(exponent)), np.float32(0))


def bisection(z: F32, alpha: float) -> Trace:
    """z: scores minus the largest, times α − 1; as for all methods."""
    low, high = np.float32(-1), np.float32(-(len(z) ** (1 - alpha)))
    trace = Trace(looked_at=len(z), kept=2)
    for _ in range(MOST_STEPS):
        middle = (low + high) / 2
        mass = powers(z - middle, 1 / (alpha - 1)).sum()
        low, high = (middle, high) if mass >= 1 else (low, middle)
        trace.step((low + high) / 2, len(z))
        if trace.tau[-1] == middle:
            break
    return trace


def _halley_bisection(z: F32, alpha: float, low: np.float32, high: np.float32, trace: Trace) -> Trace:
    """As `halley_bisect_update` in AdaSplash's kernels."""
    r = 1 / (alpha - 1)
    tau, slack = (low + high) / 2, np.float32(1e-6)
    for _ in range(MOST_STEPS):
        t = np.maximum(z - tau, 0)
        f = powers(t, r).sum() - 1
        df = -r * powers(t, r - 1).sum()
        ddf = r * (r - 1) * powers(t, r - 2).sum()
        low, high = (tau if f > 0 else low), (tau if f < 0 else high)
        with np.errstate(divide="ignore", invalid="ignore"):
            new = tau - 2 * f * df / (2 * df * df - f * ddf)
        last, tau = tau, np.float32(new if low - slack < new < high + slack else (low + high) / 2)
        trace.step(tau, len(z))
        if tau == last:
            break
    return trace


def halley_bisection(z: F32, alpha: float) -> Trace:
    trace = Trace(looked_at=len(z), kept=2)
    return _halley_bisection(z, alpha, np.float32(-1), np.float32(-(len(z) ** (1 - alpha))), trace)


def histogram(z: F32, alpha: float) -> Trace:
    """The lower end of the bracket is the threshold of the scores moved down to their bins' lower edges."""
    lanes = 64
    bins = 8 if math.ceil(len(z) / lanes) < 256 else 4  # 64 bits a lane hold the counters
    place = np.minimum(np.floor((z + 1) * bins), bins - 1)
    counts = np.bincount(place[place >= 0].astype(np.int64), minlength=bins)
    counts[-1] -= 1  # the largest score counts with its own value, 1
    n = total = squares = 1.0
    for i in range(bins - 1, -1, -1):
        edge = i / bins
        more = n + counts[i], total + counts[i] * edge, squares + counts[i] * edge**2
        excess = more[0] * edge**2 - 2 * more[1] * edge + more[2] if alpha == 1.5 else more[1] - more[0] * edge
        if excess < 1:
            n, total, squares = more
    root = math.sqrt(max(0.0, total**2 - n * (squares - 1))) if alpha == 1.5 else 1.0
    start = (total - root) / n
    low = np.float32(start - 1)
    trace = Trace(looked_at=2 * len(z), kept=lanes)
    return _halley_bisection(z, alpha, low, low + np.float32(1 / bins), trace)


def _newton_step(z: F32, alpha: float, tau: np.float32) -> tuple[np.float32, bool]:
    """One Newton step on ‖t‖_r − 1, never beyond the root, and whether this one was the last that is needed."""
    t = np.maximum(z - tau, 0)
    u = powers(t, 1 / (alpha - 1) - 1)
    p_sum, u_sum = float((t * u).sum()), float(u.sum())
    change = np.float32((p_sum - p_sum ** (2 - alpha)) / u_sum)
    return np.maximum(tau + change, np.float32(-1)), abs(p_sum - 1) <= (1e-4 if alpha <= 1.5 else 1e-6)


def _newton(z: F32, alpha: float, tau: np.float32, trace: Trace) -> Trace:
    for _ in range(MOST_STEPS):
        tau, settled = _newton_step(z, alpha, tau)
        trace.step(tau, len(z))
        if settled:
            break
    return trace


def newton_norm(z: F32, alpha: float) -> Trace:
    return _newton(z, alpha, np.float32(-1), Trace(looked_at=len(z), kept=2))


def candidates(z: F32, alpha: float, most: int = 512, first_refinement: int = 32, together: int = 64) -> Trace:
    """The list, its refinements and what happens when it overflows as in csrc/cpu/candidates.h, 16 lanes."""
    trace = Trace(looked_at=len(z))
    kept, largest, bound = np.empty(0, np.float32), np.float32(-np.inf), np.float32(-np.inf)
    refine_at, overflowed = first_refinement, False
    padded = np.append(z, np.full(-len(z) % together, -np.inf, np.float32)).reshape(-1, together)
    for chunk, top in zip(padded, padded.max(1), strict=True):
        if top <= (largest if overflowed else bound):
            continue
        if top > largest:
            largest, bound = top, np.maximum(bound, top - 1)
        if overflowed:
            continue
        kept = np.append(kept, chunk[chunk > bound])
        trace.kept = max(trace.kept, len(kept))
        if len(kept) >= refine_at:
            tau = np.maximum(bound - largest, np.float32(-1))
            for _ in range(2):
                tau, _ = _newton_step(kept - largest, alpha, tau)
                trace.looked_at += len(kept)
            slack = 4 * np.finfo(np.float32).eps * (abs(largest) + 1)
            bound = np.maximum(bound, np.float32(largest + tau - slack))
            kept = kept[kept > bound]
            overflowed = len(kept) > most // 2
            refine_at = min(max(2 * len(kept), first_refinement), most)
    start = np.maximum(bound - largest, np.float32(-1))
    return _newton(z if overflowed else kept - largest, alpha, start, trace)


METHODS: dict[str, Method] = {
    "bisection": bisection,
    "halley-bisection": halley_bisection,
    "histogram": histogram,
    "newton-norm": newton_norm,
    "candidates": candidates,
}


def offered(method: str, alpha: float) -> bool:
    return method != "histogram" or alpha in (1.5, 2)


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


def mass_error(z: NDArray[np.float64], alpha: float, tau: np.float32) -> float:
    """|Σp − 1| in fp64 for τ relative to the largest score; z as a method gets it, but in fp64."""
    return abs(np.power(np.maximum(z - np.float64(tau), 0), 1 / (alpha - 1)).sum() - 1)


def steps_until_good(trace: Trace, z: NDArray[np.float64], alpha: float) -> int | None:
    """Number of steps after which τ is good, None if it never is."""
    return next((i + 1 for i, tau in enumerate(trace.tau) if mass_error(z, alpha, tau) <= GOOD), None)


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
            passes.append(trace.after[(needed or len(trace.tau)) - 1] / length)
            kept.append(trace.kept)
            worst = max(worst, mass_error(row.astype(np.float64), alpha, trace.tau[-1]))
            support.append(int((row > trace.tau[-1]).sum()))
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
        date = datetime.fromisoformat(facts["date"]).strftime("%Y%m%d-%H%M")
        file = options.out or results.FOLDER / f"{date}-cpu-solver.jsonl"
        results.append(file, [{**facts, **row} for row in rows])
        print(f"\nWritten to {file}")
    ours = [row for row in rows if row["method"] in ("newton-norm", "candidates")]
    return 1 if any(row["failed"] for row in ours) else 0


if __name__ == "__main__":
    sys.exit(main())
