"""Nothing to attend to, or nothing that attends."""

import pytest
import torch

from adasplash import entmax_attn
from common import Inputs, assert_same_bits, assert_same_values, check_gradients, gradients, normal_like

EMPTY = {
    "no batch": dict(batch=0),
    "no heads": dict(heads=0),
    "no queries": dict(m=0),
    "no keys": dict(n=0),
    "nothing at all": dict(batch=0, heads=0, m=0, n=0),
    "no queries, no keys": dict(m=0, n=0),
}


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("alpha", (1.0, 1.25, 1.5, 2.0))
@pytest.mark.parametrize("empty", EMPTY)
def test_empty(make_inputs, empty, alpha, is_causal, dtype):
    inputs = make_inputs(**{**dict(batch=2, heads=3, m=5, n=5, size=4), **EMPTY[empty]}, dtype=dtype)
    if alpha == 1 and is_causal and inputs.query.shape[2] != inputs.key.shape[2]:
        pytest.skip("softmax with a causal mask needs as many queries as keys")
    out, *grads = gradients(inputs, normal_like(inputs.query), entmax_attn, alpha=alpha, is_causal=is_causal)
    assert out.shape == inputs.query.shape and out.dtype == dtype and not out.any()
    for x, grad in zip(inputs, grads, strict=True):
        assert grad.shape == x.shape and not grad.any()


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_rows_without_a_visible_key(make_inputs, alpha, dtype):
    """More queries than keys, causal: the first M - N rows see nothing, give zeros and take no gradient."""
    inputs = make_inputs(2, 2, 150, 70, dtype=dtype)
    grad = normal_like(inputs.query)
    out, dq, dk, dv = check_gradients(entmax_attn, inputs, alpha=alpha, is_causal=True)
    assert not out[:, :, :80].any() and not dq[:, :, :80].any()
    assert out[:, :, 80:].any(-1).all()
    grad[:, :, :80] = 1e4
    other = gradients(inputs, grad, entmax_attn, alpha=alpha, is_causal=True)
    assert_same_bits((out, dq, dk, dv), other)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_one_key_takes_all(make_inputs, alpha, dtype):
    inputs = make_inputs(m=20, n=1, dtype=dtype)
    out, dq, dk, dv = check_gradients(entmax_attn, inputs, alpha=alpha)
    assert_same_values(out, inputs.value.expand_as(out))
    for gradient in (dq, dk):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        dv.double(), normal_like(inputs.query).double().sum(2, keepdim=True), atol=0.02, rtol=0.01
    )


def test_every_element_is_written(make_inputs, dtype):
    """Results do not depend on what freed memory held."""
    inputs = make_inputs(2, 2, 90, 33, size=20, value_size=9, dtype=dtype)
    grad = normal_like(inputs.query[..., :9])
    expected = gradients(inputs, grad, entmax_attn, is_causal=True)
    for _ in range(5):
        litter = [torch.full_like(x, torch.nan) for x in (*inputs, *expected) for _ in range(3)]
        del litter
        assert_same_bits(expected, gradients(inputs, grad, entmax_attn, is_causal=True))


def test_inputs_are_left_alone(make_inputs):
    inputs = make_inputs(m=70, n=70)
    before = Inputs(*(x.clone() for x in inputs))
    gradients(inputs, normal_like(inputs.query), entmax_attn, is_causal=True)
    assert_same_bits(inputs, before)


@pytest.mark.parametrize("alpha", (1.3, 1.5, 2.0))
def test_scores_so_large_that_one_is_lost_in_rounding(backend, alpha):
    """Above 2^24 a maximum less one is the maximum itself, in fp32; the keys that reach it share the weight."""
    query = torch.tensor([[1e5, 0], [0, 1e5]], device=backend.device)
    key = torch.tensor([[1e5, 0], [0, 1e5], [3e4, 3e4], [1e5, 0]], device=backend.device)
    value = torch.arange(8.0, device=backend.device).view(4, 2)
    out = entmax_attn(*(x[None, None] for x in (query, key, value)), alpha, scale=1.0)
    assert out[0, 0].tolist() == [[3, 4], [2, 3]]
