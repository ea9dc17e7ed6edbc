"""The backward, over the tiles that hold weight and nothing else. No atomics: every gradient has one writer.

With u_j = p_j^(2-alpha) on the support, dP_j = dO.v_j and delta = sum u dP / sum u,
    dS_j = u_j (dP_j - delta),   dq = scale sum_j dS_j k_j,   dk_j = scale sum_rows dS_j q,   dv_j = sum_rows p_j dO.
grad_query finds delta and dq in one pass, since dq / scale = sum u dP k - delta sum u k. So that this difference does
not cancel, a number c of the row near delta is taken off dP first: the mean of dP over the first tile with weight.
"""

import triton
import triton.language as tl

from .common import (
    TILE,
    WORD,
    append,
    cast,
    dot,
    edge_tile,
    hide,
    load_rows,
    score_scale,
    sequence,
    store_rows,
    tile_bit,
    visible_keys,
    visible_tiles,
    weights,
)


@triton.jit
def load_state(row_state, row, limit):
    """(m, t) of rows; rows from `limit` on weigh nothing. NaN rows keep t = NaN."""
    inside = row < limit
    m = tl.load(row_state + 2 * row, mask=inside, other=0.0)
    t = tl.load(row_state + 2 * row + 1, mask=inside, other=float("inf"))
    return m, t


@triton.jit
def grad_query(
    query, key, value, grad_out, grad_query, delta, row_state, tiles, lists, lengths_q, lengths_k,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_out_batch, grad_out_head, grad_out_row, grad_query_batch, grad_query_head, grad_query_row, state_batch,
    heads, group, rows_q, rows_k, limit_q, limit_k, width, width_v, kind_q, kind_k, window_left, window_right,
    scale, alpha,
    BLOCK_M: tl.constexpr, PAD: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """dq, and delta for grad_key_value. Grid (ceil(limit_q / BLOCK_M), heads, batch)."""
    block, head, batch = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offset_q, length_q, extent_q = sequence(lengths_q, kind_q, batch, rows_q, limit_q)
    offset_k, length_k, extent_k = sequence(lengths_k, kind_k, batch, rows_k, limit_k)
    query += batch * query_batch + head * query_head + offset_q * query_row
    key += batch * key_batch + (head // group) * key_head + offset_k * key_row
    value += batch * value_batch + (head // group) * value_head + offset_k * value_row
    grad_out += batch * grad_out_batch + head * grad_out_head + offset_q * grad_out_row
    grad_query += batch * grad_query_batch + head * grad_query_head + offset_q * grad_query_row
    first_state = batch * state_batch + head * rows_q + offset_q
    tiles_q, tiles_k = tl.cdiv(limit_q, TILE), tl.cdiv(limit_k, TILE)

    first_row = block * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    first_key, end_key = visible_keys(row, length_q, length_k, window_left, window_right)
    q = load_rows(query, first_row, length_q, query_row, width, BLOCK_M, PAD, True)
    do = load_rows(grad_out, first_row, length_q, grad_out_row, width_v, BLOCK_M, PAD, True)
    m, t = load_state(row_state + 2 * first_state, row, length_q)
    factor = score_scale(scale, alpha) * tl.where(scale < 0, -1.0, 1.0)

    # The tiles to visit: those with weight in any half of the block, inner ones first.
    HALVES: tl.constexpr = BLOCK_M // TILE
    words = tl.cdiv(tiles_k, WORD)
    half = tl.arange(0, HALVES)
    place = (batch.to(tl.int64) * heads + head) * tiles_q + first_row // TILE
    tiles += place * words
    listed = lists + place * tiles_k
    known = (first_row // TILE + half < tiles_q)[:, None]
    first, inner_first, inner, edge = visible_tiles(
        first_row, BLOCK_M, length_q, length_k, window_left, window_right, TILE
    )
    count = 0
    inner_count = 0
    for EDGE in tl.static_range(2):
        total = edge if EDGE else inner
        for start in range(0, total, 64):
            index = start + tl.arange(0, 64)
            tile = edge_tile(index, first, inner_first, inner) if EDGE else inner_first + index
            bit = tile_bit(tiles + half[:, None] * words, tile[None, :], known & (index < total)[None, :])
            count = append(listed, count, tile, tl.max(bit.to(tl.int32), 0) > 0)
        if not EDGE:
            inner_count = count
    tl.debug_barrier()

    sum_u = tl.zeros([BLOCK_M], tl.float32)
    sum_d = tl.zeros([BLOCK_M], tl.float32)  # sum u (dP - c)
    c = tl.zeros([BLOCK_M], tl.float32)
    sum_dk = tl.zeros([BLOCK_M, PAD], tl.float32)  # sum u (dP - c) k
    sum_uk = tl.zeros([BLOCK_M, PAD], tl.float32)
    for EDGE in tl.static_range(2):
        for index in range(inner_count if EDGE else 0, count if EDGE else inner_count):
            tile = tl.load(listed + index)
            k = load_rows(key, tile * TILE, length_k, key_row, width, TILE, PAD, EDGE)
            v = load_rows(value, tile * TILE, length_k, value_row, width_v, TILE, PAD, EDGE)
            y = dot(q, tl.trans(k)) * factor - m[:, None]
            if EDGE:
                y = hide(y, first_key, end_key, 0, tile * TILE + tl.arange(0, TILE))
            p, u = weights(y, t[:, None], alpha, ALPHA)
            dp = dot(do, tl.trans(v))
            here_u = tl.sum(u, 1)
            here_d = tl.sum(u * dp, 1)
            c = tl.where((sum_u == 0.0) & (here_u > 0.0), here_d / here_u, c)
            sum_u += here_u
            sum_d += here_d - c * here_u
            sum_dk = dot(cast(u * (dp - c[:, None]), k.dtype), k, sum_dk)
            sum_uk = dot(cast(u, k.dtype), k, sum_uk)

    mean = tl.where(sum_u > 0.0, sum_d / sum_u, 0.0)  # delta - c
    mean = tl.where(t == t, mean, float("nan"))
    dq = (sum_dk - mean[:, None] * sum_uk) * scale
    tl.store(delta + first_state + row, mean + c, mask=row < extent_q)
    store_rows(
        grad_query, cast(dq, grad_query.dtype.element_ty), first_row, extent_q, grad_query_row, width, BLOCK_M, PAD
    )


@triton.jit
def grad_key_value(
    query, key, value, grad_out, grad_key, grad_value, delta, row_state, tiles, lists, lengths_q, lengths_k,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    grad_out_batch, grad_out_head, grad_out_row, grad_key_batch, grad_key_head, grad_key_row,
    grad_value_batch, grad_value_head, grad_value_row, state_batch,
    heads, group, rows_q, rows_k, limit_q, limit_k, width, width_v, kind_q, kind_k, window_left, window_right,
    scale, alpha,
    BLOCK_N: tl.constexpr, PAD: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """dk and dv: a block of keys against the query tiles, of all heads that share it, where it holds weight.

    Grid (ceil(limit_k / BLOCK_N), heads / group, batch). Blocks are transposed: keys down, queries across."""
    block, head_kv, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offset_q, length_q, extent_q = sequence(lengths_q, kind_q, batch, rows_q, limit_q)
    offset_k, length_k, extent_k = sequence(lengths_k, kind_k, batch, rows_k, limit_k)
    first_head = head_kv * group
    query += batch * query_batch + first_head * query_head + offset_q * query_row
    grad_out += batch * grad_out_batch + first_head * grad_out_head + offset_q * grad_out_row
    key += batch * key_batch + head_kv * key_head + offset_k * key_row
    value += batch * value_batch + head_kv * value_head + offset_k * value_row
    grad_key += batch * grad_key_batch + head_kv * grad_key_head + offset_k * grad_key_row
    grad_value += batch * grad_value_batch + head_kv * grad_value_head + offset_k * grad_value_row
    first_state = batch * state_batch + first_head * rows_q + offset_q
    tiles_q, tiles_k = tl.cdiv(limit_q, TILE), tl.cdiv(limit_k, TILE)

    first = block * BLOCK_N
    key_index = first + tl.arange(0, BLOCK_N)
    k = load_rows(key, first, length_k, key_row, width, BLOCK_N, PAD, True)
    v = load_rows(value, first, length_k, value_row, width_v, BLOCK_N, PAD, True)
    factor = score_scale(scale, alpha) * tl.where(scale < 0, -1.0, 1.0)

    # The query tiles to visit, as head in the group * tiles_q + tile, those whose rows all see all keys first.
    PARTS: tl.constexpr = BLOCK_N // TILE
    CHUNK: tl.constexpr = 64
    part = first // TILE + tl.arange(0, PARTS)
    words = tl.cdiv(tiles_k, WORD)
    place = (batch.to(tl.int64) * heads + first_head) * tiles_q
    listed = lists + place * tiles_k + (first // TILE) * group.to(tl.int64) * tiles_q
    count = 0
    inner_count = 0
    for EDGE in tl.static_range(2):
        for start in range(0, group * tiles_q, CHUNK):
            entry = start + tl.arange(0, CHUNK)
            first_row = entry % tiles_q * TILE
            last_row = tl.minimum(first_row + TILE, length_q) - 1
            ignored, end_key = visible_keys(first_row, length_q, length_k, window_left, window_right)
            first_key, ignored = visible_keys(last_row, length_q, length_k, window_left, window_right)
            whole = (first_key <= first) & (first + BLOCK_N <= end_key) & (first_row + TILE <= length_q)
            known = (entry < group * tiles_q)[:, None] & (part < tiles_k)[None, :]
            bit = tile_bit(tiles + (place + entry)[:, None] * words, part[None, :], known)
            count = append(listed, count, entry, (tl.max(bit.to(tl.int32), 1) > 0) & (whole != EDGE))
        if not EDGE:
            inner_count = count
    tl.debug_barrier()

    dk = tl.zeros([BLOCK_N, PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, PAD], tl.float32)
    for EDGE in tl.static_range(2):
        for index in range(inner_count if EDGE else 0, count if EDGE else inner_count):
            entry = tl.load(listed + index)
            member, first_row = entry // tiles_q, entry % tiles_q * TILE
            row = first_row + tl.arange(0, TILE)
            q = load_rows(query + member * query_head, first_row, length_q, query_row, width, TILE, PAD, EDGE)
            do = load_rows(
                grad_out + member * grad_out_head, first_row, length_q, grad_out_row, width_v, TILE, PAD, EDGE
            )
            state = first_state + member.to(tl.int64) * rows_q
            m, t = load_state(row_state + 2 * state, row, length_q)
            shift = tl.load(delta + state + row, mask=row < length_q, other=0.0)
            y = dot(k, tl.trans(q)) * factor - m[None, :]
            if EDGE:
                first_key, end_key = visible_keys(row, length_q, length_k, window_left, window_right)
                y = hide(y, first_key, end_key, 1, key_index)
            p, u = weights(y, t[None, :], alpha, ALPHA)
            dv = dot(cast(p, do.dtype), do, dv)
            dp = dot(v, tl.trans(do))
            dk = dot(cast(u * (dp - shift[None, :]), q.dtype), q, dk)

    store_rows(
        grad_key, cast(dk * scale, grad_key.dtype.element_ty), first, extent_k, grad_key_row, width, BLOCK_N, PAD
    )
    store_rows(
        grad_value, cast(dv, grad_value.dtype.element_ty), first, extent_k, grad_value_row, width_v, BLOCK_N, PAD
    )
