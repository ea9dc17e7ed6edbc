"""Right-padded batches: q_seqlens and kv_seqlens."""

import pytest
import torch

from adasplash import entmax_attn
from common import Inputs, assert_same_bits, check_gradients, gradients, normal_like

LENGTHS = {
    "both": dict(q_seqlens=[37, 20, 1], kv_seqlens=[53, 9, 30]),
    "queries": dict(q_seqlens=[5, 37, 36]),
    "keys": dict(kv_seqlens=[1, 52, 53]),
    "more queries than keys": dict(q_seqlens=[37, 30, 11], kv_seqlens=[10, 30, 3]),
    "zeros": dict(q_seqlens=[0, 12, 0], kv_seqlens=[4, 0, 0]),
    "no padding": dict(q_seqlens=[37] * 3, kv_seqlens=[53] * 3),
}
BLOCKS = dict(q_seqlens=[130, 64, 65], kv_seqlens=[64, 138, 1])
OPTIONS = {
    "plain": dict(),
    "causal": dict(is_causal=True),
    "window": dict(window=(4, 6)),
    "ALiBi": dict(is_causal=True, alibi_slopes=[0.5, 0.1]),
}


def tensors(lengths, device, dtype=torch.int32):
    return {name: torch.tensor(values, dtype=dtype, device=device) for name, values in lengths.items()}


def of_device(options, device):
    slopes = options.get("alibi_slopes")
    return options if slopes is None else {**options, "alibi_slopes": torch.tensor(slopes, device=device)}


def entry(inputs, b, q_seqlens=None, kv_seqlens=None):
    """One batch entry without its padding."""
    q, k = (None if x is None else int(x[b]) for x in (q_seqlens, kv_seqlens))
    return Inputs(inputs.query[b, None, :, :q], inputs.key[b, None, :, :k], inputs.value[b, None, :, :k])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_against_the_reference(make_inputs, backend, lengths, options, dtype):
    inputs = make_inputs(batch=3, heads=2, kv_heads=1, dtype=dtype)
    lengths = tensors(LENGTHS[lengths], backend.device)
    check_gradients(entmax_attn, inputs, **lengths, **of_device(OPTIONS[options], backend.device))


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
def test_lengths_around_blocks(make_inputs, backend, sigma, alpha):
    inputs = make_inputs(batch=3, m=130, n=138, sigma=sigma)
    check_gradients(entmax_attn, inputs, alpha=alpha, is_causal=True, **tensors(BLOCKS, backend.device))


@pytest.mark.parametrize("int_type", (torch.int32, torch.int64))
@pytest.mark.parametrize("size", (16, 33))
def test_every_entry_is_what_it_would_be_alone(make_inputs, backend, int_type, size, dtype):
    """To the bit: nothing depends on neighbours, on padding, or on the type of the lengths."""
    inputs = make_inputs(batch=3, heads=4, kv_heads=2, m=130, n=138, size=size, dtype=dtype)
    lengths = tensors(BLOCKS, backend.device, int_type)
    grad = normal_like(inputs.query)
    together = gradients(inputs, grad, entmax_attn, is_causal=True, **lengths)
    for b in range(3):
        q, k = (int(x[b]) for x in lengths.values())
        alone = gradients(entry(inputs, b, **lengths), grad[b, None, :, :q], entmax_attn, is_causal=True)
        for all_of_it, length, expected in zip(together, (q, q, k, k), alone, strict=True):
            assert torch.equal(all_of_it[b, None, :, :length], expected)
            assert not all_of_it[b, :, length:].any()


@pytest.mark.parametrize("hostile", (torch.nan, torch.inf, -torch.inf, 1e30))
@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
def test_padding_reaches_nothing(make_inputs, backend, sigma, hostile, dtype):
    """Neither what it holds nor the gradient that comes in for it."""
    inputs = make_inputs(batch=3, m=70, n=138, sigma=sigma, dtype=dtype)
    lengths = tensors(dict(q_seqlens=[70, 0, 33], kv_seqlens=[100, 138, 65]), backend.device)
    alpha = torch.tensor([1.3, 1.7], device=backend.device)
    grad = normal_like(inputs.query)
    clean = gradients(inputs, grad, entmax_attn, alpha=alpha, is_causal=True, **lengths)
    for b, (q, k) in enumerate(zip(*(x.tolist() for x in lengths.values()), strict=True)):
        inputs.query[b, :, q:], inputs.key[b, :, k:], inputs.value[b, :, k:] = hostile, hostile, hostile
        grad[b, :, q:] = hostile
    dirty = gradients(inputs, grad, entmax_attn, alpha=alpha, is_causal=True, **lengths)
    assert_same_bits(clean, dirty)
    assert all(x.isfinite().all() for x in dirty)


def test_what_is_saved_for_padding(make_inputs, backend):
    """Padded queries are rows that see nothing."""
    inputs = make_inputs(batch=2, m=70, n=90)
    lengths = tensors(dict(q_seqlens=[70, 3], kv_seqlens=[90, 65]), backend.device)
    options = (None, 1.5, False, None, *lengths.values(), None, None, 0, 0, [-1, -1], None)
    capacity = backend.support_capacity
    out, row_state, support, tiles = torch.ops.adasplash._entmax_attn_forward(*inputs, *options, capacity)
    assert not out[1, :, 3:].any()
    assert (row_state[1, :, 3:] == row_state.new_tensor([0, torch.inf])).all()
    assert row_state[1, :, :3].isfinite().all() and row_state[0].isfinite().all()
    assert not capacity or (support[1, :, 3:, 0] == -1).all()
    assert tiles[1, :, 0].any() and not tiles[1, :, 1:].any()


@pytest.mark.slow
def test_every_element_is_written(make_inputs, backend):
    inputs = make_inputs(batch=3, m=70, n=90)
    lengths = tensors(dict(q_seqlens=[70, 0, 33], kv_seqlens=[0, 90, 65]), backend.device)
    expected = gradients(inputs, normal_like(inputs.query), entmax_attn, **lengths)
    for _ in range(5):
        litter = [torch.full_like(x, torch.nan) for x in (*inputs, *expected) for _ in range(3)]
        del litter
        assert_same_bits(expected, gradients(inputs, normal_like(inputs.query), entmax_attn, **lengths))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    "lengths, words",
    (
        (dict(q_seqlens=[5, 38]), "q_seqlens must be from 0 to query's length 37, got 38 at [1]"),
        (dict(q_seqlens=[-1, 3]), "q_seqlens must be from 0 to query's length 37, got -1 at [0]"),
        (dict(kv_seqlens=[54, 3]), "kv_seqlens must be from 0 to key's length 53, got 54 at [0]"),
        (dict(kv_seqlens=[3, -(2**31)]), "kv_seqlens must be from 0 to key's length 53, got -2147483648 at [1]"),
    ),
)
def test_lengths_out_of_range_are_an_error(make_inputs, lengths, words):
    with pytest.raises(RuntimeError) as error:
        entmax_attn(*make_inputs(), **tensors(lengths, "cpu"))
    assert str(error.value) == f"entmax_attn: {words}"


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("lengths", (dict(q_seqlens=[5, 1000]), dict(kv_seqlens=[-3, 2**31 - 1])), ids=str)
def test_lengths_out_of_range_are_clamped(make_inputs, backend, lengths):
    """Wrong rows at worst: every element written, nothing read outside."""
    inputs = make_inputs()
    clamped = {name: [min(max(x, 0), 37 if name[0] == "q" else 53) for x in given] for name, given in lengths.items()}
    wild, tame = (
        gradients(inputs, normal_like(inputs.query), entmax_attn, **tensors(x, backend.device))
        for x in (lengths, clamped)
    )
    assert_same_bits(wild, tame)
