"""The blocks of docs/benchmarks.md: of all that was measured, a few cases that a user decides by, in plain words; and
of what models give a GPU, which goals were reached."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from bench.lib import tables
from bench.lib.case import BOTH, FORWARD, Case
from bench.lib.inputs import is_captured
from bench.lib.presets import (
    BASE,
    BOTH_WAYS_CASE,
    FLAT_CASE,
    GPU_BASE,
    GROUPED_CASE,
    MEMORY_CASE,
    SHORT_CASE,
    TRAINED_CASE,
)
from bench.lib.results import INFERENCE_MEMORY, PEAK_MEMORY, TRAINING_STEP, Row, case_of
from bench.peers import OURS


class Block(NamedTuple):
    """What the page shows of a device.

    setting: what holds for all cases that do not say otherwise.
    goals: whether it says which goals were reached.
    """

    setting: str
    peers: dict[str, str]  # peers by name: what users call them
    about_peers: str
    cases: dict[Case, str]  # what the inputs are
    about_inputs: str
    goals: bool = False


MODELS = "gpu-models"


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
    MODELS: Block(
        "Causal, α = 1.5, bf16, 16,384 tokens, 16 heads of size 64",
        {"sdpa-flash": "FlashAttention-2", "sdpa-cudnn": "cuDNN", "fa3": "FlashAttention-3"},
        "The others are softmax: FlashAttention-2 and cuDNN as torch's `scaled_dot_product_attention` runs them, "
        "FlashAttention-3 the forward pass alone, as the package `fa3-fwd` on PyPI has it.",
        {
            TRAINED_CASE: "a trained GPT: 8,192 tokens, 8 layers of 8 heads",
            **{
                _structured(share, head_dim=head_dim): f"{blocks} empty{size}"
                for share, blocks in ((0, "no block"), (0.5, "half of the blocks"), (0.85, "85 % of the blocks"))
                for head_dim, size in ((64, ""), (128, ", head size 128"))
            },
            GPU_BASE: "random vectors",
            replace(GPU_BASE, head_dim=128): "random vectors, head size 128",
            GROUPED_CASE: "random vectors, 8,192 tokens, 32 heads of queries and 8 of keys of size 128",
            SHORT_CASE: "short: random vectors, 64 × 512 tokens, 12 heads, not causal",
            FLAT_CASE: "flat, as at initialisation: 2 × 8,192 tokens",
            BOTH_WAYS_CASE: "random vectors, 8 × 4,096 tokens, not causal",
            MEMORY_CASE: "random vectors, 32,768 tokens",
        },
        "Flat are queries so near zero that most keys weigh.",
        goals=True,
    ),
}


def block(rows: Sequence[Row], page: str, name: str | None = None) -> str:
    """A block, by default that of the rows' device. Cases that were not measured are left out.

    page: the link to every number.
    Raises ValueError if that leaves none.
    """
    shown = BLOCKS[name or rows[0]["device"]]
    goals = ["goals"] if shown.goals else []
    table: tables.Table = [["input", "keys with weight", "this library, ms", *shown.peers.values(), *goals]]
    used: list[Row] = []
    for case, name in shown.cases.items():
        of_case = [row for row in rows if case_of(row) == case]
        found = {peer: _passes(of_case, peer) for peer in (OURS, *shown.peers)}
        used += of_case
        if not any(found.values()):  # its memory alone was measured, or nothing
            continue
        support = of_case[0]["support"]
        table.append(
            [
                name + _of_a_model(of_case[0]),
                f"{tables.number(support if support >= 100 else float(f'{support:.2g}'))} of {case.length:,}",
                " / ".join(tables.number(row["median"]) for row in found[OURS]),
                *(" / ".join(_short(row["ratio"]) for row in found[peer]) or "–" for peer in shown.peers),
                *([_goals(found, shown)] if shown.goals else []),
            ]
        )
    if not used:
        raise ValueError("no case that it shows was measured")
    how = (
        "This library's time divided by the others', **lower is better**: forward / training step (forward and "
        f"backward). {shown.setting}, unless a row says otherwise."
    )
    texts = [shown.about_inputs, shown.about_peers, *(_memory(used, shown, what) for what in MEMORIES)]
    if shown.goals:
        steps = [row for row in rows if row["what"] == TRAINING_STEP]
        used += steps
        texts.append(_training_step(steps, shown))
    notes = " ".join(text for text in texts if text)
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


MEMORIES = {
    PEAK_MEMORY: "a training step, inputs and gradients included",
    INFERENCE_MEMORY: "inference, inputs and output included",
}


def _memory(rows: Sequence[Row], shown: Block, what: str) -> str:
    """Peak memory beside that of the others, each length once, in a sentence; empty if it was not measured."""
    parts = []
    for peer, label in shown.peers.items():
        found = {row["length"]: row for row in rows if (row["peer"], row["what"]) == (peer, what)}
        if found:
            (length, row), *longer = sorted(found.items())
            first = f"{_short(row['ratio'])} of {label}'s at {length:,} tokens{_in_brackets(row, shown)}"
            others = (f"{_short(row['ratio'])} at {length:,}{_in_brackets(row, shown)}" for length, row in longer)
            parts.append(", ".join((first, *others)))
    return f"Peak memory of {MEMORIES[what]}: {'; '.join(parts)}." if parts else ""


def _training_step(rows: Sequence[Row], shown: Block) -> str:
    """What `bench.training_step` measured, in a sentence; empty if it did not run."""
    ours = next((row for row in rows if row["peer"] == OURS), None)
    others = [row for row in rows if row["peer"] in shown.peers]
    if ours is None or not others:
        return ""
    best = max(others, key=lambda row: row["ratio"])
    beside = ", ".join(f"{_short(row['ratio'])} of that with {shown.peers[row['peer']]}" for row in others)
    return (
        f"A training step of the whole trained GPT, {ours['batch']} × {ours['length']:,} tokens, takes "
        f"{tables.number(ours['median'])} ms, {beside}{_in_brackets(best, shown)}."
    )


def _goals(found: dict[str, list[Row]], shown: Block) -> str:
    """What became of a case's goals."""
    passes = {FORWARD: "forward", BOTH: "training"}
    return "; ".join(
        f"{label}, {passes[row['what']]}, {_outcome(row)}"
        for peer, label in shown.peers.items()
        for row in found[peer]
        if row["goal"] is not None
    )


def _outcome(row: Row) -> str:
    """A goal, and whether it was reached or by how much of it it was missed."""
    if row["reached"]:
        return f"{row['goal']:g}: reached"
    return f"{row['goal']:g}: **missed by {tables.number(100 * (row['ratio'] / row['goal'] - 1))} %**"


def _in_brackets(row: Row, shown: Block) -> str:
    return f" (goal {_outcome(row)})" if shown.goals and row["goal"] is not None else ""


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"
