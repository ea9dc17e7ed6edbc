"""Never an M x N tensor, in forward or backward, whatever the scores look like."""

import pytest
import torch

from adasplash import entmax_attn
from work import peak_mebibytes

PROGRAM = """
sigma, alpha, type = float(sys.argv[2]), float(sys.argv[3]), getattr(torch, sys.argv[4])
def step(n):
    q, k, v = ((torch.randn(1, 1, n, 16) * s).to(type).requires_grad_() for s in (sigma, sigma, 1))
    adasplash.entmax_attn(q, k, v, alpha, is_causal=True, window=(int(sys.argv[5]), -1)).sum().backward()
    assert q.grad.isfinite().all() and v.grad.any()
"""

CASES = {
    "sparse": (16384, 1.5, 1.5, "float32", -1),
    "sparse, half": (8192, 1.5, 2.0, "bfloat16", -1),
    "every key in every support": (6000, 1e-3, 1.5, "float32", -1),
    "softmax by torch": (6000, 1.0, 1.0, "float32", -1),
    "softmax by our own kernels": (6000, 1.0, 1.0, "float32", 5000),
}


@pytest.mark.slow
@pytest.mark.backends("cpu")
@pytest.mark.parametrize("case", CASES)
def test_peak_does_not_grow_with_queries_times_keys(case):
    length, *rest = CASES[case]
    extra = peak_mebibytes(PROGRAM, length, *rest)
    two_kibibytes_a_row = 2 * length / 1024  # a third at most of an M x N tensor of bytes
    assert extra < two_kibibytes_a_row, f"{extra:.1f} MiB"


@pytest.mark.backends("cuda")
def test_peak_on_the_gpu(make_inputs):
    inputs = make_inputs(1, 1, 16384, 16384, dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    entmax_attn(*inputs, is_causal=True).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20
