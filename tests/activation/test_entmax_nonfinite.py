"""NaN, infinities and masks of the largest negative number among the scores, and in the incoming gradient."""

import math

import pytest
import torch

import adasplash
from activations import TOLERANCE, check, differentiate, draw
from common import HALF, assert_same_bits


@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
@pytest.mark.parametrize("n", (1, 7, 130, 5000))
def test_fully_masked_rows(backend, dtype, alpha, n):
    x = draw(3, n, dtype=dtype, device=backend.device)
    x[1] = -torch.inf
    weights, gradient = differentiate(adasplash.entmax, x, alpha)
    assert not weights[1].any() and not gradient[1].any()
    assert (weights[[0, 2]].double().sum(-1) - 1).abs().max() < 0.02 and gradient.isfinite().all()
    alphas = torch.full((3, 1), alpha, device=backend.device)
    _, gradient, of_alpha = differentiate(adasplash.entmax, x, alphas)
    assert of_alpha[1] == 0 and of_alpha.isfinite().all() and not gradient[1].any()


@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
def test_masked_entries(backend, dtype, alpha):
    """They get no weight, and the others what they would get without them."""
    x = draw(4, 100, dtype=dtype, device=backend.device)
    kept = (torch.arange(100) % 3 == 1).to(backend.device)
    weights, gradient = differentiate(adasplash.entmax, x.masked_fill(~kept, -torch.inf), alpha)
    assert not weights[:, ~kept].any() and not gradient[:, ~kept].any()
    torch.testing.assert_close(
        weights[:, kept], adasplash.entmax(x[:, kept], alpha), atol=TOLERANCE[dtype][0], rtol=TOLERANCE[dtype][0]
    )


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
@pytest.mark.parametrize("n, place", ((1, 0), (130, 77), (130, 129), (5000, 4999)))
def test_nan_and_infinity_stay_in_their_row(backend, dtype, bad, alpha, n, place):
    x = draw(5, n, dtype=dtype, device=backend.device)
    clean = differentiate(adasplash.entmax, x, alpha)
    x[2, place] = bad
    dirty = differentiate(adasplash.entmax, x, alpha)
    others = torch.tensor([0, 1, 3, 4], device=backend.device)
    for one, other in zip(clean, dirty, strict=True):
        assert other[2].isnan().all() and torch.equal(one[others], other[others])


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("alpha", (1.2, 1.5))
def test_nan_in_a_row_with_much_support(alpha):
    x = draw(2, 5000, sigma=0.01)
    x[0, 4000] = torch.nan
    weights = adasplash.entmax(x, alpha)
    assert weights[0].isnan().all() and weights[1].isfinite().all()


@pytest.mark.parametrize("alpha", (1.05, 1.5, 2.0))
@pytest.mark.parametrize("low", (-1e4, -65504.0, -torch.inf))
def test_large_negative_logits_in_half_types(backend, alpha, low):
    """Masks of the largest negative number, where the `entmax` package gives NaN."""
    for dtype in HALF:
        x = draw(4, 90, dtype=dtype, device=backend.device)
        x[:, 30:] = low
        check(x[:3], alpha)
        x[3] = low  # nothing but large negative numbers: flat, unless infinite
        weights = adasplash.entmax(x, alpha)[3]
        torch.testing.assert_close(weights, torch.full_like(weights, 0.0 if math.isinf(low) else 1 / 90))


@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
@pytest.mark.parametrize("n", (130, 5000))
def test_gradients_of_weights_that_are_zero_do_not_matter(backend, alpha, n):
    """The logarithm of the weights has infinite gradients there."""
    x, grad = draw(3, n, device=backend.device), draw(3, n, device=backend.device, seed=1)
    leaf, alphas = x.clone().requires_grad_(), torch.full((3, 1), alpha, device=backend.device).requires_grad_()
    weights = adasplash.entmax(leaf, alphas)
    expected = torch.autograd.grad(weights, (leaf, alphas), grad, retain_graph=True)
    for bad in (torch.nan, torch.inf):
        found = torch.autograd.grad(weights, (leaf, alphas), grad.where(weights != 0, bad), retain_graph=True)
        assert_same_bits(expected, found)
    bad_support = grad.where(weights == weights.amax(-1, keepdim=True), torch.nan)
    found = torch.autograd.grad(weights, leaf, bad_support.where(torch.arange(3, device=x.device)[:, None] == 1, grad))
    assert found[0][1].isnan().any() and found[0][[0, 2]].isfinite().all()
