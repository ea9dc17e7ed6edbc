"""alpha as a tensor: one for each head, or one for all, and its gradient."""

import pytest
import torch

import adasplash
import reference
from adasplash import entmax_attn
from common import ALPHAS, Inputs, assert_same_bits, check_gradients, gradients, normal_like
from common import make_inputs as make_cpu_inputs
from saving import reloaded_script

SHAPES = {
    "few": dict(heads=3, m=20, n=30),
    "grouped queries": dict(heads=6, kv_heads=2, m=65, n=70, size=17),
    "more queries than keys": dict(heads=2, m=90, n=40),
    "much support": dict(heads=3, m=70, n=130, sigma=0.05),
    "one head": dict(heads=1, m=33, n=47),
}


def alphas(heads, device="cpu", dtype=torch.float32):
    return torch.tensor([ALPHAS[h % len(ALPHAS)] for h in range(heads)], dtype=dtype, device=device)


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(make_inputs, shape, is_causal, dtype):
    inputs = make_inputs(**SHAPES[shape], dtype=dtype)
    check_gradients(entmax_attn, inputs, alpha=alphas(inputs.query.shape[1], inputs.query.device), is_causal=is_causal)


@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
@pytest.mark.parametrize("alpha", ALPHAS)
def test_one_for_all_heads(make_inputs, alpha, sigma, dtype):
    inputs = make_inputs(m=40, n=130, sigma=sigma, dtype=dtype)
    check_gradients(entmax_attn, inputs, alpha=torch.tensor(alpha, device=inputs.query.device))


@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
def test_values_with_a_large_mean(make_inputs, sigma, dtype):
    """A constant of the row added to dP leaves the gradient of alpha, and must leave its accuracy."""
    inputs = make_inputs(heads=6, m=40, n=130, sigma=sigma, mean=16, dtype=dtype)
    check_gradients(entmax_attn, inputs, alpha=alphas(6, inputs.query.device))


@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
@pytest.mark.parametrize("alpha", (1.01, 1.02))
def test_close_to_one(make_inputs, alpha, sigma, dtype):
    """Finite in all types; in float32 dalpha has its digits even here, where its textbook form cancels."""
    inputs = make_inputs(m=40, n=100, sigma=sigma, dtype=dtype)
    of_head = torch.full((2,), alpha, device=inputs.query.device)
    everything = gradients(inputs, normal_like(inputs.query), entmax_attn, alpha=of_head)
    assert all(x.isfinite().all() for x in everything)
    if dtype == torch.float32:
        check_gradients(entmax_attn, inputs, alpha=of_head)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("alpha", ALPHAS)
def test_equals_a_number_to_the_bit(make_inputs, alpha, dtype):
    inputs = make_inputs(m=70, n=130, dtype=dtype)
    grad = normal_like(inputs.query)
    expected = gradients(inputs, grad, entmax_attn, alpha=alpha, is_causal=True)
    for shape in ((), (2,)):
        given = torch.full(shape, alpha, dtype=torch.float64)
        assert_same_bits(expected, gradients(inputs, grad, entmax_attn, alpha=given, is_causal=True)[:4])


def test_every_head_alone(make_inputs, dtype):
    inputs = make_inputs(heads=6, kv_heads=3, m=40, n=60, dtype=dtype)
    alpha, grad = alphas(6, inputs.query.device), normal_like(inputs.query)
    together = gradients(inputs, grad, entmax_attn, alpha=alpha)
    for kv_head in range(3):
        of_query, of_key = slice(2 * kv_head, 2 * kv_head + 2), slice(kv_head, kv_head + 1)
        part = Inputs(inputs.query[:, of_query], inputs.key[:, of_key], inputs.value[:, of_key])
        out, dq, dk, dv, dalpha = gradients(part, grad[:, of_query], entmax_attn, alpha=alpha[of_query])
        expected = [x[:, s] for x, s in zip(together[:4], (of_query, of_query, of_key, of_key), strict=True)]
        assert_same_bits((out, dq, dk, dv), expected)
        assert torch.equal(dalpha, together[4][of_query])


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("shape", (dict(m=4, n=6, size=3), dict(m=2, n=140, size=2, sigma=0.1), dict(m=5, n=3, size=2)))
def test_finite_differences(shape, is_causal):
    inputs = make_cpu_inputs(batch=2, heads=2, kv_heads=1, **shape, dtype=torch.float64, requires_grad=True)
    for alpha in (torch.tensor([1.2, 1.7]), torch.tensor([1.5, 1.95]), torch.tensor(1.35), torch.tensor([1.05, 1.5])):
        alpha = alpha.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda *x: entmax_attn(*x, is_causal), (*inputs, alpha))


@pytest.mark.parametrize("heads, shape", ((1, ()), (1, (1,)), (4, ()), (4, (4,))))
@pytest.mark.parametrize("door", ("eager", "op", "compiled", "TorchScript", "script of the op"))
def test_the_gradient_arrives_through_every_door(make_inputs, door, heads, shape):
    """A one-element tensor could be taken for a number on the way, and lose its gradient."""
    inputs = make_inputs(heads=heads, m=20, n=25)

    class Attend(torch.nn.Module):
        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor
        ) -> torch.Tensor:
            return adasplash.entmax_attn(query, key, value, alpha, True)

    class AttendThroughOp(torch.nn.Module):
        def forward(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, alpha: torch.Tensor
        ) -> torch.Tensor:
            return torch.ops.adasplash.entmax_attn(query, key, value, alpha, True)

    function = {
        "eager": lambda: entmax_attn,
        "op": lambda: torch.ops.adasplash.entmax_attn,
        "compiled": lambda: torch.compile(entmax_attn, fullgraph=True),
        "TorchScript": lambda: torch.jit.script(Attend()),
        "script of the op": lambda: torch.jit.script(AttendThroughOp()),
    }[door]()
    alpha = torch.full(shape, 1.3, device=inputs.query.device).requires_grad_()
    arguments = (*inputs, alpha) if "cript" in door else (*inputs, alpha, True)
    out = function(*arguments)
    grad = normal_like(out)
    (dalpha,) = torch.autograd.grad(out, alpha, grad)
    expected = gradients(inputs, grad, entmax_attn, alpha=alpha, is_causal=True)
    assert torch.equal(out, expected[0]) and torch.equal(dalpha, expected[4])
    assert dalpha.shape == shape and dalpha.all()
    torch.compiler.reset()


@pytest.mark.slow
def test_a_script_with_a_learned_alpha_and_a_number(make_inputs):
    """One Python function for both, in one module, saved and loaded."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = torch.nn.Parameter(torch.tensor([1.3, 1.6]))
            self.number = 1.25

        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            learned = adasplash.entmax_attn(query, key, value, self.alpha)
            fixed = adasplash.entmax_attn(query, key, value, self.number)
            return learned + fixed + adasplash.entmax_attn(query, key, value, alpha=2.0)

    inputs = make_inputs(m=20, n=25)
    module = Both().to(inputs.query.device)
    loaded = reloaded_script(module)
    results = []
    for either in (module, loaded, loaded, loaded):
        out = either(*inputs)
        results.append((out, *torch.autograd.grad(out.sum(), list(either.parameters()))))
    for other in results[1:]:
        assert_same_bits(results[0], other)
    assert results[0][1].all()


@pytest.mark.parametrize("alpha_dtype", (torch.float32, torch.float64, None), ids=str)
def test_types_of_alpha(make_inputs, alpha_dtype, dtype):
    """float32, float64 or the query's; the gradient comes in alpha's own type."""
    inputs = make_inputs(dtype=dtype)
    alpha = torch.tensor([1.25, 1.5], dtype=alpha_dtype or dtype, device=inputs.query.device)
    dalpha = check_gradients(entmax_attn, inputs, alpha=alpha)[4]
    assert dalpha.dtype == alpha.dtype


def test_alpha_in_autocast(make_inputs, backend):
    """Query, key and value are cast, alpha is not."""
    inputs = make_inputs()
    alpha = torch.tensor([1.2345678, 1.7], device=backend.device)
    grad = normal_like(inputs.query)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        out, *grads = gradients(inputs, grad, entmax_attn, alpha=alpha)
    lowered = gradients(Inputs(*(x.bfloat16() for x in inputs)), grad, entmax_attn, alpha=alpha)
    assert out.dtype == torch.bfloat16 and all(x.dtype == torch.float32 for x in grads)
    assert torch.equal(out, lowered[0]) and torch.equal(grads[3], lowered[4])


def test_only_alpha_wants_a_gradient(make_inputs):
    inputs = make_inputs()
    alpha = torch.tensor([1.3, 1.8], device=inputs.query.device, requires_grad=True)
    out = entmax_attn(*inputs, alpha)
    out.backward(normal_like(out))
    expected = gradients(inputs, normal_like(out), entmax_attn, alpha=alpha)
    assert torch.equal(alpha.grad, expected[4]) and all(x.grad is None for x in inputs)


def test_rows_without_a_visible_key_add_nothing(make_inputs):
    inputs = make_inputs(m=90, n=40)
    inputs.query[:, :, :50] = torch.nan
    grad = normal_like(inputs.query)
    alpha = alphas(2, inputs.query.device)
    dalpha = gradients(inputs, grad, entmax_attn, alpha=alpha, is_causal=True)[4]
    seeing = inputs._replace(query=inputs.query[:, :, 50:])
    expected = gradients(seeing, grad[:, :, 50:], entmax_attn, alpha=alpha, is_causal=True)[4]
    torch.testing.assert_close(dalpha, expected, atol=1e-5, rtol=1e-5)


def test_a_nan_row_makes_the_gradient_of_its_head_nan(make_inputs):
    inputs = make_inputs(heads=3)
    inputs.query[1, 1, 7] = torch.nan
    dalpha = gradients(inputs, normal_like(inputs.query), entmax_attn, alpha=alphas(3, inputs.query.device))[4]
    assert dalpha.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("empty", (dict(batch=0), dict(heads=0), dict(m=0), dict(n=0)), ids=str)
def test_nothing_to_attend_to(make_inputs, empty):
    inputs = make_inputs(**{"heads": 3, **empty})
    heads = inputs.query.shape[1]
    for alpha in (alphas(heads, inputs.query.device), torch.tensor(1.5, device=inputs.query.device)):
        out, *grads = gradients(inputs, normal_like(inputs.query), entmax_attn, alpha=alpha)
        assert not out.any() and not any(x.any() for x in grads) and grads[3].shape == alpha.shape


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("other", (2, 3))
def test_threads_change_no_bit(make_inputs, threads, other):
    inputs = make_inputs(batch=3, heads=2, m=150, n=190)
    results = []
    for count in (1, other):
        threads(count)
        for alpha in (alphas(2), torch.tensor(1.3)):
            results.append(gradients(inputs, normal_like(inputs.query), entmax_attn, alpha=alpha)[4])
    assert_same_bits(results[:2], results[2:])


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    "alpha, words",
    (
        ([1.5, 2.5], "got 2.5 at [1]"),
        ([1.5, 1.005], "got 1.005 at [1]"),
        ([float("nan"), 1.5], "got nan at [0]"),
        (float("inf"), "got inf at [0]"),
    ),
)
def test_values_out_of_range_are_an_error(make_inputs, alpha, words):
    with pytest.raises(RuntimeError) as error:
        entmax_attn(*make_inputs(), torch.tensor(alpha))
    assert str(error.value).startswith("entmax_attn: alpha as a tensor must be 1 or from 1.01 to 2, " + words)


def test_the_least_alpha_as_any_type_holds_it(make_inputs, backend, dtype):
    """1.01 is below 1.01 in every type but float64."""
    inputs = make_inputs(dtype=dtype)
    for type in {dtype, torch.float32, torch.float64}:
        alpha = torch.tensor([1.01, 1.5], device=backend.device).to(type)
        assert entmax_attn(*inputs, alpha).isfinite().all()
        assert adasplash.entmax(inputs.query[0, 0, :2], alpha[:, None]).isfinite().all()


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("bad", (0.5, 1.005, 2.5, float("nan")))
def test_values_out_of_range_give_nan_rows(make_inputs, bad):
    """Without looking at them, which would synchronise."""
    inputs = make_inputs()
    out = entmax_attn(*inputs, torch.tensor([1.5, bad], device=inputs.query.device))
    assert out[:, 0].isfinite().all() and out[:, 1].isnan().all()


def test_reference_per_row_is_the_reference_per_head(make_inputs):
    """What the accuracy rule of dalpha rests on."""
    inputs = make_cpu_inputs(dtype=torch.float64)
    alpha = alphas(2, dtype=torch.float64).requires_grad_()
    rows = alpha.detach().reshape(-1, 1, 1).expand(2, 2, 37, 1).contiguous().requires_grad_()
    outs = [reference.attention(*inputs, x).out for x in (alpha, rows)]
    torch.testing.assert_close(*outs)
    dalpha, drows = (torch.autograd.grad(out.sum(), x)[0] for out, x in zip(outs, (alpha, rows), strict=True))
    torch.testing.assert_close(dalpha, drows.sum((0, 2, 3)))
