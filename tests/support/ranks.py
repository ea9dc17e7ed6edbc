"""Tests over two processes or more: a program that runs cases in each, and what starts it as often."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def run_ranks(program: str, arguments: Callable[[int], list[object]], world: int = 2) -> None:
    """`python program *arguments(rank)` for all ranks at once; an error of one is one here."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}

    def start(rank):
        command = [sys.executable, program, *map(str, arguments(rank))]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    processes = [start(rank) for rank in range(world)]
    try:
        outputs = [process.communicate(timeout=1800)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(outputs)


def run_cases(cases: Mapping[str, Callable[[], None]], outcomes: Path) -> None:
    """In one of the processes: runs every case and writes what went wrong in each, "" if nothing did."""
    outcome = {}
    for name, function in cases.items():
        torch.manual_seed(0)
        try:
            function()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
    outcomes.write_text(json.dumps(outcome))


def check_outcomes(folder: Path, world: int = 2) -> None:
    """An error that has what went wrong in any case of any process: what they wrote, as RANK.json in a folder."""
    outcomes = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    wrong = [
        f"{name} on rank {rank}: {said}"
        for rank, outcome in enumerate(outcomes)
        for name, said in outcome.items()
        if said
    ]
    assert not wrong, "\n".join(wrong)
    assert all(outcomes) and all(list(outcome) == list(outcomes[0]) for outcome in outcomes)
