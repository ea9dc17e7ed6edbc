"""The kernels for sequences of few queries: attention/few.py."""

import pytest
import torch
from checked import TYPES, check
from interpreted import attention

import reference
from common import assert_accurate, make_inputs

MOST = 16
CASES = {
    "one query": (dict(m=1, n=200, heads=4, kv_heads=1, value_size=32), (1.5, True), {}),
    "two tiles of tiles": (dict(batch=1, m=1, n=1100), (1.5, True), {}),
    "several blocks of rows": (dict(m=5, n=130, heads=8, kv_heads=2), (1.5, True), {}),
    "as many as there may be": (dict(m=16, n=70), (1.5, False), {}),
    "more than keys": (dict(m=7, n=3, heads=2, kv_heads=1), (2.0, True), {}),
    "sparsemax": (dict(m=3, n=90, heads=2, kv_heads=1), (2.0, False), {}),
    "any alpha": (dict(m=3, n=90, heads=6, kv_heads=1), (1.25, False), {}),
    "softmax": (dict(m=2, n=90, heads=2, kv_heads=1), (1.0, True), {}),
    "window": (dict(m=4, n=300, heads=2, kv_heads=1), (1.5, True), dict(window=(70, 0))),
    "window both ways": (dict(m=4, n=300, heads=2, kv_heads=1), (1.5, False), dict(window=(3, 100))),
    "negative scale": (dict(m=4, n=90, heads=2, kv_heads=1), (1.5, True), dict(scale=-0.3)),
}


def check_output(inputs, *arguments, **options):
    exact, composed = (
        reference.attention(*inputs, *arguments, **options, dtype=dtype).out
        for dtype in (torch.float64, inputs.query.dtype)
    )
    actual = attention(*inputs, *arguments, few_queries=MOST, **options)
    assert_accurate("out", actual.out, exact, composed)
    return actual


@pytest.mark.parametrize("largest", (0.5, 3.0, 16.0))
def test_tiles_that_the_bound_may_list_have_scores(largest):
    """A tile whose largest score is just below row_max - 1: the bound, from which rounding is taken off, is lower."""
    query, key = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 128, 16)
    query[..., 0], key[..., 0] = 1.0, -100.0
    key[0, 0, 0, 0] = largest
    key[0, 0, 100, 0] = torch.tensor(largest - 1.0).nextafter(torch.tensor(-torch.inf))
    value = torch.randn(1, 1, 128, 16)
    found = attention(query, key, value, 1.5, False, scale=2.0, few_queries=MOST, sharers=1)
    assert torch.equal(found.out, value[:, :, :1])


@TYPES
@pytest.mark.parametrize("case", CASES)
def test_output(dtype, case):
    shape, arguments, options = CASES[case]
    check_output(make_inputs(**shape, dtype=dtype), *arguments, **options)


def test_what_the_backward_is_left():
    check(make_inputs(m=3, n=150, heads=2, kv_heads=1), 1.5, True, few_queries=MOST)


@pytest.mark.parametrize("alpha", [1.25, 1.5])
def test_a_long_row(alpha):
    """Beside one that is not."""
    inputs = make_inputs(batch=1, m=1, n=1500, heads=2, kv_heads=1)
    inputs.query[:, 1:] *= 1e-3
    check_output(inputs, alpha, True)
