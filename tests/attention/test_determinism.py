"""The same inputs give the same bits: again, alone or in a batch, on any number of threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from adasplash import entmax_attn
from common import Inputs, assert_same_bits, gradients, normal_like, run_python

CASES = {
    "ordinary": dict(m=150, n=190, size=32),
    "grouped queries": dict(heads=6, kv_heads=2, m=70, n=90),
    "overflowing rows": dict(m=70, n=130, sigma=0.1),
    "more queries than keys": dict(m=140, n=35),
    "one block": dict(batch=3, heads=1, m=60, n=190),
    "long": dict(batch=3, m=600, n=600),
}


@pytest.fixture(params=CASES)
def inputs(request, make_inputs, dtype):
    return make_inputs(**CASES[request.param], dtype=dtype)


@pytest.fixture(params=(1.25, 1.5, 2.0))
def alpha(request):
    return request.param


@pytest.fixture(autouse=True, params=(1, 3), ids="threads={}".format)
def count(request, threads):
    """A batch of one has fewer tasks than threads, where BLAS might start threads of its own."""
    threads(request.param)


def run(inputs, alpha):
    return gradients(inputs, normal_like(inputs.query), entmax_attn, alpha=alpha, is_causal=True)


def test_again(inputs, alpha):
    first = run(inputs, alpha)
    for _ in range(2):
        assert_same_bits(first, run(inputs, alpha))


def test_alone_or_in_a_batch(inputs, alpha):
    together = run(inputs, alpha)
    grad = normal_like(inputs.query)
    for b in range(inputs.query.shape[0]):
        alone = gradients(
            Inputs(*(x[b, None] for x in inputs)), grad[b, None], entmax_attn, alpha=alpha, is_causal=True
        )
        assert_same_bits([x[b, None] for x in together], alone)


def test_heads_alone(inputs, alpha):
    together = run(inputs, alpha)
    heads, kv_heads = inputs.query.shape[1], inputs.key.shape[1]
    grad = normal_like(inputs.query)
    for kv_head in range(kv_heads):
        of_query = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
        of_key = slice(kv_head, kv_head + 1)
        slices = (of_query, of_query, of_key, of_key)
        part = Inputs(inputs.query[:, of_query], inputs.key[:, of_key], inputs.value[:, of_key])
        alone = gradients(part, grad[:, of_query], entmax_attn, alpha=alpha, is_causal=True)
        assert_same_bits([x[:, part] for x, part in zip(together, slices, strict=True)], alone)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("other", (2, 5))
def test_threads_change_no_bit(inputs, alpha, threads, other):
    first = run(inputs, alpha)
    threads(other)
    assert_same_bits(first, run(inputs, alpha))


@pytest.mark.backends("cpu")
def test_threads_of_the_caller_do_not_disturb_each_other(make_inputs):
    """Several Python threads in the op at once, as data-parallel replicas and servers do."""
    several = [make_inputs(m=100, n=120, seed=seed) for seed in range(8)]
    expected = [run(inputs, 1.5) for inputs in several]
    with ThreadPoolExecutor(4) as pool:
        for result, one in zip(pool.map(lambda inputs: run(inputs, 1.5), several), expected, strict=True):
            assert_same_bits(result, one)


@pytest.mark.backends("cpu")
def test_work_is_shared_among_threads():
    """at::parallel_for runs on one thread where it was compiled without OpenMP. The process has no threads of torch's
    before the call, and they take no part in BLAS, which the kernels keep to one thread."""
    program = """
import os, torch, adasplash
def threads():
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
x = torch.randn(1, 4, 512, 64)
torch.set_num_threads(3)
before = threads()
adasplash.entmax_attn(x, x, x, is_causal=True)
print(threads() - before)
"""
    assert int(run_python(program)) == 2
