"""Few queries over many keys, as in decoding: a way of its own for sequences of at most 16 queries."""

import pytest
import torch

import adasplash
import reference
from adasplash import entmax_attn, entmax_attn_varlen
from common import Inputs, assert_same_bits, check_forward, check_gradients, gradients, normal_like
from paging import make_paged

SHAPES = {
    "one query": dict(m=1, n=1500, heads=8, kv_heads=2),
    "a few": dict(m=5, n=300, heads=4, kv_heads=4),
    "as many as there may be": dict(m=16, n=130, heads=8, kv_heads=2),
    "one more": dict(m=17, n=130, heads=2, kv_heads=2),
    "one more with its group": dict(m=9, n=130, heads=8, kv_heads=1),
    "odd numbers": dict(m=1, n=600, heads=7, kv_heads=1, size=33, value_size=7),
    "no group small enough": dict(m=1, n=90, heads=65, kv_heads=1),
    "more than keys": dict(m=7, n=3),
    "no key": dict(m=2, n=0),
}
OPTIONS = {
    "plain": {},
    "window": dict(window=(100, 0)),
    "both ways": dict(is_causal=False, window=(3, 40)),
    "ALiBi": dict(alibi_slopes=True),
    "negative scale": dict(scale=-0.3),
    "dropout": dict(dropout_p=0.3, dropout_seed=5),
}


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0, "1 for some heads"))
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(backend, make_inputs, dtype, shape, options, alpha):
    inputs = make_inputs(**SHAPES[shape], dtype=dtype)
    heads, device = inputs.query.shape[1], inputs.query.device
    options = dict(is_causal=True) | OPTIONS[options]
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.linspace(0.01, 0.2, heads, device=device)
    if "dropout_seed" in options:
        options["dropout_seed"] = torch.tensor(options["dropout_seed"], device=device)
    if alpha == "1 for some heads":
        alpha = torch.where(torch.arange(heads, device=device) % 3 == 0, 1.0, 1.5)
    # Three times on a GPU: the largest of few errors is now and then smaller in the dense composition by chance.
    check_gradients(entmax_attn, inputs, alpha=alpha, times=2 if backend.name == "cpu" else 3, **options)


@pytest.mark.parametrize("alpha", (1.0, 1.25, 1.5, 2.0))
def test_rows_that_weigh_thousands_of_keys(make_inputs, dtype, alpha):
    """Beside rows that weigh few: of one key head some are long and some are not."""
    inputs = make_inputs(batch=1, heads=4, kv_heads=1, m=2, n=3000, dtype=dtype)
    inputs.query[:, 1:3] *= 1e-3
    check_forward(entmax_attn, inputs, torch.tensor([alpha] * 4, device=inputs.query.device), True)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("sigma", (1e-3, 0.3, 1.5), ids=("flat", "between", "sparse"))
def test_training_over_thousands_of_keys(make_inputs, sigma, dtype):
    """Softmax, any alpha, 1.5 and 2 in heads of one key head."""
    inputs = make_inputs(batch=1, heads=4, kv_heads=1, m=2, n=3000, sigma=sigma, dtype=dtype)
    check_gradients(entmax_attn, inputs, alpha=torch.tensor([1.0, 1.25, 1.5, 2.0]), is_causal=True)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("m, heads", ((1, 3), (2, 5), (4, 8), (16, 4)), ids=str)
def test_threads_change_no_bit(make_inputs, threads, m, heads, dtype):
    """Keys of a head are pieces that threads share; of rows that weigh many keys, values too."""
    inputs = make_inputs(batch=1, heads=heads, kv_heads=1, m=m, n=5000, dtype=dtype)
    inputs.query[:, ::2] *= 1e-3
    alpha = torch.linspace(1.0, 2.0, heads)
    results = []
    for count in (1, 3):
        threads(count)
        results.append(run(inputs, normal_like(inputs.query), alpha=alpha))
    assert_same_bits(*results)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("m", (1, 16))
def test_pages_change_no_bit(m, dtype):
    """Several pieces, of pages that lie anywhere."""
    inputs, _, paged = make_paged([m, m], [3000, 1025], 16, "cpu", heads=4, kv_heads=2, dtype=dtype)
    inputs.query[:, ::2] *= 1e-3
    alpha = torch.tensor([1.0, 1.0, 1.5, 1.5])
    out = torch.ops.adasplash.entmax_attn_paged(*paged, alpha=alpha, max_seqlen_q=m)
    ends = torch.tensor([0, m, 2 * m]), torch.tensor([0, 3000, 4025])
    assert_same_bits(out, entmax_attn_varlen(*inputs, *ends, m, 3000, alpha=alpha, is_causal=True))


@pytest.mark.backends("cpu")
def test_heads_in_turns(make_inputs):
    """Scores of all heads at once would take too much memory: some key heads have their turn after others."""
    inputs = make_inputs(batch=1, heads=9, m=16, n=50_000, size=8)
    together = entmax_attn(*inputs, is_causal=True)
    for head in (0, 4, 8):
        alone = entmax_attn(*(x[:, head : head + 1] for x in inputs), is_causal=True)
        assert_same_bits(together[:, head : head + 1], alone)


def run(inputs: Inputs, grad: torch.Tensor, **options):
    return gradients(inputs, grad, entmax_attn, is_causal=True, **options)


def test_no_bit_depends_on_the_batch(make_inputs, dtype):
    """Padded by queries and by keys, alone, packed beside a long sequence, without gradients: the same bits. Which way
    a sequence goes follows from its own queries, whatever the tensors have room for."""
    own = make_inputs(batch=1, heads=4, kv_heads=2, m=3, n=300, dtype=dtype)
    long = make_inputs(batch=1, heads=4, kv_heads=2, m=70, n=310, dtype=dtype, seed=1)
    device = own.query.device
    grad = normal_like(own.query)
    expected = run(own, grad)
    with torch.no_grad():
        assert_same_bits([entmax_attn(*own, is_causal=True)], expected[:1])

    padded = Inputs(*(x.clone() for x in long))
    padded.query[:, :, :3], padded.key[:, :, :300], padded.value[:, :, :300] = own
    lengths = dict(q_seqlens=torch.tensor([3], device=device), kv_seqlens=torch.tensor([300], device=device))
    both = Inputs(*(torch.cat(pair) for pair in zip(padded, long, strict=True)))
    of_both = {
        name: torch.cat((x, x.new_tensor([size]))) for (name, x), size in zip(lengths.items(), (70, 310), strict=True)
    }
    for given, options in ((padded, lengths), (both, of_both)):
        padded_grad = normal_like(given.query)
        padded_grad[:1, :, :3] = grad
        out, dq, dk, dv = run(given, padded_grad, **options)
        assert_same_bits([out[:1, :, :3], dq[:1, :, :3], dk[:1, :, :300], dv[:1, :, :300]], expected)
        assert not out[0, :, 3:].any()

    flat = Inputs(*(torch.cat((x[0].transpose(0, 1), y[0].transpose(0, 1))) for x, y in zip(own, long, strict=True)))
    offsets = (torch.tensor([0, 3, 73], device=device).int(), torch.tensor([0, 300, 610], device=device).int())
    for max_seqlens in ((70, 310), (73, 610)):
        out = entmax_attn_varlen(*flat, *offsets, *max_seqlens, is_causal=True)
        assert_same_bits([out[:3].transpose(0, 1)[None]], expected[:1])
    assert_same_bits([out[3:].transpose(0, 1)[None]], [entmax_attn(*long, is_causal=True)])


def test_what_is_said_of_the_weights(make_inputs):
    """Counts, and the tiles that hold weight, as of the same rows among many."""
    few = make_inputs(batch=1, heads=4, kv_heads=2, m=4, n=700, sigma=1.0)
    many = few._replace(query=torch.cat((few.query.new_zeros(1, 4, 60, few.query.shape[-1]), few.query), 2))
    stats, of_many = (adasplash.attention_stats(*x, is_causal=True) for x in (few, many))
    assert torch.equal(stats.support_size, of_many.support_size[:, :, 60:])
    torch.testing.assert_close(stats.tau, of_many.tau[:, :, 60:], atol=1e-5, rtol=1e-5)
    weights = reference.attention(*few, is_causal=True).weights
    tiles = torch.nn.functional.pad(weights > 0, (0, 4)).unflatten(-1, (11, 64)).any(-1).any(-2)
    torch.testing.assert_close(stats.empty_tiles, 1 - tiles.double().mean(-1))


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_keys_that_are_not_finite(make_inputs, value):
    """One that is seen breaks its row, one that is not seen is not read."""
    inputs = make_inputs(batch=1, heads=2, m=2, n=300)
    inputs.key[0, 0, 299] = value  # the last key: of the two queries of a causal call the last alone sees it
    out = entmax_attn(*inputs, is_causal=True)
    assert out[0, 0, 1].isnan().all() and out[0, 0, 0].isfinite().all() and out[0, 1].isfinite().all()
