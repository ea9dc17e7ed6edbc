"""The kernels for sequences of few queries: attention/few.py."""

import pytest
import torch
from checked import TYPES, check
from interpreted import attention

import reference
from common import assert_same_bits, make_inputs

MOST = 16


@TYPES
@pytest.mark.parametrize(
    ("shape", "arguments", "options"),
    [
        (dict(m=1, n=200, heads=4, kv_heads=1, size=16, value_size=32), (1.5, True), {}),
        (dict(m=1, n=1100, heads=2, kv_heads=2, size=16), (1.5, True), {}),
        (dict(m=5, n=130, heads=4, kv_heads=2, size=32), (1.5, True), {}),
        (dict(m=16, n=70, heads=2, kv_heads=2, size=16), (1.5, False), {}),
        (dict(m=7, n=3, heads=2, kv_heads=1, size=16), (2.0, True), {}),
        (dict(m=3, n=300, heads=6, kv_heads=1, size=16), (1.25, False), {}),
        (dict(m=2, n=300, heads=2, kv_heads=1, size=16), (1.0, True), {}),
        (dict(m=4, n=300, heads=2, kv_heads=1, size=16), (1.5, True), dict(window=(70, 0))),
        (dict(m=4, n=300, heads=2, kv_heads=1, size=16), (1.5, False), dict(window=(3, 100))),
        (dict(m=4, n=300, heads=2, kv_heads=1, size=16), (1.5, True), dict(scale=-0.3)),
    ],
    ids=str,
)
def test_values_and_gradients(dtype, shape, arguments, options):
    check(make_inputs(**shape, dtype=dtype), *arguments, few_queries=MOST, **options)


@pytest.mark.parametrize("alpha", [1.0, 1.25, 1.5, 2.0])
def test_long_rows(alpha):
    """Rows that weigh more keys than their list has room for, and one that does not, beside them."""
    inputs = make_inputs(m=2, n=2500, heads=3, kv_heads=1, size=16, dtype=torch.float32)
    inputs.query[:, 1:] *= 1e-3
    check(inputs, alpha, True, few_queries=MOST)
