"""Queries that are a part of a sequence: q_positions, the place of the first one among the keys."""

import pytest
import torch

import adasplash
from adasplash import attention_stats, attention_weights, entmax_attn, entmax_attn_summary, entmax_attn_varlen
from common import Inputs, assert_same_bits, check_gradients, gradients, normal_like
from packing import check_packed, packed

N = 130
FARTHEST = 2**29 - 1
# Before the keys, at the first one, among them, across their end, behind all of them.
PLACES = (-40, 0, 33, 100, 400)
OPTIONS = {
    "causal": dict(is_causal=True),
    "window": dict(window=(20, 5)),
    "causal window": dict(is_causal=True, window=(9, -1)),
    "ALiBi": dict(alibi_slopes=[0.3, 0.05]),
    "causal ALiBi": dict(is_causal=True, alibi_slopes=[0.3, 0.05]),
    "nothing": dict(),
}


def of(backend, options):
    return {name: torch.tensor(x, device=backend.device) if isinstance(x, list) else x for name, x in options.items()}


def places(backend, *numbers, dtype=torch.int64):
    return torch.tensor(numbers, dtype=dtype, device=backend.device)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("m", (70, 5), ids=("many queries", "few queries"))
def test_against_the_reference(make_inputs, backend, m, options, dtype):
    inputs = make_inputs(batch=len(PLACES), heads=2, kv_heads=1, m=m, n=N, dtype=dtype)
    check_gradients(entmax_attn, inputs, q_positions=places(backend, *PLACES), **of(backend, OPTIONS[options]))


@pytest.mark.parametrize("alpha", (1.0, 1.25, 1.5, 2.0, "heads"))
@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
def test_alphas_and_supports(make_inputs, backend, sigma, alpha):
    inputs = make_inputs(batch=len(PLACES), heads=2, m=70, n=N, sigma=sigma)
    alpha = torch.tensor([1.2, 1.7], device=backend.device) if alpha == "heads" else alpha
    options = dict(is_causal=True, window=(50, -1), q_positions=places(backend, *PLACES))
    check_gradients(entmax_attn, inputs, alpha=alpha, **options)


@pytest.mark.parametrize("options", ("causal", "window", "ALiBi"))
def test_with_lengths_and_starts(make_inputs, backend, options):
    """Places are counted from an entry's first key, and its lengths shift nothing."""
    inputs = make_inputs(batch=4, heads=2, m=70, n=N)
    rows = dict(q_seqlens=[70, 33, 1, 0], kv_starts=[7, 64, 0, 3], kv_seqlens=[130, 90, 1, 100])
    options = {**of(backend, rows), **of(backend, OPTIONS[options])}
    check_gradients(entmax_attn, inputs, q_positions=places(backend, 60, -5, 0, 9), **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_packed(backend, options):
    inputs, lengths = packed([70, 0, 5, 33], [90, 4, 0, 40], device=backend.device, heads=2)
    options = of(backend, OPTIONS[options])
    check_packed(inputs, lengths, q_positions=places(backend, 40, 2, 0, -10, dtype=torch.int32), **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("m", (70, 5), ids=("many queries", "few queries"))
def test_the_place_that_is_meant_without_it_changes_no_bit(make_inputs, backend, m, options, dtype):
    inputs = make_inputs(batch=2, heads=2, m=m, n=N, dtype=dtype)
    grad, options = normal_like(inputs.query), of(backend, OPTIONS[options])
    expected = gradients(inputs, grad, entmax_attn, **options)
    told = places(backend, N - m, N - m)
    assert_same_bits(expected, gradients(inputs, grad, entmax_attn, q_positions=told, **options))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_part_of_the_queries_is_that_part_of_the_result(make_inputs, backend, options):
    """Queries 30 to 99 of 130, and what of the keys they are given: all, or those from 20 on where a window hides the
    ones before."""
    inputs = make_inputs(batch=1, heads=2, m=N, n=N)
    whole = entmax_attn(*inputs, **of(backend, OPTIONS[options]))
    query = inputs.query[:, :, 30:100]
    for before in (0, 10) if "window" in OPTIONS[options] else (0,):
        keys = slice(before, None)
        out = entmax_attn(
            query, inputs.key[:, :, keys], inputs.value[:, :, keys], q_positions=places(backend, 30 - before),
            **of(backend, OPTIONS[options]),
        )  # fmt: skip
        torch.testing.assert_close(out, whole[:, :, 30:100], atol=1e-5, rtol=1e-5)


def test_dropout_counts_as_without(make_inputs, backend):
    """Places of queries move no mask: it is of their numbers in the call."""
    inputs = make_inputs(batch=2, heads=2, m=37, n=53)
    seed = torch.tensor(3, device=backend.device)
    options = dict(is_causal=True, dropout_p=0.4, dropout_seed=seed)
    check_gradients(entmax_attn, inputs, q_positions=places(backend, 9, 30), **options)
    inputs, lengths = packed([37, 12], [53, 12], device=backend.device, heads=2)
    check_packed(inputs, lengths, q_positions=places(backend, 9, 3), **options)


@pytest.mark.parametrize("m", (70, 5), ids=("many queries", "few queries"))
def test_rows_that_see_nothing_may_hold_anything(make_inputs, backend, m):
    """In front of those that see keys, and behind them."""
    inputs = make_inputs(batch=2, heads=2, m=m, n=N)
    first = places(backend, -m + 2, N + 2)
    options = dict(is_causal=True, window=(4, -1), q_positions=first)
    grad = normal_like(inputs.query)
    clean = gradients(inputs, grad, entmax_attn, **options)
    place = first[:, None] + torch.arange(m, device=backend.device)
    blind = ((place < 0) | (place > N + 3))[:, None].expand(-1, 2, -1)
    inputs.query[blind], grad[blind] = torch.nan, torch.nan
    dirty = gradients(inputs, grad, entmax_attn, **options)
    assert_same_bits(clean, dirty)
    assert not dirty[0][blind].any() and not dirty[1][blind].any() and dirty[0][~blind].any()


@pytest.mark.parametrize("int_type", (torch.int32, torch.int64))
def test_the_farthest_places(make_inputs, backend, int_type):
    """Sums with rows and windows do not overflow."""
    inputs = make_inputs(batch=2, heads=2, m=70, n=N)
    told = places(backend, -FARTHEST, FARTHEST, dtype=int_type)
    for options in (dict(is_causal=True), dict(window=(2**40, 2**40)), dict(window=(3, 3))):
        out = entmax_attn(*inputs, q_positions=told, **options)
        if options.get("window") == (2**40, 2**40):
            assert_same_bits(out, entmax_attn(*inputs))
        else:
            assert not out[0].any()
            assert out[1].any() == ("window" not in options)


@pytest.mark.slow
def test_facts_and_weights(make_inputs, backend):
    inputs = make_inputs(batch=len(PLACES), heads=2, m=70, n=N)
    slopes = torch.tensor([0.3, 0.05], device=backend.device)
    options = dict(window=(20, 5), alibi_slopes=slopes, q_positions=places(backend, *PLACES))
    out, stats = entmax_attn_summary(*inputs, **options)
    assert torch.equal(out, entmax_attn(*inputs, **options))
    weights = attention_weights(*inputs, **options).to_dense().reshape(len(PLACES), 2, 70, N)
    torch.testing.assert_close(weights @ inputs.value, out, atol=1e-4, rtol=1e-4)
    assert torch.equal((weights > 0).sum(-1), stats.support_size.long())
    torch.testing.assert_close(weights.amax(-1), stats.largest_weight, atol=1e-4, rtol=1e-4)
    assert torch.equal(attention_stats(*inputs, **options).support_size, stats.support_size)


def test_torch_does_not_take_softmax_over(make_inputs, backend):
    """For alpha = 1 torch's attention has no places."""
    inputs = make_inputs(batch=1, heads=2, m=40, n=40)
    check_gradients(entmax_attn, inputs, alpha=1.0, is_causal=True, q_positions=places(backend, -7))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("place", (FARTHEST + 1, -FARTHEST - 1, 2**62))
def test_places_out_of_range(make_inputs, place):
    with pytest.raises(RuntimeError) as error:
        entmax_attn(*make_inputs(batch=2, m=5, n=9), q_positions=torch.tensor([0, place]))
    assert f"entmax_attn: q_positions must be from {-FARTHEST} to {FARTHEST}, got {place} at [1]" in str(error.value)


@pytest.mark.backends("emulated", "cuda")
def test_places_out_of_range_are_clamped(make_inputs, backend):
    inputs = make_inputs(batch=2, heads=1, m=5, n=20)
    clamped = entmax_attn(*inputs, is_causal=True, q_positions=places(backend, -FARTHEST, FARTHEST))
    told = places(backend, -(2**62), 2**62)
    assert_same_bits(clamped, entmax_attn(*inputs, is_causal=True, q_positions=told))


@pytest.mark.parametrize(
    "told", (torch.zeros(2, dtype=torch.int32), torch.zeros(3), torch.zeros(3, 1).int()), ids=("size", "type", "shape")
)
def test_places_of_another_shape_or_type(make_inputs, backend, told):
    with pytest.raises(RuntimeError, match=r"^entmax_attn: q_positions must "):
        entmax_attn(*make_inputs(batch=3, m=5, n=20), q_positions=told.to(backend.device))
    inputs, lengths = packed([5, 6, 7], [9, 9, 9], device=backend.device)
    with pytest.raises(RuntimeError, match=r"^entmax_attn_varlen: q_positions must "):
        entmax_attn_varlen(*inputs, *lengths, q_positions=told.to(backend.device))


def test_nested_tensors_hand_them_on(backend):
    inputs, lengths = packed([20, 33], [20, 33], device=backend.device, heads=2)
    told = places(backend, 4, -3)
    nested = (torch.nested.nested_tensor_from_jagged(x, lengths[0]).transpose(1, 2) for x in inputs)
    out = entmax_attn(*nested, is_causal=True, q_positions=told)
    expected = entmax_attn_varlen(*inputs, *lengths, is_causal=True, q_positions=told)
    assert torch.equal(out.transpose(1, 2).values(), expected)


def test_in_torchscript(make_inputs, backend):
    @torch.jit.script
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return adasplash.entmax_attn(q, k, v, is_causal=True, q_positions=places)

    inputs = Inputs(*make_inputs(batch=2, m=20, n=60))
    told = places(backend, 11, 50)
    assert torch.equal(attend(*inputs, told), entmax_attn(*inputs, is_causal=True, q_positions=told))
