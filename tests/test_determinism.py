"""The same inputs give the same bits: again, alone or in a batch, and forward on any number of threads."""

import pytest
import torch

from adasplash import entmax_attn
from common import Inputs, gradients, normal_like

CASES = {
    "ordinary": dict(m=150, n=190, size=32),
    "grouped queries": dict(heads=6, kv_heads=2, m=70, n=90),
    "overflowing rows": dict(m=70, n=130, sigma=0.1),
    "more queries than keys": dict(m=140, n=35),
    "long": dict(batch=3, m=600, n=600),
}


@pytest.fixture(params=CASES)
def inputs(request, make_inputs, dtype):
    return make_inputs(**CASES[request.param], dtype=dtype)


@pytest.fixture(params=(1.25, 1.5, 2.0))
def alpha(request):
    return request.param


def run(inputs, alpha):
    return gradients(inputs, normal_like(inputs.query), entmax_attn, alpha=alpha, is_causal=True)


def test_again(inputs, alpha):
    first = run(inputs, alpha)
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(first, run(inputs, alpha)))


def test_alone_or_in_a_batch(inputs, alpha):
    together = run(inputs, alpha)
    grad = normal_like(inputs.query)
    for b in range(inputs.query.shape[0]):
        alone = gradients(
            Inputs(*(x[b, None] for x in inputs)), grad[b, None], entmax_attn, alpha=alpha, is_causal=True
        )
        assert all(torch.equal(x[b, None], y) for x, y in zip(together, alone))


def test_heads_alone(inputs, alpha):
    together = run(inputs, alpha)
    heads, kv_heads = inputs.query.shape[1], inputs.key.shape[1]
    grad = normal_like(inputs.query)
    for kv_head in range(kv_heads):
        of_query = slice(kv_head * heads // kv_heads, (kv_head + 1) * heads // kv_heads)
        of_key = slice(kv_head, kv_head + 1)
        slices = (of_query, of_query, of_key, of_key)
        part = Inputs(*(x[:, s] for x, s in zip(inputs, slices[1:])))
        alone = gradients(part, grad[:, of_query], entmax_attn, alpha=alpha, is_causal=True)
        assert all(torch.equal(x[:, s], y) for x, y, s in zip(together, alone, slices))


@pytest.mark.backends("cpu")
def test_threads_change_no_bit_of_the_forward(inputs, alpha, threads):
    def forward(count):
        threads(count)
        return entmax_attn(*inputs, alpha=alpha, is_causal=True)

    one, two, five = (forward(count) for count in (1, 2, 5))
    assert torch.equal(one, two) and torch.equal(one, five)


@pytest.mark.backends("cpu")
def test_threads_leave_the_gradients_right(make_inputs, threads):
    inputs = make_inputs(heads=3, m=200, n=150, dtype=torch.float64)
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(run(inputs, 1.5))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, atol=1e-13, rtol=1e-12)


@pytest.mark.backends("cpu")
def test_threads_of_the_caller_do_not_disturb_each_other(make_inputs):
    """Several Python threads in the op at once, as data-parallel replicas and servers do."""
    from concurrent.futures import ThreadPoolExecutor

    several = [make_inputs(m=100, n=120, seed=seed) for seed in range(8)]
    expected = [run(inputs, 1.5) for inputs in several]
    with ThreadPoolExecutor(4) as pool:
        for results, one in zip(pool.map(lambda inputs: run(inputs, 1.5), several), expected):
            assert all(torch.equal(x, y) for x, y in zip(results, one))
