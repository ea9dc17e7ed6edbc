"""What the backward computes, against the fp64 reference and finite differences."""

import pytest
import torch

import reference
from adasplash import entmax_attn
from common import ALPHAS, SHAPES, Inputs, assert_same_bits, check_gradients, gradients, normal_like
from common import make_inputs as make_cpu_inputs


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(make_inputs, shape, is_causal, dtype):
    check_gradients(entmax_attn, make_inputs(**SHAPES[shape], dtype=dtype), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_alphas(make_inputs, alpha, is_causal, dtype):
    check_gradients(entmax_attn, make_inputs(m=75, n=130, dtype=dtype), alpha=alpha, is_causal=is_causal)


@pytest.mark.parametrize("scale", (0.05, 1.0, -0.5, 0.0))
def test_scale(make_inputs, scale, dtype):
    check_gradients(entmax_attn, make_inputs(dtype=dtype), scale=scale)


@pytest.mark.parametrize("sigma", (1.5, 0.1), ids=("little support", "much support"))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_values_with_a_large_mean(make_inputs, alpha, sigma, dtype):
    """Without a shift of dP the difference A - delta * b loses everything but the mean (3.5e-2 in bf16)."""
    check_gradients(entmax_attn, make_inputs(m=70, n=130, sigma=sigma, mean=16, dtype=dtype), alpha=alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_keys_with_a_mean(make_inputs, alpha):
    """Flat rows: what the keys have in common cancels in dq, and must not leave its rounding behind."""
    inputs = make_inputs(m=70, n=700, sigma=0.1)
    check_gradients(entmax_attn, inputs._replace(key=inputs.key + 2), alpha=alpha)


@pytest.mark.parametrize("sigma", (1.5, 0.1), ids=("little support", "much support"))
def test_a_constant_added_to_the_values_leaves_the_query_gradient(make_inputs, sigma):
    """In exact arithmetic dq does not depend on it."""
    inputs = make_inputs(m=70, n=130, sigma=sigma)
    grad = normal_like(inputs.query)
    plain = gradients(inputs, grad, entmax_attn)
    shifted = gradients(inputs._replace(value=inputs.value + 16), grad, entmax_attn)
    for one, other in zip(plain[1:3], shifted[1:3], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4 * one.abs().max().item(), rtol=0)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
@pytest.mark.parametrize("n", (128, 129, 140, 700))
def test_rows_whose_support_overflows(make_inputs, n, alpha, dtype):
    """Tiny scores, every key in the support: such rows are rebuilt from their threshold."""
    inputs = make_inputs(batch=1, m=20, n=n, sigma=0.03, dtype=dtype)
    check_gradients(entmax_attn, inputs, alpha=alpha)


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_rows_that_overflow_beside_rows_that_do_not(make_inputs, is_causal, dtype):
    inputs = make_inputs(m=130, n=200, dtype=dtype)
    inputs.query[:, :, ::3] *= 0.01
    support = (reference.attention(*inputs, is_causal=is_causal).weights > 0).sum(-1)
    assert (support > 128).any() and (support < 20).any()
    check_gradients(entmax_attn, inputs, is_causal=is_causal)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_large_scores(make_inputs, backend, alpha):
    """One-hot rows: the gradient of query and key is exactly zero, that of value is the gradient of the rows it got."""
    inputs = make_inputs(batch=1, heads=1, m=50, n=60, size=8, sigma=1000)
    _, dq, dk, dv = gradients(inputs, normal_like(inputs.query), entmax_attn, alpha=alpha, scale=1.0)
    best = (inputs.query.double() @ inputs.key.double().transpose(-1, -2)).argmax(-1)
    expected = torch.zeros_like(dv).index_add_(2, best[0, 0], normal_like(inputs.query))
    rounding = 0 if backend.name == "cpu" else 1e-5 * inputs.key.abs().max().item()  # of dP, times a key
    assert dq.abs().max() <= rounding and dk.abs().max() <= rounding
    torch.testing.assert_close(dv, expected)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("alpha", (1.1, 1.25, 1.5, 1.75, 2.0))
@pytest.mark.parametrize(
    "shape",
    (
        dict(batch=1, heads=1, m=3, n=5, size=3),
        dict(batch=2, heads=2, kv_heads=1, m=4, n=4, size=2, value_size=3),
        dict(batch=1, heads=1, m=5, n=3, size=2),
        dict(batch=1, heads=1, m=2, n=140, size=2, sigma=0.1),
    ),
    ids=("few", "grouped", "more queries", "overflow"),
)
def test_finite_differences(shape, alpha, is_causal):
    inputs = make_cpu_inputs(**shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: entmax_attn(*x, alpha, is_causal), tuple(inputs))


@pytest.mark.parametrize("wanted", ("query", "key", "value", "query key", "key value", "query value"))
def test_only_some_inputs_want_gradients(make_inputs, wanted, dtype):
    everything = gradients(make_inputs(dtype=dtype), normal_like(make_inputs(dtype=dtype).query), entmax_attn)
    inputs = make_inputs(dtype=dtype)
    for name in wanted.split():
        getattr(inputs, name).requires_grad_()
    entmax_attn(*inputs).backward(normal_like(inputs.query))
    for name, x, expected in zip(Inputs._fields, inputs, everything[1:], strict=True):
        assert torch.equal(x.grad, expected) if name in wanted else x.grad is None


def test_expanded_inputs_add_up(make_inputs):
    """One query, key and value for the whole batch: their gradients are the sums over it."""
    single = make_inputs(batch=1, m=20, n=30)
    grad = normal_like(single.query.expand(3, -1, -1, -1))
    for x in single:
        x.requires_grad_()
    entmax_attn(*(x.expand(3, -1, -1, -1) for x in single)).backward(grad)
    parts = [gradients(single, grad[b, None], entmax_attn) for b in range(3)]
    for i, x in enumerate(single):
        torch.testing.assert_close(x.grad, sum(part[i + 1] for part in parts))


def test_expanded_gradient(make_inputs):
    """`out.sum().backward()` hands in a gradient of stride 0."""
    inputs = make_inputs(m=20, n=30, requires_grad=True)
    entmax_attn(*inputs).sum().backward()
    expected = gradients(inputs, torch.ones_like(inputs.query), entmax_attn)
    for x, gradient in zip(inputs, expected[1:], strict=True):
        torch.testing.assert_close(x.grad, gradient, atol=1e-6, rtol=1e-5)


def test_one_tensor_as_query_key_and_value(make_inputs):
    x = make_inputs(m=30, n=30).query.requires_grad_()
    entmax_attn(x, x, x).backward(normal_like(x))
    y = x.detach().double().requires_grad_()
    reference.attention(y, y, y).out.backward(normal_like(x).double())
    torch.testing.assert_close(x.grad.double(), y.grad, atol=1e-5 * y.grad.abs().max().item(), rtol=0)


def test_backward_twice_over_a_kept_graph(make_inputs):
    inputs = make_inputs(requires_grad=True)
    out = entmax_attn(*inputs)
    first, second = (torch.autograd.grad(out, inputs, normal_like(out), retain_graph=True) for _ in range(2))
    assert_same_bits(first, second)


def test_double_backward_is_refused(make_inputs):
    inputs = make_inputs(requires_grad=True)
    (dq,) = torch.autograd.grad(entmax_attn(*inputs).sum(), inputs.query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"entmax_attn.*(double backward|twice)"):
        dq.square().sum().backward()


@pytest.mark.parametrize("given", ("one", "heads"))
def test_double_backward_of_alpha_alone_is_refused(make_inputs, given):
    inputs = make_inputs()
    alpha = torch.tensor(1.4 if given == "one" else [1.4, 1.7], device=inputs.query.device).requires_grad_()
    (dalpha,) = torch.autograd.grad(entmax_attn(*inputs, alpha).square().sum(), alpha, create_graph=True)
    with pytest.raises(RuntimeError, match=r"entmax_attn.*(double backward|twice)"):
        dalpha.square().sum().backward()


def test_forward_mode_is_refused(make_inputs):
    inputs = make_inputs()
    with torch.autograd.forward_ad.dual_level():
        query = torch.autograd.forward_ad.make_dual(inputs.query, torch.ones_like(inputs.query))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"entmax_attn.*forward[- ]mode"):
            entmax_attn(query, inputs.key, inputs.value)
        slopes = torch.ones(inputs.query.shape[1], device=inputs.query.device)
        slopes = torch.autograd.forward_ad.make_dual(slopes, torch.ones_like(slopes))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"entmax_attn.*forward[- ]mode"):
            entmax_attn(*inputs, alibi_slopes=slopes)
