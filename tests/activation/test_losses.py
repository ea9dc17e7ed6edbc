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
    with pytest.raises(RuntimeError, match=r"^entmax_loss: alpha must be 1 or from 1.01 to 2, got 3.0"):
        adasplash.entmax_loss(x, target, 3.0)


PROBABILITIES = torch.softmax(torch.linspace(-3, 3, 24 * CLASSES).sin().view(24, CLASSES) * 4, -1)
CLASS_WEIGHTS = torch.linspace(0.2, 2, CLASSES)


@pytest.mark.parametrize("label_smoothing", (0.0, 0.3))
@pytest.mark.parametrize("weighted", (False, True), ids=("", "weights"))
@pytest.mark.parametrize("soft", (False, True), ids=("classes", "probabilities"))
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
def test_options_are_those_of_cross_entropy(backend, reduction, soft, weighted, label_smoothing):
    """At alpha = 1 they are the same numbers, what a mean divides by included."""
    x = draw(24, CLASSES, device=backend.device)
    target = (PROBABILITIES if soft else TARGET.where(TARGET % 5 > 0, -100)).to(backend.device)
    options = dict(
        reduction=reduction,
        weight=CLASS_WEIGHTS.to(backend.device) if weighted else None,
        label_smoothing=label_smoothing,
    )
    ours = differentiate(lambda x, y: adasplash.entmax_loss(x, y, 1.0, **options), x, target)
    theirs = differentiate(lambda x, y: torch.nn.functional.cross_entropy(x, y, **options), x, target)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("label_smoothing", (0.0, 0.3))
@pytest.mark.parametrize("weighted", (False, True), ids=("", "weights"))
@pytest.mark.parametrize("alpha", (1.05, 1.3, 1.5, 2.0))
def test_the_formula_of_weights_and_smoothing(backend, alpha, weighted, label_smoothing):
    """Sums of the losses of single classes, for classes and for the probabilities that say the same."""
    x, target = draw(24, CLASSES, device=backend.device), TARGET.to(backend.device)
    weight = CLASS_WEIGHTS.to(backend.device) if weighted else torch.ones(CLASSES, device=backend.device)
    of_class = torch.stack(
        [adasplash.entmax_loss(x, torch.full_like(target, c), alpha) for c in range(CLASSES)], dim=-1
    )
    shares = torch.nn.functional.one_hot(target, CLASSES) * (1 - label_smoothing) + label_smoothing / CLASSES
    expected = (shares * weight * of_class).sum(-1)
    options = dict(weight=weight if weighted else None, reduction="none")
    of_classes = adasplash.entmax_loss(x, target, alpha, label_smoothing=label_smoothing, **options)
    torch.testing.assert_close(of_classes, expected, atol=1e-5, rtol=1e-5)
    of_shares = adasplash.entmax_loss(x, shares, alpha, **options)
    torch.testing.assert_close(of_shares, expected, atol=1e-5, rtol=1e-5)
    mean = adasplash.entmax_loss(
        x, target, alpha, reduction="mean", label_smoothing=label_smoothing, weight=options["weight"]
    )
    torch.testing.assert_close(mean, expected.sum() / weight[target].sum(), atol=1e-5, rtol=1e-5)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("alpha", (1.0, 1.01, 1.05, 1.3, 1.5, 2.0))
def test_gradients_of_all_that_has_one(alpha):
    """Against finite differences: of scores, class weights, probabilities, and alpha, one for all or one a row."""
    x, weight = draw(6, 5, dtype=torch.float64).requires_grad_(), torch.rand(5, dtype=torch.float64).requires_grad_()
    shares = draw(6, 5, dtype=torch.float64).softmax(-1).detach().requires_grad_()
    target = torch.tensor([0, 1, 4, 2, -100, 3])
    options = dict(label_smoothing=0.1)
    assert torch.autograd.gradcheck(
        lambda x, w: adasplash.entmax_loss(x, target, alpha, weight=w, **options), (x, weight)
    )
    assert torch.autograd.gradcheck(
        lambda x, y, w: adasplash.entmax_loss(x, y, alpha, weight=w, **options), (x, shares, weight)
    )
    if not 1.01 < alpha < 2:
        return
    for alphas in (torch.tensor(alpha), torch.linspace(alpha, 1.9, 6).view(6, 1)):
        alphas = alphas.double().requires_grad_()
        for y in (target, shares.detach()):
            assert torch.autograd.gradcheck(lambda x, a, y=y: adasplash.entmax_loss(x, y, a, **options), (x, alphas))


@pytest.mark.backends("cpu", "cuda")  # emulation has no float64 to compare with
@pytest.mark.parametrize("alpha", (1.02, 1.2, 1.9))
def test_gradient_of_alpha_in_float32(backend, alpha):
    """Nothing cancels near 1."""
    x, target = draw(24, CLASSES, device=backend.device), TARGET.to(backend.device)

    def slope(x, target):
        alphas = torch.tensor(alpha, dtype=x.dtype, device=x.device, requires_grad=True)
        return torch.autograd.grad(adasplash.entmax_loss(x, target, alphas).sum(), alphas)[0]

    exact = torch.tensor(alpha).double()
    alphas = exact.requires_grad_()
    (exact,) = torch.autograd.grad(adasplash.entmax_loss(x.double().cpu(), TARGET, alphas).sum(), alphas)
    torch.testing.assert_close(slope(x, target).double().cpu(), exact, atol=0, rtol=1e-4)


def test_the_loss_of_a_distribution_is_least_there(backend):
    """Omega of it, where its entmax is the distribution itself: for alpha = 2 the scores are the probabilities."""
    shares = PROBABILITIES.to(backend.device)
    loss, gradient = differentiate(lambda x, y: adasplash.sparsemax_loss(x, y), shares, shares)
    torch.testing.assert_close(loss, (1 - shares.square().sum(-1)) / 2, atol=1e-6, rtol=0)
    assert gradient.abs().max() <= 1e-6


@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_probabilities_of_masked_classes(backend, alpha):
    x, target = torch.tensor([[1.0, -torch.inf, 0.5]] * 2), torch.tensor([[0.3, 0.0, 0.7], [0.3, 0.1, 0.6]])
    loss, gradient = differentiate(
        lambda x, y: adasplash.entmax_loss(x, y, alpha), x.to(backend.device), target.to(backend.device)
    )
    assert loss[0].isfinite() and loss[1] == torch.inf and gradient.isfinite().all()


def test_bytes_are_classes(backend):
    x, target = draw(24, CLASSES, device=backend.device), TARGET.to(backend.device, copy=True)
    target[3] = 156  # which is -100 as a byte; no class, and not ignored either unless told so
    options = dict(ignore_index=156, reduction="mean")
    assert torch.equal(adasplash.entmax_loss(x, target.byte(), **options), adasplash.entmax_loss(x, target, **options))


CPU_ONLY = pytest.mark.backends("cpu")
WRONG_TARGETS = {
    "one row of two": (torch.zeros(2, 3), torch.tensor([0])),
    "one column": (torch.zeros(2, 7, 5), torch.zeros(2, 1).long()),
    "one row": (torch.zeros(2, 7, 5), torch.zeros(1, 7).long()),
    "no rows": (torch.zeros(2, 3), torch.zeros(0).long()),
    "a number": (torch.zeros(2, 3), torch.tensor(0)),
    "classes of all entries": (torch.zeros(2, 3), torch.zeros(2, 3).long()),
    "int32": (torch.zeros(2, 3), torch.zeros(2).int()),
    "bool": (torch.zeros(2, 3), torch.zeros(2).bool()),
    "complex": (torch.zeros(2, 3), torch.zeros(2, 3) + 0j),
    "floats as classes": (torch.zeros(2, 3), torch.zeros(2)),
    "probabilities of other sizes": (torch.zeros(2, 3), torch.zeros(1, 3)),
    "elsewhere": (torch.zeros(2, 3), torch.zeros(2, device="meta").long()),
    "none": (torch.zeros(2, 3), None),
    "a list": (torch.zeros(2, 3), [0, 1]),
    "too large": (torch.zeros(2, 3), torch.tensor([0, 3])),
    "negative": (torch.zeros(2, 3), torch.tensor([0, -1])),
}
WRONG_OPTIONS = {
    "weight of 2 classes": (dict(weight=torch.ones(2)), "weight"),
    "integer weights": (dict(weight=torch.ones(3).int()), "weight"),
    "one weight": (dict(weight=1.0), "weight"),
    "label_smoothing": (dict(label_smoothing=1.5), "label_smoothing"),
    "no label_smoothing": (dict(label_smoothing=None), "label_smoothing"),
    "ignore_index": (dict(ignore_index=None), "ignore_index"),
    "ignored probabilities": (dict(target=torch.zeros(2, 3), ignore_index=1), "ignore_index"),
    "reduction": (dict(reduction=None), "reduction"),
    "alpha None": (dict(alpha=None), "alpha"),
    "alpha True": (dict(alpha=True), "alpha"),
    "alphas of 3 rows": (dict(alpha=torch.full((3, 1), 1.5)), "alpha"),
    "integer input": (dict(input=torch.zeros(2, 3).int()), "input"),
    "no input": (dict(input=None), "input"),
}


@CPU_ONLY
@pytest.mark.parametrize("function", (adasplash.entmax_loss, adasplash.sparsemax_loss, adasplash.entmax15_loss))
@pytest.mark.parametrize("case", WRONG_TARGETS)
def test_wrong_targets(function, case):
    with pytest.raises((TypeError, ValueError, IndexError)) as error:
        function(*WRONG_TARGETS[case])
    message = str(error.value)
    assert message.startswith(f"{function.__name__}: target must be ") and "\n" not in message


@CPU_ONLY
@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options(case):
    options, name = WRONG_OPTIONS[case]
    with pytest.raises((TypeError, ValueError)) as error:
        adasplash.entmax_loss(**dict(input=torch.zeros(2, 3), target=torch.tensor([0, 1])) | options)
    message = str(error.value)
    assert message.startswith(f"entmax_loss: {name} ") and "\n" not in message


@CPU_ONLY
@pytest.mark.parametrize("name", ("alpha", "ignore_index", "reduction", "label_smoothing", "weight"))
def test_wrong_options_of_modules(name):
    with pytest.raises(TypeError, match=rf"^EntmaxLoss: {name} must be .* got list \[\]"):
        adasplash.EntmaxLoss(**{name: []})


@CPU_ONLY
def test_a_module_does_not_lose_alphas_gradient():
    with pytest.raises(TypeError, match=r"EntmaxLoss: alpha must be a number, got a float32 tensor"):
        adasplash.EntmaxLoss(torch.tensor(1.5, requires_grad=True))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("soft", (False, True), ids=("classes", "probabilities"))
@pytest.mark.parametrize("module", (adasplash.SparsemaxLoss, adasplash.Entmax15Loss, adasplash.EntmaxLoss))
def test_scripted_with_weights_and_smoothing(backend, module, soft):
    x, target = draw(24, CLASSES, device=backend.device), (PROBABILITIES if soft else TARGET).to(backend.device)
    loss = module(weight=CLASS_WEIGHTS, label_smoothing=0.2).to(backend.device)
    assert torch.equal(loss.state_dict()["weight"].cpu(), CLASS_WEIGHTS) and not module().state_dict()
    scripted = torch.jit.script(loss)
    for _ in range(3):
        torch.testing.assert_close(differentiate(scripted, x, target), differentiate(loss, x, target))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_scripted_with_an_alpha_that_learns(backend):
    def loss(x: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
        return adasplash.entmax_loss(x, target, alpha).sum()

    x, target = draw(24, CLASSES, device=backend.device), TARGET.to(backend.device)
    alpha = torch.tensor(1.3, device=backend.device, requires_grad=True)
    scripted = torch.jit.script(loss)
    for _ in range(3):
        ours = torch.autograd.grad(scripted(x, target, alpha), alpha)
        torch.testing.assert_close(ours, torch.autograd.grad(loss(x, target, alpha), alpha))


@pytest.mark.slow
def test_compiled_once_while_alpha_changes(backend):
    x, target = draw(24, CLASSES, device=backend.device), TARGET.to(backend.device)
    torch.compiler.reset()
    compiled = torch.compile(lambda a: adasplash.entmax_loss(x, target, a, weight=x.new_ones(CLASSES)), fullgraph=True)
    compiled(torch.tensor(1.1, device=backend.device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for alpha in (1.2, 1.5, 1.9):
            loss = compiled(torch.tensor(alpha, device=backend.device))
            torch.testing.assert_close(loss, adasplash.entmax_loss(x, target, alpha))
    torch.compiler.reset()


@pytest.mark.parametrize("alpha", (0.5, 3.0))
def test_errors_of_an_alpha_that_is_a_tensor_name_the_loss(alpha):
    """Which the activation finds, and on the CPU only."""
    scores, target = torch.zeros(2, 3), torch.tensor([0, 2])
    with pytest.raises(RuntimeError, match=rf"^entmax_loss: alpha must be from 1.01 to 2, got {alpha:g}"):
        adasplash.entmax_loss(scores, target, torch.tensor(alpha))
