"""Counts which keys of other processes have weight for a process' queries: what context parallelism would not have to
send if each process asked for values by pages, once it has all keys.

    python -m bench.support_pages                                            what the note about it shows
    python -m bench.support_pages --inputs captured:own.pt --no-file         of a model that bench.capture took

A page is wanted if any query of the process, of any head of its key head's group, gives any of its keys weight. Counted
from float32 scores and the op's own thresholds, for each head of keys by itself.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from adasplash import attention_stats
from bench.lib import machine, results
from bench.lib.case import Case
from bench.lib.inputs import Inputs, captured_sizes, is_captured, make_inputs
from bench.lib.timing import Spread

WORLDS, PAGES = (2, 4, 8), (1, 16, 64)
CHUNKS = 2 * max(WORLDS)
AT_ONCE = 1 << 24  # scores
SYNTHETIC = [
    Case(input=input, heads=heads, kv_heads=1, length=length)
    for input in ("gaussian:1.5", "structured:0.8", "structured:0.95")
    for length, heads in ((8192, 1), (8192, 4), (16_384, 1))
]


@torch.no_grad()
def weighed(case: Case, inputs: Inputs) -> Tensor:
    """(B, H_kv, chunks, N): whether any query of a chunk gives a key weight."""
    query, key, value = inputs
    length, groups = key.shape[2], query.shape[1] // key.shape[1]
    found = torch.zeros(*key.shape[:2], CHUNKS, length, dtype=torch.bool)
    tau = attention_stats(query, key, value, case.alpha, case.causal).tau
    factor = (case.alpha - 1) * case.head_dim**-0.5
    for entry, head in torch.cartesian_prod(*(torch.arange(size) for size in key.shape[:2])).tolist():
        for chunk in range(CHUNKS):
            of_chunk = slice(chunk * length // CHUNKS, (chunk + 1) * length // CHUNKS)
            seen = of_chunk.stop if case.causal else length
            for member in range(head * groups, (head + 1) * groups):
                rows, thresholds = query[entry, member, of_chunk], tau[entry, member, of_chunk]
                first = of_chunk.start
                for part, above in zip(
                    rows.split(max(1, AT_ONCE // length)), thresholds.split(max(1, AT_ONCE // length)), strict=True
                ):
                    scores = part.float() @ key[entry, head, :seen].float().T * factor
                    weighs = scores > above[:, None]
                    if case.causal:
                        weighs.tril_(first)
                    found[entry, head, chunk, :seen] |= weighs.any(0)
                    first += len(part)
    return found


def shares(found: Tensor, world: int, page: int) -> list[float]:
    """For each process: of the pages that others have, over all heads of keys, the share that it wants."""
    length = found.shape[-1]
    pages = found.unflatten(-1, (length // page, page)).any(-1)
    by_chunk = pages.unflatten(2, (2 * world, -1)).any(3)  # (B, H_kv, 2W, pages)
    chunk_of_page = torch.arange(length // page) // (length // page // (2 * world))
    wanted = []
    for rank in range(world):
        mine = torch.tensor([rank, 2 * world - 1 - rank])
        others = ~torch.isin(chunk_of_page, mine)
        wanted.append(by_chunk[:, :, mine].any(2)[..., others].double().mean().item())
    return wanted


def bench(case: Case) -> Iterator[results.Row]:
    inputs = make_inputs(case)
    support = attention_stats(*inputs, case.alpha, case.causal).support_size.double().mean().item()
    found = weighed(case, inputs)
    for world in WORLDS:
        for page in PAGES:
            per_process = shares(found, world, page)
            yield {
                "processes": world, "page": page, "what": "pages wanted", "unit": "share of those of others",
                "support": round(support, 2), **Spread.of(per_process).fields(), "most": max(per_process),
                "samples": world,
            }  # fmt: skip


def cases_of(options: argparse.Namespace) -> list[Case]:
    if options.inputs is None:
        return SYNTHETIC
    return [Case(input=input, **(captured_sizes(input) if is_captured(input) else {})) for input in options.inputs]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.support_pages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", nargs="+", metavar="INPUT", help="(default: drawn ones, of several sizes)")
    parser.add_argument("--out", type=Path, help="result file (bench/results/DATE-cpu-support-pages.jsonl)")
    parser.add_argument("--no-file", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    facts = machine.facts("cpu")
    file = options.out or results.path_of(facts, "support-pages")
    for case in tqdm(cases_of(options)):
        tqdm.write(case.title)
        kind, _, path = case.input.partition(":")
        fields = {**case.to_dict(), "input": f"{kind}:{Path(path).name}" if is_captured(case.input) else case.input}
        for row in bench(case):
            pages = f"{row['processes']} processes, pages of {row['page']}"
            tqdm.write(f"    {pages}: {row['median']:.3f}, at most {row['most']:.3f}")
            if not options.no_file:
                results.append(file, [{**facts, "preset": "support-pages", **fields, "peer": "adasplash", **row}])


if __name__ == "__main__":
    main()
