"""The activation's kernels in Triton's interpreter against the fp64 reference: both ways to hold a row, every type."""

import math

import pytest
import torch
from interpreted import patched_once, variants
from torch import Tensor

import reference
from activations import TOLERANCE, assert_close, draw
from common import HALF, assert_same_bits, normal_like

pytestmark = pytest.mark.backends("cpu")
TYPES = pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=lambda dtype: str(dtype).removeprefix("torch."))
# Rows of a program, numbers of a row at a time, whether rows are longer than that.
SHORT, WIDE, LONG = (8, 128, False), (2, 1024, False), (1, 64, True)
LAYOUTS = pytest.mark.parametrize("layout", (SHORT, WIDE, LONG), ids=("short", "wide", "long"))
GARBAGE = 12345.0  # what must not stay: everything is to be written


def activate(x: Tensor, alpha: float | Tensor, layout=SHORT, code: str | None = None) -> list[Tensor]:
    """Weights, gradient of x (n rows) and, if it is a tensor (n,), of alpha, for the gradient `normal_like(x)`."""
    (rows, length), per_row = x.shape, isinstance(alpha, Tensor)
    given = (alpha, rows, rows, length, 0.0) if per_row else (torch.empty(1), 0, rows, length, alpha)
    code = code or {1.5: "1_5", 2.0: "2"}.get(alpha if not per_row else 0, "any")
    out, gradient = torch.full_like(x, GARBAGE), torch.full_like(x, GARBAGE)
    of_alpha = torch.full((rows,), GARBAGE)
    grid = (math.ceil(rows / layout[0]),)
    with patched_once():
        variants.KERNELS["activate"].kernel[grid](x, out, *given, *layout, variants.ALPHAS[code])
        row_alpha, *rest = given
        grad = variants.KERNELS["activate_grad"].kernel
        grad[grid](normal_like(x), out, gradient, row_alpha, of_alpha, *rest, *layout)
    assert per_row or (of_alpha == GARBAGE).all()
    return [out, gradient, of_alpha] if per_row else [out, gradient]


def check(x: Tensor, alpha: float | Tensor, layout=SHORT) -> None:
    actual = activate(x, alpha, layout)
    scores = x.double().requires_grad_()
    rates = alpha.double()[:, None].requires_grad_() if isinstance(alpha, Tensor) else alpha
    exact = reference.entmax(scores, rates)
    exact.backward(normal_like(x).double())
    of_weights, of_gradients = TOLERANCE[x.dtype]
    assert_close("weights", actual[0], exact.detach(), of_weights)
    assert_close("gradient", actual[1], scores.grad, of_gradients)
    if isinstance(alpha, Tensor):
        assert_close("gradient of alpha", actual[2], rates.grad[:, 0], max(of_gradients, 2e-5))


@TYPES
@LAYOUTS
@pytest.mark.parametrize("alpha", (1.05, 1.5, 2.0))
@pytest.mark.parametrize("sigma", (0.02, 3.0), ids="sigma={}".format)
def test_types_and_supports(dtype, layout, alpha, sigma):
    check(draw(5, 120, sigma=sigma, dtype=dtype), alpha, layout)


@pytest.mark.parametrize("n, layout", ((1, SHORT), (127, SHORT), (128, SHORT), (1000, WIDE), (1, LONG), (63, LONG),
                                       (64, LONG), (65, LONG), (128, LONG), (3001, LONG)))  # fmt: skip
@pytest.mark.parametrize("rows", (1, 8, 9))
def test_lengths(n, layout, rows):
    check(draw(rows, n), 1.5, layout)


@TYPES
@LAYOUTS
def test_alpha_of_each_row(dtype, layout):
    check(draw(9, 120, dtype=dtype), torch.linspace(1.02, 2.0, 9), layout)


@LAYOUTS
@pytest.mark.parametrize("alpha", (1.5, 2.0))
def test_fast_code_and_powers_agree(layout, alpha):
    x = draw(5, 100)
    torch.testing.assert_close(activate(x, alpha, layout), activate(x, alpha, layout, "any"), atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("alpha", (1.01, 1.02))
def test_gradient_of_alpha_near_one(alpha):
    x, alphas = draw(16, 100), torch.full((16,), alpha)
    exact = alphas.double()[:, None].requires_grad_()
    reference.entmax(x.double(), exact).backward(normal_like(x).double())
    for layout in (SHORT, LONG):
        assert_close("gradient of alpha", activate(x, alphas, layout)[2], exact.grad[:, 0], 1e-4)


@LAYOUTS
@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
def test_masked_rows_nan_and_infinity(layout, alpha):
    x = draw(9, 100)
    clean = activate(x, alpha, layout)
    x[2], x[3, 77], x[4, 5], x[6, 99] = -torch.inf, torch.nan, torch.inf, -torch.inf
    weights, gradient = dirty = activate(x, alpha, layout)
    assert not weights[2].any() and not gradient[2].any() and weights[6, 99] == 0
    assert all(found[row].isnan().all() for found in dirty for row in (3, 4))
    others = torch.tensor([0, 1, 5, 7, 8])
    assert_same_bits([one[others] for one in clean], [other[others] for other in dirty])


@LAYOUTS
def test_alphas_out_of_range_make_nan(layout):
    found = activate(draw(6, 100), torch.tensor([1.5, 1.0, 2.1, torch.nan, -3.0, 2.0]), layout)
    for one in found:
        assert one[[0, 5]].isfinite().all() and one[1:5].isnan().all()


@LAYOUTS
@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
def test_a_row_has_the_same_bits_alone(layout, alpha):
    x = draw(9, 100)
    together = activate(x, alpha, layout)[0]
    assert all(torch.equal(activate(x[row, None], alpha, layout)[0][0], together[row]) for row in range(9))
