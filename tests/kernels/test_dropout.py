"""Dropout in the kernels: the generator, and what forward and backward make of it."""

import pytest
import torch
from checked import PARTS, SMALL, TYPES
from interpreted import attention

import reference
from common import assert_accurate, assert_same_bits, make_inputs, normal_like

pytestmark = pytest.mark.backends("cpu")
SEED = -0x123456789ABCDEF


def philox(counter, key):
    """Philox4x32-10 of four tensors or numbers and two numbers, after Salmon et al."""
    low = 2**32 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        # 32 x 32 bits are more than int64 holds: the upper half by parts.
        high = [((m >> 16) * x + ((m & 0xFFFF) * x >> 16)) >> 16 for m, x in ((0xD2511F53, c[0]), (0xCD9E8D57, c[2]))]
        c = [high[1] ^ c[1] ^ k[0], low_product(0xCD9E8D57, c[2]), high[0] ^ c[3] ^ k[1], low_product(0xD2511F53, c[0])]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def low_product(m, x):
    return ((m * (x & 0xFFFF)) + ((m * (x >> 16) & 0xFFFF) << 16)) & (2**32 - 1)


def mix(x):
    x = x ^ (x >> 16)
    x = low_product(0x7FEB352D, x)
    x = x ^ (x >> 15)
    x = low_product(0x846CA68B, x)
    return x ^ (x >> 16)


def dropout_factors(seed, p, batch, heads, queries, keys):
    """(batch, heads, queries, keys): what weights are multiplied by."""
    seed %= 2**64
    index = [torch.arange(n).reshape(shape) for n, shape in ((batch, (-1, 1, 1)), (heads, (-1, 1)), (queries, (-1,)))]
    first, second, _, _ = philox((index[2], index[1], index[0], 0), (seed % 2**32, seed >> 32))
    x = mix(torch.arange(keys) ^ first[..., None])
    x = mix((x + second[..., None]) & (2**32 - 1))
    return (x >= min(round(p * 2**32), 2**32 - 1)).double() / (1 - p)


def test_the_generator():
    """Philox's test vector of zeros, of which Random123 lists the result."""
    assert [int(x) for x in philox([torch.tensor(0)] * 4, (0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = [torch.tensor(2**32 - 1)] * 4
    assert [int(x) for x in philox(ones, [2**32 - 1] * 2)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def dropped_attention(query, key, value, alphas, factors, is_causal=False, **options):
    """The reference's, head by head, whose weights are multiplied by factors."""
    group = query.shape[1] // key.shape[1]
    out = []
    for head, alpha in enumerate(alphas):
        shared = slice(head // group, head // group + 1)
        own = query[:, head, None], key[:, shared], value[:, shared]
        weights = reference.attention(*own, alpha, is_causal, dtype=query.dtype, **options).weights
        out.append((weights * factors[:, head, None].to(query.dtype)) @ own[2])
    return torch.cat(out, 1)


@TYPES
@pytest.mark.parametrize("tiles", (SMALL, PARTS), ids=("small", "parts"))
@pytest.mark.parametrize("p", (0.15, 0.7))
def test_forward_and_backward(dtype, tiles, p):
    """For all alphas at once, tiles and gathered keys; the launch may be a part of a call."""
    alphas = torch.tensor([1.0, 1.5, 2.0, 1.2])
    inputs = make_inputs(2, 4, 70, 130, size=16, kv_heads=2, dtype=dtype)
    grad = normal_like(inputs.query)
    first = (3, 8)
    factors = dropout_factors(SEED, p, 5, 12, 70, 130)[first[0] :, first[1] :]
    results = []
    for x in (inputs, type(inputs)(*(x.double() for x in inputs))):
        leaves = [y.detach().clone().requires_grad_() for y in x]
        out = dropped_attention(*leaves, alphas.tolist(), factors, True)
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
        torch.testing.assert_close(out.double() * 130, dropout_factors(5, 0.3, 1, 2, 70, 130), atol=1e-4, rtol=0)


def test_gradient_of_alpha():
    alphas, p = torch.tensor([1.0, 1.5]), 0.4
    inputs = make_inputs(1, 2, 70, 130, size=16)
    grad = normal_like(inputs.query)
    found = attention(*inputs, alphas, grad=grad, dropout=(p, 1)).alpha_terms.double()
    factors = dropout_factors(1, p, 1, 2, 70, 130)
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
