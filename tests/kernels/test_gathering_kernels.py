"""Which blocks of rows gather their keys, and what of that shows: that they do so at all in both directions is what
checked.py forces."""

import pytest
import torch
from checked import TYPES
from interpreted import NOT_LISTED, UNMARKED, UNTOUCHED, attention

import reference
from common import Inputs, assert_same_bits, make_inputs, normal_like

pytestmark = pytest.mark.backends("cpu")


def sharp_and_flat() -> Inputs:
    """64 queries that weigh one key each, of 16 keys that lie in all four tiles, and then 64 that weigh all keys."""
    query, key, value = make_inputs(1, 1, 128, 256, size=16, sigma=0.01)
    feature = torch.arange(16)
    key[0, 0, 16 * feature, feature] = 20.0
    query[0, 0, torch.arange(64), torch.arange(64) % 16] = 20.0
    return Inputs(query, key, value)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_blocks_that_weigh_few_keys_gather_them(alpha):
    """By the support that the scan expects, one block of rows at a time: 64 keys are 25 per cent of the candidates'."""
    inputs = sharp_and_flat()
    found = attention(*inputs, alpha, gather_below=30)
    assert found.remaining[0, 0, 0] >= 0 and found.remaining[0, 0, 1] == -1
    expected = reference.attention(*(x.double() for x in inputs), alpha, False).out
    torch.testing.assert_close(found.out.double(), expected, atol=2e-5, rtol=2e-5)


@TYPES
def test_gathered_and_walked_agree(dtype):
    """The same τ and tile bits, and outputs that differ by the order of sums."""
    inputs = make_inputs(1, 2, 130, 300, size=16, sigma=1.5, dtype=dtype)
    gathered, walked = (attention(*inputs, 1.5, True, gather_below=below) for below in (101, 0))
    assert (gathered.remaining[..., :3] >= 0).all() and walked.remaining == ()
    assert torch.equal(gathered.tiles, walked.tiles)
    torch.testing.assert_close(gathered.row_state, walked.row_state, atol=2e-3, rtol=2e-3)
    close = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(gathered.out, walked.out, atol=close, rtol=close)


def test_weights_that_underflow_mark_their_tile():
    """At alpha near 1 p becomes 0 before u does; the tile's bit is set either way, and the key counted."""
    query, key = torch.zeros(1, 1, 1, 16), torch.full((1, 1, 256, 16), 0.0)
    query[..., 0], key[..., 0] = 1.0, -200.0
    key[0, 0, 0, 0], key[0, 0, 200, 0] = 0.0, (-1 + 2e-5) / 0.1
    value = torch.randn(1, 1, 256, 16)
    gathered, walked = (
        attention(query, key, value, 1.1, scale=1.0, summary=True, gather_below=below) for below in (101, 0)
    )
    assert torch.equal(gathered.tiles, walked.tiles)
    assert gathered.summary.support_size.item() == walked.summary.support_size.item() == 2


def test_more_keys_than_a_list_holds():
    """All weigh, for all rows, in inner tiles and at the edge: they are listed part by part, in every pass."""
    inputs = make_inputs(1, 1, 70, 2700, size=16, sigma=0.01)
    grad = normal_like(inputs.query)
    gathered, walked = (attention(*inputs, 1.5, True, grad=grad, gather_below=below) for below in (101, 0))
    for name in ("out", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(gathered, name), getattr(walked, name), atol=3e-6, rtol=3e-6)


def test_lengths_decide_for_each_sequence_alone():
    """Sequences with fewer keys than `gather_from` walk tiles; every sequence has the bits that it has alone."""
    inputs = make_inputs(3, 2, 70, 200, size=16, sigma=1.5)
    keys = torch.tensor([200, 130, 40], dtype=torch.int32)
    found = attention(*inputs, 1.5, lengths=(None, keys), gather_below=101, gather_from=131)
    for entry, length in enumerate(keys.tolist()):
        query, key, value = (x[entry, None] for x in inputs)
        alone = attention(query, key[:, :, :length], value[:, :, :length], 1.5, gather_below=101, gather_from=131)
        for result, place in ((found, entry), (alone, 0)):
            candidates = result.remaining[place, :, :2]
            assert (candidates == UNTOUCHED).all() if length < 131 else (candidates.clamp(0, 4) == candidates).all()
        assert_same_bits(found.out[entry], alone.out[0])
        assert_same_bits(found.row_state[entry], alone.row_state[0])


def test_rows_that_are_nan_reach_all_keys_that_they_see():
    """Through row marks, which grad_query does not make for them."""
    inputs = make_inputs(1, 1, 130, 200, size=16, sigma=1.5)
    inputs.query[0, 0, 3] = torch.nan
    found = attention(*inputs, 1.5, grad=normal_like(inputs.query), gather_below=101)
    assert found.out[0, 0, 3].isnan().all() and found.dq[0, 0, 3].isnan().all()
    assert found.out[0, 0, 4:].isfinite().all() and found.dq[0, 0, 4:].isfinite().all()
    assert found.dk.isnan().all() and found.dv.isnan().all()


@TYPES
@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_the_backward_finds_the_marks_of_the_forward(dtype, alpha):
    """Of each 64 rows, in places of their support; where they are fewer, as of the last two, `mark` marks keys itself.
    What it would mark is part of what the forward did, so gradients differ by the order of sums alone."""
    inputs = make_inputs(1, 2, 130, 2100, size=16, sigma=1.5, dtype=dtype)
    grad = normal_like(inputs.query)
    found = [attention(*inputs, alpha, True, grad=grad, keeps=keeps) for keeps in (True, False)]
    support = found[0].support
    assert support.shape == (1, 2, 130, 2 + 2) and found[1].support.shape == (1, 2, 130, 0)
    assert (support[..., 0] == NOT_LISTED).all()
    counts = support[0, :, [0, 64, 128], 1]
    assert (counts[:, :2] > 0).all() and (counts[:, 2] == NOT_LISTED).all()
    # The few that are seen everywhere are a probe's.
    marked = [(result.key_marks[0, 0] != UNMARKED).sum((1, 2)) for result in found]
    assert marked[0][1] == 0 and marked[1][1] > 10 and marked[0][2] == marked[1][2] > 10
    close = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for name in ("dq", "dk", "dv"):
        torch.testing.assert_close(*(getattr(result, name) for result in found), atol=close, rtol=close)


def test_marks_are_the_keys_that_may_weigh():
    inputs = sharp_and_flat()
    found = attention(*inputs, 1.5, grad=normal_like(inputs.query), gather_below=30)
    words = found.support[0, 0, :64, 2].view(32, 2)[:4]  # of a column of WORD tiles, those that there are
    marked = (words[..., None] >> torch.arange(32)) & 1
    assert marked.view(-1).nonzero().view(-1).tolist() == list(range(0, 256, 16)) and found.support[0, 0, 0, 1] == 16
    assert found.support[0, 0, 64, 1] == NOT_LISTED  # walked


def test_what_is_kept_follows_from_the_sequence_alone():
    """Its own lengths, not those of the tensors, in which there would be room for its last 64 rows."""
    inputs = make_inputs(2, 2, 192, 200, size=16, sigma=1.5)
    grad = normal_like(inputs.query)
    lengths = torch.tensor([150, 192], dtype=torch.int32), torch.tensor([200, 90], dtype=torch.int32)
    found = attention(*inputs, 1.5, grad=grad, lengths=lengths)
    assert ((found.support[:, 0, ::64, 1] >= 0) == torch.tensor([[True, True, False], [True, True, True]])).all()
    for entry, (m, n) in enumerate(zip(*(x.tolist() for x in lengths), strict=True)):
        query, key, value = (x[entry, None] for x in inputs)
        alone = attention(query[:, :, :m], key[:, :, :n], value[:, :, :n], 1.5, grad=grad[entry, None, :, :m])
        assert_same_bits(found.dq[entry, :, :m], alone.dq[0])
        assert_same_bits(found.dk[entry, :, :n], alone.dk[0])
        assert_same_bits(found.dv[entry, :, :n], alone.dv[0])


def test_more_kept_keys_than_a_list_holds():
    inputs = make_inputs(1, 1, 70, 2700, size=16, sigma=0.01)
    grad = normal_like(inputs.query)
    kept, marked = (attention(*inputs, 1.5, True, grad=grad, keeps=keeps) for keeps in (True, False))
    assert kept.support[0, 0, 0, 1] > 2560
    for name in ("dq", "dk", "dv"):
        torch.testing.assert_close(getattr(kept, name), getattr(marked, name), atol=3e-6, rtol=3e-6)
