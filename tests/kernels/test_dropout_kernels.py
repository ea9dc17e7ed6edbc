"""Dropout in the kernels: which weights, and what forward and backward make of it."""

import pytest
import torch
from checked import PARTS, SMALL
from interpreted import attention

import reference
from common import HALF, assert_accurate, assert_same_bits, make_inputs, normal_like

pytestmark = pytest.mark.backends("cpu")
SEED = -0x123456789ABCDEF  # whose words differ


def dropped_attention(query, key, value, alphas, factors):
    """The reference's in causal order, head by head, whose weights are multiplied by factors."""
    group = query.shape[1] // key.shape[1]
    out = []
    for head, alpha in enumerate(alphas):
        shared = slice(head // group, head // group + 1)
        own = query[:, head, None], key[:, shared], value[:, shared]
        weights = reference.attention(*own, alpha, True, dtype=query.dtype).weights
        out.append((weights * factors[:, head, None].to(query.dtype)) @ own[2])
    return torch.cat(out, 1)


@pytest.mark.parametrize(
    "dtype, tiles, p",
    ((torch.float32, PARTS, 0.15), *((dtype, SMALL, 0.7) for dtype in HALF)),
    ids=str,
)
def test_forward_and_backward(dtype, tiles, p):
    """For all alphas at once, tiles and gathered keys; the launch may be a part of a call."""
    alphas = torch.tensor([1.0, 1.5, 2.0, 1.2])
    inputs = make_inputs(1, 4, 70, 130, size=16, kv_heads=2, dtype=dtype)
    grad = normal_like(inputs.query)
    first = (3, 8)
    factors = reference.dropout_factors(torch.tensor(SEED), p, 4, 12, 70, 130)[first[0] :, first[1] :]
    results = []
    for x in (inputs, type(inputs)(*(x.double() for x in inputs))):
        leaves = [y.detach().clone().requires_grad_() for y in x]
        out = dropped_attention(*leaves, alphas.tolist(), factors)
        out.backward(grad.to(out.dtype))
        results.append([out.detach(), *(y.grad for y in leaves)])
    for below in (0, 101):
        actual = attention(
            *inputs, alphas, True, grad=grad, dropout=(p, SEED), first=first, tiles=tiles, gather_below=below
        )
        for what, mine, plain, exact in zip(
            ("out", "dq", "dk", "dv"), (actual.out, *actual[3:6]), *results, strict=True
        ):
            assert_accurate(what, mine, exact, plain, size=50.0 if dtype == torch.float32 else 1.0)
    without = attention(*inputs, alphas, True, tiles=tiles)
    assert_same_bits((actual.row_state, actual.tiles), (without.row_state, without.tiles))


def test_every_weight_has_its_own_chance():
    """Values of one key each give the weights themselves: those dropped are exactly the generator's."""
    query, key, value = torch.zeros(1, 2, 70, 16), torch.zeros(1, 2, 130, 16), torch.eye(130).expand(1, 2, 130, 130)
    for alpha in (1.0, 1.5):
        out = attention(query, key, value, alpha, dropout=(0.3, 5)).out
        torch.testing.assert_close(
            out.double() * 130, reference.dropout_factors(torch.tensor(5), 0.3, 1, 2, 70, 130), atol=1e-4, rtol=0
        )


def test_parts_of_a_call_drop_what_the_whole_does():
    """By an origin of each sequence; numbers count modulo 2^32."""
    origins = torch.tensor([[3, 8, 40, 64], [0, 1, -5, 2**31 - 20]])
    factors = reference.dropout_factors(torch.tensor(SEED), 0.3, 2, 2, 65, 66, origin=origins)
    whole = reference.dropout_factors(torch.tensor(SEED), 0.3, 4, 10, 105, 130)
    assert torch.equal(factors[0], whole[3, 8:, 40:, 64:])
    query, key, value = torch.zeros(2, 2, 65, 16), torch.zeros(2, 2, 66, 16), torch.eye(66).expand(2, 2, 66, 66)
    for alpha in (1.0, 1.5):
        result = attention(query, key, value, alpha, dropout=(0.3, SEED), origins=origins, grad=value[:, :, :65])
        torch.testing.assert_close(result.out.double() * 66, factors, atol=1e-4, rtol=0)
        torch.testing.assert_close(result.dv[..., :65].double() * 66, factors.mT, atol=1e-4, rtol=0)


@pytest.mark.parametrize("alpha", (1.0, 1.5))
def test_a_nan_query_reaches_the_keys_it_saw(alpha):
    """Those that it drops, too."""
    inputs = make_inputs(1, 1, 70, 130, size=16)
    inputs.query[0, 0, 40] = torch.nan
    result = attention(*inputs, alpha, grad=normal_like(inputs.query), dropout=(0.5, SEED))
    assert all(x[0, 0].isnan().all() for x in (result.out[:, :, 40:41], result.dk, result.dv))
    assert result.out[0, 0].isnan().any(-1).sum() == 1 and result.dq[0, 0].isnan().any(-1).sum() == 1


def test_gradient_of_alpha():
    alphas, p = torch.tensor([1.0, 1.5]), 0.4
    inputs = make_inputs(1, 2, 70, 130, size=16)
    grad = normal_like(inputs.query)
    found = attention(*inputs, alphas, grad=grad, dropout=(p, 1)).alpha_terms.double()
    factors = reference.dropout_factors(torch.tensor(1), p, 1, 2, 70, 130)
    for head, alpha in enumerate((1.001, 1.5)):
        own = [x[:, head, None].double() for x in inputs]
        per_row = torch.full((1, 1, 70, 1), alpha, dtype=torch.float64, requires_grad=True)
        weights = reference.attention(*own, per_row).weights
        ((weights * factors[:, head, None]) @ own[2]).backward(grad[:, head, None].double())
        exact = per_row.grad[..., 0]
        close = 1e-2 if head == 0 else 1e-4  # at 1 the limit, of which this is no more than near
        torch.testing.assert_close(found[:, head, None], exact, atol=close * exact.abs().max().item(), rtol=0)


def test_rows_and_keys_count_from_their_sequence():
    """Packed, and with keys that start later, each sequence is as alone; its batch entry is part of the seed."""
    queries, keys = (70, 33), (130, 65)
    alone = [make_inputs(1, 2, m, n, size=16, seed=m) for m, n in zip(queries, keys, strict=True)]
    grads = [normal_like(inputs.query, seed) for seed, inputs in enumerate(alone)]
    expected = [
        attention(*inputs, 1.5, True, grad=grad, dropout=(0.4, SEED), first=(entry, 0))
        for entry, (inputs, grad) in enumerate(zip(alone, grads, strict=True))
    ]
    packed = [torch.cat([x[0].transpose(0, 1) for x in parts]) for parts in zip(*alone, strict=True)]
    cumulated = [torch.tensor([0, *x]).cumsum(0).int() for x in (queries, keys)]
    grad = torch.cat([x[0].transpose(0, 1) for x in grads])
    actual = attention(
        *packed, 1.5, True, offsets=(*cumulated, max(queries), max(keys)), grad=grad, dropout=(0.4, SEED)
    )
    for entry, one in enumerate(expected):
        for what, side in (("out", 0), ("dq", 0), ("dk", 1), ("dv", 1)):
            first, end = cumulated[side][entry : entry + 2]
            assert_same_bits(getattr(actual, what)[first:end].transpose(0, 1)[None], getattr(one, what))
    later = [torch.nn.functional.pad(x, (0, 0, 30, 0)) for x in alone[0][1:]]
    bounds = torch.tensor([[30, 160]], dtype=torch.int32)
    found = attention(alone[0][0], *later, 1.5, True, lengths=(None, bounds), dropout=(0.4, SEED))
    assert_same_bits(found.out, expected[0].out)
