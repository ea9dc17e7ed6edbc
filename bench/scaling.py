"""What sequences over many GPUs cost: the tables of docs/scaling.md, from shapes, from one GPU's measured time, and
from what two GPUs have measured.

    python -m bench.scaling            prints them
    python -m bench.scaling --write    writes them into the page

Bytes and operations are counted. Times beyond two GPUs are computed, and none of them is measured.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.context_parallel import DIFFERENCE, WEAK_SCALING
from bench.lib import results, tables
from bench.lib.case import BOTH
from bench.peers import OURS
from bench.report import replace_block

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
TOKENS, HEADS, KEY_HEADS, CHANNELS, BYTES = 1 << 20, 32, 8, 128, 2
GPUS = (8, 16, 64, 256, 1024)
A_HOST = 8  # GPUs that share one, and its NVLink
# Bytes a second that a GPU receives: NVLink 4 of an H100 or H200 has 900 GB/s in both directions together, and a host
# of eight mostly one network card of 400 Gbit/s for each. Nominal, not measured.
WITHIN, BETWEEN = 450e9, 50e9
# Of a case that is measured.
MEASURED = dict(input="structured:0.5", length=131_072, head_dim=CHANNELS, what=BOTH)
KEYS = TOKENS * KEY_HEADS * 2 * CHANNELS * BYTES  # bytes of all keys and values


def measured() -> results.Row:
    """The newest row of a training step of one layer's attention on one GPU."""
    files = sorted(results.FOLDER.glob("*-cuda-*.jsonl"))
    rows = [row for row in results.read(files) if all(row.get(name) == value for name, value in MEASURED.items())]
    ours = [row for row in rows if row["peer"] == OURS or (row["peer"] == "gather" and row["processes"] == 1)]
    return max(ours, key=lambda row: row["date"])


def seconds_of_one() -> float:
    """On one GPU, by the square of the length, which is a bound: measured growth is less."""
    row = measured()
    return row["median"] / 1000 * HEADS / row["heads"] * (TOKENS / row["length"]) ** 2


@dataclass(frozen=True)
class Cost:
    """Of one layer's attention on each of so many GPUs: bytes received in the forward, of what is exchanged within a
    host and of keys and values that come whole, from the same host and from others; how many times that in the
    backward; bytes of keys and values that are kept for it; and which share of what comes whole computing can hide at
    best, behind which share of its time."""

    exchanged: float
    within: float
    between: float
    kept: float
    hidden: float
    back: float = 1.0
    behind: float = 1.0

    @property
    def forward(self) -> float:
        return self.exchanged + self.within + self.between

    @property
    def received(self) -> float:
        return self.forward * (1 + self.back)

    def seconds(self) -> tuple[float, float]:
        """All of it, and what of that computing can hide."""
        whole = (self.within / WITHIN + self.between / BETWEEN) * (1 + self.back)
        return whole + self.exchanged / WITHIN * (1 + self.back), whole * self.hidden


def gather(gpus: int) -> Cost:
    """Causal: half of what is fetched may come, and half of the gradients leave, behind the first chunk's work."""
    near = min(gpus, A_HOST)
    return Cost(
        0,
        KEYS * (near - 1) / gpus,
        KEYS * (gpus - near) / gpus,
        KEYS * (2 * gpus + 1) / (2 * gpus),
        0.5,
        behind=1 / (4 * gpus),
    )


def exchange(gpus: int) -> Cost | None:
    """Within a host only, and where heads can be dealt out."""
    return None if KEY_HEADS % gpus else Cost(_exchanged(gpus, gpus), 0, 0, KEYS / gpus, 0.0)


def both(gpus: int) -> Cost | None:
    """Heads are exchanged within a host, and keys and values of a host's share of them gathered between hosts."""
    if gpus <= A_HOST or KEY_HEADS % A_HOST:
        return None
    hosts, keys = gpus // A_HOST, KEYS / A_HOST
    kept = keys * (2 * hosts + 1) / (2 * hosts)
    return Cost(_exchanged(gpus, A_HOST), 0, keys * (hosts - 1) / hosts, kept, 0.5, behind=1 / (4 * hosts))


def ring(gpus: int) -> Cost:
    """Liu, Zaharia and Abbeel, 2023: blocks of key and value go round; back their gradients go with them."""
    near = min(gpus, A_HOST)
    return Cost(0, KEYS * (near - 1) / gpus, KEYS * (gpus - near) / gpus, KEYS / gpus, 1.0, back=2.0)


def _exchanged(gpus: int, near: int) -> float:
    """What a GPU receives of one GPU's tokens of all heads, if `near` of them deal them out."""
    return TOKENS / gpus * (HEADS + KEY_HEADS) * 2 * CHANNELS * BYTES * (near - 1) / near


def efficiency(cost: Cost, gpus: int, hides: bool) -> float:
    """Computing as a share of the time, if all that can be hidden is, or if nothing is: of the first process, which has
    least to hide it behind, as a step ends with the slowest."""
    computing = seconds_of_one() / gpus
    sent, hidden = cost.seconds()
    return computing / (computing + sent - (min(hidden, computing * cost.behind) if hides else 0.0))


def table() -> str:
    ways = {"gather": gather, "exchange": exchange, "both": both}
    rows: tables.Table = [
        ["GPUs", "computing", *(f"{name}: received, kept, efficiency" for name in ways), "ring: received, kept"]
    ]

    def bytes_of(cost: Cost) -> str:
        return f"{cost.received / 1e9:.2f} GB, {cost.kept / 1e9:.2f} GB"

    def shown(cost: Cost | None, gpus: int) -> str:
        if cost is None:
            return "–"
        low, high = (f"{efficiency(cost, gpus, hides):.2f}" for hides in (False, True))
        return f"{bytes_of(cost)}, {low if low == high else f'{low} – {high}'}"

    for gpus in GPUS:
        computing = f"{seconds_of_one() / gpus:.3g} s"
        rows.append([f"{gpus:,}", computing, *(shown(way(gpus), gpus) for way in ways.values()), bytes_of(ring(gpus))])
    one = measured()
    return (
        f"One layer's attention, {TOKENS:,} tokens, {HEADS} heads of queries and {KEY_HEADS} of keys, {CHANNELS} "
        f"channels, {BYTES} bytes a number, causal, forward and backward, for each GPU. One GPU: "
        f"{one['median']:.0f} ms measured at {one['length']:,} tokens with {one['heads']} heads, half the tiles empty "
        f"({one['processor']}); {seconds_of_one():.3g} s here, by the square of the length. **Computed, not measured.**"
        "\n\n"
        f"{tables.markdown(rows)}"
    )


def two_gpus() -> str:
    """What bench.context_parallel has measured on two GPUs, newest; or that it has not."""
    file = results.latest("cuda", "context-parallel")
    if file is None:
        return "**Not run yet.**"
    return table_of_two(results.read([file]))


def table_of_two(rows: Sequence[results.Row]) -> str:
    found = {(row["length"], row["kv_heads"], row["peer"], row["processes"], row["what"]): row for row in rows}
    table: tables.Table = [
        ["tokens", "heads of keys", "by", "one GPU", "two GPUs", "share", "weak scaling", "memory, share", "difference"]
    ]

    def shown(row: results.Row | None, form: str) -> str:
        if row is None or ("ratio" in form and row["ratio"] is None):  # of memory too little to be seen
            return "–"
        reached = "" if row["goal"] is None else f" (goal {row['goal']:g}{'' if row['reached'] else ', missed'})"
        return form.format(**row) + reached

    for length, kv_heads, peer in dict.fromkeys((row["length"], row["kv_heads"], row["peer"]) for row in rows):

        def row_of(what: str, processes: int = 2, of: tuple = (length, kv_heads, peer)) -> results.Row | None:
            return found.get((*of, processes, what))

        table.append(
            [
                f"{length:,}", str(kv_heads), peer, shown(row_of(BOTH, 1), "{median:.3g} ms"),
                "–" if row_of(BOTH) is None else f"{row_of(BOTH)['median']:.3g} ms", shown(row_of(BOTH), "{ratio:.2f}"),
                shown(row_of(WEAK_SCALING), "{ratio:.2f}"), shown(row_of(results.PEAK_MEMORY), "{ratio:.2f}"),
                shown(row_of(DIFFERENCE), "{median:.1e}"),
            ]
        )  # fmt: skip
    first = rows[0]
    return (
        f"{first['processor']}, torch {first['torch']}, commit {first['commit']}, {first['date'][:10]}; "
        f"{first['input']}, {first['heads']} heads of size {first['head_dim']}, {first['dtype']}, "
        f"{'causal' if first['causal'] else 'not causal'}. Difference: of output and gradients from one GPU's, as a "
        "share of the largest number.\n\n"
        f"{tables.markdown(table, left=3)}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    if parser.parse_args(arguments).write:
        page = replace_block(PAGE.read_text(), "bench:scaling", table())
        PAGE.write_text(replace_block(page, "bench:two-gpus", two_gpus()))
    else:
        print(table(), two_gpus(), sep="\n\n")


if __name__ == "__main__":
    main()
