"""The Fenchel–Young losses against the `entmax` package, and what they promise beside it."""

import entmax as package
import pytest
import torch
from torch import Tensor

import adasplash
import reference
from activations import draw
from common import HALF

CLASSES = 30
TARGET = torch.arange(24) * 7 % CLASSES
PAIRS = {
    "sparsemax": (adasplash.sparsemax_loss, package.sparsemax_loss),
    "entmax15": (adasplash.entmax15_loss, package.entmax15_loss),
    **{
        f"entmax {alpha}": (
            lambda x, y, alpha=alpha: adasplash.entmax_loss(x, y, alpha),
            lambda x, y, alpha=alpha: package.entmax_bisect_loss(x, y, alpha, 60),
        )
        for alpha in (1.05, 1.3, 1.5, 1.9, 2.0)
    },
}
MODULES = {
    "sparsemax": (adasplash.SparsemaxLoss, package.SparsemaxLoss),
    "entmax15": (adasplash.Entmax15Loss, package.Entmax15Loss),
    "entmax": (
        lambda **options: adasplash.EntmaxLoss(1.3, **options),
        lambda **options: package.EntmaxBisectLoss(1.3, 60, **options),
    ),
}


def differentiate(loss, x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    value = loss(leaf, *arguments)
    (value * torch.linspace(0.5, 2, value.numel(), device=x.device, dtype=x.dtype).view(value.shape)).sum().backward()
    return value.detach(), leaf.grad


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("sigma", (0.1, 1.0, 8.0))
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_package(name, sigma):
    x = draw(24, CLASSES, sigma=sigma, dtype=torch.float64)
    ours, theirs = (differentiate(loss, x, TARGET) for loss in PAIRS[name])
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("reduction", ("none", "sum", "elementwise_mean"))
@pytest.mark.parametrize("ignore_index", (-100, 7))
@pytest.mark.parametrize("name", MODULES)
def test_modules_equal_the_package(name, ignore_index, reduction):
    """Its mean is over the targets that are not ignored."""
    x = draw(24, CLASSES, dtype=torch.float64)
    assert (TARGET == 7).any() and not (TARGET == 7).all()
    options = dict(ignore_index=ignore_index, reduction=reduction)
    ours, theirs = (differentiate(module(**options), x, TARGET) for module in MODULES[name])
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


@pytest.mark.backends("cpu")
def test_module_defaults_equal_the_package():
    x = draw(24, CLASSES, dtype=torch.float64)
    pairs = (
        (adasplash.SparsemaxLoss, package.SparsemaxLoss),
        (adasplash.Entmax15Loss, package.Entmax15Loss),
        (adasplash.EntmaxLoss, package.EntmaxBisectLoss),
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours()(x, TARGET), theirs()(x, TARGET), atol=1e-10, rtol=1e-9)


def test_negative_ignored_targets(backend):
    """-100, the default, marks targets to ignore, as in torch's losses; the package fails on it."""
    x, target = draw(24, CLASSES, device=backend.device), TARGET.clone().to(backend.device)
    target[::3] = -100
    kept = target != -100
    loss, gradient = differentiate(adasplash.entmax_loss, x, target)
    assert not loss[~kept].any() and not gradient[~kept].any() and (loss[kept] > 0).all()
    mean = adasplash.entmax_loss(x, target, reduction="mean")
    torch.testing.assert_close(mean, adasplash.entmax_loss(x[kept], target[kept]).mean())


@pytest.mark.parametrize("alpha", (1.0, 1.2, 1.5, 2.0))
def test_gradient_is_the_difference_of_distributions(backend, dtype, alpha):
    x, target = draw(24, CLASSES, dtype=dtype, device=backend.device), TARGET.to(backend.device)
    leaf = x.clone().requires_grad_()
    adasplash.entmax_loss(leaf, target, alpha).sum().backward()
    expected = reference.entmax(x.double().cpu(), alpha) - torch.nn.functional.one_hot(TARGET, CLASSES)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert (leaf.grad.double().cpu() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
@pytest.mark.parametrize("reduction", ("none", "mean"))
def test_double_backward_is_refused(backend, alpha, reduction):
    x, target = draw(24, CLASSES, device=backend.device).requires_grad_(), TARGET.to(backend.device)
    loss = adasplash.entmax_loss(x, target, alpha, reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="entmax_loss: double backward is not supported"):
        gradient.square().sum().backward()


@pytest.mark.backends("cpu")
def test_the_packages_third_argument():
    """k, how many of the largest scores its solver sorts first. It is no ignore_index here."""
    x, target = draw(24, CLASSES, dtype=torch.float64), TARGET
    for name, module in (("sparsemax_loss", "SparsemaxLoss"), ("entmax15_loss", "Entmax15Loss")):
        ours, theirs = (getattr(where, name)(x, target, 7) for where in (adasplash, package))
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)
        ours, theirs = (getattr(where, module)(7, -1, "sum")(x, target) for where in (adasplash, package))
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-9)


def test_alpha_one_is_cross_entropy(backend):
    x, target = draw(24, CLASSES, device=backend.device), TARGET.to(backend.device)
    for reduction in ("none", "sum", "mean"):
        torch.testing.assert_close(
            adasplash.entmax_loss(x, target, 1.0, ignore_index=7, reduction=reduction),
            torch.nn.functional.cross_entropy(x, target, ignore_index=7, reduction=reduction),
        )


@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
def test_zero_beyond_the_margin(backend, alpha):
    x = torch.zeros(1, 5, device=backend.device)
    target = torch.tensor([2], device=backend.device)
    x[0, 2] = 1 / (alpha - 1) + 0.01
    loss, gradient = differentiate(lambda x, y: adasplash.entmax_loss(x, y, alpha), x, target)
    assert loss.abs() <= 1e-6 and gradient.abs().max() <= 1e-6
    x[0, 2] = 0.5 / (alpha - 1)
    assert adasplash.entmax_loss(x, target, alpha) > 1e-3


def test_any_number_of_dimensions(backend):
    x, target = draw(2, 3, 4, CLASSES, device=backend.device), TARGET.view(2, 3, 4).to(backend.device)
    flat = adasplash.entmax_loss(x.flatten(0, 2), target.flatten())
    assert torch.equal(adasplash.entmax_loss(x, target), flat.view(2, 3, 4))
    assert adasplash.entmax_loss(x[0, 0, 0], target[0, 0, 0]).shape == ()


@pytest.mark.parametrize("alpha", (1.2, 1.5, 2.0))
@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype, alpha):
    """Worked out in fp32: masks of the largest negative number, and scores far from zero, lose nothing."""
    x, target = draw(24, CLASSES, dtype=dtype, device=backend.device), TARGET.to(backend.device)
    x[:, :2] = -65504.0 if dtype == torch.float16 else -3e38
    x[:, 2] = -torch.inf
    x += 100
    scores = x.double().cpu().clamp(min=-1e5)
    p = reference.entmax(scores, alpha)
    entropy = (1 - p.pow(alpha).sum(-1)) / (alpha * (alpha - 1))
    exact = entropy + (p * (scores - scores.gather(-1, TARGET[:, None]))).sum(-1)
    loss = adasplash.entmax_loss(x, target, alpha)
    assert loss.dtype == dtype
    near = TARGET > 2
    torch.testing.assert_close(loss.cpu()[near], exact[near].to(dtype), atol=1e-6, rtol=0)
    assert loss.cpu()[TARGET == 2].isinf().all() and not loss.isnan().any()


@pytest.mark.parametrize("mean", (1e4, 1e6))
def test_scores_far_from_zero(backend, mean):
    x, target = (draw(24, CLASSES) * 8).round() / 8, TARGET.to(backend.device)
    near, far = ((x + shift).to(backend.device) for shift in (0, mean))
    torch.testing.assert_close(
        adasplash.entmax_loss(far, target), adasplash.entmax_loss(near, target), atol=1e-6, rtol=0
    )


def test_masked_targets_and_masked_rows(backend):
    x, target = draw(3, 5, device=backend.device), torch.tensor([1, 1, 1], device=backend.device)
    x[0, 1] = -torch.inf
    x[1] = -torch.inf
    loss, gradient = differentiate(adasplash.sparsemax_loss, x, target)
    assert loss[:2].tolist() == [torch.inf] * 2 and loss[2].isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("module", (adasplash.SparsemaxLoss, adasplash.Entmax15Loss, adasplash.EntmaxLoss))
def test_scripted(backend, module):
    x, target = draw(24, CLASSES, device=backend.device), TARGET.to(backend.device)
    scripted = torch.jit.script(module(ignore_index=7))
    for _ in range(3):
        torch.testing.assert_close(differentiate(scripted, x, target), differentiate(module(ignore_index=7), x, target))


@pytest.mark.slow
def test_compiled(backend):
    x, target = draw(24, CLASSES, device=backend.device), TARGET.to(backend.device)
    torch.compiler.reset()
    compiled = torch.compile(adasplash.EntmaxLoss(1.3), fullgraph=True)
    torch.testing.assert_close(differentiate(compiled, x, target), differentiate(adasplash.EntmaxLoss(1.3), x, target))
    torch.compiler.reset()


def test_errors(backend):
    x, target = draw(4, 5), torch.arange(4)
    with pytest.raises(ValueError, match="reduction must be none, sum, mean or elementwise_mean, got average"):
        adasplash.entmax_loss(x, target, reduction="average")
    with pytest.raises(RuntimeError, match="entmax: alpha must be"):
        adasplash.entmax_loss(x, target, 3.0)
