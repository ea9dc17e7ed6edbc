"""Bad input: one clear sentence that names the op, the argument, what came and what is accepted."""

import functools

import pytest
import torch

import adasplash
from activations import draw

refused = functools.partial(pytest.raises, (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError))
OPS = torch.ops.adasplash


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


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("value", (1.0, 1.005, 2.1, torch.nan, -3.0))
def test_alphas_out_of_range_are_refused(value):
    x, alpha = draw(3, 5), torch.tensor([[1.5], [value], [2.0]])
    with refused(match=r"alpha must be from 1.01 to 2, got"):
        adasplash.entmax(x, alpha)
    with refused(match=r"alpha must be from 1.01 to 2, got"):
        OPS._entmax_backward(x, x, alpha[:, 0], 0.0)


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
    weights = adasplash.entmax(x, 1.5).detach()
    by_row = torch.full((3,), 1.5, device=backend.device, requires_grad=True)
    first, _ = OPS._entmax_backward(torch.ones_like(weights), weights, by_row, 1.5)
    with refused(match="double backward is not supported"):
        first.square().sum().backward()
    with torch.autograd.forward_ad.dual_level(), refused(match="forward-mode AD is not supported"):
        adasplash.entmax(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)))
