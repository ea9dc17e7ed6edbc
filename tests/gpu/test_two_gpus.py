"""Sequences sharded over two GPUs, with NCCL: the cases that test_context_parallel.py runs on CPUs."""

import pytest
import torch

import ranks
from common import ROOT

pytestmark = [
    pytest.mark.backends("cuda"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.slow
def test_as_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("RANKS_DEVICE", "cuda")
    program = ROOT / "tests" / "distributed" / "parallel_ranks.py"
    ranks.run_ranks(str(program), lambda rank: [rank, 2, tmp_path])
    ranks.check_outcomes(tmp_path)
