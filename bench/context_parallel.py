"""Times attention over sequences that are sharded over processes beside one process with all of it: a training step,
weak scaling, and peak memory.

    torchrun --nproc-per-node 2 -m bench.context_parallel --device cuda          two GPUs of one host
    torchrun --nproc-per-node 2 -m bench.context_parallel --lengths 512 --heads 4 --head-dim 16 --no-file

Rounds run in turn one process alone, which is the first while the others wait, and all of them; a step of all is over
when the last one's is. Weak scaling is the time of one process with N tokens as a share of that of W processes with
N·√W, which is as much work for each. Memory is the peak of a step, inputs, output and gradients included.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from adasplash import entmax_attn
from adasplash.distributed import entmax_attn_context_parallel, shard
from bench.lib import machine, results
from bench.lib.case import BOTH, DTYPES, Case
from bench.lib.inputs import make_grad, make_inputs
from bench.lib.memory import CpuMeter, CudaMeter
from bench.lib.timing import Effort, Spread

WEAK_SCALING = "weak scaling"
METHODS = ("gather", "exchange")
# Of two GPUs of one host, as shares of one: of the time at some lengths, and of the memory; the least weak scaling.
TIME_GOALS, MEMORY_GOAL, WEAK_GOAL = {131_072: 0.55, 32_768: 0.6}, 0.6, 0.92
DEFAULTS = {
    "cpu": dict(lengths=[4096], heads=8, head_dim=64, dtype="fp32"),
    "cuda": dict(lengths=[32_768, 131_072], heads=32, head_dim=128, dtype="bf16"),
}
Step = Callable[[], object]


def step_of(case: Case, method: str | None) -> Step:
    """A training step of one process, or with a method this process' part of a step of all."""
    leaves, grad = list(make_inputs(case)), make_grad(case)
    if method is not None:
        *leaves, grad = (shard(x, 2) for x in (*leaves, grad))
    leaves = [x.requires_grad_() for x in leaves]

    def step() -> tuple[Tensor, ...]:
        if method is None:
            out = entmax_attn(*leaves, case.alpha, case.causal)
        else:
            out = entmax_attn_context_parallel(*leaves, case.alpha, case.causal, method=method)
        return torch.autograd.grad(out, leaves, grad)

    return step


def synchronize(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def largest(number: float, case: Case) -> float:
    """Of all processes, on all of them."""
    found = torch.tensor(number, dtype=torch.float64, device=case.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def seconds_of(step: Step | None, case: Case) -> float:
    """From when all processes are there until the last one is done; None is for those that wait."""
    dist.barrier()
    start = time.perf_counter()
    if step is not None:
        step()
    synchronize(case)
    return largest(time.perf_counter() - start, case)


def memory_of(case: Case, method: str | None) -> float:
    """The most MiB that a process' step takes, with its inputs; of one process, where the others take none."""
    mine = method is not None or dist.get_rank() == 0
    meter = CudaMeter() if case.device == "cuda" else CpuMeter()
    if mine:
        step_of(case, method)()
    return largest(meter.peak() if mine else 0.0, case)


def longer(case: Case) -> Case:
    """With as much work for each of all processes as the case is for one: N·√W tokens, which can be dealt out."""
    unit = 2 * dist.get_world_size()
    return replace(case, length=round(case.length * math.sqrt(dist.get_world_size()) / unit) * unit)


def bench(case: Case, method: str, effort: Effort) -> Iterator[results.Row]:
    """Rows of one case."""
    first = dist.get_rank() == 0
    steps = {
        "one": (step_of(case, None) if first else None, case),
        "all": (step_of(case, method), case),
        "more": (step_of(longer(case), method), longer(case)),
    }
    for step, of in steps.values():  # what is compiled or allocated first
        seconds_of(step, of)
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    while True:
        for name, (step, of) in steps.items():
            times[name].append(seconds_of(step, of))
        rounds, enough = len(times["one"]), time.perf_counter() - start > effort.seconds
        if rounds >= effort.fewest and (rounds == effort.most or largest(float(enough), case)):
            break
    steps.clear()

    def ratios(one: str, other: str) -> Spread:
        return Spread.of([a / b for a, b in zip(times[one], times[other], strict=True)])

    def row(what: str, unit: str, spread: Spread, ratio: Spread, goal: float | None, reached: bool) -> results.Row:
        return {
            "what": what, "unit": unit, **spread.fields(), "samples": rounds, **ratio.fields("ratio"),
            "goal": goal, "reached": None if goal is None else reached,
        }  # fmt: skip

    has_goals = case.device == "cuda" and dist.get_world_size() == 2
    share, goal = ratios("all", "one"), TIME_GOALS.get(case.length) if has_goals else None
    spent = Spread.of([1000 * seconds for seconds in times["all"]])
    yield row(BOTH, "ms", spent, share, goal, goal is not None and share.median <= goal)
    weak = ratios("one", "more")
    spent = Spread.of([1000 * seconds for seconds in times["more"]])
    yield row(WEAK_SCALING, "ms", spent, weak, WEAK_GOAL if has_goals else None, weak.median >= WEAK_GOAL)
    one, each = memory_of(case, None), memory_of(case, method)
    share = Spread.of([each / max(one, 1e-9)])
    yield row(
        results.PEAK_MEMORY,
        "MiB",
        Spread.of([each]),
        share,
        MEMORY_GOAL if has_goals else None,
        share.median <= MEMORY_GOAL,
    )


def line_of(row: results.Row) -> str:
    goal = "" if row["goal"] is None else f"   goal {row['goal']:g} {'reached' if row['reached'] else 'missed'}"
    return f"    {row['what']:<18}{row['median']:12.1f} {row['unit']:<4} share {row['ratio']:.3f}{goal}"


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m bench.context_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--inputs", nargs="+", default=["structured:0.5"], metavar="INPUT")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--not-causal", action="store_true")
    parser.add_argument("--seconds", type=float, default=10, help="of rounds a case (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (bench/results/DATE-DEVICE-context-parallel.jsonl)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    known, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**DEFAULTS[known.device])
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    if not dist.is_torchelastic_launched():
        sys.exit("error: start it by torchrun --nproc-per-node 2 -m bench.context_parallel")
    device = options.device
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        facts = machine.facts(device)
        file = options.out or results.path_of(facts, "context-parallel")
        first = dist.get_rank() == 0
        cases = list(product(options.inputs, options.lengths, options.methods))
        for input, length, method in tqdm(cases, disable=not first):
            case = Case(
                device, input, heads=options.heads, length=length, head_dim=options.head_dim, dtype=options.dtype,
                alpha=options.alpha, causal=not options.not_causal,
                threads=0 if device == "cuda" else torch.get_num_threads(),
            )  # fmt: skip
            rows = list(bench(case, method, Effort(options.seconds, fewest=3)))
            if not first:
                continue
            tqdm.write(f"{case.title}, {dist.get_world_size()} processes, {method}")
            for row in rows:
                tqdm.write(line_of(row))
            if not options.no_file:
                fixed = {"preset": "context-parallel", **case.to_dict(), "processes": dist.get_world_size()}
                results.append(file, [{**facts, **fixed, "peer": method, **row} for row in rows])
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
