"""The names of PyPI's adasplash 0.2.2: its signatures, its meaning, and none of its limits."""

import importlib.util
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch

import adasplash as package
import reference
from adasplash import (
    adasplash,
    adasplash2,
    adasplash_no_block_mask,
    adasplash_v1,
    adasplash_v2,
    entmax_attn,
    triton_entmax,
    triton_entmax15,
    triton_entmax_v1,
    triton_entmax_v2,
    triton_sparsemax,
)
from common import Inputs, assert_same_bits, check_forward, check_gradients, gradients, normal_like

SIGNATURES = {
    "adasplash": "(q, k, v, alpha=1.5, is_causal=True, varlen=None, niter=None)",
    "adasplash2": "(q, k, v, niter=1, varlen=None)",
    "adasplash_v1": "(q, k, v, alpha=1.5, is_causal=False, varlen=None, niter=10)",
    "adasplash_v2": "(q, k, v, niter=1, varlen=None)",
    "adasplash_no_block_mask": "(q, k, v, alpha=1.5, is_causal=False, varlen=None, niter=10)",
    "triton_entmax": "(x, alpha=1.5, n_iter=2, use_histogram=True, fast_math=False)",
    "triton_entmax_v1": "(x, alpha=1.5, n_iter=10, fast_math=True)",
    "triton_entmax_v2": "(x, alpha=1.5, n_iter=2, use_histogram=True, fast_math=False)",
    "triton_sparsemax": "(x, **kwargs)",
    "triton_entmax15": "(x, **kwargs)",
}
THEIRS = "ADASPLASH_PYPI"  # names a folder into which that package was unpacked

# Name -> (the function, whether it is causal unless told otherwise, whether alpha and is_causal are options)
ATTENTION = {
    "adasplash": (adasplash, True, True),
    "adasplash2": (adasplash2, True, False),
    "adasplash_v1": (adasplash_v1, False, True),
    "adasplash_v2": (adasplash_v2, True, False),
    "adasplash_no_block_mask": (adasplash_no_block_mask, False, True),
}
ENTMAX = {
    "triton_entmax": (triton_entmax, 1.5),
    "triton_entmax_v1": (triton_entmax_v1, 1.5),
    "triton_entmax_v2": (triton_entmax_v2, 1.5),
    "triton_sparsemax": (triton_sparsemax, 2.0),
    "triton_entmax15": (triton_entmax15, 1.5),
}
WITH_OPTIONS = [name for name, (_, _, options) in ATTENTION.items() if options]


def signature(function) -> str:
    """Names, order, kinds and defaults, without annotations."""
    plain = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in plain.parameters.values()]
    return str(plain.replace(parameters=parameters, return_annotation=plain.empty))


def test_signatures():
    assert {name: signature(getattr(package, name)) for name in SIGNATURES} == SIGNATURES


@pytest.mark.skipif(THEIRS not in os.environ, reason=f"{THEIRS} names no folder")
def test_signatures_are_theirs(monkeypatch):
    file = Path(os.environ[THEIRS]) / "adasplash" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "authors_adasplash", file, submodule_search_locations=[str(file.parent)]
    )
    theirs = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, theirs)
    spec.loader.exec_module(theirs)
    assert {name: signature(getattr(theirs, name)) for name in SIGNATURES} == SIGNATURES
    assert set(theirs.__all__) <= set(package.__all__)


def test_names():
    namespace = {}
    exec("from adasplash import *", namespace)
    assert set(SIGNATURES) | {"__version__"} <= set(namespace)
    assert namespace["adasplash"] is adasplash and callable(package.adasplash)


@pytest.mark.parametrize("name", ATTENTION)
def test_defaults(make_inputs, name):
    """Lengths that are no power of two, fewer heads of key and value, and forward and backward of each name."""
    function, is_causal, _ = ATTENTION[name]
    inputs = make_inputs(2, 4, 77, 77, kv_heads=2)

    def as_they_call_it(q, k, v, **_):
        return function(q, k, v)

    check_gradients(as_they_call_it, inputs, alpha=1.5, is_causal=is_causal)


@pytest.mark.parametrize("name", WITH_OPTIONS)
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2))
def test_alpha_and_is_causal(make_inputs, name, alpha, is_causal):
    function = ATTENTION[name][0]
    inputs = make_inputs(1, 2, 70, 70)
    out = check_forward(function, inputs, alpha=alpha, is_causal=is_causal)
    assert_same_bits(out, function(*inputs, alpha, is_causal))


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_alpha_of_each_head_learns(make_inputs, backend, name):
    function = ATTENTION[name][0]
    inputs = make_inputs(1, 3, 70, 70)
    alpha = torch.tensor([1.2, 1.5, 1.9], device=backend.device)

    def gradient(call, alpha):
        alpha = alpha.requires_grad_()
        out = call(alpha)
        return out.detach().double(), *torch.autograd.grad(out, alpha, normal_like(inputs.query).to(out.dtype))

    out, dalpha = gradient(lambda alpha: function(*inputs, alpha=alpha), alpha)
    is_causal = ATTENTION[name][1]
    exact, expected = gradient(lambda alpha: reference.attention(*inputs, alpha, is_causal).out, alpha.double())
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(dalpha.double(), expected, atol=0, rtol=1e-3)


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("type", (torch.int32, torch.int64))
def test_varlen_is_a_length_for_each_batch_entry(make_inputs, backend, name, type):
    """Each entry is what it is alone; beyond it there are zeros, no gradient, and anything in the inputs."""
    function, is_causal, _ = ATTENTION[name]
    lengths = (70, 33, 0)
    varlen = torch.tensor(lengths, dtype=type, device=backend.device)
    inputs = make_inputs(3, 2, 70, 70)
    grad = normal_like(inputs.query)
    for x in inputs:
        x[1, :, 33:] = torch.nan
        x[2] = torch.inf
    out, *grads = gradients(inputs, grad, function, varlen=varlen)
    for entry, length in enumerate(lengths):
        assert not any(x[entry, :, length:].any() for x in (out, *grads))
        alone = Inputs(*(x[entry : entry + 1, :, :length] for x in inputs))
        expected = gradients(alone, grad[entry : entry + 1, :, :length], entmax_attn, is_causal=is_causal)
        for x, y in zip((out, *grads), expected, strict=True):
            torch.testing.assert_close(x[entry : entry + 1, :, :length], y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_without_their_limits(make_inputs, name):
    """Head sizes between powers of two, another one for values, strides, one token."""
    function, is_causal, _ = ATTENTION[name]
    for n in (1, 3, 65):
        inputs = make_inputs(2, 2, n, n, size=20, value_size=7)
        strided = Inputs(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs))
        assert_same_bits(function(*strided), entmax_attn(*inputs, is_causal=is_causal))


@pytest.mark.parametrize("name", ATTENTION)
def test_niter_changes_nothing(make_inputs, name):
    function = ATTENTION[name][0]
    inputs = make_inputs(1, 2, 70, 70)
    for niter in (0, 1, 50):
        assert_same_bits(function(*inputs, niter=niter), function(*inputs))


@pytest.mark.slow
def test_order_of_the_second_version(make_inputs, backend):
    """niter comes before varlen there."""
    inputs = make_inputs(2, 2, 40, 40)
    varlen = torch.tensor([40, 11], device=backend.device)
    for function in (adasplash_v2, adasplash2):
        assert_same_bits(function(*inputs, 3, varlen), function(*inputs, varlen=varlen))
        assert not function(*inputs, 3, varlen)[1, :, 11:].any()


def test_attention_types(make_inputs, dtype):
    inputs = make_inputs(1, 2, 70, 70, dtype=dtype)
    check_forward(lambda q, k, v, **_: adasplash(q, k, v), inputs, is_causal=True)


def test_errors_name_what_was_wrong(make_inputs, backend):
    inputs = make_inputs(2, 2, 10, 10)
    with pytest.raises(RuntimeError, match=r"^adasplash: alpha must be .* got 2.5"):
        adasplash(*inputs, alpha=2.5)
    with pytest.raises(RuntimeError, match=r"^adasplash: varlen must have"):
        adasplash(*inputs, varlen=torch.tensor([10, 10, 10], device=backend.device))


@pytest.mark.slow
@pytest.mark.backends("cpu", "cuda")
def test_attention_compiles(make_inputs):
    inputs = make_inputs(1, 2, 70, 70)
    compiled = torch.compile(lambda q, k, v: adasplash(q, k, v) + adasplash_v1(q, k, v, 1.3), fullgraph=True)
    expected = entmax_attn(*inputs, is_causal=True) + entmax_attn(*inputs, alpha=1.3)
    torch.testing.assert_close(compiled(*inputs), expected)


@pytest.mark.backends("cpu", "cuda")
@pytest.mark.parametrize("name", [*ATTENTION, "triton_entmax", "triton_entmax_v1", "triton_entmax_v2"])
def test_scripted(make_inputs, name):
    function = getattr(package, name)
    arguments = make_inputs(1, 2, 40, 40)[: 3 if name in ATTENTION else 1]
    assert_same_bits(torch.jit.script(function)(*arguments), function(*arguments))


def scores(backend, *shape, dtype=torch.float32) -> torch.Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(backend.device, dtype)


@pytest.mark.parametrize("name", ENTMAX)
def test_entmax_over_the_last_dimension(backend, dtype, name):
    function, alpha = ENTMAX[name]
    x = scores(backend, 5, 3, 37, dtype=dtype).requires_grad_()
    p = function(x)
    exact = x.detach().double().requires_grad_()
    expected = reference.entmax(exact, alpha)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-6}.get(dtype, 0.01)
    assert p.dtype == dtype and p.shape == x.shape
    torch.testing.assert_close(p.double(), expected, atol=tolerance, rtol=0)
    grad = normal_like(p)
    (dx,), (expected,) = torch.autograd.grad(p, x, grad), torch.autograd.grad(expected, exact, grad.double())
    torch.testing.assert_close(dx.double(), expected, atol=10 * tolerance, rtol=0)


@pytest.mark.parametrize("function", (triton_entmax, triton_entmax_v1, triton_entmax_v2))
def test_entmax_alpha(backend, function):
    x = scores(backend, 4, 37)
    for alpha in (1.05, 1.7, 2.0):
        torch.testing.assert_close(function(x, alpha), reference.entmax(x, alpha), atol=5e-6, rtol=0)
    alpha = torch.tensor([[1.1], [1.4], [1.5], [2.0]], device=x.device)
    torch.testing.assert_close(function(x, alpha=alpha), reference.entmax(x, alpha), atol=5e-6, rtol=0)


def test_entmax_options_change_nothing(backend):
    x = scores(backend, 4, 37).t()  # not contiguous
    for function in (triton_entmax, triton_entmax_v2, triton_sparsemax, triton_entmax15):
        assert_same_bits(function(x, n_iter=0, use_histogram=False, fast_math=True), function(x))
    assert_same_bits(triton_entmax_v1(x, n_iter=0, fast_math=False), triton_entmax_v1(x))


@pytest.mark.parametrize("function", (triton_sparsemax, triton_entmax15))
def test_entmax_options_that_do_not_exist(backend, function):
    for wrong in (dict(alpha=1.5), dict(niter=3)):
        with pytest.raises(TypeError):
            function(scores(backend, 4, 37), **wrong)
