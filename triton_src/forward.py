"""The forward: row_max looks at every visible tile once, attend solves for tau and gathers the output where it must.

For a block of query rows and the keys j that a row sees,
    m = max_j z_j,    p_j = [z_j - tau]+^(1/(alpha-1)) with sum_j p_j = 1,    out = sum_j p_j v_j,
and only keys with z_j > m - 1 can have weight. A running maximum knows a superset of those, so row_max, while it finds
m, writes one number a tile: the largest (row's maximum in the tile - row's running maximum). All later passes walk
lists of the tiles whose number is above what is by then known of t = tau - m, which starts at -1 and only rises:

  1. the two largest scores of each of 64 columns of the tiles are kept in registers. They are a subset of the row's
     keys, so the tau of that subset, solved without touching memory again, is a lower bound, mostly a very close one;
  2. sums of p and u over the tiles, Newton's step, until sum p is 1 in all rows; each round also keeps only the tiles
     where something had weight;
  3. the output.
"""

import triton
import triton.language as tl

from .common import (
    TILE,
    WORD,
    append,
    cast,
    dot,
    hide,
    load_rows,
    load_signed,
    max_or_nan,
    newton_step,
    ordered_tile,
    part_of,
    products,
    program,
    score_scale,
    sequence,
    sign_of,
    store_rows,
    visible_keys,
    visible_tiles,
    weights,
)

# Rows stop being refined when their sum of weights is this close to 1; one more step is then taken unseen.
TOLERANCE = tl.constexpr(4e-6)
# How much an fp32 z - m may be off, relative to m: a few roundings.
ROUNDING = tl.constexpr(2.0**-21)


@triton.jit
def row_max(
    query, query_batch, query_head, query_row,
    key, key_batch, key_head, key_row,
    row_state, numbers, lengths_q, lengths_k, state_batch,
    heads, group, rows_q, rows_k, limit_q, limit_k, tile_rows, tile_words, width, width_v,
    kind_q, kind_k, window_left, window_right, scale, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """m of each row into row_state, and the number of each visible (64 rows) x (64 keys) tile into `numbers`.

    Programs: ceil(limit_q / BLOCK_M) * heads * batch. BLOCK_N is a multiple of TILE."""
    block, head, batch = program(tl.cdiv(limit_q, BLOCK_M), heads)
    offset_q, length_q, extent_q = sequence(lengths_q, kind_q, batch, rows_q, limit_q)
    offset_k, length_k, _extent_k = sequence(lengths_k, kind_k, batch, rows_k, limit_k)
    query += batch * query_batch + head * query_head + offset_q * query_row
    key += batch * key_batch + (head // group) * key_head + offset_k * key_row
    tiles_q, tiles_k = tl.cdiv(limit_q, TILE), tl.cdiv(limit_k, TILE)

    first_row = (tl.cdiv(limit_q, BLOCK_M) - 1 - block) * BLOCK_M  # in causal order the last are longest, and go first
    row = first_row + tl.arange(0, BLOCK_M)
    first_key, end_key = visible_keys(row, length_q, length_k, window_left, window_right)
    visible = first_key < end_key
    sign = sign_of(scale)  # goes into q, so that q.k orders keys as z does
    q = load_signed(query, first_row, length_q, query_row, width, sign, BLOCK_M, PAD, STEP)
    factor = score_scale(scale, alpha)

    PARTS: tl.constexpr = BLOCK_N // TILE
    HALVES: tl.constexpr = BLOCK_M // TILE
    half = first_row // TILE + tl.arange(0, HALVES)
    numbers += ((batch * heads + head) * tiles_q + half[:, None]) * tiles_k + tl.arange(0, PARTS)[None, :]
    never = tl.where(visible, 0.0, float("-inf"))  # rows that see nothing ask for no tile

    first, inner_first, inner, edge = visible_tiles(
        first_row, BLOCK_M, length_q, length_k, window_left, window_right, BLOCK_N
    )
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of q.k; z follows by one multiplication at the end
    for EDGE in tl.static_range(2):
        for index in range(edge if EDGE else inner):
            tile = ordered_tile(inner + index if EDGE else index, first, inner_first, inner)
            s = products(
                q, query, first_row, length_q, query_row, key, tile * BLOCK_N, length_k, key_row, width, sign,
                BLOCK_M, BLOCK_N, PAD, STEP, EDGE,
            )  # fmt: skip
            if EDGE:
                s = hide(s, first_key, end_key, 0, tile * BLOCK_N + tl.arange(0, BLOCK_N))
            tile_max = max_or_nan(tl.reshape(s, [BLOCK_M, PARTS, TILE]), 2)
            m = tl.maximum(m, max_or_nan(tile_max, 1), propagate_nan=tl.PropagateNan.ALL)
            above = tile_max - m[:, None] + (tl.abs(m) * ROUNDING + never)[:, None]
            number = tl.max(tl.reshape(above, [HALVES, TILE, PARTS]), 1) * factor
            part = tile * PARTS + tl.arange(0, PARTS)
            tl.store(numbers + tile * PARTS, number, mask=(half < tiles_q)[:, None] & (part < tiles_k)[None, :])

    row_state += 2 * (batch * state_batch + head * rows_q + offset_q)
    tl.store(row_state + 2 * row, m * factor, mask=row < extent_q)


@triton.jit
def list_tiles(
    listed, numbers, threshold, tiles_k, first, inner_first, inner, edge, HALVES: tl.constexpr, CHUNK: tl.constexpr
):
    """Lists the tiles whose number is above the threshold in any half of the block: (inner ones, all), inner first."""
    half = tl.arange(0, HALVES)
    count = 0
    inner_count = 0
    tl.debug_barrier()  # what is read here was written by other threads, and they may still read the old list
    for start in range(0, inner + edge, CHUNK):
        index = start + tl.arange(0, CHUNK)
        tile = ordered_tile(index, first, inner_first, inner)
        known = (index < inner + edge)[None, :]
        number = tl.load(numbers + half[:, None] * tiles_k + tile[None, :], mask=known, other=float("-inf"))
        wanted = tl.max(number, 0) > threshold
        count = append(listed, count, tile, wanted)
        inner_count += tl.sum((wanted & (index < inner)).to(tl.int32), 0)
    tl.debug_barrier()
    return inner_count, count


@triton.jit
def attend(
    query, query_batch, query_head, query_row,
    key, key_batch, key_head, key_row,
    value, value_batch, value_head, value_row,
    out, out_batch, out_head, out_row,
    row_state, tiles, numbers, lists, lengths_q, lengths_k, state_batch,
    heads, group, rows_q, rows_k, limit_q, limit_k, tile_rows, tile_words, width, width_v,
    kind_q, kind_k, window_left, window_right, scale, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Completes row_state with t = tau - m, writes the output and one bit for each tile that holds weight.

    Programs as row_max. `numbers` comes from row_max and is used up; `lists` is scratch."""
    block, head, batch = program(tl.cdiv(limit_q, BLOCK_M), heads)
    offset_q, length_q, extent_q = sequence(lengths_q, kind_q, batch, rows_q, limit_q)
    offset_k, length_k, _extent_k = sequence(lengths_k, kind_k, batch, rows_k, limit_k)
    query += batch * query_batch + head * query_head + offset_q * query_row
    key += batch * key_batch + (head // group) * key_head + offset_k * key_row
    value += batch * value_batch + (head // group) * value_head + offset_k * value_row
    out += batch * out_batch + head * out_head + offset_q * out_row
    row_state += 2 * (batch * state_batch + head * rows_q + offset_q)
    tiles_q, tiles_k = tl.cdiv(limit_q, TILE), tl.cdiv(limit_k, TILE)

    first_row = (tl.cdiv(limit_q, BLOCK_M) - 1 - block) * BLOCK_M  # in causal order the last are longest, and go first
    row = first_row + tl.arange(0, BLOCK_M)
    first_key, end_key = visible_keys(row, length_q, length_k, window_left, window_right)
    visible = first_key < end_key
    sign = sign_of(scale)  # goes into q, so that q.k orders keys as z does
    q = load_signed(query, first_row, length_q, query_row, width, sign, BLOCK_M, PAD, STEP)
    factor = score_scale(scale, alpha)
    m = tl.load(row_state + 2 * row, mask=row < extent_q, other=0.0)
    finite = visible & (tl.abs(m) < float("inf"))
    m = tl.where(finite, m, 0.0)
    t = tl.where(finite, -1.0, float("inf"))  # rows that see nothing, and rows that are NaN, weigh nothing below

    HALVES: tl.constexpr = BLOCK_M // TILE
    half = first_row // TILE + tl.arange(0, HALVES)
    place = (batch * heads + head) * tiles_q + first_row // TILE
    numbers += place * tiles_k
    listed = lists + place * tiles_k
    SPLIT: tl.constexpr = TILE // BLOCK_N  # a tile is visited in so many steps
    column = tl.arange(0, BLOCK_N)
    first, inner_first, inner, edge = visible_tiles(
        first_row, BLOCK_M, length_q, length_k, window_left, window_right, TILE
    )

    # 1. The two largest scores of each column over the candidate tiles, and tau of those.
    inner_count, count = list_tiles(listed, numbers, -1.0, tiles_k, first, inner_first, inner, edge, HALVES, 64)
    largest = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    second = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    for EDGE in tl.static_range(2):
        for index in range(inner_count * SPLIT if EDGE else 0, (count if EDGE else inner_count) * SPLIT):
            tile = tl.load(listed + index // SPLIT)
            first_j = tile * TILE + part_of(index, SPLIT) * BLOCK_N
            s = products(
                q, query, first_row, length_q, query_row, key, first_j, length_k, key_row, width, sign,
                BLOCK_M, BLOCK_N, PAD, STEP, EDGE,
            )  # fmt: skip
            if EDGE:
                s = hide(s, first_key, end_key, 0, first_j + column)
            second = tl.maximum(second, tl.minimum(largest, s))
            largest = tl.maximum(largest, s)
    largest = largest * factor - m[:, None]
    second = second * factor - m[:, None]
    refined = finite
    while tl.max(refined.to(tl.int32), 0) > 0:
        p, u = weights(largest, t[:, None], alpha, ALPHA)
        p2, u2 = weights(second, t[:, None], alpha, ALPHA)
        sum_p, sum_u = tl.sum(p + p2, 1), tl.sum(u + u2, 1)
        risen = tl.where(refined, t + newton_step(sum_p, sum_u, alpha, ALPHA), t)
        refined = (sum_p > 1.0 + TOLERANCE) & (risen > t)
        t = risen

    # 2. Sums over all keys that can have weight. From the second round on the numbers say where there was weight.
    threshold = tl.min(t, 0)
    refined = finite
    while tl.max(refined.to(tl.int32), 0) > 0:
        inner_count, count = list_tiles(
            listed, numbers, threshold, tiles_k, first, inner_first, inner, edge, HALVES, 64
        )
        sum_p = tl.zeros([BLOCK_M], tl.float32)
        sum_u = tl.zeros([BLOCK_M], tl.float32)
        tile_p = tl.zeros([BLOCK_M], tl.float32)
        for EDGE in tl.static_range(2):
            for index in range(inner_count * SPLIT if EDGE else 0, (count if EDGE else inner_count) * SPLIT):
                tile = tl.load(listed + index // SPLIT)
                first_j = tile * TILE + part_of(index, SPLIT) * BLOCK_N
                s = products(
                    q, query, first_row, length_q, query_row, key, first_j, length_k, key_row, width, sign,
                    BLOCK_M, BLOCK_N, PAD, STEP, EDGE,
                )  # fmt: skip
                if EDGE:
                    s = hide(s, first_key, end_key, 0, first_j + column)
                p, u = weights(s * factor - m[:, None], t[:, None], alpha, ALPHA)
                here = tl.sum(p, 1)
                sum_p += here
                sum_u += tl.sum(u, 1)
                tile_p = here + tl.where(part_of(index, SPLIT) > 0, tile_p, 0.0)
                number = tl.max(tl.reshape(tile_p, [HALVES, TILE]), 1)
                tl.store(numbers + tl.arange(0, HALVES) * tiles_k + tile, number, mask=half < tiles_q)
        risen = tl.where(refined, t + newton_step(sum_p, sum_u, alpha, ALPHA), t)
        refined = (sum_p > 1.0 + TOLERANCE) & (risen > t)
        t = risen
        threshold = 0.0

    # 3. The output.
    inner_count, count = list_tiles(listed, numbers, threshold, tiles_k, first, inner_first, inner, edge, HALVES, 64)
    acc = tl.zeros([BLOCK_M, PAD], tl.float32)
    for EDGE in tl.static_range(2):
        for index in range(inner_count * SPLIT if EDGE else 0, (count if EDGE else inner_count) * SPLIT):
            tile = tl.load(listed + index // SPLIT)
            first_j = tile * TILE + part_of(index, SPLIT) * BLOCK_N
            s = products(
                q, query, first_row, length_q, query_row, key, first_j, length_k, key_row, width, sign,
                BLOCK_M, BLOCK_N, PAD, STEP, EDGE,
            )  # fmt: skip
            if EDGE:
                s = hide(s, first_key, end_key, 0, first_j + column)
            p, u = weights(s * factor - m[:, None], t[:, None], alpha, ALPHA)
            v = load_rows(value, first_j, length_k, value_row, width_v, BLOCK_N, PAD, EDGE)
            acc = dot(cast(p, v.dtype), v, acc)

    broken = visible & ~finite
    m = tl.where(broken, float("nan"), m)
    tl.store(row_state + 2 * row, m, mask=row < extent_q)
    tl.store(row_state + 2 * row + 1, tl.where(broken, float("nan"), t), mask=row < extent_q)
    acc = tl.where(broken[:, None], float("nan"), acc)
    store_rows(out, cast(acc, out.dtype.element_ty), first_row, extent_q, out_row, width_v, BLOCK_M, PAD)

    tiles += ((batch * heads + head) * tile_rows + first_row // TILE) * tile_words
    spoilt = tl.max(tl.reshape(broken.to(tl.int32), [HALVES, TILE]), 1) > 0  # NaN goes back to all keys that were seen
    bit = tl.arange(0, WORD)
    index_half = tl.arange(0, HALVES)[:, None]
    for word in range(tile_words):
        tile = word * WORD + bit
        seen = (tile >= first) & (tile < first + inner + edge)
        known = (half < tiles_q)[:, None] & seen[None, :]
        number = tl.load(numbers + index_half * tiles_k + tile[None, :], mask=known, other=float("-inf"))
        marked = (number > threshold) | (spoilt[:, None] & seen[None, :])
        packed = tl.sum(marked.to(tl.int32) << bit[None, :], 1)
        tl.store(tiles + tl.arange(0, HALVES) * tile_words + word, packed, mask=half < tile_rows)
