"""Scores that fit the type they are computed in, of queries and keys whose products may not before they are scaled."""

import pytest
import torch

from adasplash import entmax_attn
from common import Inputs, assert_same_bits, check_gradients, gradients, normal_like

LARGEST = {torch.float64: 2.0**500, torch.float32: 2.0**60, torch.bfloat16: 2.0**60, torch.float16: 2.0**10}
KINDS = {"lists": dict(sigma=1.5), "products": dict(sigma=0.01)}


@pytest.mark.backends("cpu")
def test_as_it_was_reported():
    """The output was right and dq NaN."""
    query = torch.full((1, 1, 3, 1), 1.9e19, requires_grad=True)
    key = torch.full((1, 1, 3, 1), 1.9e19, requires_grad=True)
    value = torch.arange(3.0).reshape(1, 1, 3, 1).requires_grad_()
    out = entmax_attn(query, key, value, scale=0.25)
    torch.testing.assert_close(out, torch.ones_like(out))
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (query, key, value))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", (1.0, 1.3))
@pytest.mark.parametrize("above", (2.0**-35, 2.0**20), ids=("a little", "far above"))
def test_a_power_of_two_in_the_query_and_its_inverse_in_the_scale(make_inputs, dtype, kind, alpha, above):
    """Such factors change no bit of scores, so no bit of anything."""
    factor = LARGEST[dtype] * (1 if dtype == torch.float16 else above)
    inputs = make_inputs(1, 2, 70, 700, 16, **KINDS[kind], dtype=dtype)
    keys = inputs.key * (2.0**30 if dtype != torch.float16 else 1)
    scale = 0.25 / (2.0**30 if dtype != torch.float16 else 1)
    options = dict(alpha=torch.tensor([alpha] * 2), is_causal=True)
    grad = normal_like(inputs.query)
    usual = gradients(Inputs(inputs.query, keys, inputs.value), grad, entmax_attn, scale=scale, **options)
    large = Inputs(inputs.query * factor, keys, inputs.value)
    assert large.query.isfinite().all()
    out, dq, dk, dv, dalpha = gradients(large, grad, entmax_attn, scale=scale / factor, **options)
    assert_same_bits((out, dk, dv, dalpha), (usual[0], usual[2], usual[3], usual[4]))
    if dtype != torch.float16:  # in which so small a dq is nothing
        largest = usual[1].abs().max().item()
        torch.testing.assert_close(dq.double() * factor, usual[1].double(), rtol=2e-2, atol=1e-3 * largest)


@pytest.mark.backends("cpu")
def test_rows_keep_their_bits_beside_a_large_one(make_inputs):
    inputs = make_inputs(1, 1, 70, 700, sigma=0.1)
    inputs.query[0, 0, :35] *= 1e-6
    clean = entmax_attn(*inputs)
    inputs.query[0, 0, 40] = 2.0**100
    out = entmax_attn(*inputs, scale=None)
    rest = torch.arange(70) != 40
    assert_same_bits(out[:, :, rest], clean[:, :, rest])


@pytest.mark.parametrize("alpha", (1.0, 1.25, 1.5, 2.0))
def test_scores_near_the_largest_number(make_inputs, backend, dtype, alpha):
    """One key far above all others, in every type; where q.k itself fits, on every backend."""
    inputs = make_inputs(1, 1, 5, 9, 4, dtype=dtype)
    largest = {torch.float64: 1e150, torch.float16: 200.0}.get(dtype, 1e18)
    inputs.query.fill_(largest)
    inputs.key.copy_(-inputs.key.abs())
    inputs.key[0, 0, 3] = largest
    given = torch.tensor([alpha], device=backend.device)
    out, dq, dk, dv, dalpha = gradients(inputs, normal_like(inputs.query), entmax_attn, alpha=given)
    torch.testing.assert_close(out, inputs.value[:, :, 3:4].expand_as(out))
    assert all(x.isfinite().all() for x in (dq, dk, dv, dalpha))


@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_what_does_not_fit_is_nan_forward_and_backward(make_inputs, backend, alpha):
    inputs = make_inputs(1, 1, 5, 9, 4)
    inputs.query[0, 0, 2] = 1e38
    inputs.key[0, 0, 3] = 1e36
    given = torch.tensor([alpha], device=backend.device)
    out, dq, _, _, _ = gradients(inputs, normal_like(inputs.query), entmax_attn, alpha=given)
    assert out[0, 0, 2].isnan().all() and dq[0, 0, 2].isnan().all()
    rest = torch.arange(5, device=out.device) != 2
    assert out[0, 0, rest].isfinite().all()


def test_usual_inputs_beside_the_reference(make_inputs):
    check_gradients(entmax_attn, make_inputs(m=30, n=40, sigma=30.0), scale=0.01)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("keys", (4, 600))
@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_gradients_of_a_large_loss(make_inputs, alpha, keys):
    """As scaled by an AMP loss scale: what is summed is scaled before it can overflow."""
    inputs = make_inputs(1, 1, 3, keys, 4, sigma=1.0)
    inputs.query.mul_(1e37)
    inputs.key.mul_(1e-19)
    grad = normal_like(inputs.query) * 1e8
    found = gradients(inputs, grad, entmax_attn, alpha=torch.tensor([alpha]), scale=1e-18)
    assert all(x.isfinite().all() for x in found) and found[2].any()
