"""Models of transformers over two processes on the CPU: FSDP2 and tensor parallelism."""

import socket

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import two_models

import ranks


@pytest.mark.builds
@pytest.mark.slow
def test_over_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks.run_ranks(two_models.__file__, lambda rank: [rank, port, tmp_path])
    ranks.check_outcomes(tmp_path)
