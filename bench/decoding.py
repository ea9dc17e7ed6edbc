"""Times a step of decoding, one new query a sequence: this library against softmax over the same cache.

    python -m bench.decoding                          the table of goals for the CPU
    python -m bench.decoding --device cuda            … for a GPU
    python -m bench.decoding --device cuda --cases 1x32768 16x4096 --inputs scores:1 flat --no-file
    python -m bench.decoding --write FILE …           the block of docs/benchmarks.md, of these result files

scores:σ stands for scores from N(0, σ²), flat for queries that are nearly zero, trained for the last query of each head
of the GPT that `bench.capture` trained, a layer a sequence (--cases 8x8192 --heads 8 8 --head-dim 64). Peers run in
turn; ratios are medians over rounds of ours / theirs. On a GPU each step is a captured CUDA graph, so that what the
host does is not timed. `flash-attn-3` is FlashAttention-3's flash_attn_with_kvcache, where it is installed (pip install
fa3-fwd); `sdpa` is torch's attention with grouped heads.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from adasplash import (
    attention_stats,
    entmax_attn,
    entmax_attn_paged,
    entmax_cache_append,
    entmax_key_index_update,
    make_key_index,
)
from bench.lib import machine, results, tables
from bench.lib.case import DTYPES
from bench.lib.inputs import FLAT, captured, is_captured
from bench.lib.timing import Effort, Spread
from bench.peers import fa3
from bench.report import BENCHMARKS, replace_block

OURS = "adasplash"
INDEXED = f"{OURS}, index"
PAGE = 64
Step = Callable[[], object]


class Cache:
    """A batch of sequences of one length: a query of each, keys and values behind each other and in pages."""

    def __init__(self, device: str, batch: int, length: int, heads: tuple[int, int], size: int, dtype: str, input: str):
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])

        if is_captured(input):
            if heads[0] != heads[1]:
                raise ValueError(f"{input} has as many heads of keys as of queries, got {heads[0]} and {heads[1]}")
            held = (x.transpose(1, 2) for x in captured(input, (batch, heads[0], length, size)))
            query, self.key, self.value = (x.contiguous().to(device, DTYPES[dtype]) for x in held)
            self.query = query[:, -1:]
        else:
            kind, _, sigma = input.partition(":")
            query_spread, key_spread = (FLAT, 1.0) if kind == "flat" else (float(sigma) ** 0.5,) * 2
            self.query = draw(batch, 1, heads[0], size) * query_spread
            self.key, self.value = draw(batch, length, heads[1], size) * key_spread, draw(batch, length, heads[1], size)
        self.lengths = torch.full((batch,), length, device=device, dtype=torch.int32)
        pages = batch * length // PAGE
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).to(device)
        self.table = order.int().view(batch, -1)
        self.key_pages, self.value_pages = (
            torch.empty_like(x).view(pages, PAGE, heads[1], size) for x in (self.key, self.value)
        )
        for cache, x in ((self.key_pages, self.key), (self.value_pages, self.value)):
            cache[order] = x.view(pages, PAGE, heads[1], size)
        # An index of the keys behind each other, where a sequence is a page, and of those in pages.
        self.index, self.page_index = (indexed(cache) for cache in (self.key, self.key_pages))
        self.new = [draw(batch, heads[1], size) for _ in range(2)]
        last = torch.tensor([length - 1], device=device)
        self.slots = self.table[:, last // PAGE].long().flatten() * PAGE + last % PAGE

    def dense(self) -> list[Tensor]:
        return [x.transpose(1, 2) for x in (self.query, self.key, self.value)]


def indexed(key_cache: Tensor) -> Tensor:
    """An index of all keys."""
    index = make_key_index(key_cache)
    entmax_key_index_update(key_cache, torch.arange(key_cache[:, :, 0, 0].numel(), device=key_cache.device), index)
    return index


def peers(cache: Cache, alpha: float) -> dict[str, Step]:
    query, key, value = cache.dense()
    pages = (cache.key_pages, cache.value_pages)

    def paged(index: Tensor | None = None) -> Tensor:
        return entmax_attn_paged(cache.query[:, 0], *pages, cache.table, cache.lengths, alpha, key_index=index)

    def step(index: Tensor | None = None) -> Tensor:
        entmax_cache_append(*cache.new, *pages, cache.slots, index)
        return paged(index)

    found: dict[str, Step] = {
        OURS: lambda: entmax_attn(query, key, value, alpha),
        f"{OURS}, pages": paged,
        f"{OURS}, append and pages": step,
        INDEXED: lambda: entmax_attn(query, key, value, alpha, key_index=cache.index),
        f"{INDEXED}, pages": lambda: paged(cache.page_index),
        f"{INDEXED}, append and pages": lambda: step(cache.page_index),
        "sdpa": lambda: scaled_dot_product_attention(query, key, value, enable_gqa=True),
    }
    flash_attn_3 = fa3.interface() if query.is_cuda else None
    if flash_attn_3 is not None:
        found["flash-attn-3"] = lambda: flash_attn_3.flash_attn_with_kvcache(
            cache.query, cache.key, cache.value, cache_seqlens=cache.lengths, causal=True
        )
    return found


def replayed(step: Step) -> Step:
    """A replay of the step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(step: Step, device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure(steps: dict[str, Step], device: str, effort: Effort) -> dict[str, list[float]]:
    """Milliseconds of each, a round an entry; each round begins with the next one."""
    names, found = list(steps), {name: [] for name in steps}
    for name in names:
        milliseconds(steps[name], device)
    began, rounds = time.perf_counter(), 0
    while rounds < effort.most and (rounds < effort.fewest or time.perf_counter() - began < effort.seconds):
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            found[name].append(milliseconds(steps[name], device))
        rounds += 1
    return found


@torch.inference_mode()
def bench(cache: Cache, alpha: float, device: str, effort: Effort) -> Iterator[results.Row]:
    """A row for each peer."""
    support = attention_stats(*cache.dense(), alpha=alpha).support_size.double().mean().item()
    steps = peers(cache, alpha)
    if device == "cuda":
        steps = {name: replayed(step) for name, step in steps.items()}
    times = measure(steps, device, effort)
    for peer, spent in times.items():
        ours = peer.startswith(OURS)
        ratios = Spread.of([a / b for a, b in zip(times[OURS], spent, strict=True)])
        yield {
            "peer": peer, "what": "a step", "unit": "ms", "support": round(support, 2),
            **Spread.of(spent).fields(), "samples": len(spent),
            **(results.NO_RATIO if ours else ratios.fields("ratio")),
        }  # fmt: skip


def by_device(rows: list[results.Row]) -> list[tuple[str, list[results.Row]]]:
    devices = dict.fromkeys(row["device"] for row in rows)
    return [(device, [row for row in rows if row["device"] == device]) for device in devices]


def block(rows: list[results.Row]) -> str:
    """What the page shows: a line for each case of a device."""
    peers = {"flash-attn-3": "FlashAttention-3", "sdpa": "torch's softmax"}
    head = [
        "sequences × keys",
        "heads, size",
        "type",
        "scores",
        "keys with weight",
        "a step",
        "in pages",
        *peers.values(),
    ]
    table: tables.Table = [head]
    fields = ("device", "batch", "length", "heads", "kv_heads", "head_dim", "dtype", "input")
    rows = sorted(rows, key=lambda row: row["device"] == "cpu")  # below the others
    cases = {tuple(row[name] for name in fields): {} for row in rows}
    for row in rows:
        cases[tuple(row[name] for name in fields)][row["peer"]] = row
    for (device, batch, length, heads, kv_heads, size, dtype, input), found in cases.items():
        ours, pages = (found[name]["median"] for name in (OURS, f"{OURS}, pages"))
        table.append(
            [
                f"{batch} × {length:,}" + (" on the CPU" if device == "cpu" else ""),
                f"{heads}/{kv_heads}, {size}",
                dtype,
                scores_of(input),
                tables.number(found[OURS]["support"]),
                f"{tables.number(ours)} ms",
                f"{tables.number(pages)} ms",
                *(f"{found[peer]['ratio']:.2f}" if peer in found else "–" for peer in peers),
            ]
        )
    where = [
        f"{'The rows on the CPU: ' if device == 'cpu' else ''}{tables.heading(of)}" for device, of in by_device(rows)
    ]
    return (
        "A step of decoding, one new query a sequence, α = 1.5: this library's time, with keys behind each other and "
        f"in a paged cache (pages of {PAGE}), and the first of these divided by the others' over the same keys, "
        "**lower is better**. On a GPU all are captured graphs. Heads are of queries / of keys; flat scores are those "
        "of a query near zero; writing the new key is not counted, and what caches hold from the step before is left "
        "there.\n\n"
        f"{tables.markdown(table)}\n\nMeasured on: {' '.join(where)} `python -m bench.decoding`."
    )


def scores_of(input: str) -> str:
    if is_captured(input):
        return "a trained GPT's"
    return "flat" if input == "flat" else f"N(0, {input.partition(':')[2]}²)"


def line_of(row: results.Row) -> str:
    text = f"    {row['peer']:<28}{1e3 * row['median']:12.1f} µs"
    return text if row["ratio"] is None else f"{text}   ours/theirs {row['ratio']:.3f}"


def case_of(text: str) -> tuple[int, int]:
    batch, length = text.split("x")
    if int(length) % PAGE:
        raise argparse.ArgumentTypeError(f"lengths must be multiples of {PAGE}, got {length}")
    return int(batch), int(length)


CASES = {
    "cpu": [(1, 131072)],
    "cuda": [(1, 4096), (1, 32768), (1, 131072), (1, 1 << 20), (16, 4096), (16, 32768), (16, 131072)],
}
DTYPE_NAMES = {"cpu": ["fp32", "bf16"], "cuda": ["bf16"]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decoding", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", type=case_of, metavar="SEQUENCESxKEYS")
    parser.add_argument("--inputs", nargs="+", default=["scores:1.5"], metavar="INPUT")
    parser.add_argument("--heads", nargs=2, type=int, default=[32, 8], metavar=("QUERY", "KEY"))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--seconds", type=float, default=5, help="of rounds a case (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/DATE-DEVICE-decoding.jsonl)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    parser.add_argument(
        "--write", nargs="+", type=Path, metavar="FILE", help="write docs/benchmarks.md's block of these"
    )
    options = parser.parse_args(arguments)
    if options.write:
        BENCHMARKS.write_text(
            replace_block(BENCHMARKS.read_text(), "bench:decoding", block(results.read(options.write)))
        )
        return
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device here")
    facts = machine.facts(device)
    os.environ["ADASPLASH_KEY_INDEX"] = "read"  # as INDEXED says; a GPU would not read one of few keys
    file = options.out or results.path_of(facts, "decoding")
    effort = Effort(options.seconds, fewest=5)
    sizes = options.cases or CASES[device]
    for (batch, length), dtype, input in tqdm(
        list(product(sizes, options.dtypes or DTYPE_NAMES[device], options.inputs)), disable=None
    ):
        cache = Cache(device, batch, length, tuple(options.heads), options.head_dim, dtype, input)
        rows = list(bench(cache, options.alpha, device, effort))
        tqdm.write(f"{batch} × {length:,} keys, {dtype}, {input}: {rows[0]['support']:g} keys a query")
        for row in rows:
            tqdm.write(line_of(row))
        if not options.no_file:
            heads, kv_heads = options.heads
            case = {
                "input": input, "batch": batch, "length": length, "heads": heads, "kv_heads": kv_heads,
                "head_dim": options.head_dim, "dtype": dtype, "alpha": options.alpha,
                "threads": torch.get_num_threads(),
            }  # fmt: skip
            results.append(file, [{**facts, "preset": "decoding", **case, **row} for row in rows])


if __name__ == "__main__":
    main()
