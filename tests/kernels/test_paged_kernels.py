"""The kernels over a paged cache: they give the bits of those over rows that stand behind each other."""

import pytest
import torch
from checked import TYPES
from interpreted import Tiles, attention

from common import Inputs, assert_same_bits, make_inputs

MOST = 16  # queries that go the way of few
LENGTHS = torch.tensor([100, 37, 0], dtype=torch.int32)
CAPACITY = 130


def scattered(rows: torch.Tensor, lengths: torch.Tensor, page: int, blocks: torch.Tensor) -> torch.Tensor:
    """A cache of pages with rows (B, H_kv, N, D) of sequences of some lengths in the blocks that a table names, and NaN
    in all other places. Its heads are not where the kernels could expect them."""
    batch, heads, _, size = rows.shape
    cache = torch.full((int(blocks.max()) + 2, page, heads, size), torch.nan).to(rows.dtype)
    for sequence in range(batch):
        for key in range(int(lengths[sequence])):
            cache[blocks[sequence, key // page], key % page] = rows[sequence, :, key]
    return cache.transpose(1, 2)


def draw_blocks(sequences: int, capacity: int, page: int) -> torch.Tensor:
    """A table of different blocks in no order."""
    pages = -(-capacity // page)
    order = torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(page))
    return order.view(sequences, pages).to(torch.int32)


def both(inputs: Inputs, page: int, *arguments, lengths=LENGTHS, table=None, offsets=None, **options):
    """(over the paged cache, over a padded batch of as many keys) of the same keys."""
    blocks = draw_blocks(len(lengths), inputs.key.shape[2], page)
    room = blocks.shape[1] * page
    caches = [scattered(x, lengths, page, blocks) for x in inputs[1:]]
    # Entries of pages behind a sequence's last name no block.
    used = torch.arange(blocks.shape[1]) * page < lengths[:, None]
    wide = torch.full((len(blocks), blocks.shape[1] + 3), -1, dtype=torch.int32)
    wide[:, 1:-2] = torch.where(used, blocks, 1 << 30)
    paged = attention(
        inputs.query, *caches, *arguments, table=wide[:, 1:-2], lengths=(None, lengths), offsets=offsets, **options
    )
    if offsets is not None:
        return paged, None
    padded = [torch.nn.functional.pad(x, (0, 0, 0, room - x.shape[2])) for x in inputs[1:]]
    return paged, attention(inputs.query, *padded, *arguments, lengths=(None, lengths), **options)


def assert_equal(paged, padded) -> None:
    assert_same_bits(paged[:3], padded[:3])
    assert paged.out.isfinite().all() and paged.out[0].any()


@pytest.mark.parametrize("way", (-1, MOST), ids=("many", "few"))
@pytest.mark.parametrize("page", (1, 3, 16, 17, 64, 100))
def test_pages_of_any_size(page, way):
    inputs = make_inputs(3, 4, 5, CAPACITY, kv_heads=2, value_size=24)
    assert_equal(*both(inputs, page, 1.5, True, few_queries=way))


@TYPES
@pytest.mark.parametrize("way", (-1, MOST), ids=("many", "few"))
@pytest.mark.parametrize("alpha", (1.0, 1.25, 1.5, 2.0, torch.tensor([1.0, 1.25])))
def test_alphas(dtype, way, alpha):
    inputs = make_inputs(3, 2, 3, CAPACITY, kv_heads=1, dtype=dtype)
    code = None if way == MOST or isinstance(alpha, torch.Tensor) or alpha == 1.5 else "any"
    assert_equal(*both(inputs, 16, alpha, True, few_queries=way, alpha_code=code))


@pytest.mark.parametrize("way", (-1, MOST), ids=("many", "few"))
@pytest.mark.parametrize("options", (dict(window=(40, 0)), dict(window=(3, 60)), dict(scale=-0.3)), ids=str)
def test_options(way, options):
    assert_equal(*both(make_inputs(3, 2, 4, CAPACITY, kv_heads=1), 17, 1.5, few_queries=way, **options))


@pytest.mark.parametrize("page", (16, 100))
def test_many_blocks_of_queries(page):
    """Whole tiles, scanned two at a time, and parts of them; columns some at a time."""
    lengths = torch.tensor([300, 211], dtype=torch.int32)
    inputs = make_inputs(2, 2, 150, 300, kv_heads=1, size=32)
    for tiles in (Tiles(scan_n=128), Tiles(walk=16, step_d=16)):
        assert_equal(*both(inputs, page, 1.5, True, lengths=lengths, tiles=tiles))


def test_a_long_row():
    """Whose values are summed by weigh_few, over splits of tiles, with pages across them."""
    inputs = make_inputs(1, 2, 1, 1500, kv_heads=1)
    inputs.query[:] *= 1e-3
    lengths = torch.tensor([1400], dtype=torch.int32)
    assert_equal(*both(inputs, 17, 1.5, True, lengths=lengths, few_queries=MOST))


@pytest.mark.parametrize("window", ((-1, -1), (300, 0)))
def test_how_many_programs_share_keys_changes_no_bit(window):
    """Also where there is room for many more keys than there are."""
    inputs = make_inputs(2, 4, 2, 2500, kv_heads=2)
    inputs.query[:, :2] *= 1e-3  # long rows beside others
    lengths = torch.tensor([1300, 70], dtype=torch.int32)
    results = [
        attention(*inputs, 1.5, True, lengths=(None, lengths), few_queries=MOST, window=window, sharers=sharers)
        for sharers in (1, 3, 40)
    ]
    for other in results[1:]:
        assert_same_bits(results[0][:3], other[:3])


@pytest.mark.parametrize("way", (-1, MOST), ids=("many", "few"))
def test_packed_queries(way):
    """Each sequence as it is alone; a token that no sequence has is left out. Over tiles: by lists of keys a row's bits
    also depend on which other queries of its sequence there are."""
    inputs = make_inputs(3, 2, 5, CAPACITY, kv_heads=1)
    counts = (5, 2, 4)
    _, padded = both(inputs, 16, 1.5, True, few_queries=way, gather_below=0)
    tokens = torch.cat([inputs.query[i, :, -n:].transpose(0, 1) for i, n in enumerate(counts)])
    offsets = torch.tensor([0, *counts]).cumsum(0).int(), None, 5, None
    paged, _ = both(Inputs(tokens, *inputs[1:]), 16, 1.5, True, offsets=offsets, few_queries=way, gather_below=0)
    for entry, (out, count) in enumerate(zip(paged.out.split(counts), counts, strict=True)):
        assert_same_bits(out.transpose(0, 1), padded.out[entry, :, -count:])


@pytest.mark.parametrize("way", (-1, MOST), ids=("many", "few"))
def test_a_table_that_names_no_blocks_reads_others(way):
    """Entries are clamped: -1 is the first block, and what is too large the last."""
    inputs = make_inputs(1, 2, 3, 32, kv_heads=1)
    caches = [torch.randn(5, 1, 16, 16) for _ in range(2)]
    lengths = torch.tensor([32], dtype=torch.int32)
    wrong, right = (
        attention(inputs.query, *caches, 1.5, table=torch.tensor([table], dtype=torch.int32), lengths=(None, lengths),
                  few_queries=way)
        for table in ((-1, 1 << 30), (0, 4))
    )  # fmt: skip
    assert_same_bits(wrong[:3], right[:3])
