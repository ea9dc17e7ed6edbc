"""Attention beside its peers: time of forward, backward and both, and peak memory.

    python -m bench.attention                                       the table of goals for the CPU (10 minutes)
    python -m bench.attention --preset gpu-targets                  … for a GPU
    python -m bench.attention --quick                               a few seconds, to see that all of it runs
    python -m bench.attention --peers adasplash sdpa --lengths 1024 4096 --inputs gaussian:1 structured:0.8

Peers of a case run in turn in one process (but for packages that cannot share one), after each has been checked against
an fp64 reference. Rows go to a file of JSON lines in bench/results; `python -m bench.report` makes tables and plots.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bench.lib import machine, results
from bench.lib.case import DTYPES, Case, grid
from bench.lib.inputs import TRAINED, Inputs, captured_sizes, is_captured, make_grad, make_inputs
from bench.lib.presets import PRESETS, Entry, entries_of, goals_of
from bench.lib.reference import Check, empty_tiles, keys_of_block, make_check
from bench.lib.remote import RemoteRunner
from bench.lib.results import INFERENCE_MEMORY, NO_RATIO, PEAK_MEMORY, Row
from bench.lib.runner import LocalRunner, Runner
from bench.lib.timing import Effort, Spread, measure
from bench.peers import OURS, PEERS

BAR = "{percentage:3.0f}%|{bar:14}| {n:.1f}/{total} cases, {elapsed}<{remaining} {postfix}"


class Contender(NamedTuple):
    """A runner that was found right."""

    runner: Runner
    errors: dict[str, float]
    first_call: float  # seconds of the first forward and training step, with whatever compiling and tuning they start


class Bench:
    """Runs entries and hands their rows on."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar
        self.problems: list[str] = []

    def run(self, entry: Entry) -> list[Row]:
        """Rows of one entry, without the facts about the machine. What a peer cannot do is said, and left out."""
        case, start = entry.case, self._bar.n
        self._say(f"{case.title}: inputs and reference")
        with _threads(case.threads) as threads:
            inputs, grad = make_inputs(case), make_grad(case)
            check = make_check(case, inputs, grad)
            kind, _, path = case.input.partition(":")
            name = f"captured:{Path(path).name}" if kind == "captured" else case.input
            common = {**case.to_dict(), "input": name, "threads_used": threads, "support": round(check.support, 2)}
            peers = [name for name in (OURS, *entry.peers) if self._can(name, case)]
            rows: list[Row] = []
            contenders: list[Contender] = []
            try:
                for name in peers if entry.timed else ():
                    self._say(f"{case.title}: checking {name}")
                    contenders += self._contender(name, case, inputs, grad, check)
                rows += self._time(entry, contenders, start)
            finally:
                for contender in contenders:
                    contender.runner.close()
            if entry.memory:
                rows += self._memory(entry, peers, (inputs.numel() + grad.numel()) * grad.element_size() / 2**20)
            common["keys_of_block"] = round(keys_of_block(case, inputs), 4)
            common["empty_tiles"] = round(empty_tiles(case, inputs), 4)  # calls our op, whose first call is timed above
        self._bar.n = start + 1
        return [{**common, **row} for row in rows]

    def _say(self, text: str) -> None:
        self._bar.set_postfix_str(text)

    def _problem(self, text: str) -> None:
        self.problems.append(text)
        tqdm.write(f"  ! {text}", file=sys.stderr)

    def _can(self, name: str, case: Case) -> bool:
        reason = PEERS[name].refuses(case)
        if reason:
            tqdm.write(f"  ({name} is left out at {case.title}: {reason})", file=sys.stderr)
        return reason is None

    def _contender(self, name: str, case: Case, inputs: Inputs, grad: Tensor, check: Check) -> list[Contender]:
        """Of one peer; none if it fails or is wrong, which is said."""
        peer, runner = PEERS[name], None
        times = 1 if name == OURS else 5  # others are measured too, unless they are plainly wrong
        try:
            runner = RemoteRunner(peer, case) if peer.package_path else LocalRunner(peer, case, inputs, grad)
            first = runner.sample(1)
            errors = check.errors(peer.weights, runner.results(check.grad), times)
        except Exception as error:  # whatever goes wrong in a peer, the others are still measured
            self._problem(f"{name} at {case.title}: {type(error).__name__}: {error}")
            if runner is not None:
                runner.close()
            return []
        return [Contender(runner, errors, first.spent)]

    def _time(self, entry: Entry, contenders: list[Contender], start: float) -> Iterator[Row]:
        def on_round(rounds: int) -> None:
            self._say(f"{entry.case.title}: round {rounds}")
            self._bar.n = start + min(rounds / entry.effort.most, 0.99)
            self._bar.refresh()

        if not contenders:
            return
        runners, _, first_calls = zip(*contenders, strict=True)
        timings = measure(runners, entry.effort, first_calls, on_round)
        names = [runner.peer.name for runner in runners]
        ours = timings[names.index(OURS)] if OURS in names else None
        for name, contender, timing in zip(names, contenders, timings, strict=True):
            for what in contender.runner.peer.passes:
                ratio = None if ours is None or name == OURS else ours.ratio_to(timing, what)
                goal = _goal(entry, name, what)
                yield {
                    "peer": name,
                    "what": what,
                    "unit": "ms",
                    **timing.milliseconds(what).fields(),
                    "samples": len(timing.seconds[what]),
                    **(ratio.fields("ratio") if ratio else NO_RATIO),
                    "goal": goal,
                    "reached": None if goal is None or ratio is None else ratio.median <= goal,
                    "errors": {key: float(f"{value:.1e}") for key, value in contender.errors.items()},
                    "first_call_ms": round(1000 * contender.first_call, 3),
                }

    def _memory(self, entry: Entry, peers: list[str], tensors: float) -> Iterator[Row]:
        """tensors: MiB of query, key, value and out; a training step has as many again of their gradients."""
        beside = {PEAK_MEMORY: 2 * tensors, INFERENCE_MEMORY: tensors}
        peaks: dict[tuple[str, str], float] = {}
        for name in peers:
            self._say(f"{entry.case.title}: memory of {name}")
            try:
                runner = RemoteRunner(PEERS[name], entry.case)
                try:
                    for what in beside if PEERS[name].trains else (INFERENCE_MEMORY,):
                        peaks[what, name] = runner.memory(what)
                finally:
                    runner.close()
            except RuntimeError as error:
                self._problem(f"{name} at {entry.case.title}: {error}")
        for (what, name), peak in peaks.items():
            ours, held = peaks.get((what, OURS)), beside[what]
            ratio = None if name == OURS or ours is None else (ours + held) / (peak + held)
            goal = _goal(entry, name, what)
            value = peak if name == OURS else ratio
            yield {
                "peer": name,
                "what": what,
                "unit": "MiB",
                **Spread.of([peak]).fields(),
                "samples": 1,
                **(NO_RATIO if ratio is None else Spread.of([ratio]).fields("ratio")),
                "goal": goal,
                "reached": None if goal is None else value <= goal,
            }


def _goal(entry: Entry, peer: str, what: str) -> float | None:
    return next((goal.at_most for goal in entry.goals if (goal.peer, goal.what) == (peer, what)), None)


@contextmanager
def _threads(count: int) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield count or before
    finally:
        torch.set_num_threads(before)


def line_of(row: Row) -> str:
    """One row as a line for people."""
    value = f"{row['median']:10.2f} {row['unit']:<3} [{row['low']:.2f} – {row['high']:.2f}]"
    text = f"    {row['peer']:<14}{row['what']:<26}{value:<36}"
    if row["ratio"] is not None:
        text += f" ours/theirs {row['ratio']:.3f} [{row['ratio_low']:.3f} – {row['ratio_high']:.3f}]"
    if row["goal"] is not None:
        text += f"  goal ≤ {row['goal']:g}: {'reached' if row['reached'] else 'MISSED'}"
    return text


def _needs_trained(options: argparse.Namespace) -> bool:
    inputs = [entry.case.input for entry in entries_of(options.preset)] if options.preset else options.inputs
    return "trained" in inputs and torch.cuda.is_available()


def _entries(options: argparse.Namespace) -> list[Entry]:
    if options.preset:
        return [
            _narrowed(entry, options)
            for entry in entries_of(options.preset)
            if options.head_dims is None or entry.case.head_dim in options.head_dims
        ]
    cases = grid(
        device=[options.device],
        input=options.inputs,
        batch=options.batches,
        heads=options.heads,
        length=options.lengths,
        head_dim=options.head_dims or [64],
        dtype=options.dtypes,
        alpha=options.alphas,
        causal=[{"yes": True, "no": False}[word] for word in options.causal],
        threads=[0 if word == "all" else int(word) for word in options.threads],
        seed=[options.seed],
    )
    for i, case in enumerate(cases):
        if is_captured(case.input):  # the file knows its own sizes
            cases[i] = replace(case, **captured_sizes(case.input))
    peers = tuple(peer for peer in options.peers or ["sdpa"] if peer != OURS)
    effort = Effort(10 if options.seconds is None else options.seconds, options.fewest, options.most)
    return [Entry(case, peers, goals_of(case), effort, options.memory) for case in dict.fromkeys(cases)]


def _narrowed(entry: Entry, options: argparse.Namespace) -> Entry:
    """A preset's entry with fewer peers or seconds, where the user asks for that."""
    peers = entry.peers if options.peers is None else tuple(peer for peer in entry.peers if peer in options.peers)
    effort = entry.effort if options.seconds is None else replace(entry.effort, seconds=options.seconds)
    return replace(entry, peers=peers, effort=effort, memory=entry.memory and not options.no_memory)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", nargs="+", choices=PRESETS, metavar="NAME", help=f"named lists of cases: {', '.join(PRESETS)}"
    )
    parser.add_argument("--quick", action="store_true", help="the same as --preset quick; writes no file unless --out")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/DATE-DEVICE-PRESET.jsonl)")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)}; of a preset's only these"
    )
    parser.add_argument(
        "--head-dims", nargs="+", type=int, metavar="D", help="of a preset's only these (default: all; 64 without one)"
    )
    parser.add_argument("--seconds", type=float, help="of rounds a case (default: the preset's, else 10)")
    parser.add_argument("--no-memory", action="store_true", help="leave out a preset's peak memory")
    own = parser.add_argument_group("a sweep of one's own: every combination of what is listed")
    own.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    own.add_argument(
        "--inputs", nargs="+", metavar="KIND:VALUE", help="gaussian:σ, structured:share, flat, trained, …:file"
    )
    own.add_argument("--lengths", nargs="+", type=int, metavar="N", help="queries, and keys")
    own.add_argument("--heads", nargs="+", type=int, default=[4], metavar="H")
    own.add_argument("--batches", nargs="+", type=int, default=[1], metavar="B")
    own.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    own.add_argument("--alphas", nargs="+", type=float, default=[1.5], metavar="A")
    own.add_argument("--threads", nargs="+", default=["all"], metavar="T", help="CPU threads: numbers, or all")
    own.add_argument("--causal", nargs="+", choices=("yes", "no"), default=["yes"])
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--memory", action="store_true", help="peak memory too, in processes of their own")
    own.add_argument("--fewest", type=int, default=5, help="rounds a case (default: %(default)s)")
    own.add_argument("--most", type=int, default=51, help="rounds a case (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.preset = ["quick"]
    elif not options.preset and not (options.inputs or options.lengths):
        options.preset = ["targets", "lengths"] if options.device == "cpu" else ["gpu-targets"]
    options.inputs = options.inputs or ["gaussian:1.5"]
    options.lengths = options.lengths or [4096]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if anything failed or was wrong, else 0; a goal that was missed is no failure."""
    options = parse(arguments)
    if _needs_trained(options) and not TRAINED.exists():
        print(f'Training a model for the input "trained", once: {TRAINED}', flush=True)
        from bench import capture  # the example's modules have plain names, and are imported where they are used

        capture.main(["--device", "cuda"])
    entries = _entries(options)
    if not entries:
        sys.exit("error: no such case among those of the preset")
    devices = {entry.case.device for entry in entries}
    if "cuda" in devices and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device here")
    facts = machine.facts(devices.pop())
    preset = "+".join(options.preset or ["own"])
    file = options.out or (None if options.quick else results.path_of(facts, preset))
    print(f"{facts['processor']}, {facts['cores']} cores, torch {facts['torch']}, commit {facts['commit']}")
    with tqdm(total=len(entries), bar_format=BAR, disable=None) as bar:
        bench = Bench(bar)
        for number, entry in enumerate(entries):
            rows = [{**facts, "preset": preset, "entry": number, **row} for row in bench.run(entry)]
            if file:
                results.append(file, rows)
            if rows:
                empty, support = rows[0]["empty_tiles"], rows[0]["support"]
                tqdm.write(f"{entry.case.title}: {support:g} keys a query, {empty:.0%} of the tiles empty")
            for row in rows:
                tqdm.write(line_of(row))
    if file:
        print(f"Written to {file}")
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
