"""What sequences over many GPUs would cost: the table of docs/scaling.md, from one GPU's measured time and shapes.

    python -m bench.scaling            prints them
    python -m bench.scaling --write    writes them into the page

Bytes and operations are counted. Times beyond one GPU are computed, and none of them is measured.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

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
# Of a case that is measured: heads, tokens.
MEASURED = dict(input="structured:0.5", heads=16, length=131_072, head_dim=CHANNELS, what=BOTH, peer=OURS)


def measured() -> results.Row:
    """The newest row of a training step of one layer's attention on one GPU."""
    files = sorted(results.FOLDER.glob("*-cuda-*.jsonl"))
    rows = [row for row in results.read(files) if all(row.get(name) == value for name, value in MEASURED.items())]
    return max(rows, key=lambda row: row["date"])


def seconds_of_one(tokens: int = TOKENS, heads: int = HEADS) -> float:
    """On one GPU, by the square of the length, which is a bound: measured growth is less."""
    return measured()["median"] / 1000 * heads / MEASURED["heads"] * (tokens / MEASURED["length"]) ** 2


@dataclass(frozen=True)
class Cost:
    """Of one layer's attention on each of so many GPUs: bytes received forward and backward, bytes of keys and values
    that are kept for the backward, and which share of the received ones computing can hide at best. None where a method
    cannot be used."""

    forward: float
    backward: float
    kept: float
    hidden: float


def gather(gpus: int) -> Cost:
    """Causal: half of what is fetched may come, and half of the gradients leave, behind the first chunk's work."""
    whole = TOKENS * KEY_HEADS * 2 * CHANNELS * BYTES
    received = whole * (gpus - 1) / gpus
    return Cost(received, received, whole * (2 * gpus + 1) / (2 * gpus), 0.5)


def exchange(gpus: int) -> Cost | None:
    if KEY_HEADS % gpus:
        return None
    received = TOKENS * (HEADS + KEY_HEADS) * 2 * CHANNELS * BYTES * (gpus - 1) / gpus**2
    return Cost(received, received, TOKENS * KEY_HEADS * 2 * CHANNELS * BYTES / gpus, 0.0)


def ring(gpus: int) -> Cost:
    """Liu, Zaharia and Abbeel, 2023: blocks of key and value go round; back their gradients go with them."""
    received = TOKENS * KEY_HEADS * 2 * CHANNELS * BYTES * (gpus - 1) / gpus
    return Cost(received, 2 * received, TOKENS * KEY_HEADS * 2 * CHANNELS * BYTES / gpus, 1.0)


def bandwidth(gpus: int) -> float:
    return WITHIN if gpus <= A_HOST else BETWEEN


def efficiency(cost: Cost, gpus: int, hides: bool) -> float:
    """Computing as a share of the time, if all that can be hidden is, or if nothing is."""
    computing = seconds_of_one() / gpus
    sent = (cost.forward + cost.backward) / bandwidth(gpus)
    shown = sent - min(cost.hidden * sent, computing) if hides else sent
    return computing / (computing + shown)


def table() -> str:
    rows: tables.Table = [
        ["GPUs", "computing", "gather: received", "kept", "efficiency", "exchange: received", "kept", "efficiency",
         "ring: received", "kept"]
    ]  # fmt: skip

    def gigabytes(count: float) -> str:
        return f"{count / 1e9:.2f} GB"

    def shown(cost: Cost | None, gpus: int) -> list[str]:
        if cost is None:
            return ["–", "–", "–"]
        low, high = efficiency(cost, gpus, hides=False), efficiency(cost, gpus, hides=True)
        between = f"{low:.2f}" if round(low, 2) == round(high, 2) else f"{low:.2f} – {high:.2f}"
        return [gigabytes(cost.forward + cost.backward), gigabytes(cost.kept), between]

    for gpus in GPUS:
        around = ring(gpus)
        rows.append(
            [
                f"{gpus:,}", f"{seconds_of_one() / gpus:.3g} s", *shown(gather(gpus), gpus),
                *shown(exchange(gpus), gpus), gigabytes(around.forward + around.backward), gigabytes(around.kept),
            ]
        )  # fmt: skip
    one = measured()
    return (
        f"One layer's attention, {TOKENS:,} tokens, {HEADS} heads of queries and {KEY_HEADS} of keys, {CHANNELS} "
        f"channels, {BYTES} bytes a number, causal, forward and backward, for each GPU. One GPU: "
        f"{one['median']:.0f} ms measured at {one['length']:,} tokens with {one['heads']} heads, half the tiles empty "
        f"({one['processor']}); {seconds_of_one():.3g} s here, by the square of the length. **Computed, not measured.**"
        "\n\n"
        f"{tables.markdown(rows)}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    if parser.parse_args(arguments).write:
        PAGE.write_text(replace_block(PAGE.read_text(), "bench:scaling", table()))
    else:
        print(table())


if __name__ == "__main__":
    main()
