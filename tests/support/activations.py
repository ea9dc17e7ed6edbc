"""Scores for the activation, its gradients beside the reference's, and how far they may be apart."""

import torch
from torch import Tensor

import adasplash
import reference
from common import normal_like

# Largest error of weights and of gradients, relative to the largest exact number. Gradients are worked out from weights
# that were rounded to the type, as torch.softmax's are.
TOLERANCE = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2**-8, 2**-6),
    torch.float16: (2**-11, 2**-9),
}


def draw(*shape, sigma=1.5, mean=0.0, dtype=torch.float32, device="cpu", seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * sigma + mean).to(device, dtype)


def differentiate(function, x: Tensor, alpha: float | Tensor, dim: int = -1) -> list[Tensor]:
    """Weights and the gradients of x and, if it is a tensor, alpha."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, alpha) if isinstance(t, Tensor)]
    weights = function(leaves[0], leaves[1] if isinstance(alpha, Tensor) else alpha, dim)
    weights.backward(normal_like(weights))
    return [weights.detach(), *(leaf.grad for leaf in leaves)]


def exactly(x: Tensor, alpha: float | Tensor, dim: int = -1) -> list[Tensor]:
    """The same by the reference, in fp64, for the incoming gradient that `differentiate` draws in x's type."""
    grad = normal_like(x).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, alpha) if isinstance(t, Tensor)]
    rows = leaves[0].movedim(dim, -1)
    rates = alpha
    if isinstance(alpha, Tensor):
        rates = leaves[1].expand([1 if d == dim % x.dim() else s for d, s in enumerate(x.shape)]).movedim(dim, -1)
    weights = reference.entmax(rows, rates).movedim(-1, dim)
    weights.backward(grad)
    return [weights.detach(), *(leaf.grad for leaf in leaves)]


def assert_close(what: str, actual: Tensor, exact: Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape, what
    error = (actual.double() - exact).abs().max().item()
    assert error <= tolerance * exact.abs().max().item(), f"{what}: error {error:.2e}"


def check(x: Tensor, alpha: float | Tensor, dim: int = -1) -> None:
    actual, exact = differentiate(adasplash.entmax, x, alpha, dim), exactly(x, alpha, dim)
    of_weights, of_gradients = TOLERANCE[x.dtype]
    assert actual[0].dtype == actual[1].dtype == x.dtype and actual[0].is_contiguous()
    assert_close("weights", actual[0], exact[0], of_weights)
    assert_close("gradient", actual[1], exact[1], of_gradients)
    if len(actual) == 3:
        assert actual[2].dtype == alpha.dtype
        assert_close("gradient of alpha", actual[2], exact[2], of_gradients)
