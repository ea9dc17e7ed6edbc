"""Result files: JSON lines, one row a case, peer and quantity.

A row holds `bench.lib.machine.facts`, the case's fields, `support` (mean keys with weight a query), `empty_tiles` (of
the visible 64×64 tiles the share without weight), `keys_of_block` (of the keys that 64 neighbouring queries see, the
share that any of them weighs; since 2026-11-29), `preset`, `entry` (one number for what was measured together), and
    peer, what       what was measured of whom: a pass, PEAK_MEMORY or (since 2026-11-30) INFERENCE_MEMORY; of
                     `bench.training_step` TRAINING_STEP
    unit             "ms" a call, or "MiB" beyond inputs, outputs and gradients
    median, low, high, samples    of the rounds, with quartiles
    ratio, ratio_low, ratio_high  ours / this peer's, of the pairs; for memory, of peaks that include inputs, outputs
                     and gradients; null for ours
    goal, reached    largest ratio wanted (for our own peak memory, MiB) and whether the median keeps to it; or null
    errors           of out, dq, dk, dv against fp64, relative to the largest exact number
    first_call_ms    the first forward and training step, with whatever compiling or tuning it started
"""

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.lib.case import Case

PEAK_MEMORY = "peak memory"  # of a training step
INFERENCE_MEMORY = "peak memory of inference"
TRAINING_STEP = "training step"  # of a whole model, in files of the preset
TRAINING_STEP_PRESET = "training-step"
FOLDER = Path(__file__).resolve().parents[1] / "results"

Row = dict[str, Any]
NO_RATIO: Row = dict.fromkeys(("ratio", "ratio_low", "ratio_high"))  # of a row about ourselves


def path_of(facts: Row, preset: str) -> Path:
    """Where results go unless the user says where; names begin with the date, so that they sort by it."""
    date = datetime.fromisoformat(facts["date"]).strftime("%Y%m%d-%H%M")
    return FOLDER / f"{date}-{facts['device']}-{preset}.jsonl"


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(paths: Iterable[Path]) -> list[Row]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines() if line]


def case_of(row: Row) -> Case:
    """Fields that came later than the row have their defaults."""
    return Case(**{name: row[name] for name in Case.__dataclass_fields__ if name in row})


def latest(device: str, preset: str) -> Path | None:
    """The newest result file of a preset."""
    found = sorted(FOLDER.glob(f"*-{device}-*{preset}*.jsonl"))
    return found[-1] if found else None
