"""Sequences of at most 512 keys, for which a GPU has code of its own for half types."""

import pytest
import torch

from adasplash import entmax_attn, entmax_attn_varlen
from common import HALF, Inputs, assert_same_bits, check_gradients, gradients, normal_like

SHAPES = {
    "as many as the narrow code takes": dict(m=20, n=256),
    "one more": dict(m=20, n=257),
    "as many as the wide code takes": dict(m=70, n=512),
    "one more than that": dict(m=20, n=513),
    "large heads": dict(m=20, n=200, size=128),
    "large heads, more keys": dict(m=20, n=300, size=128),
    "odd sizes, grouped": dict(m=30, n=90, heads=4, kv_heads=2, size=33, value_size=7),
}
OPTIONS = {
    "full": {},
    "causal": dict(is_causal=True),
    "window": dict(window=(40, 3)),
    "ALiBi": dict(is_causal=True, alibi_slopes=True),
    "dropout": dict(dropout_p=0.3, dropout_seed=5),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0, "1 for some heads"))
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(make_inputs, dtype, shape, options, alpha):
    inputs = make_inputs(**dict(batch=1, size=64) | SHAPES[shape], dtype=dtype)
    heads, device = inputs.query.shape[1], inputs.query.device
    options = dict(OPTIONS[options])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.linspace(0.01, 0.2, heads, device=device)
    if "dropout_seed" in options:
        options["dropout_seed"] = torch.tensor(options["dropout_seed"], device=device)
    if alpha == "1 for some heads":
        alpha = torch.where(torch.arange(heads, device=device) % 2 == 0, 1.0, 1.5)
    check_gradients(entmax_attn, inputs, alpha=alpha, times=3, **options)


QUERIES, KEYS = (70, 64, 130, 20, 17, 0), (600, 512, 257, 256, 5, 90)


@pytest.fixture(params=(1.25, 1.5), ids=str)
def alone(request, make_inputs):
    """Sequences of all kinds of lengths, the gradients of their outputs, and what comes of each alone."""
    several = [
        make_inputs(1, 2, m, n, size=32, kv_heads=1, dtype=torch.bfloat16, seed=m)
        for m, n in zip(QUERIES, KEYS, strict=True)
    ]
    grads = [normal_like(inputs.query, seed) for seed, inputs in enumerate(several)]
    found = [gradients(*one, entmax_attn, request.param, True) for one in zip(several, grads, strict=True)]
    return several, grads, found, request.param


def test_no_bit_depends_on_the_batch(alone):
    """Short and long sequences padded to the longest, their keys at the front or behind others."""
    several, grads, found, alpha = alone
    most, device = [max(QUERIES), max(KEYS)], grads[0].device
    queries, keys = (torch.tensor(lengths, device=device) for lengths in (QUERIES, KEYS))
    for front in (0, 30):

        def padded(x, length, front=0):
            return torch.nn.functional.pad(x, (0, 0, front, length - x.shape[2]), value=7.0)

        batch = Inputs(
            torch.cat([padded(x.query, most[0]) for x in several]),
            *(torch.cat([padded(x[side], most[1], front) for x in several]) for side in (1, 2)),
        )
        grad = torch.cat([padded(x, most[0]) for x in grads])
        bounds = dict(q_seqlens=queries, kv_seqlens=keys + front)
        if front:
            bounds["kv_starts"] = torch.full_like(keys, front)
        actual = gradients(batch, grad, entmax_attn, alpha, True, **bounds)
        for index, expected in enumerate(found):
            for side, (mine, other) in enumerate(zip(actual, expected, strict=True)):
                first = front if side >= 2 else 0
                assert_same_bits(mine[index, None, :, first : first + other.shape[2]], other)
            assert not actual[0][index, :, QUERIES[index] :].any()


def test_no_bit_depends_on_packing(alone):
    several, grads, found, alpha = alone
    packed = Inputs(*(torch.cat([x[0].transpose(0, 1) for x in parts]) for parts in zip(*several, strict=True)))
    grad = torch.cat([x[0].transpose(0, 1) for x in grads])
    ends = [torch.tensor([0, *x], device=grad.device).cumsum(0).int() for x in (QUERIES, KEYS)]
    actual = gradients(packed, grad, entmax_attn_varlen, *ends, max(QUERIES), max(KEYS), alpha, True)
    for index, expected in enumerate(found):
        for side, (mine, other) in enumerate(zip(actual, expected, strict=True)):
            first, last = ends[side // 2][index : index + 2]
            assert_same_bits(mine[first:last].transpose(0, 1)[None], other)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_a_value_that_is_not_finite(make_inputs, bad):
    """Shows in the rows that give it weight, and in none that do not see it."""
    inputs = make_inputs(1, 2, 130, 130, dtype=torch.bfloat16)
    clean = entmax_attn(*inputs, is_causal=True)
    inputs.value[0, 1, 100] = bad
    dirty = entmax_attn(*inputs, is_causal=True)
    assert not dirty[0, 1, 100:].isfinite().all()
    assert_same_bits(dirty[0, 1, :64], clean[0, 1, :64])
    assert_same_bits(dirty[0, 0], clean[0, 0])
