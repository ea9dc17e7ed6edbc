"""The kernel for sequences of few keys: attention/short.py."""

import pytest
import torch
from checked import check
from interpreted import attention

import reference
from common import HALF, assert_accurate, assert_same_bits, make_inputs

pytestmark = pytest.mark.backends("cpu")
HALVES = pytest.mark.parametrize("dtype", HALF, ids=lambda dtype: str(dtype).removeprefix("torch."))
CASES = {
    "grouped": (dict(m=70, n=100, heads=4, kv_heads=2), (1.5, True), {}),
    "fewer keys than queries": (dict(m=130, n=20), (1.5, True), {}),
    "window": (dict(m=100, n=128), (1.5, False), dict(window=(20, 5))),
    "negative scale": (dict(m=40, n=90), (1.25, True), dict(scale=-0.3)),
    "padded": (
        dict(batch=3, m=70, n=128),
        (1.5, True),
        dict(q_seqlens=torch.tensor([70, 64, 0]), kv_seqlens=torch.tensor([128, 0, 90])),
    ),
    "keys that start later": (
        dict(batch=3, m=70, n=300),
        (1.5, False),
        dict(kv_starts=torch.tensor([3, 200, 90]), kv_seqlens=torch.tensor([130, 300, 90])),
    ),
    "alpha of each head": (dict(m=70, n=90, heads=3), (torch.tensor([1.0, 1.5, 2.0]), True), {}),
}


@HALVES
@pytest.mark.parametrize("alpha", (1.0, 1.1, 1.5, 2.0))
@pytest.mark.parametrize("is_causal", (False, True), ids=("full", "causal"))
def test_types_and_alphas(dtype, alpha, is_causal):
    check(make_inputs(1, 1, 70, 128, size=16, dtype=dtype), alpha, is_causal, short_keys=128)


@pytest.mark.parametrize("case", CASES)
def test_options(case):
    shape, arguments, options = CASES[case]
    inputs = make_inputs(**dict(batch=1, heads=1, size=16) | shape, dtype=torch.bfloat16)
    check(inputs, *arguments, short_keys=128, **options)


@HALVES
@pytest.mark.parametrize("alpha", (1.05, 1.5, 2.0))
@pytest.mark.parametrize("sigma", (0.02, 4.0), ids=("flat", "peaked"))
def test_flat_and_peaked_scores(dtype, alpha, sigma):
    """Supports from all keys to one; the widest code that there is."""
    inputs = make_inputs(1, 1, 64, 500, size=16, sigma=sigma, dtype=dtype)
    exact, composed = (reference.attention(*inputs, alpha, dtype=type_).out for type_ in (torch.float64, dtype))
    assert_accurate("out", attention(*inputs, alpha, short_keys=512).out, exact, composed)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_one_key_above_a_flat_crowd(dtype):
    """As of `attend`: the threshold that is kept is better than it has to be for the output."""
    m, n = 64, 512
    query, key = torch.zeros(1, 1, m, 16), torch.zeros(1, 1, n, 16)
    query[..., 0] = torch.linspace(0.9, 0.999, m)  # how far the key is above the others
    key[..., 7, 0] = 1.0
    query, key, value = (x.to(dtype) for x in (query, key, torch.randn(1, 1, n, 16)))
    state = attention(query, key, value, 1.5, scale=2.0, short_keys=512).row_state.double()
    z = query.double() @ key.double().transpose(-1, -2)
    total = (z - state.sum(-1, keepdim=True)).clamp(min=0).square().sum(-1)
    assert (total - 1).abs().max() < {torch.float16: 2e-4, torch.bfloat16: 1e-3}[dtype]


def results(actual):
    return actual.out, actual.row_state, actual.tiles


def test_programs_that_share_a_head_change_no_bit():
    inputs = make_inputs(1, 2, 200, 100, size=16, dtype=torch.bfloat16)
    alone, shared = (attention(*inputs, 1.5, True, short_keys=128, sharers=sharers) for sharers in (1, 3))
    assert_same_bits(results(alone), results(shared))


def test_a_short_sequence_in_a_long_batch():
    """Each sequence goes the way of its own length, and has the bits that it has alone."""
    inputs = make_inputs(3, 1, 200, 200, size=16, dtype=torch.bfloat16)
    lengths = torch.tensor([200, 64, 129], dtype=torch.int32)
    actual = attention(*inputs, 1.5, True, lengths=(lengths, lengths), short_keys=128)
    for index, length in enumerate(lengths.tolist()):
        mine = [x[index : index + 1, :, :length].contiguous() for x in inputs]
        alone = attention(*mine, 1.5, True, short_keys=128)
        assert_same_bits(actual.out[index : index + 1, :, :length], alone.out)
        assert_same_bits(actual.row_state[index : index + 1, :, :length], alone.row_state)
        assert not actual.out[index, :, length:].any()
        assert not actual.tiles[index, :, -(-length // 64) :].any()


def test_sequences_of_few_queries_keep_their_way():
    inputs = make_inputs(2, 1, 70, 100, size=16, dtype=torch.bfloat16)
    queries = torch.tensor([70, 5], dtype=torch.int32)
    actual = attention(*inputs, 1.5, lengths=(queries, None), short_keys=128, few_queries=16)
    alone = [x[1:].contiguous() for x in (inputs.query[:, :, :5], inputs.key, inputs.value)]
    assert_same_bits(actual.out[1:, :, :5], attention(*alone, 1.5, few_queries=16).out)
    assert not actual.out[1, :, 5:].any()


@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_what_is_not_finite(alpha):
    """A NaN query or key shows in the rows that see it; a value that is not finite in those that give it weight."""
    inputs = make_inputs(1, 1, 128, 128, size=16, dtype=torch.bfloat16)
    clean = attention(*inputs, alpha, True, short_keys=128)
    inputs.query[0, 0, 17] = torch.nan
    inputs.key[0, 0, 90] = torch.nan
    inputs.value[0, 0, 40] = torch.inf
    dirty = attention(*inputs, alpha, True, short_keys=128)
    row = torch.arange(128)
    state_broken = (row == 17) | (row >= 90)
    weighs = reference.attention(*make_inputs(1, 1, 128, 128, size=16), alpha, True).weights[0, 0, :, 40] > 1e-3
    assert dirty.row_state[0, 0, state_broken].isnan().all() and dirty.out[0, 0, state_broken].isnan().all()
    assert weighs.any() and not dirty.out[0, 0, weighs].isfinite().any()
    assert_same_bits(dirty.row_state[0, 0, ~state_broken], clean.row_state[0, 0, ~state_broken])
    others = ~state_broken & (row < 40)
    assert_same_bits(dirty.out[0, 0, others], clean.out[0, 0, others])
