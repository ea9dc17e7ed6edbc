"""The blocks of docs/benchmarks.md: of all that was measured, a few cases that a user decides by, in plain words."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from bench.lib import tables
from bench.lib.case import BOTH, FORWARD, Case
from bench.lib.inputs import is_captured
from bench.lib.presets import BASE, GPU_BASE, TRAINED_CASE
from bench.lib.results import PEAK_MEMORY, Row, case_of
from bench.peers import OURS


class Block(NamedTuple):
    """What the page shows of a device. setting: what holds for all cases that do not say otherwise."""

    setting: str
    peers: dict[str, str]  # peers by name: what users call them
    about_peers: str
    cases: dict[Case, str]  # what the inputs are
    about_inputs: str


def _structured(share: float, **changes) -> Case:
    return replace(GPU_BASE, input=f"structured:{share:g}", **changes)


BLOCKS = {
    "cpu": Block(
        "Causal, α = 1.5, fp32, 4,096 tokens, 4 heads of size 64",
        {"sdpa": "softmax", "entmax-exact": "dense entmax"},
        "Softmax is torch's `scaled_dot_product_attention`; dense entmax is `entmax15` of the package `entmax` between "
        "two matrix products.",
        {
            replace(BASE, input="gaussian:3"): "random vectors",
            BASE: "random vectors",
            replace(BASE, input="gaussian:1"): "random vectors",
            replace(BASE, length=2048): "random vectors, 2,048 tokens",
            replace(BASE, length=16384): "random vectors, 16,384 tokens",
            replace(BASE, dtype="bf16"): "random vectors, bf16",
            replace(BASE, input="gaussian:0.05"): "scores nearly equal: every visible key has weight",
        },
        "Random vectors are normally distributed queries and keys: the larger they are, the fewer keys get weight.",
    ),
    "cuda": Block(
        "Causal, α = 1.5, bf16, 16,384 tokens, 16 heads of size 64",
        {"sdpa-flash": "FlashAttention-2", "sdpa-cudnn": "cuDNN", "pypi-v2": "AdaSplash-2"},
        "FlashAttention-2 and cuDNN are softmax, as torch's `scaled_dot_product_attention` runs it; AdaSplash-2 is the "
        "same α-entmax attention from the package `adasplash` 0.2.2 on PyPI.",
        {
            _structured(0.8): "80 % of the blocks empty",
            _structured(0.8, head_dim=128): "80 % of the blocks empty, head size 128",
            _structured(0.5): "half of the blocks empty",
            _structured(0.5, length=131072): "half of the blocks empty, 131,072 tokens",
            _structured(0.5, length=2048, heads=128): "half of the blocks empty, 2,048 tokens, 128 heads",
            _structured(0): "no block empty",
            GPU_BASE: "random vectors",
            replace(GPU_BASE, input="captured:captured64.pt", batch=384, heads=4, length=256, head_dim=32): (
                "the demo's trained model: 256 tokens, 1,536 heads of size 32"
            ),
            TRAINED_CASE: "a trained GPT: 8,192 tokens, 8 layers of 8 heads",
        },
        "A block is 64 queries by 64 keys, and empty if none of these pairs has weight: here keys belong to topics. "
        "In random vectors and in trained models the keys with weight lie anywhere. The trained GPT reads Python "
        "sources; `python -m bench.capture` trains it again.",
    ),
}


def block(rows: Sequence[Row], page: str) -> str:
    """The block of the rows' device. page: the link to every number. Cases that were not measured are left out.

    Raises ValueError if that leaves none.
    """
    shown = BLOCKS[rows[0]["device"]]
    table: tables.Table = [["input", "keys with weight", "this library, ms", *shown.peers.values()]]
    used: list[Row] = []
    for case, name in shown.cases.items():
        of_case = [row for row in rows if case_of(row) == case]
        found = {peer: _passes(of_case, peer) for peer in (OURS, *shown.peers)}
        if not any(found.values()):
            continue
        used += of_case
        support = of_case[0]["support"]
        table.append(
            [
                name + _of_a_model(of_case[0]),
                f"{tables.number(support if support >= 100 else float(f'{support:.2g}'))} of {case.length:,}",
                " / ".join(tables.number(row["median"]) for row in found[OURS]),
                *(" / ".join(_short(row["ratio"]) for row in found[peer]) or "–" for peer in shown.peers),
            ]
        )
    if not used:
        raise ValueError("no case that it shows was measured")
    how = (
        "This library's time divided by the others', **lower is better**: forward / training step (forward and "
        f"backward). {shown.setting}, unless a row says otherwise."
    )
    notes = " ".join(text for text in (shown.about_inputs, shown.about_peers, _memory(used, shown)) if text)
    where = f"Measured on: {tables.heading(used)} [Every number]({page})."
    return "\n\n".join((how, tables.markdown(table), notes, where))


def _of_a_model(row: Row) -> str:
    """What heads of a trained model look like, behind the input's name."""
    if not is_captured(row["input"]) or "keys_of_block" not in row:
        return ""
    empty, weighed = row["empty_tiles"], row["keys_of_block"]
    return f"; {empty:.0%} of the blocks empty, 64 neighbours weigh {weighed:.1%} of their keys"


def _passes(rows: Sequence[Row], peer: str) -> list[Row]:
    """Forward and training step of a peer, as it was first measured; empty if it was not."""
    found = {row["what"]: row for row in reversed(rows) if row["peer"] == peer}
    return [found[what] for what in (FORWARD, BOTH) if what in found]


def _memory(rows: Sequence[Row], shown: Block) -> str:
    """Peak memory beside that of the others, each length once, in a sentence; empty if it was not measured."""
    parts = []
    for peer, label in shown.peers.items():
        ratios = {row["length"]: row["ratio"] for row in rows if (row["peer"], row["what"]) == (peer, PEAK_MEMORY)}
        if ratios:
            (length, ratio), *longer = sorted(ratios.items())
            first = f"{_short(ratio)} of {label}'s at {length:,} tokens"
            parts.append(", ".join((first, *(f"{_short(ratio)} at {length:,}" for length, ratio in longer))))
    return f"Peak memory of a training step, inputs and gradients included: {'; '.join(parts)}." if parts else ""


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"
