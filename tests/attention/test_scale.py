"""A scale that is a tensor: what the number does, with a gradient, and one compilation for all its values."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import adasplash
from adasplash import entmax_attn, entmax_attn_varlen
from common import assert_same_bits, normal_like

SHAPES = pytest.mark.parametrize("shape", ((), (1,), (1, 1)), ids=str)
SCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
ENDS = torch.tensor([0, 12, 40])


def packed(inputs):
    """Two sequences, 12 and 28 long."""
    return [x[0].transpose(0, 1) for x in inputs]


def call_packed(query, key, value, *options, **named):
    ends = ENDS.to(query.device)
    return entmax_attn_varlen(query, key, value, ends, ends, 28, 28, *options, **named)


FORMS = {"padded": (entmax_attn, list), "packed": (call_packed, packed)}
BOTH = pytest.mark.parametrize("form", FORMS)


@SHAPES
@BOTH
@pytest.mark.parametrize("alpha", (1.2, torch.tensor([1.2, 1.9])), ids=("number", "per head"))
def test_equals_the_number(make_inputs, backend, form, shape, alpha):
    call, arrange = FORMS[form]
    inputs = arrange(make_inputs(1, 2, 40, 40))
    alpha = alpha.to(backend.device) if isinstance(alpha, torch.Tensor) else alpha
    out = call(*inputs, alpha, True, scale=torch.full(shape, 0.3, device=backend.device))
    torch.testing.assert_close(out, call(*inputs, alpha, True, scale=0.3), atol=1e-5, rtol=1e-5)
    assert_same_bits(out, call(inputs[0] * 0.3, *inputs[1:], alpha, True, scale=1.0))


@pytest.mark.backends("cpu")
@SHAPES
@BOTH
def test_gradient(make_inputs, form, shape):
    """Against finite differences; nothing was said before, and nothing given."""
    call, arrange = FORMS[form]
    inputs = [x.detach().requires_grad_() for x in arrange(make_inputs(1, 2, 40, 40, 4, dtype=torch.float64))]
    scale = torch.full(shape, 0.3, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda scale, alpha: call(*inputs, alpha, scale=scale), (scale, alpha), atol=1e-6, rtol=1e-4
    )


@pytest.mark.backends("cpu")
def test_gradient_at_alpha_one(make_inputs):
    inputs = make_inputs(1, 2, 5, 5, 4, dtype=torch.float64)
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda scale: entmax_attn(*inputs, 1.0, scale=scale), (scale,))


def test_takes_querys_type(make_inputs, backend, dtype):
    """Whatever its own is, so that the product stays of one type with key and value."""
    inputs = make_inputs(1, 2, 40, 40, dtype=dtype)
    for own in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        scale = torch.ones(1, dtype=own, device=backend.device)
        assert_same_bits(entmax_attn(*inputs, scale=scale), entmax_attn(*inputs, scale=1.0))
    assert_same_bits(entmax_attn(*inputs, scale=torch.ones(1)), entmax_attn(*inputs, scale=1.0))  # of the CPU


@SCRIPT
@BOTH
def test_scripted(make_inputs, backend, form):
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return adasplash.entmax_attn(query, key, value, scale=scale)

    def attend_packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ends = torch.tensor([0, 12, 40], device=query.device)
        return adasplash.entmax_attn_varlen(query, key, value, ends, ends, 28, 28, scale=scale)

    function = attend if form == "padded" else attend_packed
    inputs = FORMS[form][1](make_inputs(1, 2, 40, 40))
    scripted = torch.jit.script(function)
    for _ in range(3):  # the profiling executor rewrites the graph after its first runs
        scale = torch.tensor([0.3], device=backend.device, requires_grad=True)
        out, expected = scripted(*inputs, scale), function(*inputs, scale)
        assert_same_bits(out, expected)
        (ours,), (theirs,) = (torch.autograd.grad(x, scale, normal_like(x)) for x in (out, expected))
        torch.testing.assert_close(ours, theirs)


@SCRIPT
def test_scripted_with_a_scale_that_may_be_none(make_inputs):
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        return adasplash.entmax_attn(query, key, value, scale=scale)

    inputs = make_inputs(1, 2, 40, 40)
    scripted = torch.jit.script(attend)
    for scale in (None, 0.3):
        assert_same_bits(scripted(*inputs, scale), attend(*inputs, scale))


def count_compilations(function, values) -> int:
    """How often `function` is compiled for calls with these values, one after the other."""
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for value in values:
        torch.testing.assert_close(compiled(value), function(value))
    torch.compiler.reset()
    return counter.frame_count


ANNEALED = [1.05 + 0.05 * step for step in range(12)]  # more than torch compiles anew before it gives up


@pytest.mark.slow
@BOTH
def test_annealing_takes_one_compilation(make_inputs, backend, form):
    """As the docstring of entmax_attn says: alpha and scale as tensors, new ones or one that is filled anew."""
    call, arrange = FORMS[form]
    inputs = arrange(make_inputs(1, 2, 40, 40))
    tensors = [torch.tensor(value, device=backend.device) for value in ANNEALED]
    assert count_compilations(lambda alpha: call(*inputs, alpha), tensors) == 1
    assert count_compilations(lambda scale: call(*inputs, scale=scale), tensors) == 1

    alpha = torch.tensor(1.1, device=backend.device)
    torch.compiler.reset()
    counter = CompileCounter()
    attend = torch.compile(lambda q, k, v: call(q, k, v, alpha), fullgraph=True, backend=counter)
    for value in ANNEALED:
        alpha.fill_(value)
        torch.testing.assert_close(attend(*inputs), call(*inputs, value), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.backends("cpu")
@pytest.mark.parametrize("name", ("alpha", "scale"))
def test_annealing_a_number_compiles_anew(make_inputs, name):
    """What the docstring warns of. Where torch stops doing that, it can stop warning."""
    inputs = make_inputs(1, 2, 40, 40)
    assert count_compilations(lambda value: entmax_attn(*inputs, **{name: value}), ANNEALED[:4]) == 4


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_compiled_with_a_gradient(make_inputs, backend):
    inputs = make_inputs(1, 2, 40, 40)
    torch.compiler.reset()
    compiled = torch.compile(lambda scale: entmax_attn(*inputs, 1.3, scale=scale), fullgraph=True)
    scale = torch.tensor(0.3, device=backend.device, requires_grad=True)
    grads = [
        torch.autograd.grad(f(scale).square().sum(), scale)
        for f in (compiled, lambda s: entmax_attn(*inputs, 1.3, scale=s))
    ]
    torch.testing.assert_close(*grads)
    torch.compiler.reset()
