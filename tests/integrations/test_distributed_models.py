"""Models of transformers over two processes on the CPU: FSDP2 and tensor parallelism."""

import socket
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import two_models

import common
import ranks


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> list[dict[str, str]]:
    """What went wrong in each case of two_models.py, for both ranks."""
    return ranks.read_outcomes(common.build_once(tmp_path_factory, "two_models", run_two_models))


def run_two_models(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks.run_ranks(two_models.__file__, lambda rank: [rank, port, folder])


@pytest.mark.slow
@pytest.mark.parametrize("name", two_models.CASES)
def test_over_two_processes(outcomes, name):
    assert not any(outcome[name] for outcome in outcomes), "\n".join(outcome[name] for outcome in outcomes)
