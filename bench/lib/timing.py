"""Times runners in turn: every round runs each of them once, so that whatever slows the machine slows all alike."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import quantiles

from bench.lib.case import BACKWARD, BOTH, FORWARD
from bench.lib.runner import Runner

SHORTEST_SAMPLE = 0.01  # seconds of calls that make a sample


@dataclass(frozen=True)
class Effort:
    """A case is run for `seconds`, but for at least `fewest` and at most `most` rounds."""

    seconds: float = 10.0
    fewest: int = 5
    most: int = 51


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def fields(self, name: str = "") -> dict[str, float]:
        """For a result row: median, low, high; or name, name_low, name_high."""
        names = (name, f"{name}_low", f"{name}_high") if name else ("median", "low", "high")
        values = (self.median, self.low, self.high)
        return {key: float(f"{value:.5g}") for key, value in zip(names, values, strict=True)}


@dataclass
class Timing:
    """Seconds a call, one entry a round; none of a pass that was not timed."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {FORWARD: [], BACKWARD: [], BOTH: []})

    def milliseconds(self, what: str) -> Spread:
        return Spread.of([1000 * seconds for seconds in self.seconds[what]])

    def ratio_to(self, other: "Timing", what: str) -> Spread:
        """Of the pairs: both ran in the same round."""
        return Spread.of([a / b for a, b in zip(self.seconds[what], other.seconds[what], strict=True)])


def measure(
    runners: Sequence[Runner],
    effort: Effort,
    first_calls: Sequence[float],
    on_round: Callable[[int], None] = lambda rounds: None,
) -> list[Timing]:
    """Runs rounds of all runners, each round beginning with the next one.

    first_calls: seconds of every runner's first call. Where that was short, a second one says how many make a sample.
    """
    timings, calls = [Timing() for _ in runners], []
    for runner, first in zip(runners, first_calls, strict=True):
        warm = runner.sample(1).spent if first < 1 else first
        calls.append(max(1, min(100, round(SHORTEST_SAMPLE / warm))))
    start, rounds = time.perf_counter(), 0
    while rounds < effort.most and (rounds < effort.fewest or time.perf_counter() - start < effort.seconds):
        order = [(rounds + i) % len(runners) for i in range(len(runners))]
        for i in order:
            sample = runners[i].sample(calls[i])
            for what, value in zip((FORWARD, BACKWARD, BOTH), sample, strict=True):
                if value is not None:
                    timings[i].seconds[what].append(value)
        rounds += 1
        on_round(rounds)
    return timings
