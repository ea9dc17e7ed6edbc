"""The kernels of the key index: lib/codes.py, index_keys of cache.py, attention/few_indexed.py."""

import pytest
import torch
from interpreted import attention, key_index_argument, make_index

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


@HALF_TYPES
@pytest.mark.parametrize("page", (16, 64))
def test_an_index_of_pages_changes_no_bit(dtype, page):
    """Pages in any order, lengths that end within one, and room behind them."""
    generator = torch.Generator().manual_seed(1)
    blocks, heads, size, lengths = 512 // page, 2, 24, torch.tensor([200, 131, 0])
    query, key, value = (
        torch.randn(*shape, size, generator=generator).to(dtype)
        for shape in ((3, 4, 2), (blocks, heads, page), (blocks, heads, page))
    )
    table = torch.randperm(blocks, generator=generator)[: 3 * (256 // page)].view(-1, 256 // page).int()
    table = torch.cat((table, table[:1])) if len(table) < 3 else table[:3]
    options = dict(lengths=(None, lengths.int()), table=table, few_queries=MOST)
    expected = attention(query * 6, key, value, 1.5, True, **options)
    found = attention(query * 6, key, value, 1.5, True, index=make_index(key), **options)
    for name in ("out", "row_state"):
        assert_same_bits(getattr(found, name), getattr(expected, name))


def test_keys_that_bounds_dismiss_are_not_read():
    """They are NaN here, after they were indexed. One key has by far the largest z, so it looks best; a bound is above
    its key's z by at most twice |q| times the error."""
    query, key, value = make_inputs(batch=1, m=1, n=900, heads=1, size=64, dtype=torch.bfloat16, sigma=1.0)
    key[0, 0, 500] = query[0, 0, 0]
    index = make_index(key)
    factor = query.double().norm() / 64**0.5 / 2
    z = (query.double() @ key.double().mT)[0, 0, 0] / 64**0.5 / 2
    width = factor * key_index_argument(index, key).norms[900:1800].double()
    dismissed = z + 2.01 * width < z[500] - 2.01 * width[500] - 1.01
    assert 0.5 < dismissed.double().mean() < 1
    expected = attention(query, key, value, few_queries=MOST).out
    key[0, 0, dismissed] = torch.nan
    assert_same_bits(attention(query, key, value, few_queries=MOST, index=index).out, expected)
    assert attention(query, key, value, few_queries=MOST).out.isnan().all()


def test_an_index_of_something_else_is_not_believed():
    """Its header names other sizes; then all keys are read."""
    query, key, value = make_inputs(batch=1, m=1, n=300, heads=2, kv_heads=1, dtype=torch.bfloat16)
    index = make_index(key)
    index[1:] = 0  # scale and error of all keys
    index.view(torch.int32)[0, 3] += 1
    expected = attention(query, key, value, few_queries=MOST).out
    assert_same_bits(attention(query, key, value, few_queries=MOST, index=index).out, expected)
