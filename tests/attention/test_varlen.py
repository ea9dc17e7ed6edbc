"""Sequences of different lengths packed behind each other: entmax_attn_varlen."""

import pytest
import torch

import adasplash
from adasplash import entmax_attn, entmax_attn_varlen
from common import HALF, assert_same_bits, gradients, normal_like, run_python
from packing import alone, check_packed, packed
from work import count_products

LENGTHS = {
    "unequal": ([5, 60, 1, 17], [9, 3, 40, 80]),
    "around blocks": ([64, 65, 1], [64, 1, 65]),
    "empty ones": ([0, 12, 0, 7, 0], [4, 0, 0, 9, 0]),
    "one": ([37], [53]),
    "the same": ([20, 20], [20, 20]),
}


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("lengths", LENGTHS)
def test_against_the_reference(backend, lengths, is_causal, dtype):
    inputs, lengths = packed(*LENGTHS[lengths], backend.device, heads=4, kv_heads=2, value_size=9, dtype=dtype)
    check_packed(inputs, lengths, is_causal=is_causal)


@pytest.mark.parametrize("slopes", ("per head", "per sequence"))
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0, "per head"))
def test_with_every_option(backend, alpha, slopes, dtype):
    inputs, lengths = packed(*LENGTHS["unequal"], backend.device, heads=4, kv_heads=2, dtype=dtype)
    rows = 1 if slopes == "per head" else 4
    slopes = torch.rand(rows, 4, generator=torch.Generator().manual_seed(0)).to(backend.device)
    alpha = torch.tensor([1.1, 1.4, 1.5, 1.9], device=backend.device) if alpha == "per head" else alpha
    options = dict(alpha=alpha, is_causal=True, scale=0.4, window=(30, -1), alibi_slopes=slopes.squeeze(0))
    check_packed(inputs, lengths, **options)


@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
@pytest.mark.parametrize("size, value_size", ((16, 16), (33, 7), (1, 64)))
@pytest.mark.parametrize("lengths", LENGTHS)
def test_equal_to_every_sequence_alone(backend, lengths, size, value_size, sigma, dtype):
    """To the bit, forward and backward: block shapes follow from a sequence's own lengths, wherever it stands."""
    shape = dict(heads=4, kv_heads=2, size=size, value_size=value_size, sigma=sigma, dtype=dtype)
    inputs, lengths = packed(*LENGTHS[lengths], backend.device, **shape)
    grad = normal_like(inputs.query.new_empty(*inputs.query.shape[:2], value_size))
    options = dict(alpha=torch.tensor([1.1, 1.5, 1.7, 2.0], device=backend.device), is_causal=True)
    *together, dalpha = gradients(inputs, grad, lambda *x, **o: entmax_attn_varlen(*x, *lengths, **o), **options)
    sums = torch.zeros_like(dalpha)
    for b in range(len(lengths[0]) - 1):
        sequence, (q, k) = alone(inputs, lengths, b)
        *results, of_alpha = gradients(sequence, grad[q].transpose(0, 1)[None], entmax_attn, **options)
        for all_of_it, part, expected in zip(together, (q, q, k, k), results, strict=True):
            assert torch.equal(all_of_it[part], expected[0].transpose(0, 1))
        sums += of_alpha
    torch.testing.assert_close(dalpha, sums, atol=1e-4, rtol=1e-4)


@pytest.mark.backends("cpu")
def test_threads_change_no_bit(threads):
    inputs, lengths = packed([200, 3, 70, 130], [90, 300, 2, 130])
    results = []
    for count in (1, 3):
        threads(count)
        results.append(gradients(inputs, normal_like(inputs.query), lambda *x: entmax_attn_varlen(*x, *lengths)))
    assert_same_bits(*results)


@pytest.mark.parametrize("more", (100, 2**31, 2**62), ids=str)
def test_int64_lengths_and_loose_maxima(backend, more):
    """max_seqlen may be more than the longest sequence, by any number: nothing is as large as it."""
    inputs, lengths = packed(*LENGTHS["unequal"], backend.device)
    wider = (lengths[0].long(), lengths[1].long(), lengths[2] + more, lengths[3] + more)
    results = [
        gradients(inputs, normal_like(inputs.query), lambda *x, given=given: entmax_attn_varlen(*x, *given, 1.5, True))
        for given in (lengths, wider)
    ]
    assert_same_bits(*results)


def test_a_joint_projection_needs_no_copy_to_be_right(backend, dtype):
    """Query, key and value as views of one (tokens, 3, heads, D) tensor."""
    inputs, lengths = packed([20, 40], [20, 40], backend.device, dtype=dtype)
    joint = torch.stack(inputs, 1).requires_grad_()
    out = entmax_attn_varlen(*joint.unbind(1), *lengths)
    out.backward(normal_like(out))
    expected = gradients(inputs, normal_like(out), lambda *x: entmax_attn_varlen(*x, *lengths))
    assert_same_bits((out.detach(), *joint.grad.unbind(1)), expected)


@pytest.mark.parametrize(
    "q_lengths, k_lengths, shape",
    (
        ([], [], dict()),
        ([0, 0], [0, 0], dict()),
        ([0, 0], [5, 3], dict()),
        ([5, 3], [0, 0], dict()),
        ([5, 3], [2, 6], dict(heads=0)),
        ([5, 3], [2, 6], dict(heads=0, kv_heads=3)),
    ),
    ids=str,
)
def test_nothing_to_attend_to(backend, q_lengths, k_lengths, shape):
    inputs, lengths = packed(q_lengths, k_lengths, backend.device, **{"heads": 2, **shape})
    results = gradients(inputs, normal_like(inputs.query), lambda *x: entmax_attn_varlen(*x, *lengths))
    assert [x.shape for x in results] == [inputs.query.shape, *(x.shape for x in inputs)]
    assert not any(x.any() for x in results)


def test_a_nan_stays_in_its_sequence(backend):
    inputs, lengths = packed([20, 30, 10], [25, 15, 40], backend.device)
    grad = normal_like(inputs.query)
    clean = gradients(inputs, grad, lambda *x: entmax_attn_varlen(*x, *lengths))
    for x, ends in zip(inputs, (lengths[0], lengths[1], lengths[1]), strict=True):
        x[int(ends[1]) : int(ends[2])] = torch.nan
    dirty = gradients(inputs, grad, lambda *x: entmax_attn_varlen(*x, *lengths))
    for one, other, ends in zip(clean, dirty, (lengths[0], lengths[0], lengths[1], lengths[1]), strict=True):
        assert torch.equal(one[: ends[1]], other[: ends[1]]) and torch.equal(one[ends[2] :], other[ends[2] :])
    assert dirty[0][lengths[0][1] : lengths[0][2]].isnan().all()


@pytest.mark.parametrize("lower", HALF, ids=("bfloat16", "float16"))
def test_autocast(backend, lower):
    inputs, lengths = packed(*LENGTHS["unequal"], backend.device)
    alpha = torch.tensor([1.23456, 1.7], device=backend.device)
    with torch.autocast(backend.device, dtype=lower):
        out = entmax_attn_varlen(*inputs, *lengths, alpha)
        same = entmax_attn_varlen(*inputs, *lengths, 1.5)
    lowered = [x.to(lower) for x in inputs]
    assert torch.equal(out, entmax_attn_varlen(*lowered, *lengths, alpha))
    assert torch.equal(same, entmax_attn_varlen(*lowered, *lengths, 1.5))


def test_inference_mode(backend):
    inputs, lengths = packed(*LENGTHS["unequal"], backend.device)
    expected = entmax_attn_varlen(*inputs, *lengths)
    with torch.inference_mode():
        out = entmax_attn_varlen(*inputs, *lengths)
    assert out.is_inference() and torch.equal(out, expected)


@pytest.mark.backends("cpu")
def test_no_padding_work():
    """A long sequence beside 32 short ones costs about what it costs alone; padded they would cost 33 times that."""
    alone, together = count_products("""
def attend(*lengths):
    x = torch.randn(sum(lengths), 1, 64)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    adasplash.entmax_attn_varlen(x, x, x, ends, ends, max(lengths), max(lengths), 1.5, True)
for lengths in ([2048], [2048] + [20] * 32):
    print(products(lambda: attend(*lengths)))
""")
    assert 0 < alone < together < 2 * alone


@pytest.mark.backends("cpu")
def test_finite_differences():
    inputs, lengths = packed([3, 0, 2], [4, 2, 3], kv_heads=1, size=3, dtype=torch.float64, requires_grad=True)
    inputs = [x.detach().requires_grad_() for x in inputs]
    alpha = torch.tensor([1.3, 1.8], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: entmax_attn_varlen(*x[:3], *lengths, x[3], True), (*inputs, alpha))


@pytest.mark.backends("cpu")
def test_ten_thousand_sequences():
    """The packed form's own bookkeeping does not grow out of hand."""
    program = (
        "import torch, adasplash; n = 10_000; x = torch.randn(4 * n, 1, 8).requires_grad_();"
        "ends = torch.arange(0, 4 * n + 1, 4); out = adasplash.entmax_attn_varlen(x, x, x, ends, ends, 4, 4);"
        "out.sum().backward();"
        "padded = x.detach().view(n, 4, 1, 8).transpose(1, 2);"
        "print(torch.equal(adasplash.entmax_attn(padded, padded, padded).transpose(1, 2).reshape(-1, 1, 8), out))"
    )
    assert run_python(program).strip() == "True"


def test_the_python_function_is_the_op(backend):
    inputs, lengths = packed(*LENGTHS["unequal"], backend.device)
    expected = torch.ops.adasplash.entmax_attn_varlen(*inputs, *lengths, 1.25, True, scale=0.3, window=[20, -1])
    assert torch.equal(adasplash.entmax_attn_varlen(*inputs, *lengths, 1.25, True, 0.3, (20, -1)), expected)
