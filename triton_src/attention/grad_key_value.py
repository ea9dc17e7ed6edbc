"""The gradients of key and value: a block of keys against the query rows, of all heads that share it, where it holds
weight. The mathematics is grad_query's. Blocks are transposed: keys down, queries across."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..lib.call import Head, band_of, block_of_program, first_state_row, head_scale, query_rows_of
from ..lib.dropout import SequenceDropout, dropout_factors, dropout_of_sequence
from ..lib.entmax import ALPHA_1, ALPHA_ANY, fixed_alpha, weigh
from ..lib.marks import GATHER_ROOM, MarkedRows, TileMarks, gathers, visit_rows
from ..lib.matrices import (
    Code,
    Factor,
    RowsFrom,
    cast,
    dot,
    load_factor,
    load_rows,
    products,
    row_numbers,
    rows_of_head,
    store_rows,
)
from ..lib.scores import HeadScale, ScoreRules, scores_of
from ..lib.tile_lists import LIST_CHUNK, WORD, TileList, all_edges, append, first_tile_row, list_where
from ..lib.visibility import TILE, rows_that_see, sequence_bounds, visible_keys
from ..spec import CALL, MATRIX, Spec
from .grad_query import load_terms


class KeyBlock(NamedTuple):
    """The block of keys that a program holds: their numbers, they and their values."""

    key_number: tl.tensor
    k: Factor
    v: Factor


class KeyValueSums(NamedTuple):
    """Sums over rows, of a block of keys."""

    dk: tl.tensor
    dv: tl.tensor


class HeadRows(NamedTuple):
    """What is read of the queries of a head."""

    query_rows: RowsFrom
    grad_out_rows: RowsFrom
    row_terms: tl.tensor
    row_seeds: tl.tensor
    scale: HeadScale
    dropout: SequenceDropout


@triton.jit
def grad_key_value(
    query, key, value, grad_out, grad_key, grad_value, row_terms, row_seeds, tiles, tile_lists, marks, gathered,
    probe_counts, gather_below, call,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, ALPHA: tl.constexpr,
    GATHER: tl.constexpr,
):  # fmt: skip
    """dk and dv. GATHER and what goes with it as in grad_query; `marks` are of rows."""
    blocks, kv_heads = tl.cdiv(call.keys.max_seqlen, BLOCK_N), call.heads // call.group
    block, kv_head, batch = block_of_program(blocks, kv_heads)
    if gathers(probe_counts, batch * kv_heads + kv_head, gather_below) != GATHER:
        return
    EXACT: tl.constexpr = key.data.dtype.element_ty == tl.float32
    CODE: tl.constexpr = Code(BLOCK_M, BLOCK_N, BLOCK_D, STEP_D, ALPHA, EXACT)
    queries = sequence_bounds(call.queries, batch)
    keys = sequence_bounds(call.keys, batch)
    # The first of the heads that share the keys; what is of one of them goes from head to head.
    at = Head(batch, kv_head * call.group, call.group, queries, keys, band_of(call, batch, queries, keys))
    query_rows = query_rows_of(query, at, call.head_dim, queries.length)
    grad_out_rows = query_rows_of(grad_out, at, call.value_dim, queries.length)
    key_rows = rows_of_head(key, batch, kv_head, keys.offset, call.head_dim, keys.length)
    value_rows = rows_of_head(value, batch, kv_head, keys.offset, call.value_dim, keys.length)
    grad_key_rows = rows_of_head(grad_key, batch, kv_head, keys.offset, call.head_dim, keys.extent)
    grad_value_rows = rows_of_head(grad_value, batch, kv_head, keys.offset, call.value_dim, keys.extent)
    row_terms += 4 * first_state_row(call, at)
    row_seeds += first_state_row(call, at)
    first_key = block * BLOCK_N
    if first_key >= keys.extent:
        return

    query_data, grad_out_data = query_rows.data, grad_out_rows.data  # from here on of one head after the other
    key_number = first_key + tl.arange(0, BLOCK_N)
    k = load_factor(key_rows, first_key, BLOCK_N, CODE)
    v = load_factor(value_rows, first_key, BLOCK_N, CODE)
    held = KeyBlock(key_number, k, v)
    key_tile = first_key // TILE
    key_tiles = tl.cdiv(call.keys.max_seqlen, TILE)
    query_tiles = tl.cdiv(call.queries.max_seqlen, TILE)
    tile_row = first_tile_row(call.queries, call.heads, batch, at.head, queries.offset)
    tiles += tile_row * call.tile_words + key_tile // WORD
    marks += (tile_row * key_tiles + key_tile) * (TILE // WORD)
    key_tile_row = first_tile_row(call.keys, kv_heads, batch, kv_head, keys.offset) + key_tile
    entries = tile_lists + key_tile_row * query_tiles
    gathered += key_tile_row * GATHER_ROOM
    # The others see nothing: they may hold anything, and 0 * NaN would reach the sums.
    see = rows_that_see(at.band)
    dropout = dropout_of_sequence(call.dropout, batch, ALPHA)

    wide = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sums = KeyValueSums(wide, wide)
    for member in range(call.group):
        scale = head_scale(call, batch, at.head + member, ALPHA)
        member_query = RowsFrom(query_data, query_rows.stride, call.head_dim, see.end, see.first)
        member_grad_out = RowsFrom(grad_out_data, grad_out_rows.stride, call.value_dim, see.end, see.first)
        member_rows = HeadRows(member_query, member_grad_out, row_terms, row_seeds, scale, dropout)
        weighing = list_query_tiles(entries, query_tiles, tiles, call.tile_words, key_tile, at.band, CODE)
        unused = query_tiles - weighing.count
        to_tile = key_tiles * (TILE // WORD)  # tiles follow each other down a column
        marked = MarkedRows(TileMarks(marks, 1, to_tile, to_tile.to(tl.int64) * WORD), gathered)
        context = (held, member_rows, at.band)
        if ALPHA == ALPHA_ANY:
            SOFTMAX_CODE: tl.constexpr = Code(BLOCK_M, BLOCK_N, BLOCK_D, STEP_D, ALPHA_1, EXACT)
            listed = list_where(weighing, scale.alpha == 1.0)
            sums = visit_rows(add_queries, sums, context, listed, unused, marked, BLOCK_M, True, SOFTMAX_CODE, GATHER)
            weighing = list_where(weighing, scale.alpha != 1.0)
        sums = visit_rows(add_queries, sums, context, weighing, unused, marked, BLOCK_M, True, CODE, GATHER)
        query_data += query.head_stride
        grad_out_data += grad_out.head_stride
        row_terms += 4 * call.queries.rows
        row_seeds += call.queries.rows
        tiles += call.queries.tile_rows * call.tile_words
        marks += call.queries.tile_rows.to(tl.int64) * key_tiles * (TILE // WORD)

    # Without its sign, which the queries came with; dq is multiplied by it as it is, as the keys came without.
    dk = sums.dk * tl.abs(call.scores.scale)
    store_rows(grad_key_rows, dk, first_key, BLOCK_N, BLOCK_D)
    store_rows(grad_value_rows, sums.dv, first_key, BLOCK_N, BLOCK_D)


GRAD_KEY_VALUE = Spec(
    grad_key_value,
    arguments=dict(
        query=MATRIX, key=MATRIX, value=MATRIX, grad_out=MATRIX, grad_key=MATRIX, grad_value=MATRIX, row_terms="*fp32",
        row_seeds="*i64", tiles="*i32", tile_lists="*i32", marks="*i32", gathered="*i32", probe_counts="*i32",
        gather_below="i32", call=CALL,
    ),
    writes=("grad_key", "grad_value", "tile_lists", "gathered"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D", "STEP_D", "ALPHA", "GATHER"),
    programs="a block of BLOCK_N = TILE keys, for ceil(longest key sequence / BLOCK_N) * key heads * batch",
    scratch=dict(
        tile_lists="an entry for each tile row of keys and each tile of queries",
        gathered="GATHER_ROOM entries for each tile row of keys, where rows are gathered",
    ),
    shapes="attention",
    gathers=True,
)  # fmt: skip


@triton.jit
def list_query_tiles(entries, room, bits, tile_words, key_tile, band, CODE):
    """The TileList of the query tiles with weight in a tile of keys: those whose rows all see all keys from the front
    of `room` entries, others from its end."""
    first_key = key_tile * TILE
    inner = 0
    edge = 0
    tl.debug_barrier()  # the old list may still be read
    for start in range(0, tl.cdiv(band.query_length, TILE), LIST_CHUNK):
        tile = start + tl.arange(0, LIST_CHUNK)
        first_row = tile * TILE
        last_row = tl.minimum(first_row + TILE, band.query_length) - 1
        lowest = visible_keys(first_row, band)
        highest = visible_keys(last_row, band)
        whole = (highest.first <= first_key) & (first_key + CODE.BLOCK_N <= lowest.end)
        whole = whole & (first_row + TILE <= band.query_length)
        if all_edges(CODE.ALPHA):
            whole = first_row < 0
        word = tl.load(bits + tile * tile_words, mask=first_row < band.query_length, other=0)
        wanted = ((word >> (key_tile % WORD)) & 1) != 0
        inner = append(entries, inner, tile, wanted & whole)
        edge = append(entries + room - 1, edge, tile, wanted & ~whole, -1)
    tl.debug_barrier()
    return TileList(entries, inner, inner + edge)


@triton.jit
def add_queries(sums, first_row, context, CODE, EDGE: tl.constexpr):
    """The sums with what some more rows of a head add."""
    held, head, band = context
    scale = head.scale
    q = load_rows(head.query_rows, first_row, CODE.BLOCK_M, CODE.BLOCK_D, EDGE)
    do = load_rows(head.grad_out_rows, first_row, CODE.BLOCK_M, CODE.BLOCK_D, EDGE)
    terms = load_terms(head.row_terms, first_row, band.query_length, CODE.BLOCK_M, EDGE)
    qk = products(held.k, head.query_rows, first_row, CODE.BLOCK_N, CODE.BLOCK_M, CODE, EDGE)
    rules = ScoreRules(row_numbers(first_row, CODE.BLOCK_M), band, None, scale.qk_slope)
    qk = scores_of(qk, rules, held.key_number, 1, CODE.ALPHA, EDGE)
    p, u = weigh(qk, scale, terms.threshold, 1, CODE)
    p = p * terms.normaliser[None, :] if CODE.EXACT else p + terms.normaliser[None, :]
    if EDGE:
        p = tl.where(qk == float("-inf"), 0.0, p)
    if fixed_alpha(CODE.ALPHA):
        dv = dot(cast(p, do.dtype), do, sums.dv)
    dp = products(held.v, head.grad_out_rows, first_row, CODE.BLOCK_N, CODE.BLOCK_M, CODE, EDGE)
    if not fixed_alpha(CODE.ALPHA):
        if head.dropout.threshold != 0:  # one branch for both, p and dp
            seeds = tl.load(head.row_seeds + rules.row, mask=rules.row < band.query_length, other=0)
            factors = dropout_factors(head.dropout, seeds.to(tl.uint64, bitcast=True), held.key_number, 1)
            p *= factors
            dp *= factors
        dv = dot(cast(p, do.dtype), do, sums.dv)
    ds = u * (dp - terms.delta[None, :])
    if EDGE:
        ds = tl.where(qk == float("-inf"), 0.0, ds)  # 0 * NaN
    return KeyValueSums(dot(cast(ds, q.dtype), q, sums.dk), dv)
