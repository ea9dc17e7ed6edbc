"""The activation: any shape, dimension, type and alpha, against the fp64 reference and the `entmax` package."""

import functools
import math

import entmax as package
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adasplash
import reference
from common import HALF, assert_same_bits, normal_like, run_python

refused = functools.partial(pytest.raises, (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError))
OPS = torch.ops.adasplash
ALPHAS = (1.01, 1.05, 1.25, 1.5, 1.75, 2.0)
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


# ---- values and gradients --------------------------------------------------------------------------------------------


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


# ---- the entmax package ----------------------------------------------------------------------------------------------


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


# ---- shapes and dimensions -------------------------------------------------------------------------------------------


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
@settings(max_examples=60, deadline=None, derandomize=True)
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


# ---- alpha as a tensor -----------------------------------------------------------------------------------------------


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


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("value", (1.0, 1.005, 2.1, torch.nan, -3.0))
def test_alphas_out_of_range_are_refused(value):
    x, alpha = draw(3, 5), torch.tensor([[1.5], [value], [2.0]])
    with refused(match=r"alpha must be from 1.01 to 2, got"):
        adasplash.entmax(x, alpha)
    with refused(match=r"alpha must be from 1.01 to 2, got"):
        OPS._entmax_backward(x, x, alpha[:, 0], 0.0)


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


# ---- NaN and infinity ------------------------------------------------------------------------------------------------


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


# ---- errors ----------------------------------------------------------------------------------------------------------

ERRORS = {
    "dim": (dict(dim=2), "dim -2 1 2"),
    "dim below": (dict(dim=-3), "dim -2 1 -3"),
    "int": (dict(input=torch.ones(3, 4, dtype=torch.int32)), "input float32 Int"),
    "complex": (dict(input=torch.ones(3, 4) + 0j), "input float32 omplex"),
    "sparse": (dict(input=torch.ones(3, 4).to_sparse()), "input dense Sparse"),
    "alpha 0.5": (dict(alpha=0.5), "alpha 1 1.01 2 0.5"),
    "alpha 1.005": (dict(alpha=1.005), "alpha 1 1.01 2 1.005"),
    "alpha 2.5": (dict(alpha=2.5), "alpha 1 1.01 2 2.5"),
    "alpha NaN": (dict(alpha=torch.nan), "alpha 1 1.01 2 nan"),
    "alphas along dim": (dict(alpha=torch.full((3, 4), 1.5)), "alpha broadcast [3, 1] [3, 4]"),
    "alphas of another size": (dict(alpha=torch.full((2, 1), 1.5)), "alpha broadcast [3, 1] [2, 1]"),
    "alphas of more dimensions": (dict(alpha=torch.full((1, 3, 1), 1.5)), "alpha broadcast [3, 1] [1, 3, 1]"),
    "alphas of ints": (dict(alpha=torch.full((3, 1), 2)), "alpha floating Long"),
    "alpha elsewhere": (dict(alpha=torch.full((3, 1), 1.5, device="meta")), "alpha device meta"),
}


@pytest.mark.parametrize("inference", (False, True), ids=("plain", "inference mode"))
@pytest.mark.parametrize("function", (adasplash.entmax, OPS.entmax), ids=("python", "op"))
@pytest.mark.parametrize("case", ERRORS)
def test_errors(backend, function, case, inference):
    changes, words = ERRORS[case]
    arguments = {"input": torch.ones(3, 4), "alpha": 1.5, "dim": -1, **changes}
    with torch.inference_mode(inference), refused() as error:
        function(**arguments)
    message = str(error.value)
    assert message.startswith("entmax: ") and "\n" not in message
    for word in words.split():
        assert word in message, f"{word!r} is not in: {message}"


@pytest.mark.parametrize(
    "arguments, words",
    (
        ((torch.ones(()), None, 1.5), "input dimension"),
        ((torch.ones(3, 4), None, 1.0), "alpha 1.01 2 1"),
        ((torch.ones(3, 4), torch.full((3, 1), 1.5), 0.0), "row_alpha [3] [3, 1]"),
        ((torch.ones(3, 4), torch.full((3,), 1.5).double(), 0.0), "row_alpha Float Double"),
    ),
)
def test_errors_of_the_private_ops(backend, arguments, words):
    for op, more in ((OPS._entmax_forward, ()), (OPS._entmax_backward, (arguments[0],))):
        with refused() as error:
            op(*more, *arguments)
        for word in (f"{op.__name__.split('.')[0]}:", *words.split()):
            assert word in str(error.value) or word == "input"


@pytest.mark.parametrize("change", (lambda g: g[:2], lambda g: g.double(), lambda g: g.to("meta")))
def test_a_gradient_that_does_not_fit(backend, change):
    weights = torch.full((3, 4), 0.25)
    with refused(match="_entmax_backward: grad_out must"):
        OPS._entmax_backward(change(torch.ones(3, 4)), weights, None, 1.5)


def test_double_backward_and_forward_mode_are_refused(backend):
    x = draw(3, 5, device=backend.device).requires_grad_()
    alpha = torch.tensor(1.5, device=backend.device, requires_grad=True)
    for arguments in ((x, 1.5), (x, alpha)):
        (first,) = torch.autograd.grad(adasplash.entmax(*arguments).square().sum(), x, create_graph=True)
        with refused(match="double backward is not supported"):
            first.square().sum().backward()
    with torch.autograd.forward_ad.dual_level(), refused(match="forward-mode AD is not supported"):
        adasplash.entmax(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))


# ---- determinism -----------------------------------------------------------------------------------------------------


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


# ---- what PyTorch puts around ops ------------------------------------------------------------------------------------


def test_inference_mode(backend, dtype):
    x = draw(4, 30, 5, dtype=dtype, device=backend.device)
    alpha = torch.full((4, 1, 5), 1.3, device=backend.device)
    for arguments in ((x, 1.5, 1), (x, alpha, 1), (x, 1.0, 1)):
        expected = adasplash.entmax(*arguments)
        with torch.inference_mode():
            out = adasplash.entmax(*arguments)
            assert out.is_inference() and torch.equal(out, expected)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_as_softmax(backend, dtype):
    x = draw(4, 30, dtype=dtype, device=backend.device)
    alpha = torch.full((4, 1), 1.5, device=backend.device)
    with torch.autocast(backend.device, dtype=dtype):
        for rate in (1.5, alpha):
            assert adasplash.entmax(x, rate).dtype == torch.softmax(x, -1).dtype


@pytest.mark.parametrize("dim", (0, 1, -1))
@pytest.mark.parametrize("alpha", (1.5, 1.3, "tensor"))
def test_opcheck(backend, alpha, dim):
    x = draw(3, 4, 5, device=backend.device).requires_grad_()
    op, shape = OPS.entmax.default, [1 if d == dim % 3 else size for d, size in enumerate(x.shape)]
    if alpha == "tensor":
        op, alpha = OPS.entmax.tensor_alpha, torch.full(shape, 1.3, device=backend.device).requires_grad_()
    torch.library.opcheck(op, (x, alpha, dim))
    torch.library.opcheck(op, (x.detach().transpose(0, 1), 1.5 if isinstance(alpha, float) else alpha.mean(), dim))


def test_opcheck_of_the_private_ops(backend):
    x, alpha = draw(3, 4, 5, device=backend.device), torch.full((3, 4), 1.3, device=backend.device)
    for row_alpha in (None, alpha):
        torch.library.opcheck(OPS._entmax_forward.default, (x, row_alpha, 1.5))
        weights = OPS._entmax_forward(x, row_alpha, 1.5)
        torch.library.opcheck(OPS._entmax_backward.default, (normal_like(x), weights, row_alpha, 1.5))


class Gate(torch.nn.Module):
    """A learned alpha for each column, and fixed ones, along several dimensions."""

    def __init__(self):
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.tensor([[1.2, 1.5, 1.8]]))
        self.weight = torch.nn.Parameter(draw(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = adasplash.entmax(x @ self.weight, self.alpha, 0)
        return adasplash.sparsemax(y * 3.0, 1) + adasplash.entmax(y, 1.3) + adasplash.entmax15(y, 0)


def train(gate: torch.nn.Module, x: Tensor) -> list[Tensor]:
    out = gate(x)
    return [out, *torch.autograd.grad((out * normal_like(out)).sum(), list(gate.parameters()))]


@pytest.mark.slow
def test_compiled_in_one_graph_for_all_lengths(backend):
    torch.compiler.reset()
    gate = Gate().to(backend.device)
    compiled = torch.compile(gate, fullgraph=True, dynamic=True)
    train(compiled, draw(20, 8, device=backend.device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (20, 33, 7):
            x = draw(rows, 8, device=backend.device)
            torch.testing.assert_close(train(compiled, x), train(gate, x), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.backends("cpu", "cuda")
def test_exported(backend, tmp_path):
    gate = Gate().to(backend.device)
    x = draw(20, 8, device=backend.device)
    program = torch.export.export(gate, (x,), dynamic_shapes=({0: torch.export.Dim("rows", max=4096)},))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("adasplash.entmax.tensor_alpha") == 1 and names.count("adasplash.entmax.default") == 3
    names = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert names.count("adasplash._entmax_forward.default") == 4
    torch.export.save(program, tmp_path / "gate.pt2")
    module = torch.export.load(tmp_path / "gate.pt2").module()
    for rows in (20, 50):
        x = draw(rows, 8, device=backend.device)
        assert torch.equal(module(x), gate(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_scripted_saved_and_loaded(backend, tmp_path):
    gate = Gate().to(backend.device)
    torch.jit.save(torch.jit.script(gate), tmp_path / "gate.pt")
    loaded = torch.jit.load(tmp_path / "gate.pt")
    for rows in (20, 7, 33, 20):  # the profiling executor rewrites the graph after its first runs
        x = draw(rows, 8, device=backend.device)
        assert_same_bits(train(loaded, x), train(gate, x))


@pytest.mark.backends("cpu")
def test_scripted_in_another_process(tmp_path):
    torch.jit.script(Gate()).save(tmp_path / "gate.pt")
    torch.save(draw(20, 8), tmp_path / "x.pt")
    run_python(
        "import torch, adasplash; x = torch.load('x.pt'); torch.save(torch.jit.load('gate.pt')(x), 'out.pt')",
        cwd=tmp_path,
    )
    assert torch.equal(torch.load(tmp_path / "out.pt"), Gate()(draw(20, 8)))


def test_only_the_weights_are_saved(backend):
    saved = []
    x = draw(6, 50, device=backend.device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weights = adasplash.entmax(x, 1.5)
    assert [t.data_ptr() for t in saved if t.numel()] == [weights.data_ptr()]
