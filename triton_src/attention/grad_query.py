"""The gradient of query, over what holds weight and nothing else. No atomics on gradients: every one has one writer.

With u_j = p_j^(2-alpha) on the support (u_j = p_j for alpha = 1), dp_j = dO.v_j and delta = sum u dp / sum u,
    ds_j = u_j (dp_j - delta),   dq = scale sum_j ds_j k_j,   dk_j = scale sum_rows ds_j q,   dv_j = sum_rows p_j dO.
grad_query finds delta and dq in one pass, since dq / scale = sum u dp k - delta sum u k. So that this difference does
not cancel, a number of the row near delta is taken off dp first: dp_shift = dO.out, which is sum p dp where delta has u
for p.

With dropout the weights p_j of values, here and in dp_j, become what `drop` makes of them; thresholds and u_j stay.
"""

from typing import NamedTuple

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
from ..lib.dropout import SequenceDropout, drop, dropout_of_sequence, row_seeds_of
from ..lib.entmax import (
    ALPHA_1,
    ALPHA_ANY,
    ALPHA_NUMBER,
    Threshold,
    alpha_term,
    fixed_alpha,
    load_thresholds,
    log2,
    softmax_alpha_term,
    weigh,
    weights_threshold,
)
from ..lib.marks import GATHER_ROOM, MarkedRows, add_row_marks, gathers, kept_marks, kept_or_lent, visit_rows
from ..lib.matrices import (
    ROW_PARTS,
    Code,
    Factor,
    RowsFrom,
    cast,
    column_sums,
    dot,
    kahan_add,
    load_factor,
    load_rows,
    products,
    row_numbers,
    rows_from,
    store_rows,
)
from ..lib.scores import QueryBlock, block_scores, score_rules
from ..lib.tile_lists import WORD, list_weighing, list_where
from ..lib.visibility import TILE, keys_of_block, visible_keys, visible_tiles
from ..spec import CALL, MATRIX, Spec


class BackwardBlock(NamedTuple):
    """A block of queries as the backward meets keys and values with it."""

    queries: QueryBlock
    threshold: Threshold
    do: Factor
    value_rows: RowsFrom
    # Two numbers of each row that are taken off terms of sums, so that these do not cancel: off dp, and off a key's
    # part in the gradient of alpha.
    dp_shift: tl.tensor
    largest_term: tl.tensor
    alpha_source: tl.tensor
    dropout: SequenceDropout
    row_seeds: tl.tensor
    row_marks: tl.tensor  # of its tile row, where keys are gathered


class Sums(NamedTuple):
    """Sums over keys, of a block of rows; but for the last two in ROW_PARTS parts. dp is less dp_shift here."""

    p: tl.tensor  # in EXACT code
    lost: tl.tensor  # of p, see kahan_add
    u: tl.tensor
    u_dp: tl.tensor
    u_term: tl.tensor  # the same two times what a key adds to the gradient of alpha, where that is asked for
    u_dp_term: tl.tensor
    u_dp_k: tl.tensor
    u_k: tl.tensor


@triton.jit
def grad_query(
    query, key, value, out, grad_out, grad_query, row_terms, row_seeds, alpha_terms, row_state, support, tiles,
    support_capacity, tile_lists, key_marks, row_marks, gathered, probe_counts, gather_below, call,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, ALPHA: tl.constexpr,
    GATHER: tl.constexpr,
):  # fmt: skip
    """dq, and what grad_key_value needs of rows: `row_terms`, with dropout `row_seeds` too. `alpha_terms` are the rows'
    parts of the gradient of alpha, where that is asked for. Visits the keys that the forward or `mark` marked if
    GATHER, and marks the rows that weigh them, else all of tiles with weight, of the key heads that `probe_counts` say
    so of."""
    block, head, batch = block_of_program(tl.cdiv(call.queries.max_seqlen, BLOCK_M), call.heads)
    if gathers(probe_counts, kv_head_of(call, batch, head), gather_below) != GATHER:
        return
    EXACT: tl.constexpr = key.data.dtype.element_ty == tl.float32
    CODE: tl.constexpr = Code(BLOCK_M, BLOCK_N, BLOCK_D, STEP_D, ALPHA, EXACT)
    at = head_in_sequence(call, batch, head)
    query_rows = query_rows_of(query, at, call.head_dim, at.queries.length)
    key_rows = key_rows_of(key, at, call.head_dim, at.keys.length)
    value_rows = key_rows_of(value, at, call.value_dim, at.keys.length)
    out_rows = query_rows_of(out, at, call.value_dim, at.queries.length)
    grad_out_rows = query_rows_of(grad_out, at, call.value_dim, at.queries.length)
    grad_query_rows = query_rows_of(grad_query, at, call.head_dim, at.queries.extent)
    state_row = first_state_row(call, at)
    key_tiles = tl.cdiv(call.keys.max_seqlen, TILE)
    # In causal order the last are longest, and go first.
    first_row = (tl.cdiv(call.queries.max_seqlen, BLOCK_M) - 1 - block) * BLOCK_M
    if first_row >= at.queries.extent:
        return

    row = first_row + tl.arange(0, BLOCK_M)
    visible = visible_keys(row, at.band)
    q = load_factor(query_rows, first_row, BLOCK_M, CODE)
    do = load_factor(grad_out_rows, first_row, BLOCK_M, CODE)
    threshold, row_max, gap = load_thresholds(row_state, state_row + row, row < at.queries.length, EXACT)
    scale = head_scale(call, batch, head, ALPHA)

    # The keys to visit: all of the tiles with weight, or those that are marked there.
    tile_row = tile_row_of(call, at, first_row)
    entries = tile_lists + tile_row * key_tiles
    gathered += tile_row * GATHER_ROOM
    kept, kept_count, of_row = kept_marks(support, support_capacity, state_row, first_row, at.queries, at.keys)
    kept = tl.load(kept_count, mask=kept, other=-1) >= 0
    marks = kept_or_lent(kept, of_row, key_marks + tile_row * key_tiles * (TILE // WORD))
    row_marks += tile_row * key_tiles * (TILE // WORD)
    keys_seen = keys_of_block(first_row, at.band, BLOCK_M)
    key_rows = rows_from(key_rows, keys_seen.first, keys_seen.end)
    value_rows = rows_from(value_rows, keys_seen.first, keys_seen.end)
    tiles_seen = visible_tiles(first_row, at.band, BLOCK_M)
    bits = tiles + tile_row * call.tile_words
    weighing = list_weighing(entries, bits, tiles_seen, ALPHA)

    threshold = weights_threshold(threshold, row_max, scale.alpha, ALPHA)
    queries = QueryBlock(q, key_rows, score_rules(row, at.band, visible, scale), scale)
    dp_shift = output_products(do, out_rows, CODE)
    largest_term = term_of_largest_weight(gap, scale.alpha, ALPHA, EXACT)
    seeds = row_seeds_of(call.dropout, batch, head, row, ALPHA)
    held = BackwardBlock(
        queries,
        threshold,
        do,
        value_rows,
        dp_shift,
        largest_term,
        call.alpha.source,
        dropout_of_sequence(call.dropout, batch, ALPHA),
        seeds,
        row_marks,
    )
    marked = MarkedRows(marks, gathered)
    sums = zero_sums(CODE)
    if ALPHA == ALPHA_ANY:
        SOFTMAX_CODE: tl.constexpr = Code(BLOCK_M, BLOCK_N, BLOCK_D, STEP_D, ALPHA_1, EXACT)
        sums = sum_keys(sums, held, list_where(weighing, scale.alpha == 1.0), marked, SOFTMAX_CODE, GATHER)
        weighing = list_where(weighing, scale.alpha != 1.0)
    sums = sum_keys(sums, held, weighing, marked, CODE, GATHER)
    store_sums(sums, held, gap, state_row, call.scores.scale, grad_query_rows, row_terms, alpha_terms, CODE)
    if not fixed_alpha(ALPHA):  # noqa: SIM102
        if call.dropout.threshold != 0:
            tl.store(row_seeds + state_row + row, seeds.to(tl.int64, bitcast=True), mask=row < grad_query_rows.end)


GRAD_QUERY = Spec(
    grad_query,
    arguments=dict(
        query=MATRIX, key=MATRIX, value=MATRIX, out=MATRIX, grad_out=MATRIX, grad_query=MATRIX, row_terms="*fp32",
        row_seeds="*i64", alpha_terms="*fp32", row_state="*fp32", support="*i32", tiles="*i32", support_capacity="i32",
        tile_lists="*i32", key_marks="*i32", row_marks="*i32", gathered="*i32", probe_counts="*i32",
        gather_below="i32", call=CALL,
    ),
    writes=("grad_query", "row_terms", "row_seeds", "alpha_terms", "tile_lists", "row_marks", "gathered"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D", "STEP_D", "ALPHA", "GATHER"),
    programs="a block of BLOCK_M = TILE rows, for ceil(longest query sequence / BLOCK_M) * heads * batch",
    scratch=dict(
        row_terms="four numbers for each query of each head",
        row_seeds="one for each, with dropout",
        tile_lists="an entry for each tile row of queries and each tile of keys",
        gathered="GATHER_ROOM entries for each tile row of queries, where keys are gathered",
    ),
    shapes="attention",
    gathers=True,
)  # fmt: skip


@triton.jit
def zero_sums(CODE):
    narrow = tl.zeros([CODE.BLOCK_M, ROW_PARTS], tl.float32)
    wide = tl.zeros([CODE.BLOCK_M, CODE.BLOCK_D], tl.float32)
    return Sums(narrow, narrow, narrow, narrow, narrow, narrow, wide, wide)


@triton.jit
def sum_keys(sums, held, weighing, marked, CODE, GATHER: tl.constexpr):
    """The Sums with those over the tiles of a list, or over what is marked in them."""
    # Steps of a whole tile (D = 64) are faster with as many stages at edges (docs/notes/2026-11-26-kernel-tuning.md).
    SHORT_EDGES: tl.constexpr = CODE.BLOCK_N < TILE
    return visit_rows(add_keys, sums, held, weighing, 0, marked, CODE.BLOCK_N, SHORT_EDGES, CODE, GATHER)


@triton.jit
def add_keys(sums, first_key, held, CODE, EDGE: tl.constexpr):
    """The sums with some more keys."""
    queries, scale = held.queries, held.queries.scale
    k = load_rows(queries.key_rows, first_key, CODE.BLOCK_N, CODE.BLOCK_D, EDGE)
    qk = block_scores(queries, first_key, CODE, EDGE)  # of the same rows of keys: one load for both
    p, u = weigh(qk, scale, held.threshold, 0, CODE)
    if len(first_key.shape) > 0:  # gathered
        add_row_marks(held.row_marks, tl.maximum(p, u) > 0.0, first_key)
    dp = products(held.do, held.value_rows, first_key, CODE.BLOCK_M, CODE.BLOCK_N, CODE, EDGE)
    dp = drop(dp, held.dropout, held.row_seeds, row_numbers(first_key, CODE.BLOCK_N), CODE)
    sum_p, lost, sum_u_term, sum_u_dp_term = sums.p, sums.lost, sums.u_term, sums.u_dp_term
    if CODE.EXACT:
        sum_p, lost = kahan_add(sum_p, lost, column_sums(p), True)
    sum_u = sums.u + column_sums(u)
    u_dp = u * (dp - held.dp_shift[:, None])
    if EDGE:
        u_dp = tl.where(u == 0.0, 0.0, u_dp)  # 0 * NaN
    sum_u_dp = sums.u_dp + column_sums(u_dp)
    if not fixed_alpha(CODE.ALPHA):  # noqa: SIM102
        if held.alpha_source != ALPHA_NUMBER:
            if CODE.ALPHA == ALPHA_1:
                term = softmax_alpha_term(p, qk, scale.z, held.threshold)
            else:
                term = alpha_term(p, log2(p, CODE.EXACT), scale.alpha) - held.largest_term[:, None]
            sum_u_term += column_sums(u * term)
            sum_u_dp_term += column_sums(u_dp * term)
    sum_u_dp_k = dot(cast(u_dp, k.dtype), k, sums.u_dp_k)
    sum_u_k = dot(cast(u, k.dtype), k, sums.u_k)
    return Sums(sum_p, lost, sum_u, sum_u_dp, sum_u_term, sum_u_dp_term, sum_u_dp_k, sum_u_k)


@triton.jit
def store_sums(sums, held, gap, state_row, scale, grad_query_rows, row_terms, alpha_terms, CODE):
    """What follows from the sums of rows: dq, the terms, and the parts of the gradient of alpha."""
    row = held.queries.rules.row
    sum_u = tl.sum(sums.u, 1)
    sum_u_dp = tl.sum(sums.u_dp, 1)
    shifted_delta = tl.where(sum_u > 0.0, sum_u_dp / sum_u, 0.0)  # delta - dp_shift
    shifted_delta = tl.where(gap == gap, shifted_delta, float("nan"))
    visible = held.queries.rules.visible
    sees = visible.first < visible.end  # the other rows' queries and incoming gradients may be anything
    dq = tl.where(sees[:, None], (sums.u_dp_k - shifted_delta[:, None] * sums.u_k) * scale, 0.0)

    normaliser = tl.where(gap == gap, 0.0, float("nan"))
    if CODE.EXACT:  # no fp32 threshold makes the sum of thousands of weights quite one
        sum_p = tl.sum(sums.p, 1)
        normaliser += 1.0 / tl.where(sum_p == 0.0, 1.0, sum_p)
    normaliser = tl.where(sees, normaliser, 0.0)
    place = row_terms + 4 * (state_row + row)
    delta = tl.where(sees, shifted_delta + held.dp_shift, 0.0)
    store_terms(place, RowTerms(held.threshold, delta, normaliser), row < grad_query_rows.end)
    if not fixed_alpha(CODE.ALPHA):  # noqa: SIM102
        if held.alpha_source != ALPHA_NUMBER:
            of_alpha = tl.sum(sums.u_dp_term, 1) - shifted_delta * tl.sum(sums.u_term, 1)
            of_alpha = tl.where(sees, of_alpha, 0.0)
            tl.store(alpha_terms + state_row + row, of_alpha, mask=row < grad_query_rows.end)
    store_rows(grad_query_rows, dq, held.do.first, CODE.BLOCK_M, CODE.BLOCK_D)


@triton.jit
def output_products(do, out_rows, CODE):
    """dO.out of each row; 0 where it is not finite, as keys of no weight may have made NaN of the output."""
    grad_out = do.block
    if CODE.STEP_D != CODE.BLOCK_D:
        grad_out = load_rows(do.rows, do.first, CODE.BLOCK_M, CODE.BLOCK_D, True)
    out = load_rows(out_rows, do.first, CODE.BLOCK_M, CODE.BLOCK_D, True)
    found = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)
    return tl.where(tl.abs(found) < float("inf"), found, 0.0)


@triton.jit
def term_of_largest_weight(gap, alpha, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """What a row's largest weight, (-gap)^(1/(alpha-1)), has for alpha_term, which is taken off all: as sum ds = 0 only
    rounding changes, and where weights are nearly equal so are the terms. Of no use for alpha = 1, where it is 0."""
    if not fixed_alpha(ALPHA):
        return alpha_term(-gap, log2(-gap, EXACT) / (alpha - 1.0), alpha)
    else:
        return gap  # code for one alpha has no gradient of it


# ---- what grad_key_value is told of each row -------------------------------------------------------------------------


class RowTerms(NamedTuple):
    """Of rows: tau, delta, and the normaliser, by which EXACT code multiplies weights; NaN for broken rows. Other code
    needs none: there its place holds 0, or NaN for broken rows, which is added to weights and so makes them NaN."""

    threshold: Threshold
    delta: tl.tensor
    normaliser: tl.tensor


@triton.jit
def store_terms(place, terms, mask):
    tl.store(place, terms.threshold.high, mask=mask)
    tl.store(place + 1, terms.threshold.low, mask=mask)
    tl.store(place + 2, terms.delta, mask=mask)
    tl.store(place + 3, terms.normaliser, mask=mask)


@triton.jit
def load_terms(row_terms, first, limit, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """The RowTerms of rows as in load_rows; those from `limit` on weigh nothing. A vector that gathers rows has
    UNLIMITED in places that it does not need; 4 * UNLIMITED overflows to 0, so they get the terms of row 0, which does
    no harm: as rows beyond the sequence they see no key. One load, as those of fewer numbers than there are threads are
    repeated by all threads that need a number."""
    if len(first.shape) > 0:
        place = tl.reshape(4 * first[:, None] + tl.arange(0, 4)[None, :], [4 * ROWS])
    else:
        row_terms += 4 * first
        limit -= first
        place = tl.arange(0, 4 * ROWS)
    x = tl.load(row_terms + place, mask=place < 4 * limit, other=float("inf")) if MASKED else tl.load(row_terms + place)
    even, odd = tl.split(tl.reshape(x, [ROWS, 2, 2]))
    high, delta = tl.split(even)
    low, normaliser = tl.split(odd)
    return RowTerms(Threshold(high, low), delta, normaliser)
