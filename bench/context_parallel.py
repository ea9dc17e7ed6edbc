"""Times attention over sequences that are sharded over processes beside one process with all of it: a training step,
weak scaling, and peak memory.

    torchrun --nproc-per-node 2 -m bench.context_parallel --device cuda          two GPUs of one host
    torchrun --nproc-per-node 2 -m bench.context_parallel --device cuda --only 131072 gather
    torchrun --nproc-per-node 2 -m bench.context_parallel --lengths 512 --heads 4 --kv-heads 2 --head-dim 16 --no-file

Rounds run in turn one process alone, which is the first while the others wait, and all of them; a step of all is over
when the last one's is. Weak scaling is the time of one process with N tokens as a share of that of W processes with
N·√W, which is as much work for each. Memory is the peak of a step, inputs, output and gradients included. At the
shortest length output and gradients are compared with those of one process.

The peer is torch's own softmax attention over sharded sequences, its experimental context_parallel, which passes keys
and values round (ring attention) through FlashAttention-2; its shares are of FlashAttention-2 in one process. Each row
is written as soon as it is there, and what fails, as for want of memory, ends nothing else.
"""

import argparse
import contextlib
import datetime
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from adasplash import entmax_attn
from adasplash.distributed import entmax_attn_context_parallel, shard
from bench.lib import machine, results
from bench.lib.case import BOTH, DTYPES, Case
from bench.lib.inputs import TILE, make_grad, make_inputs
from bench.lib.memory import CpuMeter, CudaMeter
from bench.lib.timing import Effort, Spread

WEAK_SCALING, DIFFERENCE = "weak scaling", "difference from one process"
# Of two GPUs of one host, as shares of one: of the time at some lengths, and of the memory; the least weak scaling.
TIME_GOALS, MEMORY_GOAL, WEAK_GOAL = {131_072: 0.55, 32_768: 0.6}, 0.6, 0.92
DEFAULTS = {
    "cpu": dict(lengths=[4096], heads=8, kv_heads=[8], head_dim=64, dtype="fp32"),
    "cuda": dict(lengths=[32_768, 131_072], heads=32, kv_heads=[8, 32], head_dim=128, dtype="bf16"),
}
RING = "torch-ring"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Step = Callable[[], Sequence[Tensor]]  # output and gradients
T = TypeVar("T")


@dataclass(frozen=True)
class Way:
    """Of attending, in one process and in all of a group: contexts in which a function of a case's query, key and value
    does it. `refuses` says why it cannot do a case."""

    alone: Callable[[Case], AbstractContextManager[Attention]]
    shared: Callable[[Case], AbstractContextManager[Attention]]
    refuses: Callable[[Case], str | None] = lambda case: None


def ours(method: str) -> Way:
    def alone(case: Case) -> AbstractContextManager[Attention]:
        return contextlib.nullcontext(lambda query, key, value: entmax_attn(query, key, value, case.alpha, case.causal))

    def shared(case: Case) -> AbstractContextManager[Attention]:
        return contextlib.nullcontext(
            lambda query, key, value: entmax_attn_context_parallel(
                query, key, value, case.alpha, case.causal, method=method
            )
        )

    def refuses(case: Case) -> str | None:
        if method == "exchange" and case.heads_of_key % dist.get_world_size():
            return f"heads of keys are {case.heads_of_key}, which cannot be dealt out"
        return None

    return Way(alone, shared, refuses)


@contextlib.contextmanager
def flash_alone(case: Case) -> Iterator[Attention]:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield lambda *tensors: scaled_dot_product_attention(*for_all_heads(*tensors), is_causal=case.causal)


@contextlib.contextmanager
def torch_ring(case: Case) -> Iterator[Attention]:
    """torch wants a tensor to shard; tensors that this module has laid out lie as it would lay them out. Its context
    replaces the function in its module. Imported here, as what is experimental may be gone."""
    from torch.distributed.tensor.experimental import context_parallel as torch_context_parallel

    mesh = init_device_mesh(case.device, (dist.get_world_size(),))
    tokens = torch.zeros(2 * mesh.size(), device=case.device)
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        torch_context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[0], no_restore_buffers={tokens}),
    ):
        yield lambda *tensors: F.scaled_dot_product_attention(*for_all_heads(*tensors), is_causal=case.causal)


def for_all_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As torch itself does for its fused kernels."""
    groups = query.shape[1] // key.shape[1]
    return query, *(x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))


def ring_refuses(case: Case) -> str | None:
    if case.device == "cpu":
        return "torch passes keys round on GPUs only"
    return None if case.causal else "torch lays tokens out so for causal attention only"


WAYS = {"gather": ours("gather"), "exchange": ours("exchange"), RING: Way(flash_alone, torch_ring, ring_refuses)}


class FailedError(Exception):
    """Raised on all processes: what one of them could not do."""


def together(do: Callable[[], T]) -> T:
    """Does it on every process, or is one error on all of them."""
    error, errors = "", [""] * dist.get_world_size()
    try:
        found = do()
    except Exception as raised:
        error = f"{type(raised).__name__}: {str(raised).strip().splitlines()[0] if str(raised).strip() else ''}"
    dist.all_gather_object(errors, error)
    if any(errors):
        raise FailedError("; ".join(f"rank {rank}: {error}" for rank, error in enumerate(errors) if error))
    return found


def step_of(case: Case, attend: Attention, is_sharded: bool) -> tuple[Step, float]:
    """A training step, of this process' part of the tokens or of all of them, and the MiB of what it is given."""
    tensors = [*make_inputs(case, drawn_on=case.device), make_grad(case, drawn_on=case.device)]
    if is_sharded:
        tensors = [shard(x, 2) for x in tensors]
    *leaves, grad = tensors
    leaves = [x.requires_grad_() for x in leaves]

    def step() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    return step, sum(x.numel() * x.element_size() for x in tensors) / 2**20


def is_first() -> bool:
    return dist.get_rank() == 0


def largest(number: float, case: Case) -> float:
    """Of all processes, on all of them."""
    found = torch.tensor(number, dtype=torch.float64, device=case.device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def seconds_of(step: Step | None, case: Case) -> float:
    """From when all processes are there until the last one is done; None is for those that wait."""

    def run() -> float:
        start = time.perf_counter()
        if step is not None:
            step()
            if case.device == "cuda":
                torch.cuda.synchronize()
        return time.perf_counter() - start

    dist.barrier()
    return largest(together(run), case)


def memory_of(case: Case, attend: Attention, is_shared: bool) -> float:
    """The most MiB that a process' step takes, with its inputs; of one process, where the others take none."""

    def run() -> float:
        if not (is_shared or is_first()):
            return 0.0
        step, given = step_of(case, attend, is_shared)
        meter = CudaMeter() if case.device == "cuda" else CpuMeter()
        step()
        return given + meter.peak()

    return largest(together(run), case)


def difference_of(case: Case, way: Way) -> float:
    """Of output and gradients from one process' with everything, as a share of the largest number of each."""

    def results_of(context: AbstractContextManager[Attention], is_sharded: bool) -> Sequence[Tensor]:
        with context as attend:
            return step_of(case, attend, is_sharded)[0]()

    def run() -> float:
        expected = [shard(x, 2).double() for x in results_of(way.alone(case), False)]
        found = results_of(way.shared(case), True)
        pairs = zip(found, expected, strict=True)
        return max(((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item() for x, y in pairs)

    return largest(together(run), case)


def longer(case: Case) -> Case:
    """With as much work for each of all processes as the case is for one: N·√W tokens, dealt out in whole tiles, as
    structured inputs would have fewer empty ones for chunks that begin within one."""
    unit = 2 * dist.get_world_size() * min(TILE, case.length // (2 * dist.get_world_size()))
    return replace(case, length=round(case.length * math.sqrt(dist.get_world_size()) / unit) * unit)


def times_of(case: Case, alone: Attention, shared: Attention, effort: Effort) -> dict[str, list[float]]:
    """Seconds of each round: of one process, of all, and of all with more tokens."""
    more = longer(case)

    def prepare() -> dict[str, tuple[Step | None, Case]]:
        return {
            "one": (step_of(case, alone, False)[0] if is_first() else None, case),
            "all": (step_of(case, shared, True)[0], case),
            "more": (step_of(more, shared, True)[0], more),
        }

    steps = together(prepare)
    for step, of in steps.values():  # what is compiled or allocated first
        seconds_of(step, of)
    times: dict[str, list[float]] = {name: [] for name in steps}
    start, rounds, enough = time.perf_counter(), 0, False
    while rounds < effort.fewest or not (enough or rounds == effort.most):
        for name, (step, of) in steps.items():
            times[name].append(seconds_of(step, of))
        rounds += 1
        enough = bool(largest(float(time.perf_counter() - start > effort.seconds), case))
    return times


def bench(case: Case, way: Way, effort: Effort, compares: bool) -> Iterator[results.Row]:
    """Rows of one case, each as soon as it is known."""
    world = dist.get_world_size()

    def row(
        what: str, unit: str, spread: Spread, ratio: Spread | None = None, goal: float | None = None, *,
        least: bool = False, samples: int = 1, processes: int = world,
    ) -> results.Row:  # fmt: skip
        """`least`: the goal is the least that the ratio may be, not the most."""
        reached = None
        if goal is not None and ratio is not None:
            reached = ratio.median >= goal if least else ratio.median <= goal
        ratios = results.NO_RATIO if ratio is None else ratio.fields("ratio")
        return {
            "processes": processes, "what": what, "unit": unit, **spread.fields(), "samples": samples, **ratios,
            "goal": goal, "reached": reached,
        }  # fmt: skip

    if compares:
        yield row(DIFFERENCE, "of the largest number", Spread.of([difference_of(case, way)]))
    goals = case.device == "cuda" and world == 2 and way is not WAYS[RING]
    with contextlib.ExitStack() as stack:
        alone, shared = (together(lambda of=of: stack.enter_context(of(case))) for of in (way.alone, way.shared))
        times = times_of(case, alone, shared, effort)
        rounds = len(times["one"])
        spent = {name: Spread.of([1000 * seconds for seconds in times[name]]) for name in times}

        def ratios(one: str, other: str) -> Spread:
            return Spread.of([a / b for a, b in zip(times[one], times[other], strict=True)])

        yield row(BOTH, "ms", spent["one"], samples=rounds, processes=1)
        goal = TIME_GOALS.get(case.length) if goals else None
        yield row(BOTH, "ms", spent["all"], ratios("all", "one"), goal, samples=rounds)
        goal = WEAK_GOAL if goals else None
        yield row(WEAK_SCALING, "ms", spent["more"], ratios("one", "more"), goal, least=True, samples=rounds)
        one = memory_of(case, alone, False)
        yield row(results.PEAK_MEMORY, "MiB", Spread.of([one]), processes=1)
        each = memory_of(case, shared, True)
        share = Spread.of([each / one]) if one > 0 else None  # on a CPU small steps take pages that were there
        yield row(results.PEAK_MEMORY, "MiB", Spread.of([each]), share, MEMORY_GOAL if goals else None)


def line_of(row: results.Row) -> str:
    share = "" if row["ratio"] is None else f"   share {row['ratio']:.3f}"
    goal = "" if row["goal"] is None else f"   goal {row['goal']:g} {'reached' if row['reached'] else 'missed'}"
    processes = f"{row['processes']} process{'es' * (row['processes'] > 1)}"
    return f"    {row['what']:<28}{processes:<14}{row['median']:12.5g} {row['unit']}{share}{goal}"


def name_of(case: Case, peer: str) -> str:
    return f"{case.length} tokens, {case.heads}/{case.heads_of_key} heads, {peer}"


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m bench.context_parallel",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", nargs="+", type=int, metavar="HEADS", help="of keys and values")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--inputs", nargs="+", default=["structured:0.5"], metavar="INPUT")
    parser.add_argument("--peers", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD",
        help='cases whose name, as "131072 tokens, 32/8 heads, gather", has all these words',
    )  # fmt: skip
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--not-causal", action="store_true")
    parser.add_argument("--seconds", type=float, default=3, help="of rounds a case (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (bench/results/DATE-DEVICE-context-parallel.jsonl)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    known, _ = parser.parse_known_args(arguments)
    parser.set_defaults(**DEFAULTS[known.device])
    return parser.parse_args(arguments)


def cases_of(options: argparse.Namespace) -> list[tuple[Case, str]]:
    """What is measured of which peer, the shortest first, so that much is there if time runs out."""
    threads = 0 if options.device == "cuda" else torch.get_num_threads()
    found = []
    for length, kv_heads, input, peer in product(
        sorted(options.lengths), options.kv_heads, options.inputs, options.peers
    ):
        case = Case(
            options.device, input, heads=options.heads, length=length, head_dim=options.head_dim, dtype=options.dtype,
            alpha=options.alpha, causal=not options.not_causal, threads=threads, kv_heads=kv_heads,
        )  # fmt: skip
        words = name_of(case, peer).replace(",", "").split()
        if all(word in words for word in options.only):
            found.append((case, peer))
    return found


def run(options: argparse.Namespace) -> None:
    facts = machine.facts(options.device)
    file = options.out or results.path_of(facts, "context-parallel")
    say = tqdm.write if is_first() else lambda line: None
    cases = cases_of(options)
    say("ring-flash-attn is left out: it needs the package flash-attn, whose kernels are built for each torch and CUDA")
    for case, peer in tqdm(cases, disable=not is_first()):
        say(f"{case.title}, {dist.get_world_size()} processes, {peer}")
        refusal = WAYS[peer].refuses(case)
        if refusal:
            say(f"    left out: {refusal}")
            continue
        compares = case.length == min(options.lengths)
        try:
            for row in bench(case, WAYS[peer], Effort(options.seconds, fewest=3), compares):
                say(line_of(row))
                if is_first() and not options.no_file:
                    results.append(
                        file, [{**facts, "preset": "context-parallel", **case.to_dict(), "peer": peer, **row}]
                    )
        except FailedError as error:
            say(f"    failed: {error}")
        if case.device == "cuda":
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    if not dist.is_torchelastic_launched():
        sys.exit("error: start it by torchrun --nproc-per-node 2 -m bench.context_parallel")
    wait = datetime.timedelta(minutes=2)  # for a process that failed where the others wait
    if options.device == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=wait, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=wait)
    try:
        run(options)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
