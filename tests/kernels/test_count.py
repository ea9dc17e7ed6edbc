"""What count_support says of what the forward saved."""

import pytest
import torch
from checked import PARTS, SMALL
from interpreted import attention

import reference
from common import HALF, assert_same_bits, make_inputs

pytestmark = pytest.mark.backends("cpu")
ALPHAS = (1.0, 1.2, 1.5, 2.0)


@pytest.mark.parametrize(
    "dtype, tiles, options",
    (
        (torch.float32, SMALL, dict()),
        (torch.float32, PARTS, dict(is_causal=True)),
        (torch.float32, SMALL, dict(window=(40, 5))),
        *((dtype, SMALL, dict(is_causal=True)) for dtype in HALF),
    ),
    ids=str,
)
def test_rows_and_tiles(dtype, tiles, options):
    inputs = make_inputs(1, 4, 150, 200, size=16, kv_heads=2, dtype=dtype)
    result = attention(*inputs, torch.tensor(ALPHAS), tiles=tiles, summary=True, **options)
    sizes, largest, counts = result.summary
    for head, alpha in enumerate(ALPHAS):
        own = inputs.query[:, head, None], *(x[:, head // 2, None] for x in inputs[1:])
        exact = reference.attention(*(x.double() for x in own), alpha, **options)
        weights, visible = exact.weights[:, 0], exact.scores[:, 0] > -torch.inf
        expected = visible.sum(-1) if alpha == 1 else (weights > 0).sum(-1)
        off = (sizes[:, head] - expected).abs()  # thresholds are as exact as the type asks for
        assert not off.any() if alpha == 1 else off.max() <= (1 if dtype == torch.float32 else 8)
        close = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(largest[:, head].double(), weights.amax(-1), atol=close, rtol=close)
        seen = torch.nn.functional.pad(visible, (0, 56, 0, 42)).reshape(1, 3, 64, 4, 64).any(4).any(2)
        assert torch.equal(counts[:, head, 0], seen.sum((1, 2)))
        bits = (result.tiles[:, head, :3, 0, None] >> torch.arange(4)) & 1
        assert torch.equal(counts[:, head, 1], bits.sum((1, 2)))


def test_packed_batches_equal_each_sequence_alone():
    queries, keys = (100, 0, 1, 70), (130, 5, 1, 70)
    alone = [make_inputs(1, 4, m, n, size=16, kv_heads=2, seed=m) for m, n in zip(queries, keys, strict=True)]
    packed = [torch.cat([x[0].transpose(0, 1) for x in parts]) for parts in zip(*alone, strict=True)]
    cumulated = [torch.tensor([0, *x]).cumsum(0).int() for x in (queries, keys)]
    offsets = (*cumulated, max(queries), max(keys))
    actual = attention(*packed, torch.tensor(ALPHAS), True, offsets=offsets, summary=True).summary
    for index, inputs in enumerate(alone):
        expected = attention(*inputs, torch.tensor(ALPHAS), True, summary=True).summary
        first, end = cumulated[0][index : index + 2]
        assert_same_bits(actual.support_size[:, first:end], expected.support_size[0])
        assert_same_bits(actual.largest_weight[:, first:end], expected.largest_weight[0])
        assert_same_bits(actual.tile_counts[index], expected.tile_counts[0])


@pytest.mark.parametrize("alpha", ALPHAS)
def test_rows_without_weights(alpha):
    """Rows that see nothing and padding have none; broken ones 0 and NaN."""
    inputs = make_inputs(1, 1, 150, 100, size=16)
    inputs.query[0, 0, 70] = torch.nan
    lengths = (torch.tensor([120], dtype=torch.int32), None)
    sizes, largest, counts = attention(*inputs, alpha, True, lengths=lengths, summary=True).summary
    empty = torch.ones(150, dtype=torch.bool)
    empty[20:120] = False
    broken = torch.zeros(150, dtype=torch.bool).index_fill(0, torch.tensor(70), True)
    assert not sizes[0, 0, empty | broken].any() and not largest[0, 0, empty].any()
    assert largest[0, 0, broken].isnan().all()
    assert (sizes[0, 0, ~(empty | broken)] > 0).all() and (largest[0, 0, ~(empty | broken)] > 0).all()
    assert counts[0, 0, 0] == 1 + 2
