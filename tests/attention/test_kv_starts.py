"""Batches and caches that are padded on the left: kv_starts."""

import pytest
import torch

import adasplash
from adasplash import EntmaxAttention, attention_stats, attention_weights, entmax_attn
from common import Inputs, assert_same_bits, check_gradients, gradients, normal_like

# (starts, ends) of three entries of 138 keys: around blocks, nothing, all of it; None: kv_seqlens are not given.
BOUNDS = {
    "starts": ([0, 64, 137], None),
    "starts and ends": ([3, 64, 0], [138, 129, 1]),
    "nothing is seen": ([138, 70, 50], [138, 70, 20]),
}
OPTIONS = {
    "plain": dict(),
    "causal": dict(is_causal=True),
    "window": dict(window=(4, 6)),
    "ALiBi": dict(is_causal=True, alibi_slopes=[0.5, 0.1]),
}


def given(bounds, device, dtype=torch.int32):
    names = ("kv_starts", "kv_seqlens")
    return {
        name: torch.tensor(rows, dtype=dtype, device=device)
        for name, rows in zip(names, bounds, strict=True)
        if rows is not None
    }


def of_device(options, device):
    slopes = options.get("alibi_slopes")
    return options if slopes is None else {**options, "alibi_slopes": torch.tensor(slopes, device=device)}


def entry(inputs, b, starts, ends):
    """One batch entry with the keys that it has."""
    keys = slice(starts[b], 138 if ends is None else max(ends[b], starts[b]))
    return Inputs(inputs.query[b, None], inputs.key[b, None, :, keys], inputs.value[b, None, :, keys])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("bounds", BOUNDS)
def test_against_the_reference(make_inputs, backend, bounds, options, dtype):
    inputs = make_inputs(batch=3, heads=2, kv_heads=1, m=70, n=138, dtype=dtype)
    options = of_device(OPTIONS[options], backend.device)
    check_gradients(entmax_attn, inputs, **given(BOUNDS[bounds], backend.device), **options)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0, "heads"))
@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
def test_alphas_and_supports(make_inputs, backend, sigma, alpha):
    inputs = make_inputs(batch=3, heads=2, m=130, n=138, sigma=sigma)
    alpha = torch.tensor([1.2, 1.7], device=backend.device) if alpha == "heads" else alpha
    bounds = given(BOUNDS["starts and ends"], backend.device)
    lengths = torch.tensor([130, 64, 65], device=backend.device)
    check_gradients(entmax_attn, inputs, alpha=alpha, is_causal=True, q_seqlens=lengths, **bounds)


@pytest.mark.parametrize("int_type", (torch.int32, torch.int64))
@pytest.mark.parametrize("size", (16, 33))
@pytest.mark.parametrize("bounds", BOUNDS)
def test_every_entry_is_what_it_would_be_alone(make_inputs, backend, bounds, int_type, size, dtype):
    """To the bit: blocks, tiles and lists are counted from the start. What is before it has no gradient."""
    inputs = make_inputs(batch=3, heads=4, kv_heads=2, m=70, n=138, size=size, dtype=dtype)
    starts, ends = BOUNDS[bounds]
    grad = normal_like(inputs.query)
    together = gradients(inputs, grad, entmax_attn, is_causal=True, **given(BOUNDS[bounds], backend.device, int_type))
    for b in range(3):
        alone = gradients(entry(inputs, b, starts, ends), grad[b, None], entmax_attn, is_causal=True)
        count = alone[2].shape[2]
        for of_batch, expected in zip(together[:2], alone[:2], strict=True):
            assert torch.equal(of_batch[b, None], expected)
        for of_batch, expected in zip(together[2:], alone[2:], strict=True):
            assert torch.equal(of_batch[b, None, :, starts[b] : starts[b] + count], expected)
            assert not of_batch[b, :, : starts[b]].any() and not of_batch[b, :, starts[b] + count :].any()


def test_what_is_saved_is_counted_from_the_start(make_inputs, backend):
    inputs = make_inputs(batch=2, heads=1, m=5, n=138)
    starts = torch.tensor([70, 0], device=backend.device)
    options = (None, 1.5, False, None, None, None, None, None, 0, 0, [-1, -1], None, backend.support_capacity, starts)
    _, row_state, support, tiles = torch.ops.adasplash._entmax_attn_forward(*inputs, *options)
    short = Inputs(inputs.query[:1], inputs.key[:1, :, 70:], inputs.value[:1, :, 70:])
    _, of_short, short_support, short_tiles = torch.ops.adasplash._entmax_attn_forward(*short, *options[:-1])
    assert_same_bits((row_state[:1], support[:1], tiles[:1]), (of_short, short_support, short_tiles))


@pytest.mark.parametrize("hostile", (torch.nan, torch.inf, 1e30))
@pytest.mark.parametrize("sigma", (0.05, 1.5), ids=("much support", "little support"))
def test_keys_before_the_start_reach_nothing(make_inputs, backend, sigma, hostile, dtype):
    inputs = make_inputs(batch=3, m=70, n=138, sigma=sigma, dtype=dtype)
    bounds = given(BOUNDS["starts and ends"], backend.device)
    grad = normal_like(inputs.query)
    clean = gradients(inputs, grad, entmax_attn, is_causal=True, **bounds)
    for b, (start, end) in enumerate(zip(*BOUNDS["starts and ends"], strict=True)):
        for x in (inputs.key, inputs.value):
            x[b, :, :start] = hostile
            x[b, :, end:] = hostile
    dirty = gradients(inputs, grad, entmax_attn, is_causal=True, **bounds)
    assert_same_bits(clean, dirty)
    assert all(x.isfinite().all() for x in dirty)


@pytest.mark.slow
def test_every_element_is_written(make_inputs, backend):
    """Gradients of keys that nobody sees, too."""
    inputs = make_inputs(batch=3, m=20, n=138, size=9)
    bounds = given(BOUNDS["starts and ends"], backend.device)
    expected = gradients(inputs, normal_like(inputs.query), entmax_attn, **bounds)
    for _ in range(5):
        litter = [torch.full_like(x, torch.nan) for x in (*inputs, *expected) for _ in range(3)]
        del litter
        assert_same_bits(expected, gradients(inputs, normal_like(inputs.query), entmax_attn, **bounds))


def test_one_token_of_a_static_cache(make_inputs, backend):
    """Decoding: one query, keys up to where the cache is filled, prompts padded on the left."""
    inputs = make_inputs(batch=3, heads=4, kv_heads=2, m=1, n=138)
    starts, filled = [5, 0, 60], [90, 90, 90]
    out = entmax_attn(*inputs, is_causal=True, **given((starts, filled), backend.device))
    for b in range(3):
        assert torch.equal(out[b, None], entmax_attn(*entry(inputs, b, starts, filled), is_causal=True))


@pytest.mark.backends("cpu")
@pytest.mark.parametrize(
    "bounds, words",
    (
        (([139, 0, 0], None), "kv_starts must be from 0 to key's length 138, got 139 at [0]"),
        (([0, 0, -1], [1, 1, 1]), "kv_starts must be from 0 to key's length 138, got -1 at [2]"),
    ),
    ids=str,
)
def test_starts_out_of_range(make_inputs, bounds, words):
    inputs = make_inputs(batch=3, m=5, n=138)
    with pytest.raises(RuntimeError) as error:
        entmax_attn(*inputs, **given(bounds, "cpu"))
    assert words in str(error.value)


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("bounds", (([500, -7, 2**31 - 1], None), ([5, 5, 5], [2**40, -(2**40), 6])), ids=str)
def test_starts_out_of_range_are_clamped(make_inputs, backend, bounds):
    """Wrong rows, no stray access."""
    inputs = make_inputs(batch=3, m=5, n=138)
    results = gradients(inputs, normal_like(inputs.query), entmax_attn, **given(bounds, backend.device, torch.int64))
    assert all(x.isfinite().all() for x in results)


@pytest.mark.parametrize(
    "starts", (torch.zeros(2, dtype=torch.int32), torch.zeros(3), torch.zeros(3, 1).int()), ids=str
)
def test_starts_of_another_shape_or_type(make_inputs, backend, starts):
    inputs = make_inputs(batch=3, m=5, n=20)
    with pytest.raises(RuntimeError, match=r"^entmax_attn: kv_starts must "):
        entmax_attn(*inputs, kv_starts=starts.to(backend.device))


def test_the_packed_form_has_no_starts(make_inputs, backend):
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in make_inputs(batch=1, m=20, n=20))
    ends = torch.tensor([0, 20], dtype=torch.int32, device=backend.device)
    options = (None, 1.5, False, None, None, None, ends, ends, 20, 20, [-1, -1], None, -1, ends[:1])
    with pytest.raises(RuntimeError, match="kv_starts are of the padded form"):
        torch.ops.adasplash._entmax_attn_forward(query, key, value, *options)


@pytest.mark.slow
@pytest.mark.parametrize("bounds", BOUNDS)
def test_weights_and_stats(make_inputs, backend, bounds):
    """Columns are those of the whole key; facts are those of the entry alone."""
    inputs = make_inputs(batch=3, heads=2, m=70, n=138)
    starts, ends = BOUNDS[bounds]
    options = given(BOUNDS[bounds], backend.device)
    weights = attention_weights(*inputs, is_causal=True, **options).to_dense().reshape(3, 2, 70, 138)
    stats = attention_stats(*inputs, is_causal=True, **options)
    for b in range(3):
        alone = entry(inputs, b, starts, ends)
        count = alone.key.shape[2]
        expected = attention_weights(*alone, is_causal=True).to_dense().reshape(2, 70, count)
        assert torch.equal(weights[b, :, :, starts[b] : starts[b] + count], expected)
        assert torch.count_nonzero(weights[b]) == torch.count_nonzero(expected)
        for found, of_entry in zip(stats, attention_stats(*alone, is_causal=True), strict=True):
            torch.testing.assert_close(found[b, None], of_entry, rtol=0, atol=0, equal_nan=True)


def test_a_layer_takes_them(make_inputs, backend):
    torch.manual_seed(0)
    layer = EntmaxAttention(32, 4, is_causal=True, device=backend.device)
    x = make_inputs(batch=1, heads=3, m=20, size=32).query[0]
    starts = torch.tensor([0, 7, 12], device=backend.device)
    out = layer(x, kv_starts=starts)
    for b, start in enumerate(starts.tolist()):
        torch.testing.assert_close(out[b, start:], layer(x[b, None, start:])[0], atol=1e-5, rtol=1e-5)


def test_in_torchscript(make_inputs, backend):
    @torch.jit.script
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return adasplash.entmax_attn(q, k, v, is_causal=True, kv_starts=starts)

    inputs = make_inputs(batch=3, m=20, n=60)
    starts = torch.tensor([0, 17, 60], device=backend.device)
    assert torch.equal(attend(*inputs, starts), entmax_attn(*inputs, is_causal=True, kv_starts=starts))
