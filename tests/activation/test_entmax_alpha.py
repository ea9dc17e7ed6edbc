"""Alpha as a tensor: one for each row, or one for all, and its gradient."""

import pytest
import torch

import adasplash
from activations import assert_close, check, differentiate, draw, exactly
from common import HALF

OPS = torch.ops.adasplash


@pytest.mark.parametrize("n", (40, 130, 5000))
def test_alpha_of_each_row(backend, dtype, n):
    alpha = torch.linspace(1.02, 2.0, 12, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    check(draw(3, 4, n, dtype=dtype, device=backend.device), alpha.view(3, 4, 1).to(backend.device))


@pytest.mark.parametrize("alpha", (1.01, 1.02, 1.05))
@pytest.mark.parametrize("types", ((torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.004)))
def test_gradient_of_alpha_near_one(backend, alpha, types):
    """The usual closed form cancels here: off by 0.3 % in fp32 at 1.01, and useless from weights in half types."""
    dtype, tolerance = types
    backend.needs(dtype=dtype)
    x = draw(20, 100, dtype=dtype, device=backend.device)
    alphas = torch.full((20, 1), alpha, device=backend.device)
    _, _, actual = differentiate(adasplash.entmax, x, alphas)
    _, _, exact = exactly(x, alphas)
    assert_close("gradient of alpha", actual, exact, tolerance)


def test_alpha_of_another_type(backend):
    """alpha is worked with in fp32, and its gradient comes back in its own type."""
    x = draw(4, 30, device=backend.device)
    for dtype in (torch.float64, *HALF):
        alpha = torch.tensor([[1.25], [1.5], [1.75], [2.0]], dtype=dtype, device=backend.device)
        weights, _, gradient = differentiate(adasplash.entmax, x, alpha)
        single = differentiate(adasplash.entmax, x, alpha.float())
        assert torch.equal(weights, single[0]) and torch.equal(gradient, single[2].to(dtype))


@pytest.mark.parametrize("shape", ((), (1,), (1, 1)))
def test_gradient_of_one_alpha(backend, shape):
    """A one-element tensor is no number: it keeps its gradient."""
    alpha = torch.full(shape, 1.4, device=backend.device, requires_grad=True)
    (OPS.entmax(draw(5, 30, device=backend.device), alpha) ** 2).sum().backward()
    assert alpha.grad.shape == shape and alpha.grad.item() != 0


@pytest.mark.backends("cpu")
def test_gradcheck():
    x = draw(3, 4, 6, dtype=torch.float64).requires_grad_()
    for dim in (0, 1, 2):
        for alpha in (1.3, 1.5, 2.0):
            assert torch.autograd.gradcheck(lambda x, alpha=alpha, dim=dim: adasplash.entmax(x, alpha, dim), x)
        shape = [1 if d == dim else size for d, size in enumerate(x.shape)]
        alpha = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.8 + 1.1
        assert torch.autograd.gradcheck(adasplash.entmax, (x, alpha.requires_grad_(), dim))


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("n", (5, 5000))
def test_alphas_out_of_range_make_nan(backend, n):
    """Without looking at the GPU's memory nobody can refuse them."""
    x = draw(6, n, device=backend.device)
    alpha = torch.tensor([1.5, 1.0, 2.1, torch.nan, -3.0, 2.0], device=backend.device)[:, None]
    weights, gradient, of_alpha = differentiate(adasplash.entmax, x, alpha)
    good = torch.tensor([True, False, False, False, False, True], device=backend.device)
    for found in (weights, gradient, of_alpha):
        assert found[good].isfinite().all() and found[~good].isnan().all()
