"""The kernels in Triton's interpreter against the fp64 reference: small shapes, every path."""

import pytest
import torch
from checked import BIG, PARTS, SMALL, TYPES, check
from interpreted import Tiles, attention

import reference
from common import HALF, assert_same_bits, gradients, make_inputs, normal_like

pytestmark = pytest.mark.backends("cpu")


@TYPES
@pytest.mark.parametrize("alpha", (1.0, 1.1, 1.5, 2.0))
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_types_and_alphas(dtype, alpha, is_causal):
    check(make_inputs(2, 1, 100, 100, size=16, dtype=dtype), alpha, is_causal)


@pytest.mark.parametrize("tiles", (SMALL, BIG, PARTS, Tiles(walk=32, step_d=16)), ids=lambda tiles: str(vars(tiles)))
@pytest.mark.parametrize("m, n", ((1, 1), (1, 130), (130, 1), (64, 128), (65, 193)))
def test_shapes(m, n, tiles):
    check(make_inputs(1, 1, m, n, size=24, value_size=16), 1.5, True, tiles=tiles)
    check(make_inputs(1, 1, m, n, size=9, value_size=21), 1.5, False, tiles=tiles)


@pytest.mark.parametrize("size, value_size", ((1, 1), (3, 40), (40, 3), (80, 80), (256, 256)))
def test_head_sizes(size, value_size):
    check(make_inputs(1, 1, 70, 70, size=size, value_size=value_size), 1.5, True)


@pytest.mark.parametrize("heads, kv_heads", ((4, 2), (6, 1), (3, 3)))
@pytest.mark.parametrize("tiles", (SMALL, BIG, PARTS), ids=("small", "big", "parts"))
def test_grouped_queries(heads, kv_heads, tiles):
    check(make_inputs(1, heads, 20, 70, size=16, kv_heads=kv_heads), 1.5, True, tiles=tiles)


@pytest.mark.parametrize("scale", (0.0, -0.4, 1e-3, 2.0))
def test_scale(scale):
    check(make_inputs(1, 2, 70, 90, size=16), 1.5, True, scale=scale)


@pytest.mark.parametrize("alpha", (1.5, 2.0))
def test_fast_code_and_powers_agree(alpha):
    inputs = make_inputs(1, 2, 70, 90, size=16)
    fast, powers = (attention(*inputs, alpha, alpha_code=code).out for code in (None, "any"))
    torch.testing.assert_close(fast, powers, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("sigma", (0.02, 0.3, 4.0))
@pytest.mark.parametrize("alpha", (1.0, 1.05, 1.5, 2.0))
def test_flat_and_peaked_scores(sigma, alpha):
    """Supports from all keys to one."""
    check(make_inputs(1, 1, 70, 300, size=16, sigma=sigma), alpha)


@TYPES
def test_values_far_from_zero(dtype):
    check(make_inputs(1, 2, 100, 130, size=16, mean=16.0, dtype=dtype), 1.5)


@pytest.mark.parametrize("spread, mean", ((0.05, 30.0), (1e-4, 5.3), (1.0, 1000.0)))
@pytest.mark.parametrize("alpha", (1.0, 1.01, 1.25, 1.5, 2.0))
def test_weights_sum_to_one(alpha, spread, mean):
    n = 600
    scores = torch.randn(4, n, generator=torch.Generator().manual_seed(0)) * spread + mean
    query = torch.eye(4, 16)[None, None]
    key = torch.nn.functional.pad(scores.T, (0, 12))[None, None]
    out = attention(query, key.contiguous(), torch.ones(1, 1, n, 1), alpha, scale=1.0).out
    assert (out - 1).abs().max() <= 1e-5


def test_strides():
    inputs = make_inputs(2, 2, 70, 90, size=16)
    odd = type(inputs)(
        inputs.query.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((inputs.key, inputs.key), -1)[..., 16:],
        inputs.value[:1].expand(2, -1, -1, -1),
    )
    grad = normal_like(inputs.query)
    dense = type(inputs)(*(x.contiguous() for x in odd))
    for one, other in zip(attention(*odd, grad=grad), attention(*dense, grad=grad), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("window", ((10, 5), (0, 0), (70, -1), (-1, 3)))
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("m, n", ((130, 200), (200, 130)))
def test_window(window, is_causal, m, n):
    check(make_inputs(1, 1, m, n, size=16), 1.5, is_causal, window=window)
    check(make_inputs(1, 1, m, n, size=16), 1.5, is_causal, window=window, tiles=BIG)


def test_window_over_many_tiles():
    """Four tiles are scanned at a time, from wherever the first is that all rows see."""
    check(make_inputs(1, 1, 200, 900, size=16), 1.5, window=(500, 70), tiles=Tiles(scan_n=256))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("m, n", ((64, 64), (65, 193), (70, 300)))
def test_products_that_go_ahead_change_no_bit(m, n, dtype):
    """None, one and several inner tiles, and steps of 128 keys of them."""
    inputs = make_inputs(1, 2, m, n, size=24, kv_heads=1, dtype=dtype)
    inputs.query[0, 0, 3, 3] = torch.nan
    for alpha, options in ((1.5, {}), (1.5, dict(is_causal=True)), (2.0, dict(window=(150, 30)))):
        for scan_n in (64, 128):
            found = []
            for ahead in (False, True):
                result = attention(*inputs, alpha, tiles=Tiles(scan_n, ahead), gather_below=0, **options)
                assert result.out[0, 0, 3].isnan().all() and result.out.isnan().sum() == 24
                found.append((result.out.nan_to_num(7.0), result.row_state.nan_to_num(7.0), result.tiles))
            assert_same_bits(*found)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_one_key_above_a_flat_crowd(dtype):
    """Steps guess from the sums how many keys are above tau, and guess wrong here: a first output is not good enough,
    and the threshold that is kept is better than it has to be for the output."""
    m, n = 64, 512
    query, key = torch.zeros(1, 1, m, 16), torch.zeros(1, 1, n, 16)
    query[..., 0] = torch.linspace(0.9, 0.999, m)  # how far the key is above the others
    key[..., 7, 0] = 1.0
    query, key, value = (x.to(dtype) for x in (query, key, torch.randn(1, 1, n, 16)))
    state = attention(query, key, value, 1.5, scale=2.0).row_state.double()
    z = query.double() @ key.double().transpose(-1, -2)
    total = (z - state.sum(-1, keepdim=True)).clamp(min=0).square().sum(-1)
    assert (total - 1).abs().max() < {torch.float16: 2e-4, torch.bfloat16: 1e-3}[dtype]


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("tiles", (SMALL, BIG, PARTS), ids=("small", "big", "parts"))
def test_padded_batches(is_causal, tiles):
    """Any lengths, zero too; padding holds NaN and nothing shows it."""
    inputs = make_inputs(4, 2, 90, 130, size=16, kv_heads=1)
    lengths = dict(q_seqlens=torch.tensor([90, 64, 0, 33]), kv_seqlens=torch.tensor([130, 17, 90, 0]))
    for x, length in zip(inputs, (lengths["q_seqlens"], *[lengths["kv_seqlens"]] * 2), strict=True):
        x[(torch.arange(x.shape[2]) >= length[:, None])[:, None].expand(x.shape[:3])] = torch.nan
    grad = normal_like(inputs.query)
    actual = attention(
        *inputs, 1.5, is_causal, lengths=tuple(x.int() for x in lengths.values()), grad=grad, tiles=tiles
    )
    clean = type(inputs)(*(x.nan_to_num(0.0).double() for x in inputs))
    exact = gradients(clean, grad, lambda *x: reference.attention(*x, 1.5, is_causal, **lengths).out)
    for mine, true in zip((actual.out, *actual[3:6]), exact, strict=True):
        torch.testing.assert_close(mine.double(), true, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("window", ((-1, -1), (40, 3)), ids=("full", "window"))
@pytest.mark.parametrize("tiles", (SMALL, BIG, PARTS), ids=("small", "big", "parts"))
def test_keys_that_start_later(window, tiles):
    """Bounds of the keys: around a tile, none of them, all of them; what is outside holds NaN and nothing shows it."""
    bounds = dict(kv_starts=torch.tensor([3, 64, 90, 0]), kv_seqlens=torch.tensor([130, 127, 90, 1]))
    inputs = make_inputs(4, 2, 70, 130, size=16, kv_heads=1)
    row = torch.arange(130)
    hidden = (row < bounds["kv_starts"][:, None]) | (row >= bounds["kv_seqlens"][:, None])
    for x in (inputs.key, inputs.value):
        x[hidden[:, None]] = torch.nan
    for lengths in (dict(), dict(q_seqlens=torch.tensor([70, 64, 33, 1]))):
        actual = check(inputs, 1.5, True, tiles=tiles, window=window, **bounds, **lengths)
        assert not any(x[hidden[:, None]].any() for x in (actual.dk, actual.dv))


@pytest.mark.parametrize("window", ((-1, -1), (40, 3)), ids=("full", "window"))
@pytest.mark.parametrize("few_queries, tiles", ((-1, SMALL), (-1, PARTS), (16, SMALL)), ids=("small", "parts", "few"))
def test_places_of_queries(window, few_queries, tiles):
    """Before the keys, among them, across their end, far from them: rows that see nothing give zeros, whatever they
    hold, in front of those that see keys and behind them."""
    places = torch.tensor([-30, 50, 120, 500, -(2**29) + 1, 2**29 - 1])
    m = 70 if few_queries < 0 else 16
    inputs = make_inputs(len(places), 2, m, 130, size=16, kv_heads=1)
    sees = reference.visible(m, 130, True, window=window, q_positions=places).any(-1)
    inputs.query[~sees.expand(-1, 2, -1)] = 1e30
    actual = check(inputs, 1.5, True, tiles=tiles, window=window, few_queries=few_queries, q_positions=places)
    assert not actual.out[~sees.expand(-1, 2, -1)].any() and not actual.dq[~sees.expand(-1, 2, -1)].any()
    assert actual.out[2 if window == (40, 3) else 3].any()


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_packed_batches_equal_each_sequence_alone(is_causal):
    queries, keys = (100, 0, 1, 70), (130, 5, 1, 70)
    alone = [make_inputs(1, 4, m, n, size=16, kv_heads=2, seed=m) for m, n in zip(queries, keys, strict=True)]
    packed = [torch.cat([x[0].transpose(0, 1) for x in parts]) for parts in zip(*alone, strict=True)]
    grads = [normal_like(inputs.query, seed) for seed, inputs in enumerate(alone)]
    cumulated = [torch.tensor([0, *x]).cumsum(0).int() for x in (queries, keys)]
    offsets = (*cumulated, max(queries), max(keys))
    grad = torch.cat([x[0].transpose(0, 1) for x in grads])
    actual = attention(*packed, 1.5, is_causal, offsets=offsets, grad=grad)
    for index, inputs in enumerate(alone):
        expected = attention(*inputs, 1.5, is_causal, grad=grads[index])
        for what, bounds in (("out", 0), ("dq", 0), ("dk", 1), ("dv", 1)):
            first, last = cumulated[bounds][index : index + 2]
            mine = getattr(actual, what)[first:last].transpose(0, 1)[None]
            assert_same_bits(mine, getattr(expected, what))


@pytest.mark.parametrize("wrong", ([0, 500], [-7, 90], [90, 10], [1 << 30, 1 << 30]))
def test_wrong_lengths_stay_inside(wrong):
    """Lengths that contradict the tensors are clamped: finite rows, whatever they mean."""
    inputs = make_inputs(1, 1, 90, 90, size=16)
    packed = [x[0].transpose(0, 1).contiguous() for x in inputs]
    cumulated = torch.tensor(wrong, dtype=torch.int32)
    out = attention(*packed, offsets=(cumulated, cumulated, 90, 90)).out
    assert out.isfinite().all()
    padded = attention(*inputs, lengths=(cumulated[1:], cumulated[1:]))
    assert padded.out.isfinite().all()


@pytest.mark.parametrize("below", (0, 101), ids=("tiles", "keys"))
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_nan_stays_in_its_row(is_causal, below):
    inputs = make_inputs(1, 1, 150, 150, size=16)
    clean = attention(*inputs, 1.5, is_causal, tiles=BIG, gather_below=below)
    inputs.query[0, 0, 77, 3] = torch.nan
    inputs.query[0, 0, 80] = torch.inf
    marked = attention(*inputs, 1.5, is_causal, tiles=BIG, gather_below=below)
    broken = torch.tensor([77, 80])
    assert marked.out[0, 0, broken].isnan().all() and marked.row_state[0, 0, broken].isnan().all()
    others = torch.ones(150, dtype=torch.bool).index_fill(0, broken, False)
    same_in_other_blocks(clean, marked, others, below)


@pytest.mark.parametrize("below", (0, 101), ids=("tiles", "keys"))
def test_a_nan_key_reaches_the_rows_that_see_it(below):
    inputs = make_inputs(1, 1, 150, 150, size=16)
    clean = attention(*inputs, 1.5, True, gather_below=below)
    inputs.key[0, 0, 100, 3] = torch.nan
    marked = attention(*inputs, 1.5, True, gather_below=below)
    assert marked.out[0, 0, 100:].isnan().all()
    same_in_other_blocks(clean, marked, torch.arange(150) < 100, below)


def same_in_other_blocks(clean, marked, others, below):
    """The other rows have the same bits. Gathered, those of the second block of 64 are sums over another list."""
    near = others & (below > 0) & (torch.arange(150) // 64 == 1)
    for name in ("out", "row_state"):
        one, other = (getattr(result, name)[0, 0] for result in (marked, clean))
        assert_same_bits(one[others & ~near], other[others & ~near])
        torch.testing.assert_close(one[near], other[near], atol=3e-6, rtol=3e-6)


def test_rows_that_see_nothing():
    result = attention(*make_inputs(1, 1, 100, 60, size=16), 1.5, True)
    assert not result.out[0, 0, :40].any()
    assert (result.row_state[0, 0, :40] == torch.tensor([0.0, torch.inf])).all()


def test_empty_tiles_are_not_marked():
    """Queries of one direction and keys of two: the bits say which tiles hold weight."""
    band = torch.arange(64 * 7) // 64 % 3
    hot = torch.nn.functional.one_hot(band, 16).float()[None, None] * 10
    tiles = attention(hot, hot, torch.randn(1, 1, 64 * 7, 4), tiles=BIG).tiles
    bits = (tiles[0, 0, :7, 0, None] >> torch.arange(7)) & 1
    which = torch.arange(7) % 3
    assert torch.equal(bits.bool(), which[:, None] == which)
    assert not tiles[0, 0, 7:].any() and not tiles[0, 0, :, 1:].any()


@TYPES
@pytest.mark.parametrize("alpha", (1.0, 1.5))
@pytest.mark.parametrize("tiles", (SMALL, BIG, PARTS), ids=("small", "big", "parts"))
def test_rows_that_see_nothing_reach_no_gradient(dtype, alpha, tiles):
    """Their queries and incoming gradients may be NaN."""
    inputs = make_inputs(1, 2, 100, 60, size=16, dtype=dtype)
    grad = normal_like(inputs.query)
    inputs.query[:, :, :40] = 0
    grad[:, :, :40] = 0
    clean = attention(*inputs, alpha, True, grad=grad, tiles=tiles)
    inputs.query[:, :, :40] = torch.nan
    grad[:, :, :40] = torch.inf
    result = attention(*inputs, alpha, True, grad=grad, tiles=tiles)
    assert_same_bits((*result[:7], *result.summary), (*clean[:7], *clean.summary))


@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("alpha", (1.0, 1.25, 1.5, 2.0))
def test_a_nan_query_reaches_the_keys_it_saw(alpha, is_causal):
    inputs = make_inputs(1, 1, 150, 150, size=16)
    inputs.query[0, 0, 100] = torch.nan
    result = attention(*inputs, alpha, is_causal, grad=normal_like(inputs.query), tiles=BIG)
    seen = slice(0, 101 if is_causal else 150)
    assert all(x[0, 0, seen].isnan().all() for x in (result.dk, result.dv))
    assert result.dq[0, 0, 100].isnan().all()
    assert result.dq[0, 0].isnan().any(-1).sum() == 1
