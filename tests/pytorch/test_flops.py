"""FlopCounterMode counts for attention what it counts for scaled_dot_product_attention of the same shapes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import adasplash
import common

SHAPES = (
    # batch, heads, key heads, queries, keys, head_dim, value_dim
    (2, 4, 4, 33, 33, 16, 16),
    (2, 4, 2, 20, 50, 16, 24),
    (1, 6, 1, 1, 70, 8, 8),
)


def count(function, *tensors):
    """Forward, and forward and backward."""
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        function(*tensors)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    with FlopCounterMode(display=False) as both:
        function(*leaves).sum().backward()
    return forward.get_total_flops(), both.get_total_flops()


def tensors_of(batch, heads, kv_heads, queries, keys, dim, value_dim, device="cpu"):
    shapes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)
    return [torch.randn(batch, *shape, device=device) for shape in shapes]


def torch_count(batch, heads, kv_heads, queries, keys, dim, value_dim):
    """Of torch's attention without data, as matrix products and their derivatives; 7 where a fused kernel, which makes
    the scores anew for the backward, does 7 products and not 6."""
    tensors = tensors_of(batch, heads, kv_heads, queries, keys, dim, value_dim, device="meta")
    repeated = [x.repeat_interleave(heads // x.shape[1], 1) for x in tensors]

    def dense(query, key, value):
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value

    forward, both = count(dense, *repeated)
    return forward, both + 2 * batch * heads * queries * keys * dim


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("alpha", (1.5, torch.tensor(1.3)), ids=("number", "tensor"))
def test_padded(shape, alpha):
    def op(query, key, value):
        return adasplash.entmax_attn(query, key, value, alpha)

    assert count(op, *tensors_of(*shape)) == torch_count(*shape)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        op(*tensors_of(*shape))
    assert counter.get_total_flops() == torch_count(*shape)[0]


def test_as_many_as_a_fused_kernel():
    """The count of torch's own fused kernel, from its formulas."""
    from torch.utils.flop_counter import flop_registry

    aten = torch.ops.aten
    query, key, value = tensors_of(2, 4, 4, 33, 40, 16, 16)
    forward = flop_registry[aten._scaled_dot_product_flash_attention](query, key, value, out_val=query)
    backward = flop_registry[aten._scaled_dot_product_flash_attention_backward](query, query, key, value, out_val=query)
    assert count(adasplash.entmax_attn, query, key, value) == (forward, forward + backward)


def test_an_index_changes_nothing():
    """It saves what is read; the dense work is counted all the same."""
    query, key, value = tensors_of(2, 4, 2, 1, 50, 16, 16)
    index = adasplash.make_key_index(key.transpose(1, 2))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        adasplash.entmax_attn(query, key, value, key_index=index)
    with torch.no_grad(), FlopCounterMode(display=False) as plain:
        adasplash.entmax_attn(query, key, value)
    assert counter.get_total_flops() == plain.get_total_flops() > 0


def test_masks_change_nothing():
    shape = (2, 4, 2, 20, 50, 16, 24)

    def op(query, key, value):
        lengths = torch.tensor([3, 20])
        return adasplash.entmax_attn(
            query, key, value, is_causal=True, window=(5, 0), q_seqlens=lengths, kv_seqlens=lengths
        )

    assert count(op, *tensors_of(*shape)) == torch_count(*shape)


@pytest.mark.parametrize("alpha", (1.5, torch.tensor([1.3, 1.5, 1.7, 2.0])), ids=("number", "tensor"))
def test_packed_is_the_sum_over_the_sequences(alpha):
    offsets = torch.tensor([0, 5, 5, 20]), torch.tensor([0, 7, 12, 21])

    def op(query, key, value):
        return adasplash.entmax_attn_varlen(query, key, value, *offsets, 15, 9, alpha)

    tensors = [torch.randn(20, 4, 8), torch.randn(21, 2, 8), torch.randn(21, 2, 12)]
    each = [torch_count(1, 4, 2, m, n, 8, 12) for m, n in ((5, 7), (0, 5), (15, 9))]
    assert count(op, *tensors) == tuple(map(sum, zip(*each, strict=True)))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        op(*tensors)
    assert counter.get_total_flops() == sum(forward for forward, _ in each)


def test_packed_without_values_is_as_if_all_were_the_longest():
    offsets = torch.zeros(4, dtype=torch.int32, device="meta")
    tensors = [torch.randn(20, 4, 8, device="meta"), *(torch.randn(21, 2, 8, device="meta") for _ in range(2))]

    def op(query, key, value):
        return adasplash.entmax_attn_varlen(query, key, value, offsets, offsets, 15, 9)

    assert count(op, *tensors) == tuple(3 * x for x in torch_count(1, 4, 2, 15, 9, 8, 8))


def test_by_module():
    layer = adasplash.EntmaxAttention(16, 2)
    with FlopCounterMode(display=False) as counter:
        x = torch.randn(2, 9, 16)
        layer(x, x, x)
    counts = counter.get_flop_counts()["EntmaxAttention"]
    assert counts[torch.ops.adasplash._entmax_attn_forward] == torch_count(2, 2, 2, 9, 9, 8, 8)[0]


@pytest.mark.parametrize("first", ("adasplash", "torch.utils.flop_counter"))
def test_formulas_are_there_in_whichever_order(first):
    second = {"adasplash": "torch.utils.flop_counter"}.get(first, "adasplash")
    common.run_python(
        f"""
import sys
import {first}
assert {first!r} != "adasplash" or "torch.utils.flop_counter" not in sys.modules
import {second}
assert torch.ops.adasplash.entmax_attn in torch.utils.flop_counter.flop_registry
""".replace("import sys", "import sys, torch")
    )
