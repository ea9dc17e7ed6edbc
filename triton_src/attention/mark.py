"""Which keys of a tile weigh, and for which rows: what the backward gathers, where that pays.

Within a tile with weight few keys may have any. Of long sequences `mark` first probes how many, for each key head.
Where they are few it notes which, unless the forward has kept its marks of them, and the kernels after it gather them:
grad_query the keys that a block of rows weighs, noting for which rows, and grad_key_value the rows that weigh a block
of keys. Elsewhere the same kernels walk tiles. Both codes are launched, and one of them returns at once: only the GPU
knows which.
"""

import triton
import triton.language as tl

from ..lib.call import (
    block_of_program,
    first_state_row,
    head_in_sequence,
    head_scale,
    key_rows_of,
    kv_head_of,
    query_rows_of,
    tile_row_of,
)
from ..lib.entmax import load_thresholds, mark_threshold
from ..lib.marks import PROBE_EVERY, WARP_ROWS, TileMarks, bits_of_rows, gathers, kept_marks, mark_keys
from ..lib.matrices import Code, load_factor
from ..lib.scores import QueryBlock, score_rules
from ..lib.tile_lists import LIST_CHUNK, WORD, list_weighing, list_where
from ..lib.visibility import TILE, visible_keys, visible_tiles
from ..spec import CALL, MATRIX, Spec


@triton.jit
def mark(
    query, key, row_state, support, tiles, support_capacity, tile_lists, key_marks, row_marks, probe_counts,
    gather_below, probe_from, call,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Which keys of a tile with weight some row weighs, as bits, in tile rows of which the forward kept none; and bits
    for rows that weigh some key, which are those that are broken: the others are for grad_query to add. Of other tiles
    nothing is written, and nothing read. As a probe, if `probe_from` is above 0, it adds to the `probe_counts` of a key
    head how many keys weigh, and of how many, in some tiles of sequences as long."""
    EXACT: tl.constexpr = key.data.dtype.element_ty == tl.float32
    CODE: tl.constexpr = Code(BLOCK_M, TILE, BLOCK_D, STEP_D, ALPHA, EXACT)
    blocks = tl.cdiv(call.queries.max_seqlen, BLOCK_M)
    block, head, batch = block_of_program(tl.where(probe_from > 0, tl.cdiv(blocks, PROBE_EVERY), blocks), call.heads)
    block *= tl.where(probe_from > 0, PROBE_EVERY, 1)
    probe_counts += 2 * kv_head_of(call, batch, head)  # from here on those of its key head alone, which is its 0th
    if (probe_from == 0) & (gathers(probe_counts, 0, gather_below) == 0):
        return
    at = head_in_sequence(call, batch, head)
    query_rows = query_rows_of(query, at, call.head_dim, at.queries.length)
    key_rows = key_rows_of(key, at, call.head_dim, at.keys.length)
    state_row = first_state_row(call, at)
    key_tiles = tl.cdiv(call.keys.max_seqlen, TILE)
    if probe_from > 0:  # as if the sequence were alone, so that what is done does not depend on others
        if tl.minimum(at.queries.length, at.keys.length) < probe_from:
            return
        blocks = tl.cdiv(at.queries.length, BLOCK_M)
    first_row = (blocks - 1 - block) * BLOCK_M  # in causal order the last are longest, and go first
    if (first_row < 0) | (first_row >= at.queries.extent):
        return

    row = first_row + tl.arange(0, BLOCK_M)
    visible = visible_keys(row, at.band)
    q = load_factor(query_rows, first_row, BLOCK_M, CODE)
    threshold, _, gap = load_thresholds(row_state, state_row + row, row < at.queries.length, EXACT)
    scale = head_scale(call, batch, head, ALPHA)
    threshold = mark_threshold(threshold, scale.alpha, ALPHA)
    queries = QueryBlock(q, key_rows, score_rules(row, at.band, visible, scale), scale)

    tile_row = tile_row_of(call, at, first_row)
    entries = tile_lists + tile_row * key_tiles
    kept, count, _ = kept_marks(support, support_capacity, state_row, first_row, at.queries, at.keys)
    kept = tl.load(count, mask=kept, other=-1) >= 0
    marks = TileMarks(key_marks + tile_row * key_tiles * (TILE // WORD), 1, TILE // WORD, TILE)
    row_marks += tile_row * key_tiles * (TILE // WARP_ROWS)
    tiles_seen = visible_tiles(first_row, at.band, BLOCK_M)
    every = tl.where(probe_from > 0, tl.maximum((tiles_seen.inner + tiles_seen.edge) // PROBE_EVERY, 1), 1)
    bits = tiles + tile_row * call.tile_words
    weighing = list_weighing(entries, bits, tiles_seen, ALPHA, every)
    marked = mark_keys(queries, threshold, list_where(weighing, (probe_from > 0) | (kept == 0)), marks, CODE)
    if probe_from > 0:
        tl.atomic_add(probe_counts, marked, sem="relaxed")
        tl.atomic_add(probe_counts + 1, weighing.count * TILE, sem="relaxed")
    else:
        mark_broken_rows(row_marks, gap != gap, weighing)


MARK = Spec(
    mark,
    arguments=dict(
        query=MATRIX, key=MATRIX, row_state="*fp32", support="*i32", tiles="*i32", support_capacity="i32",
        tile_lists="*i32", key_marks="*i32", row_marks="*i16", probe_counts="*i32", gather_below="i32",
        probe_from="i32", call=CALL,
    ),
    writes=("tile_lists", "key_marks", "row_marks", "probe_counts"),
    constants=("BLOCK_M", "BLOCK_D", "STEP_D", "ALPHA"),
    programs="a block of BLOCK_M = TILE rows, for ceil(longest query sequence / BLOCK_M) * heads * batch; of a probe "
    "the PROBE_EVERY-th part of the blocks",
    scratch=dict(
        tile_lists="an entry for each tile row of queries and each tile of keys",
        key_marks="two words for each of those",
        row_marks="four numbers for each of those",
        probe_counts="two for each key head of each sequence, zeros before the probe",
    ),
    shapes="attention",
)  # fmt: skip


@triton.jit
def mark_broken_rows(row_marks, broken, tile_list):
    """The row marks of the tiles of a list: those of broken rows, which weigh all keys."""
    group = tl.arange(0, TILE // WARP_ROWS)
    bits = bits_of_rows(tl.expand_dims(broken, 1))
    for start in range(0, tile_list.count, LIST_CHUNK):
        index = start + tl.arange(0, LIST_CHUNK)
        tile = tl.load(tile_list.entries + index, mask=index < tile_list.count, other=0)
        place = row_marks + tile[None, :] * (TILE // WARP_ROWS) + group[:, None]
        tl.store(place, (bits + tl.zeros(place.shape, tl.int32)).to(tl.int16), mask=(index < tile_list.count)[None, :])
