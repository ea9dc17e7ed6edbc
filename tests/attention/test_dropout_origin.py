"""Parts of a call that drop what the whole call does: dropout_origin, where each was taken from."""

import pytest
import torch

from adasplash import entmax_attn, entmax_attn_varlen
from common import Inputs, assert_same_bits, check_gradients, gradients, normal_like
from packing import check_packed, packed


@pytest.fixture
def options(backend):
    return dict(dropout_p=0.4, dropout_seed=torch.tensor(0x123456789ABCDEF, device=backend.device))


def origin(backend, *rows, dtype=torch.int64):
    return torch.tensor(rows, dtype=dtype, device=backend.device)


@pytest.mark.parametrize("int_type", (torch.int32, torch.int64))
@pytest.mark.parametrize("alpha", (1.0, 1.3, 1.5))
def test_against_the_reference(make_inputs, backend, options, alpha, int_type):
    inputs = make_inputs(batch=2, heads=4, kv_heads=2, m=37, n=53)
    told = origin(backend, [7, 3, 100, 64], [0, 2**31 - 2, -9, -70], dtype=int_type)
    check_gradients(entmax_attn, inputs, alpha=alpha, is_causal=True, dropout_origin=told, **options)


def test_packed(backend, options):
    inputs, lengths = packed([70, 0, 5], [90, 4, 5], device=backend.device)
    told = origin(backend, [2, 0, 5, 0], [0, 0, 0, 0], [9, 1, 64, 3])
    check_packed(inputs, lengths, is_causal=True, dropout_origin=told, **options)


def test_the_origin_that_is_meant_without_it_changes_no_bit(make_inputs, backend, options):
    inputs = make_inputs(batch=2, m=37, n=53)
    grad = normal_like(inputs.query)
    told = origin(backend, [0, 0, 0, 0], [1, 0, 0, 0])
    one, other = (gradients(inputs, grad, entmax_attn, **given, **options) for given in ({}, {"dropout_origin": told}))
    assert_same_bits(one, other)


@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_a_part_of_a_call(make_inputs, backend, options, alpha):
    """Entry 1, heads 2 and 3, queries 20 to 39, and of the keys those that a window shows them."""
    inputs = make_inputs(batch=2, heads=4, kv_heads=4, m=60, n=60)
    whole = entmax_attn(*inputs, alpha, window=(8, 4), **options)
    query, *sides = (x[1:, 2:] for x in inputs)
    part = Inputs(query[:, :, 20:40], *(x[:, :, 12:44] for x in sides))
    told = dict(q_positions=origin(backend, 8), dropout_origin=origin(backend, [1, 2, 20, 12]))
    out = entmax_attn(*part, alpha, window=(8, 4), **told, **options)
    torch.testing.assert_close(out, whole[1:, 2:, 20:40], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, entmax_attn(*part, alpha, window=(8, 4), q_positions=told["q_positions"], **options))


def test_it_may_be_given_without_dropout(make_inputs, backend):
    inputs = make_inputs(batch=1, m=9, n=9)
    assert_same_bits(entmax_attn(*inputs), entmax_attn(*inputs, dropout_origin=origin(backend, [1, 2, 3, 4])))


@pytest.mark.parametrize(
    "told, words",
    (
        (torch.zeros(3, 4).int(), "dropout_origin must have .* batch size 2, got 3"),
        (torch.zeros(2, 3).int(), "dropout_origin must have four numbers' width 4, got 3"),
        (torch.zeros(2, 4), "dropout_origin must be int32 or int64, got Float"),
        (torch.zeros(2).int(), "dropout_origin must have 2 dimensions"),
    ),
)
def test_origins_of_another_shape_or_type(make_inputs, backend, told, words):
    with pytest.raises(RuntimeError, match=f"^entmax_attn: {words}"):
        entmax_attn(*make_inputs(batch=2, m=5, n=5), dropout_origin=told.to(backend.device))
    inputs, lengths = packed([5, 4], [5, 4], device=backend.device)
    with pytest.raises(RuntimeError, match=f"^entmax_attn_varlen: {words}"):
        entmax_attn_varlen(*inputs, *lengths, dropout_origin=told.to(backend.device))
