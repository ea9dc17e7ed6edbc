"""Which keys of a tile weigh, and for which rows: what the backward gathers, where that pays.

Within a tile with weight few keys may have any. Of long sequences `mark` first probes how many, for each key head.
Where they are few it notes which, and the kernels after it gather them: grad_query the keys that a block of rows
weighs, grad_key_value the rows that weigh a block of keys. Elsewhere the same kernels walk tiles. Both codes are
launched, and one of them returns at once: only the GPU knows which.
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
from ..lib.marks import PROBE_EVERY, WARP_ROWS, bits_set, gathers, marks_of
from ..lib.matrices import Code, load_factor
from ..lib.scores import QueryBlock, block_scores, score_rules
from ..lib.tile_lists import LIST_CHUNK, WORD, list_weighing, part_of, visit_tiles
from ..lib.visibility import TILE, visible_keys, visible_tiles
from ..spec import CALL, MATRIX, Spec


@triton.jit
def mark(
    query, key, row_state, tiles, tile_lists, key_marks, row_marks, probe_counts, gather_below, probe_from, call,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Which keys of a tile with weight some row weighs, and which rows weigh some key: two words of bits each. Rows
    that are broken weigh all. Of other tiles nothing is written, and nothing read. As a probe, if `probe_from` is above
    0, it adds to the `probe_counts` of a key head how many keys weigh, and of how many, in some tiles of sequences as
    long."""
    EXACT: tl.constexpr = key.data.dtype.element_ty == tl.float32
    CODE: tl.constexpr = Code(BLOCK_M, BLOCK_N, BLOCK_D, STEP_D, ALPHA, EXACT)
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
    key_marks += tile_row * key_tiles * (TILE // WORD)
    row_marks += tile_row * key_tiles * (TILE // WARP_ROWS)
    tiles_seen = visible_tiles(first_row, at.band, BLOCK_M)
    every = tl.where(probe_from > 0, tl.maximum((tiles_seen.inner + tiles_seen.edge) // PROBE_EVERY, 1), 1)
    bits = tiles + tile_row * call.tile_words
    weighing = list_weighing(entries, bits, tiles_seen, ALPHA, every)
    clear_key_marks(key_marks, weighing)
    mark_tiles(queries, threshold, gap != gap, weighing, key_marks, row_marks, CODE)
    if probe_from > 0:
        tl.debug_barrier()
        tl.atomic_add(probe_counts, count_key_marks(key_marks, weighing), sem="relaxed")
        tl.atomic_add(probe_counts + 1, weighing.count * TILE, sem="relaxed")


MARK = Spec(
    mark,
    arguments=dict(
        query=MATRIX, key=MATRIX, row_state="*fp32", tiles="*i32", tile_lists="*i32", key_marks="*i32",
        row_marks="*i16", probe_counts="*i32", gather_below="i32", probe_from="i32", call=CALL,
    ),
    writes=("tile_lists", "key_marks", "row_marks", "probe_counts"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D", "STEP_D", "ALPHA"),
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
def words_of_listed(key_marks, word, tile_list, start):
    """(addresses, mask) of the key marks of LIST_CHUNK tiles of a list, from the start-th on; `word` numbers a tile's
    words."""
    index = start + tl.arange(0, LIST_CHUNK)
    tile = tl.load(tile_list.entries + index, mask=index < tile_list.count, other=0)
    return key_marks + tile[:, None] * (TILE // WORD) + word[None, :], (index < tile_list.count)[:, None]


@triton.jit
def clear_key_marks(key_marks, tile_list):
    """No bits for the tiles of a list: those that weigh are added to them."""
    word = tl.arange(0, TILE // WORD)
    for start in range(0, tile_list.count, LIST_CHUNK):
        place, mask = words_of_listed(key_marks, word, tile_list, start)
        tl.store(place, tl.zeros([LIST_CHUNK, TILE // WORD], tl.int32), mask=mask)
    tl.debug_barrier()


@triton.jit
def count_key_marks(key_marks, tile_list):
    """How many keys are marked in the tiles of a list."""
    word = tl.arange(0, TILE // WORD)
    count = 0
    for start in range(0, tile_list.count, LIST_CHUNK):
        place, mask = words_of_listed(key_marks, word, tile_list, start)
        count += tl.sum(tl.sum(bits_set(tl.load(place, mask=mask, other=0)), 1), 0)
    return count


@triton.jit
def mark_tiles(queries, threshold, broken, tile_list, key_marks, row_marks, CODE):
    """The marks of the tiles of a list. Each group of WARP_ROWS rows for itself: no warp waits for another."""
    row_bits = tl.zeros([TILE // WARP_ROWS], tl.int32)
    visit_tiles(add_marks, row_bits, (queries, threshold, broken, key_marks, row_marks), tile_list, CODE)


@triton.jit
def add_marks(row_bits, tile, index, context, CODE, EDGE: tl.constexpr):
    """Marks keys; returns the bits of the tile's rows so far."""
    queries, threshold, broken, key_marks, row_marks = context
    part = part_of(index, TILE // CODE.BLOCK_N)
    qk = block_scores(queries, tile * TILE + part * CODE.BLOCK_N, CODE, EDGE)
    key_bits, here = marks_of(qk, queries.scale.z, threshold, broken, CODE.EXACT)
    of_step = tl.arange(0, CODE.BLOCK_N // WORD)
    place = key_marks + tile * (TILE // WORD) + part * (CODE.BLOCK_N // WORD) + of_step
    place = place[None, :] + tl.zeros(key_bits.shape, tl.int32)  # 3.6's interpreter misreads a broadcast_to
    tl.atomic_or(place, key_bits, mask=key_bits != 0, sem="relaxed")
    row_bits = tl.where(part > 0, row_bits, 0) | here
    groups = tl.arange(0, TILE // WARP_ROWS)
    tl.store(row_marks + tile * (TILE // WARP_ROWS) + groups, row_bits.to(tl.int16))
    return row_bits
