"""Models of transformers over two processes on the CPU: FSDP2 and tensor parallelism."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import two_models

import common

RANKS = range(2)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, str]]:
    """What went wrong in each case of two_models.py, for both ranks."""
    folder = common.build_once(tmp_path_factory, "two_models", run_ranks)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in RANKS]


def run_ranks(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(Path(common.__file__).parent), os.environ.get("PYTHONPATH", "")])

    def start(rank):
        command = [sys.executable, two_models.__file__, str(rank), str(port), str(folder)]
        environment = os.environ | {"PYTHONPATH": paths}
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    processes = [start(rank) for rank in RANKS]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", two_models.CASES)
def test_over_two_processes(outcomes, name):
    assert not any(outcome[name] for outcome in outcomes), "\n".join(outcome[name] for outcome in outcomes)
