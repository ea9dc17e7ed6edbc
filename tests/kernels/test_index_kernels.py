"""The kernels of the key index: lib/codes.py, index_keys of cache.py, attention/few_indexed.py."""

import pytest
import torch
from interpreted import attention, make_index

from common import assert_same_bits, make_inputs

MOST = 16
CASES = {
    "one query": (dict(m=1, n=700, heads=4, kv_heads=1, value_size=32), (1.5, True), {}),
    "several blocks of rows": (dict(m=5, n=300, heads=8, kv_heads=2), (1.5, True), {}),
    "sparsemax": (dict(m=3, n=300, heads=2, kv_heads=1), (2.0, False), {}),
    "any alpha": (dict(m=3, n=300, heads=6, kv_heads=1), (1.25, False), {}),
    "softmax": (dict(m=2, n=90, heads=2, kv_heads=1), (1.0, True), {}),
    "window": (dict(m=4, n=300, heads=2, kv_heads=1), (1.5, True), dict(window=(70, 0))),
    "negative scale": (dict(m=4, n=300, heads=2, kv_heads=1), (1.5, True), dict(scale=-0.3)),
}
HALF_TYPES = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))


@HALF_TYPES
@pytest.mark.parametrize("case", CASES)
def test_an_index_changes_no_bit(dtype, case):
    shape, arguments, options = CASES[case]
    query, key, value = make_inputs(**shape, dtype=dtype)
    query = query * 4  # so that few keys weigh
    expected = attention(query, key, value, *arguments, few_queries=MOST, **options)
    found = attention(query, key, value, *arguments, few_queries=MOST, index=make_index(key), **options)
    for name in ("out", "row_state", "tiles"):
        assert_same_bits(getattr(found, name), getattr(expected, name))
