"""The kernels, interpreted, against the fp64 reference: what the tests of this folder share."""

import pytest
import torch
from interpreted import Tiles, attention

import reference
from common import HALF, assert_accurate, gradients, normal_like

SMALL = Tiles()
BIG = Tiles(scan_n=128)
PARTS = Tiles(walk=16, step_d=16)
_OF_ENTRIES = ("q_seqlens", "kv_seqlens", "kv_starts", "q_positions")  # which the kernels take otherwise
TYPES = pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=lambda dtype: str(dtype).removeprefix("torch."))


def check(inputs, *arguments, tiles=SMALL, few_queries=-1, **options):
    """Forward and backward, over tiles and over keys; `options` as the reference takes them. Returns the result."""
    grad = normal_like(inputs.query.new_empty(*inputs.query.shape[:-1], inputs.value.shape[-1]))
    mine = {name: value for name, value in options.items() if name not in _OF_ENTRIES}
    queries, ends, starts = (options.get(name) for name in ("q_seqlens", "kv_seqlens", "kv_starts"))
    keys = ends if starts is None else torch.stack((starts, ends), -1)
    mine["lengths"] = tuple(None if x is None else x.int() for x in (queries, keys))
    if "q_positions" in options:
        mine["positions"] = options["q_positions"].int()

    def dense(query, key, value, dtype):
        return reference.attention(query, key, value, *arguments, **options, dtype=dtype).out

    exact = gradients(type(inputs)(*(x.double() for x in inputs)), grad, dense, dtype=torch.float64)
    composed = gradients(inputs, grad, dense, dtype=inputs.query.dtype)
    for below in (0, 101):
        actual = attention(
            *inputs, *arguments, grad=grad, tiles=tiles, gather_below=below, few_queries=few_queries, **mine
        )
        named = zip(("out", "dq", "dk", "dv"), (actual.out, *actual[3:6]), exact, composed, strict=True)
        for what, result, true, plain in named:
            # delta and the dO.v that it is taken off come from two kernels, which sum in different orders.
            assert_accurate(what, result, true, plain, size=50.0 if result.dtype == torch.float32 else 1.0)
    return actual
