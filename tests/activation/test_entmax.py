"""The activation: any shape, dimension, type and alpha, against the fp64 reference and the `entmax` package."""

import math

import entmax as package
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adasplash
import reference
from activations import assert_close, check, differentiate, draw
from common import assert_same_bits, normal_like
from drawn import UNTIMED

ALPHAS = (1.01, 1.05, 1.25, 1.5, 1.75, 2.0)


# Values and gradients


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("sigma", (0.02, 1.5, 10.0), ids="sigma={}".format)
def test_types_and_supports(backend, dtype, alpha, sigma):
    """Supports from all entries to one."""
    check(draw(7, 130, sigma=sigma, dtype=dtype, device=backend.device), alpha)


@pytest.mark.parametrize("n", (1, 2, 3, 8, 63, 64, 65, 127, 128, 129, 1000, 1024, 1025, 4096, 4097, 9000))
@pytest.mark.parametrize("alpha", (1.3, 1.5, 2.0))
def test_lengths(backend, n, alpha):
    check(draw(3, n, device=backend.device), alpha)


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("alpha", (1.1, 1.5, 2.0))
@pytest.mark.parametrize("sigma", (1e-3, 0.3, 1.5))
def test_a_row_of_a_million(backend, alpha, sigma):
    """Short lists, long lists, and rows with more support than a list holds."""
    check(draw(1, 1 << 20, sigma=sigma, device=backend.device), alpha)


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("order", ("ascending", "descending"))
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_sorted_rows(backend, order, alpha):
    """Every score a new maximum, or none."""
    x = draw(2, 20000, device=backend.device).sort(-1, descending=order == "descending").values
    check(x, alpha)


@pytest.mark.parametrize("mean", (1e4, -1e4, 1e8, -1e30))
@pytest.mark.parametrize("alpha", (1.05, 1.5, 2.0))
def test_large_scores(backend, alpha, mean):
    """What decides is the scores' difference, however large they are."""
    x = (draw(3, 90) * 2**6).round() / 2**6
    unit = 2.0 ** max(0, math.frexp(mean)[1] - 18)  # of scores this large, so that adding the mean is exact
    far = (x * unit + mean).to(backend.device)
    weights = adasplash.entmax(far, alpha)
    assert_close("weights", weights, reference.entmax(far.double(), alpha), 2e-6)


@pytest.mark.parametrize("alpha", (1.01, 1.1, 1.5, 2.0))
def test_weights_sum_to_one(backend, alpha):
    for sigma, mean in ((0.05, 30.0), (1e-4, 5.3), (1.0, 1000.0)):
        sums = adasplash.entmax(draw(5, 5000, sigma=sigma, mean=mean, device=backend.device), alpha).double().sum(-1)
        assert (sums - 1).abs().max() <= 1e-5


def test_alpha_one_is_softmax(backend, dtype):
    x = draw(3, 4, 5, dtype=dtype, device=backend.device)
    for dim in (0, -1):
        assert torch.equal(adasplash.entmax(x, 1.0, dim), torch.softmax(x, dim))


def test_sparsemax_and_entmax15(backend):
    x = draw(3, 4, 5, device=backend.device)
    for dim in (1, -1):
        assert torch.equal(adasplash.sparsemax(x, dim), adasplash.entmax(x, 2.0, dim))
        assert torch.equal(adasplash.entmax15(x, dim), adasplash.entmax(x, 1.5, dim))
    assert torch.equal(adasplash.entmax(x), adasplash.entmax15(x, -1))


# The entmax package


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("sigma", (0.1, 1.0, 5.0))
@pytest.mark.parametrize("dim", (0, 1, -1))
@pytest.mark.parametrize(
    "alpha, theirs",
    (
        (1.5, lambda x, alpha, dim: package.entmax15(x, dim)),
        (2.0, lambda x, alpha, dim: package.sparsemax(x, dim)),
        *((alpha, lambda x, alpha, dim: package.entmax_bisect(x, alpha, dim, 60)) for alpha in (1.05, 1.3, 1.5, 1.9)),
    ),
)
def test_equals_the_package(alpha, theirs, dim, sigma):
    x = draw(4, 30, 20, sigma=sigma, dtype=torch.float64)
    ours, package_s = (differentiate(function, x, alpha, dim) for function in (adasplash.entmax, theirs))
    torch.testing.assert_close(ours, package_s, atol=1e-11, rtol=1e-9)


@pytest.mark.backends("cpu")
def test_gradient_of_alpha_equals_the_package():
    x, alpha = draw(4, 5, 20, dtype=torch.float64), torch.linspace(1.1, 1.95, 20, dtype=torch.float64).view(4, 5, 1)
    theirs = differentiate(lambda x, alpha, dim: package.entmax_bisect(x, alpha, dim, 60), x, alpha)
    torch.testing.assert_close(differentiate(adasplash.entmax, x, alpha), theirs, atol=1e-9, rtol=1e-9)


# Shapes and dimensions


@st.composite
def problems(draw_from):
    shape = draw_from(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    dim = draw_from(st.integers(-len(shape), len(shape) - 1))
    rows = [1 if d == dim % len(shape) else size for d, size in enumerate(shape)]
    of_alpha = draw_from(st.sampled_from(("number", "one", "rows", "some")))
    if of_alpha == "some":  # fewer dimensions, or ones that broadcast
        rows = [size if draw_from(st.booleans()) else 1 for size in rows][draw_from(st.integers(0, len(rows))) :]
    alpha_shape = () if of_alpha == "one" else tuple(rows)
    order = draw_from(st.permutations(range(len(shape))))
    alpha = draw_from(st.floats(1.02, 2.0)) if of_alpha == "number" else alpha_shape
    return shape, dim, order, alpha


@given(problem=problems(), seed=st.integers(0, 1000))
@settings(UNTIMED, max_examples=60)
def test_any_shape_dim_stride_and_alpha(backend, problem, seed):
    shape, dim, order, alpha = problem
    strided = draw(*(shape[d] for d in order), seed=seed, device=backend.device)
    x = strided.permute([order.index(d) for d in range(len(shape))])
    assert list(x.shape) == shape
    if isinstance(alpha, tuple):
        generator = torch.Generator().manual_seed(seed)
        alpha = (torch.rand(alpha, generator=generator) * 0.9 + 1.05).to(backend.device)
    if x.numel():
        return check(x, alpha, dim)
    weights, gradient, *of_alpha = differentiate(adasplash.entmax, x, alpha, dim)
    assert weights.shape == gradient.shape == x.shape
    assert all(g.shape == alpha.shape and not g.any() for g in of_alpha)


@pytest.mark.parametrize("dim", (0, -1))
@pytest.mark.parametrize("alpha", (1.5, torch.tensor(1.3)), ids=("number", "tensor"))
def test_a_tensor_without_dimensions(backend, alpha, dim, dtype):
    """As torch.softmax: a row of one."""
    x = torch.tensor(-3.0, dtype=dtype, device=backend.device)
    alpha = alpha.to(backend.device) if isinstance(alpha, Tensor) else alpha
    weights, gradient, *of_alpha = differentiate(adasplash.entmax, x, alpha, dim)
    assert weights.shape == gradient.shape == () and weights == 1 and gradient == 0
    assert all(g == 0 for g in of_alpha)


def test_strided_input_and_gradient(backend):
    x = draw(6, 10, 8, device=backend.device)
    views = (x[::2], x[:, ::3], x[..., ::2], x.transpose(0, 2), x[:1].expand(6, -1, -1), x.flip(1)[:, 2:])
    for view in views:
        assert_same_bits(
            differentiate(adasplash.entmax, view, 1.5), differentiate(adasplash.entmax, view.contiguous(), 1.5)
        )
    leaf = x.clone().requires_grad_()
    adasplash.entmax(leaf, 1.5).backward(torch.ones((), device=backend.device).expand(6, 10, 8))
    assert leaf.grad.abs().max() < 1e-6  # a constant gradient moves nothing


# Determinism


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_rows_alone_have_the_same_bits(backend, dtype, alpha):
    x, alphas = draw(9, 700, dtype=dtype, device=backend.device), torch.full((9, 1), alpha, device=backend.device)
    together = differentiate(adasplash.entmax, x, alphas)
    assert_same_bits(together, differentiate(adasplash.entmax, x, alphas))
    grad = normal_like(x)
    for row in range(9):
        leaf = x[row].clone().requires_grad_()
        weights = adasplash.entmax(leaf, alphas[row])
        weights.backward(grad[row])
        assert torch.equal(weights, together[0][row]) and torch.equal(leaf.grad, together[1][row])


@pytest.mark.backends("cpu")
def test_threads_change_no_bit(threads, dtype):
    x, alpha = draw(300, 333, dtype=dtype), torch.full((300, 1), 1.5)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(differentiate(adasplash.entmax, x, alpha))
    assert_same_bits(*results)
