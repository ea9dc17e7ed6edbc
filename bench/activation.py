"""Times the activation: this library against torch.softmax and the `entmax` package, forward and training step.

    python -m bench.activation                              4096 × 1000, 128 × 32,000 and 8 × 1,048,576 scores
    python -m bench.activation --device cuda --dtypes fp32 bf16
    python -m bench.activation --shapes 64x100 --alphas 1.5 --no-file

Scores are drawn from N(0, σ²). Peers run in turn, as in bench.attention: ratios are medians over rounds of ours /
theirs. The package's peer is its best for that α: entmax15 and sparsemax (which sort), entmax_bisect elsewhere; with
`-partial` they sort the 100 largest first (k=100), which pays where the support is small.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import entmax as package
import torch
from torch import Tensor
from tqdm import tqdm

import adasplash
from bench.lib import machine, results
from bench.lib.case import BOTH, DTYPES, FORWARD
from bench.lib.runner import FunctionRunner
from bench.lib.timing import Effort, measure

OURS, SOFTMAX, PACKAGE = "adasplash", "torch softmax", "entmax"
WHAT = (FORWARD, BOTH)
Function = Callable[[Tensor], Tensor]


def peers(alpha: float) -> dict[str, Function]:
    found: dict[str, Function] = {
        OURS: lambda x: adasplash.entmax(x, alpha),
        SOFTMAX: lambda x: torch.softmax(x, -1),
    }
    if alpha in (1.5, 2):
        sorting = package.entmax15 if alpha == 1.5 else package.sparsemax
        found |= {PACKAGE: lambda x: sorting(x), f"{PACKAGE}-partial": lambda x: sorting(x, k=100)}
    else:
        found[PACKAGE] = lambda x: package.entmax_bisect(x, alpha)
    return found


def bench(device: str, shape: tuple[int, int], dtype: str, alpha: float, sigma: float, effort: Effort) -> Iterator:
    """Yields result rows."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for _ in range(2))
    x *= sigma
    support = (adasplash.entmax(x, alpha) > 0).sum(-1).double().mean().item()
    contenders = peers(alpha)
    runners = [FunctionRunner(function, (x,), grad) for function in contenders.values()]
    first_calls = []
    for runner in runners:
        start = time.perf_counter()
        runner.sample(1)
        first_calls.append(time.perf_counter() - start)
    timings = dict(zip(contenders, measure(runners, effort, first_calls), strict=True))
    for (peer, timing), what in product(timings.items(), WHAT):
        ratio = None if peer == OURS else timings[OURS].ratio_to(timing, what)
        yield {
            "rows": shape[0], "length": shape[1], "dtype": dtype, "alpha": alpha, "sigma": sigma,
            "threads": torch.get_num_threads(), "support": round(support, 2), "peer": peer, "what": what, "unit": "ms",
            **timing.milliseconds(what).fields(), "samples": len(timing.seconds[what]),
            **(ratio.fields("ratio") if ratio else results.NO_RATIO),
        }  # fmt: skip


def line_of(row: results.Row) -> str:
    text = f"    {row['peer']:<16}{row['what']:<18}{row['median']:10.2f} ms"
    return text if row["ratio"] is None else f"{text}   ours/theirs {row['ratio']:.3f}"


def shape_of(text: str) -> tuple[int, int]:
    rows, length = text.split("x")
    return int(rows), int(length)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.activation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    shapes = [(4096, 1000), (128, 32000), (8, 1 << 20)]
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=shapes, metavar="ROWSxLENGTH")
    parser.add_argument("--alphas", nargs="+", type=float, default=[1.5, 2.0, 1.25], metavar="A")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=10, help="of rounds a case (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/DATE-DEVICE-activation.jsonl)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device here")
    facts = machine.facts(options.device)
    file = options.out or results.path_of(facts, "activation")
    effort = Effort(options.seconds, fewest=3)
    for shape, dtype, alpha in tqdm(list(product(options.shapes, options.dtypes, options.alphas)), disable=None):
        rows = list(bench(options.device, shape, dtype, alpha, options.sigma, effort))
        tqdm.write(f"{shape[0]} × {shape[1]}, {dtype}, α={alpha:g}: {rows[0]['support']:g} weights a row")
        for row in rows:
            tqdm.write(line_of(row))
        if not options.no_file:
            results.append(file, [{**facts, "preset": "activation", **row} for row in rows])


if __name__ == "__main__":
    main()
