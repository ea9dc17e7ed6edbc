"""The ways to find a row's threshold that `bench.solver` compares, each as a function of one row.

A row of scores has z = (α−1) · score, and weights excess^(1/(α−1)) with excess = [z − τ]₊. Methods get z less its
largest, so that the threshold they look for is the gap, τ less the largest z: from −1 to 0. All work in fp32, as the
kernels do.

    bisection         of the bracket [−1, −n^(1−α)]
    halley-bisection  Halley's steps, where they stay in the bracket, else its middle: AdaSplash (arXiv 2502.12082)
    histogram         AdaSplash-2: a histogram of [−1, 0] in 8 bins (4 for long rows) gives a bracket of a bin's
                      width, then Halley–bisection; for α = 1.5 and 2, as in its code
    newton-norm       Newton's steps on ‖excess‖_r − 1, r = 1/(α−1), from −1
    candidates        what csrc/cpu/candidates.h and threshold.h do: one pass that keeps candidates above a running
                      bound, then the same steps on the short list
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
MOST_STEPS = 64


@dataclass
class Trace:
    """What a method did on one row: the gap after each step, and what that cost."""

    gap: list[np.float32] = field(default_factory=list)
    looked_at: int = 0  # scores, of the row or of its short list
    before: int = 0  # … up to the first step's start
    after: list[int] = field(default_factory=list)  # looked_at when each step was done
    kept: int = 0

    def step(self, gap: np.float32, looked_at: int) -> None:
        self.looked_at += looked_at
        self.gap.append(np.float32(gap))
        self.after.append(self.looked_at)


Method = Callable[[F32, float], Trace]


def powers(excess: F32, exponent: float) -> F32:
    """excess^exponent where excess > 0, else 0, in fp32."""
    positive = excess > 0
    return np.where(positive, np.power(np.where(positive, excess, 1), np.float32(exponent)), np.float32(0))


def bisection(z: F32, alpha: float) -> Trace:
    """z: scores minus the largest, times α − 1; as for all methods."""
    low, high = np.float32(-1), np.float32(-(len(z) ** (1 - alpha)))
    trace = Trace(looked_at=len(z), kept=2)
    for _ in range(MOST_STEPS):
        middle = (low + high) / 2
        mass = powers(z - middle, 1 / (alpha - 1)).sum()
        low, high = (middle, high) if mass >= 1 else (low, middle)
        trace.step((low + high) / 2, len(z))
        if trace.gap[-1] == middle:
            break
    return trace


def _halley_bisection(z: F32, alpha: float, low: np.float32, high: np.float32, trace: Trace) -> Trace:
    """As `halley_bisect_update` in AdaSplash's kernels."""
    r = 1 / (alpha - 1)
    gap, slack = (low + high) / 2, np.float32(1e-6)
    for _ in range(MOST_STEPS):
        excess = np.maximum(z - gap, 0)
        f = powers(excess, r).sum() - 1
        df = -r * powers(excess, r - 1).sum()
        ddf = r * (r - 1) * powers(excess, r - 2).sum()
        low, high = (gap if f > 0 else low), (gap if f < 0 else high)
        with np.errstate(divide="ignore", invalid="ignore"):
            new = gap - 2 * f * df / (2 * df * df - f * ddf)
        last, gap = gap, np.float32(new if low - slack < new < high + slack else (low + high) / 2)
        trace.step(gap, len(z))
        if gap == last:
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
        mass = more[0] * edge**2 - 2 * more[1] * edge + more[2] if alpha == 1.5 else more[1] - more[0] * edge
        if mass < 1:
            n, total, squares = more
    root = math.sqrt(max(0.0, total**2 - n * (squares - 1))) if alpha == 1.5 else 1.0
    start = (total - root) / n
    low = np.float32(start - 1)
    trace = Trace(looked_at=2 * len(z), kept=lanes)
    return _halley_bisection(z, alpha, low, low + np.float32(1 / bins), trace)


def _newton_step(z: F32, alpha: float, gap: np.float32) -> tuple[np.float32, bool]:
    """One Newton step on ‖excess‖_r − 1, never beyond the root, and whether this one was the last that is needed."""
    excess = np.maximum(z - gap, 0)
    u = powers(excess, 1 / (alpha - 1) - 1)
    p_sum, u_sum = float((excess * u).sum()), float(u.sum())
    change = np.float32((p_sum - p_sum ** (2 - alpha)) / u_sum)
    return np.maximum(gap + change, np.float32(-1)), abs(p_sum - 1) <= (1e-4 if alpha <= 1.5 else 1e-6)


def _newton(z: F32, alpha: float, gap: np.float32, trace: Trace) -> Trace:
    for _ in range(MOST_STEPS):
        gap, settled = _newton_step(z, alpha, gap)
        trace.step(gap, len(z))
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
            gap = np.maximum(bound - largest, np.float32(-1))
            for _ in range(2):
                gap, _ = _newton_step(kept - largest, alpha, gap)
                trace.looked_at += len(kept)
            slack = 4 * np.finfo(np.float32).eps * (abs(largest) + 1)
            bound = np.maximum(bound, np.float32(largest + gap - slack))
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
