"""Never an M x N tensor, in forward or backward, whatever the scores look like."""

import pytest

from common import run_python

PROGRAM = """
import resource, sys, torch, adasplash
length, sigma, alpha, type = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), getattr(torch, sys.argv[4])
torch.manual_seed(0)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def step(n):
    q, k, v = ((torch.randn(1, 1, n, 16) * s).to(type).requires_grad_() for s in (sigma, sigma, 1))
    adasplash.entmax_attn(q, k, v, alpha, is_causal=True).sum().backward()
    assert q.grad.isfinite().all() and v.grad.any()
step(1000)
before = peak()
step(length)
print(peak() - before)
"""

CASES = {
    "sparse": (16384, 1.5, 1.5, "float32"),
    "sparse, half": (16384, 1.5, 2.0, "bfloat16"),
    "every key in every support": (8192, 1e-3, 1.5, "float32"),
}


@pytest.mark.slow
@pytest.mark.backends("cpu")
@pytest.mark.parametrize("case", CASES)
def test_peak_does_not_grow_with_queries_times_keys(case):
    length, *rest = CASES[case]
    extra = float(run_python(PROGRAM, length, *rest))
    of_matrix = length * length / 2**20  # in one byte an entry: a quarter of what one fp32 matrix would take
    assert extra < 64 < of_matrix, f"{extra:.0f} MiB"


@pytest.mark.backends("cuda")
def test_peak_on_the_gpu(make_inputs):
    import torch

    from adasplash import entmax_attn

    inputs = make_inputs(1, 1, 16384, 16384, dtype=torch.bfloat16, requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    entmax_attn(*inputs, is_causal=True).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 32 * 2**20
