"""What a call attended to: how many keys each row weighs, its largest weight, and how many tiles hold weight. From what
the forward saved, and the scores of the tiles that hold weight; no weight is computed but the largest."""

import triton
import triton.language as tl

from ..lib.call import (
    block_of_program,
    first_state_row,
    head_in_sequence,
    head_scale,
    key_rows_of,
    query_rows_of,
    tile_row_of,
)
from ..lib.entmax import ALPHA_ANY, LOG2_E, column_counts, excess_of, load_thresholds, weights
from ..lib.matrices import ROW_PARTS, Code, load_factor
from ..lib.scores import QueryBlock, block_scores, score_rules
from ..lib.tile_lists import list_weighing, list_where, part_of, visit_tiles
from ..lib.visibility import TILE, visible_keys, visible_tiles
from ..spec import CALL, MATRIX, Spec


@triton.jit
def count_support(
    query, key, row_state, tiles, tile_lists, support_size, largest_weight, tile_counts, counts_batch_stride, call,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """How many keys have weight and the largest weight, of each row; 0 and NaN of broken ones. To the two `tile_counts`
    of each head of a sequence is added how many tiles are visible, and how many of these hold weight."""
    EXACT: tl.constexpr = key.data.dtype.element_ty == tl.float32
    CODE: tl.constexpr = Code(BLOCK_M, BLOCK_N, BLOCK_D, STEP_D, ALPHA, EXACT)
    blocks = tl.cdiv(call.queries.max_seqlen, BLOCK_M)
    block, head, batch = block_of_program(blocks, call.heads)
    at = head_in_sequence(call, batch, head)
    query_rows = query_rows_of(query, at, call.head_dim, at.queries.length)
    key_rows = key_rows_of(key, at, call.head_dim, at.keys.length)
    state_row = first_state_row(call, at)
    key_tiles = tl.cdiv(call.keys.max_seqlen, TILE)
    first_row = (blocks - 1 - block) * BLOCK_M  # in causal order the last are longest, and go first
    if first_row >= at.queries.extent:
        return

    row = first_row + tl.arange(0, BLOCK_M)
    visible = visible_keys(row, at.band)
    q = load_factor(query_rows, first_row, BLOCK_M, CODE)
    threshold, _, gap = load_thresholds(row_state, state_row + row, row < at.queries.length, EXACT)
    scale = head_scale(call, batch, head, ALPHA)
    queries = QueryBlock(q, key_rows, score_rules(row, at.band, visible, scale), scale)
    tile_row = tile_row_of(call, at, first_row)
    tiles_seen = visible_tiles(first_row, at.band, BLOCK_M)
    weighing = list_weighing(tile_lists + tile_row * key_tiles, tiles + tile_row * call.tile_words, tiles_seen, ALPHA)

    softmax = scale.alpha == 1.0  # where every key that is seen has weight, and no tile need be looked at
    looked_at = list_where(weighing, scale.alpha != 1.0)
    counts = tl.zeros([BLOCK_M, ROW_PARTS], tl.int32)
    counts = visit_tiles(add_counts, counts, (queries, threshold), looked_at, CODE)
    size = tl.where(softmax, visible.end - visible.first, tl.sum(counts, 1))
    size = tl.where(gap < float("inf"), size, 0)  # gap is NaN in broken rows
    tl.store(support_size + state_row + row, size, mask=row < at.queries.extent)
    largest = weight_of_largest(gap, scale.alpha, EXACT)
    tl.store(largest_weight + state_row + row, largest, mask=row < at.queries.extent)

    tile_counts += batch * counts_batch_stride + 2 * head
    tl.atomic_add(tile_counts, (tiles_seen.inner + tiles_seen.edge).to(tl.int64), sem="relaxed")
    tl.atomic_add(tile_counts + 1, weighing.count.to(tl.int64), sem="relaxed")


COUNT_SUPPORT = Spec(
    count_support,
    arguments=dict(
        query=MATRIX, key=MATRIX, row_state="*fp32", tiles="*i32", tile_lists="*i32", support_size="*i32",
        largest_weight="*fp32", tile_counts="*i64", counts_batch_stride="i64", call=CALL,
    ),
    writes=("tile_lists", "support_size", "largest_weight", "tile_counts"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D", "STEP_D", "ALPHA"),
    programs="a block of BLOCK_M = TILE rows, for ceil(longest query sequence / BLOCK_M) * heads * batch",
    scratch=dict(tile_lists="an entry for each tile row of queries and each tile of keys"),
    shapes="attention",
)  # fmt: skip


@triton.jit
def weight_of_largest(gap, alpha, EXACT: tl.constexpr):
    """(-gap)^(1/(alpha-1)), and e^-gap for alpha = 1: the weight of a row's largest score. NaN where gap is."""
    largest, _ = weights(tl.maximum(-gap, 0.0), alpha, ALPHA_ANY, EXACT)
    largest = tl.where(alpha == 1.0, tl.exp2(-gap * LOG2_E), largest)
    return tl.where(gap == gap, largest, gap)


@triton.jit
def add_counts(counts, tile, index, context, CODE, EDGE: tl.constexpr):
    """The counts with the keys that weigh in a part of a tile."""
    queries, threshold = context
    first_key = tile * TILE + part_of(index, TILE // CODE.BLOCK_N) * CODE.BLOCK_N
    qk = block_scores(queries, first_key, CODE, EDGE)
    return counts + column_counts(excess_of(qk, queries.scale.z, threshold, 0, CODE.EXACT))
