"""Rows of which most keys weigh: a sample of the keys says about where tau is, before all keys are looked at."""

import pytest
import torch
from checked import TYPES
from interpreted import Tiles, attention

import reference
from common import HALF, assert_accurate, assert_same_bits, make_inputs

pytestmark = pytest.mark.backends("cpu")

KEYS = 64 * 24  # from so many on that all rows see a sample is taken: SAMPLED_FROM


def flat(dtype=torch.float32, m=64, n=KEYS):
    return make_inputs(1, 1, m, n, size=16, sigma=0.05, dtype=dtype)


def walk(inputs, alpha=1.5, is_causal=False, tiles=None, kv_seqlens=None, **options):
    """The forward over tiles, whose output has to be right."""
    lengths = (None, None if kv_seqlens is None else kv_seqlens.int())
    result = attention(*inputs, alpha, is_causal, tiles=tiles, lengths=lengths, gather_below=0, **options)
    exact, composed = (
        reference.attention(*inputs, alpha, is_causal, kv_seqlens=kv_seqlens, dtype=dtype, **options).out
        for dtype in (torch.float64, inputs.query.dtype)
    )
    assert_accurate("out", result.out, exact, composed)
    return result


@pytest.fixture
def called(monkeypatch):
    """The names of `sum_weights`, over the candidates of a block of rows, and `sampled_gap`, in the order of calls."""
    from triton_src.attention import forward

    names = []

    def noted(name):
        function = getattr(forward, name)

        def call(*arguments, **options):
            names.append(name)
            return function(*arguments, **options)

        return call

    for name in ("sum_weights", "sampled_gap"):
        monkeypatch.setattr(forward, name, noted(name))
    return names


@TYPES
@pytest.mark.parametrize("alpha", (1.5, 1.1, 2.0))
def test_a_sample_saves_sums(dtype, alpha, called):
    """From the bound of the classes alone it takes more of them."""
    inputs = flat(dtype)
    walk(inputs, alpha)
    assert called.count("sampled_gap") == 1
    with_sample = called.count("sum_weights")
    called.clear()
    walk(type(inputs)(inputs.query, *(x[:, :, 64:].contiguous() for x in inputs[1:])), alpha)  # a tile of keys less
    assert "sampled_gap" not in called
    assert with_sample <= called.count("sum_weights") - (dtype in HALF and alpha == 1.5)


@pytest.mark.parametrize("tiles", (Tiles(walk=32), Tiles(scan_n=128, ahead=True), Tiles(walk=16, step_d=16)), ids=str)
def test_all_ways_to_walk(tiles, called):
    walk(flat(m=70), tiles=tiles)
    assert called.count("sampled_gap") == 2


def test_causal_windows_and_lengths(called):
    """The last queries of a sequence, over all of its keys or those of a window; a window of less keys than a sample is
    taken of; a sequence that ends before."""
    walk(flat(n=KEYS + 100), is_causal=True)
    far = flat(n=KEYS + 700)
    far.key[:, :, :200] *= 1e3  # what the window hides
    walk(far, is_causal=True, window=(KEYS + 300, 0))
    assert called.count("sampled_gap") == 2
    walk(flat(), is_causal=True, window=(600, 0))
    walk(flat(), kv_seqlens=torch.tensor([KEYS - 1]))
    assert called.count("sampled_gap") == 2


def test_a_sample_that_is_unlike_the_rest(called):
    """Of the keys that are sampled none is like the others: the guess is far off, on either side, the result is not."""
    in_sample = torch.arange(KEYS) // 64 % 3 == 1  # the middles of eight times three tiles
    for sampled, others in ((1.0, 0.0), (0.0, 1.0)):
        inputs = flat()
        inputs.query[..., 0] = 1.0
        inputs.key[..., 0] = torch.where(in_sample, sampled, others)
        walk(inputs, scale=0.1)
    assert called.count("sampled_gap") == 2


def test_a_row_does_not_depend_on_its_neighbours(called):
    """Half of a block's rows weigh one key each: the others have the bits that they have among their like."""
    inputs = flat()
    among_like = walk(inputs)
    sharp = torch.arange(0, 64, 2)
    inputs.query[0, 0, sharp] = inputs.key[0, 0, sharp] * 1e4
    mixed = walk(inputs)
    assert called.count("sampled_gap") == 2
    for name in ("out", "row_state"):
        one, other = (getattr(result, name)[0, 0, 1::2] for result in (among_like, mixed))
        assert_same_bits(one, other)
    assert (mixed.row_state[0, 0, sharp, 1] < -0.999).all()  # a gap of -1: one key


@TYPES
def test_a_step_back_stops_at_the_bound(dtype, called):
    """Here the sample's gap is too high, and the step back from it too long: keys of the third tile would weigh, which
    is a candidate of these rows' neighbours alone."""
    z = torch.full((KEYS,), -1.0)
    z[64:96], z[96:128], z[128:192] = 0.0, -0.1, -0.17  # the second tile is in the sample
    inputs = flat(dtype)
    inputs.query.zero_()
    inputs.query[..., 0] = 1.0
    inputs.key.zero_()
    inputs.key[..., 0] = z
    inputs.key[0, 0, 128:192, 1] = 3.0
    among_like = walk(inputs, scale=2.0)
    inputs.query[0, 0, ::2, 1] = 1.0
    mixed = walk(inputs, scale=2.0)
    assert called.count("sampled_gap") >= 1
    for name in ("out", "row_state"):
        one, other = (getattr(result, name)[0, 0, 1::2] for result in (among_like, mixed))
        assert_same_bits(one, other)


def test_broken_rows_stay_so():
    inputs = flat()
    clean = walk(inputs)
    inputs.query[0, 0, 5] = torch.nan
    broken = attention(*inputs, gather_below=0)
    assert broken.out[0, 0, 5].isnan().all()
    others = torch.arange(64) != 5
    assert_same_bits(broken.out[0, 0, others], clean.out[0, 0, others])
