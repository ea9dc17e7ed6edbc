"""What PyTorch puts around an op: modes, autocast, checkpointing, functional calls, fake tensors, opcheck."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from adasplash import entmax_attn
from common import HALF, assert_same_bits, gradients, normal_like
from options import FORMS, packed_arguments, padded_arguments, resolved

OPS = torch.ops.adasplash


def test_inference_mode(make_inputs, dtype):
    inputs = make_inputs(dtype=dtype)
    expected = entmax_attn(*inputs)
    with torch.inference_mode():
        fresh = type(inputs)(*(x.clone() for x in inputs))
        for tensors in (inputs, fresh):
            out = entmax_attn(*tensors)
            assert out.is_inference() and torch.equal(out, expected)


def test_no_grad(make_inputs):
    inputs = make_inputs(requires_grad=True)
    with torch.no_grad():
        assert not entmax_attn(*inputs).requires_grad
    assert entmax_attn(*inputs).requires_grad


class Scores(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 16)

    def forward(self, query, key, value):
        return entmax_attn(self.project(query), key, value, is_causal=True)


def test_functional_call(make_inputs, backend):
    module, inputs = Scores().to(backend.device), make_inputs()
    parameters = {name: torch.randn_like(p).requires_grad_() for name, p in module.named_parameters()}
    out = torch.func.functional_call(module, parameters, tuple(inputs))
    projected = torch.nn.functional.linear(inputs.query, parameters["project.weight"], parameters["project.bias"])
    assert torch.equal(out, entmax_attn(projected, inputs.key, inputs.value, is_causal=True))
    grads = torch.autograd.grad(out.sum(), list(parameters.values()))
    assert all(grad.any() for grad in grads) and module.project.weight.grad is None


@pytest.mark.parametrize("use_reentrant", (False, True))
def test_checkpoint(make_inputs, use_reentrant):
    inputs = make_inputs(m=40, n=50)
    grad = normal_like(inputs.query)

    def checkpointed(*tensors):
        return checkpoint(lambda *x: entmax_attn(*x, is_causal=True), *tensors, use_reentrant=use_reentrant)

    assert_same_bits(gradients(inputs, grad, checkpointed), gradients(inputs, grad, entmax_attn, is_causal=True))


def test_hooks_and_retained_gradients(make_inputs):
    inputs = make_inputs(requires_grad=True)
    seen = []
    out = entmax_attn(*inputs)
    out.register_hook(seen.append)
    out.backward(normal_like(out))
    assert torch.equal(seen[0], normal_like(out))


def test_saved_tensors_notice_changes_in_place(make_inputs):
    """A query overwritten between forward and backward is an error, not a wrong gradient."""
    inputs = make_inputs()
    query = inputs.query.clone().requires_grad_()
    copy = query * 1
    out = entmax_attn(copy, inputs.key, inputs.value)
    copy.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("lower", HALF, ids=("bfloat16", "float16"))
def test_autocast(make_inputs, backend, lower):
    inputs = make_inputs(m=40, n=50)
    grad = normal_like(inputs.query)
    with torch.autocast(backend.device, dtype=lower):
        out, *grads = gradients(inputs, grad.to(lower), entmax_attn, is_causal=True)
    assert out.dtype == lower and all(g.dtype == torch.float32 for g in grads)
    lowered = type(inputs)(*(x.to(lower) for x in inputs))
    expected = gradients(lowered, grad.to(lower), entmax_attn, is_causal=True)
    assert_same_bits([out, *(g.to(lower) for g in grads)], expected)


def test_autocast_makes_mixed_types_one(make_inputs, backend):
    inputs = make_inputs(m=40, n=50)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        mixed = entmax_attn(inputs.query.bfloat16(), inputs.key, inputs.value)
        with torch.inference_mode():
            inferred = entmax_attn(inputs.query, inputs.key, inputs.value)
    expected = entmax_attn(*(x.bfloat16() for x in inputs))
    assert torch.equal(mixed, expected) and torch.equal(inferred, expected)


def test_autocast_leaves_doubles_alone(make_inputs, backend):
    inputs = make_inputs(dtype=torch.float64)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        out = entmax_attn(*inputs)
    assert out.dtype == torch.float64 and torch.equal(out, entmax_attn(*inputs))


def test_autocast_of_the_other_device_is_no_concern(make_inputs, backend):
    """The CUDA key is registered too, by one library for both, and does nothing to tensors of the CPU."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("adasplash::entmax_attn", "AutocastCUDA")
    inputs = make_inputs()
    other = "cpu" if backend.device == "cuda" else "cuda"
    expected = entmax_attn(*inputs)
    torch.set_autocast_enabled(other, True)
    try:
        out = entmax_attn(*inputs)
    finally:
        torch.set_autocast_enabled(other, False)
        torch.clear_autocast_cache()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("capacity", (-1, 0, 64))
@pytest.mark.parametrize(
    "shape", (dict(), dict(m=1, n=1, size=1), dict(m=130, n=70, kv_heads=1, value_size=5), dict(batch=0))
)
def test_meta_and_fake_tensors_foretell_the_real_ones(make_inputs, backend, shape, capacity, dtype):
    if capacity > 0 and backend.support_capacity == 0:
        pytest.skip(f"the {backend.name} backend keeps no support lists")
    inputs = make_inputs(**shape, dtype=dtype)
    inputs = type(inputs)(inputs.query.transpose(1, 2).contiguous().transpose(1, 2), *inputs[1:])
    options = resolved(inputs, is_causal=True)

    def everything(tensors):
        out, *saved = OPS._entmax_attn_forward(*tensors, *options, capacity)
        results = [OPS.entmax_attn(*tensors, is_causal=True), out, *saved]
        if capacity >= 0:
            results += OPS._entmax_attn_backward(torch.empty_like(out), *tensors, *saved, *options)
        return results

    def look(results):
        return [(x.shape, x.stride(), x.dtype, x.storage_offset()) for x in results]

    real = everything(inputs)
    assert look(everything([x.to("meta") for x in inputs])) == look(real)
    with FakeTensorMode() as mode:
        fake = everything([mode.from_tensor(x) for x in inputs])
    assert look(fake) == look(real) and all(x.device == y.device for x, y in zip(fake, real, strict=True))


def test_meta_tensors_train(make_inputs):
    inputs = [x.to("meta").requires_grad_() for x in make_inputs()]
    out = entmax_attn(*inputs)
    out.sum().backward()
    assert out.is_meta and all(x.grad.shape == x.shape and x.grad.is_meta for x in inputs)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
@pytest.mark.parametrize("shape", (dict(), dict(heads=4, kv_heads=2, m=20, n=9), dict(m=3, n=100, sigma=0.01)))
def test_opcheck(make_inputs, shape, alpha):
    inputs = make_inputs(**shape, requires_grad=True)
    torch.library.opcheck(OPS.entmax_attn.default, tuple(inputs), dict(alpha=alpha, is_causal=True, scale=0.4))


@pytest.mark.slow
def test_opcheck_of_the_private_ops(make_inputs, backend):
    inputs = make_inputs(m=20, n=90)
    options = resolved(inputs, is_causal=True)
    for capacity in {-1, 0, backend.support_capacity}:
        torch.library.opcheck(OPS._entmax_attn_forward.default, (*inputs, *options, capacity))
    out, *saved = OPS._entmax_attn_forward(*inputs, *options, backend.support_capacity)
    torch.library.opcheck(OPS._entmax_attn_backward.default, (normal_like(out), *inputs, *saved, *options))


def private_arguments(form, device):
    """query, key, value and the options of the private ops, with everything at once."""
    arguments = {"padded": padded_arguments, "packed": packed_arguments}[form]([20, 0, 33], [40, 7, 65], device)
    query, key, value, alpha, *lengths, slopes = arguments[:7]
    lengths = (None, None, *lengths, *arguments[7:]) if form == "packed" else (*lengths, None, None, 0, 0)
    return (query, key, value), (alpha, 1.5, True, None, *lengths, [20, -1], slopes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_opcheck_of_the_private_ops_with_every_option(backend, form):
    inputs, options = private_arguments(form, backend.device)
    for capacity in {-1, 0, backend.support_capacity}:
        torch.library.opcheck(OPS._entmax_attn_forward.default, (*inputs, *options, capacity))
    out, *saved = OPS._entmax_attn_forward(*inputs, *options, backend.support_capacity)
    torch.library.opcheck(OPS._entmax_attn_backward.default, (normal_like(out), *inputs, *saved, *options))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ("number", "per head", "one for all"))
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_with_every_option(backend, form, kind):
    arguments = {"padded": padded_arguments, "packed": packed_arguments}[form]([20, 1, 33], [40, 7, 25], backend.device)
    query, key, value, alpha, *lengths, slopes = arguments[:7]
    alpha = {"number": 1.25, "per head": alpha.requires_grad_(), "one for all": alpha[1].clone().requires_grad_()}[kind]
    inputs = [x.requires_grad_() for x in (query, key, value)]
    options = dict(is_causal=True, window=[20, 3], alibi_slopes=slopes)
    overload = "default" if kind == "number" else "per_head"
    if form == "padded":
        options.update(q_seqlens=lengths[0], kv_seqlens=lengths[1], kv_starts=lengths[1] // 3)
        torch.library.opcheck(getattr(OPS.entmax_attn, overload), (*inputs, alpha), options)
    else:
        given = (*inputs, *lengths, *arguments[7:], alpha)
        torch.library.opcheck(getattr(OPS.entmax_attn_varlen, overload), given, options)


@pytest.mark.parametrize("capacity", (-1, 0, 64))
@pytest.mark.parametrize("form", FORMS)
def test_meta_and_fake_tensors_foretell_every_option(backend, form, capacity):
    if capacity > 0 and backend.support_capacity == 0:
        pytest.skip(f"the {backend.name} backend keeps no support lists")
    inputs, options = private_arguments(form, backend.device)

    def everything(convert):
        tensors = [convert(x) for x in inputs]
        given = [convert(x) if isinstance(x, torch.Tensor) else x for x in options]
        results = OPS._entmax_attn_forward(*tensors, *given, capacity)
        if capacity >= 0:
            out, *saved = results
            results += OPS._entmax_attn_backward(torch.empty_like(out), *tensors, *saved, *given)
        return [(x.shape, x.stride(), x.dtype, x.storage_offset()) for x in results]

    real = everything(lambda x: x)
    assert everything(lambda x: x.to("meta")) == real
    with FakeTensorMode() as mode:
        assert everything(mode.from_tensor) == real


def test_anomaly_mode(make_inputs):
    with torch.autograd.detect_anomaly(check_nan=True):
        entmax_attn(*make_inputs(m=50, n=30, requires_grad=True), is_causal=True).sum().backward()
