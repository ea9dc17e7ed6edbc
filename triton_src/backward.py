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
    append,
    cast,
    dot,
    hide,
    load_rows,
    load_signed,
    ordered_tile,
    part_of,
    products,
    program,
    score_scale,
    sequence,
    sign_of,
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
    query, query_batch, query_head, query_row,
    key, key_batch, key_head, key_row,
    value, value_batch, value_head, value_row,
    grad_out, grad_out_batch, grad_out_head, grad_out_row,
    grad_query, grad_query_batch, grad_query_head, grad_query_row,
    delta, row_state, tiles, lists, lengths_q, lengths_k, state_batch,
    heads, group, rows_q, rows_k, limit_q, limit_k, tile_rows, tile_words, width, width_v,
    kind_q, kind_k, window_left, window_right, scale, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """dq, and delta for grad_key_value. Programs: ceil(limit_q / BLOCK_M) * heads * batch."""
    block, head, batch = program(tl.cdiv(limit_q, BLOCK_M), heads)
    offset_q, length_q, extent_q = sequence(lengths_q, kind_q, batch, rows_q, limit_q)
    offset_k, length_k, _extent_k = sequence(lengths_k, kind_k, batch, rows_k, limit_k)
    query += batch * query_batch + head * query_head + offset_q * query_row
    key += batch * key_batch + (head // group) * key_head + offset_k * key_row
    value += batch * value_batch + (head // group) * value_head + offset_k * value_row
    grad_out += batch * grad_out_batch + head * grad_out_head + offset_q * grad_out_row
    grad_query += batch * grad_query_batch + head * grad_query_head + offset_q * grad_query_row
    first_state = batch * state_batch + head * rows_q + offset_q
    tiles_q, tiles_k = tl.cdiv(limit_q, TILE), tl.cdiv(limit_k, TILE)

    first_row = (tl.cdiv(limit_q, BLOCK_M) - 1 - block) * BLOCK_M  # in causal order the last are longest, and go first
    row = first_row + tl.arange(0, BLOCK_M)
    first_key, end_key = visible_keys(row, length_q, length_k, window_left, window_right)
    sign = sign_of(scale)
    q = load_signed(query, first_row, length_q, query_row, width, sign, BLOCK_M, PAD, STEP)
    do = load_signed(grad_out, first_row, length_q, grad_out_row, width_v, 1.0, BLOCK_M, PAD, STEP)
    m, t = load_state(row_state + 2 * first_state, row, length_q)
    factor = score_scale(scale, alpha)

    # The tiles to visit: those with weight in any half of the block, inner ones first.
    HALVES: tl.constexpr = BLOCK_M // TILE
    SPLIT: tl.constexpr = TILE // BLOCK_N  # a tile is visited in so many steps
    half = tl.arange(0, HALVES)
    place = (batch * heads + head) * tiles_q + first_row // TILE
    tiles += ((batch * heads + head) * tile_rows + first_row // TILE) * tile_words
    listed = lists + place * tiles_k
    known = (first_row // TILE + half < tiles_q)[:, None]
    first, inner_first, inner, edge = visible_tiles(
        first_row, BLOCK_M, length_q, length_k, window_left, window_right, TILE
    )
    count = 0
    inner_count = 0
    for start in range(0, inner + edge, 64):
        index = start + tl.arange(0, 64)
        tile = ordered_tile(index, first, inner_first, inner)
        bit = tile_bit(tiles + half[:, None] * tile_words, tile[None, :], known & (index < inner + edge)[None, :])
        wanted = tl.max(bit.to(tl.int32), 0) > 0
        count = append(listed, count, tile, wanted)
        inner_count += tl.sum((wanted & (index < inner)).to(tl.int32), 0)
    tl.debug_barrier()

    sum_u = tl.zeros([BLOCK_M], tl.float32)
    sum_d = tl.zeros([BLOCK_M], tl.float32)  # sum u (dP - c)
    c = tl.zeros([BLOCK_M], tl.float32)
    sum_dk = tl.zeros([BLOCK_M, PAD], tl.float32)  # sum u (dP - c) k
    sum_uk = tl.zeros([BLOCK_M, PAD], tl.float32)
    for EDGE in tl.static_range(2):
        for index in range(inner_count * SPLIT if EDGE else 0, (count if EDGE else inner_count) * SPLIT):
            first_j = tl.load(listed + index // SPLIT) * TILE + part_of(index, SPLIT) * BLOCK_N
            k = load_rows(key, first_j, length_k, key_row, width, BLOCK_N, PAD, EDGE)
            s = products(
                q, query, first_row, length_q, query_row, key, first_j, length_k, key_row, width, sign,
                BLOCK_M, BLOCK_N, PAD, STEP, EDGE,
            )  # fmt: skip
            if EDGE:
                s = hide(s, first_key, end_key, 0, first_j + tl.arange(0, BLOCK_N))
            _p, u = weights(s * factor - m[:, None], t[:, None], alpha, ALPHA)
            dp = products(
                do, grad_out, first_row, length_q, grad_out_row, value, first_j, length_k, value_row, width_v, 1.0,
                BLOCK_M, BLOCK_N, PAD, STEP, EDGE,
            )  # fmt: skip
            here_u = tl.sum(u, 1)
            here_d = tl.sum(u * dp, 1)
            c = tl.where((sum_u == 0.0) & (here_u > 0.0), here_d / here_u, c)
            sum_u += here_u
            sum_d += here_d - c * here_u
            sum_dk = dot(cast(u * (dp - c[:, None]), k.dtype), k, sum_dk)
            sum_uk = dot(cast(u, k.dtype), k, sum_uk)

    mean = tl.where(sum_u > 0.0, sum_d / sum_u, 0.0)  # delta - c
    mean = tl.where(t == t, mean, float("nan"))
    sees = first_key < end_key  # the other rows' queries and incoming gradients may be anything
    dq = tl.where(sees[:, None], (sum_dk - mean[:, None] * sum_uk) * scale, 0.0)
    tl.store(delta + first_state + row, tl.where(sees, mean + c, 0.0), mask=row < extent_q)
    store_rows(
        grad_query, cast(dq, grad_query.dtype.element_ty), first_row, extent_q, grad_query_row, width, BLOCK_M, PAD
    )


@triton.jit
def grad_key_value(
    query, query_batch, query_head, query_row,
    key, key_batch, key_head, key_row,
    value, value_batch, value_head, value_row,
    grad_out, grad_out_batch, grad_out_head, grad_out_row,
    grad_key, grad_key_batch, grad_key_head, grad_key_row,
    grad_value, grad_value_batch, grad_value_head, grad_value_row,
    delta, row_state, tiles, lists, lengths_q, lengths_k, state_batch,
    heads, group, rows_q, rows_k, limit_q, limit_k, tile_rows, tile_words, width, width_v,
    kind_q, kind_k, window_left, window_right, scale, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """dk and dv: a block of keys against the query tiles, of all heads that share it, where it holds weight.

    Programs: ceil(limit_k / BLOCK_N) * heads / group * batch. Blocks are transposed: keys down, queries across."""
    block, head_kv, batch = program(tl.cdiv(limit_k, BLOCK_N), heads // group)
    offset_q, length_q, _extent_q = sequence(lengths_q, kind_q, batch, rows_q, limit_q)
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
    sign = sign_of(scale)
    k = load_signed(key, first, length_k, key_row, width, sign, BLOCK_N, PAD, STEP)
    v = load_signed(value, first, length_k, value_row, width_v, 1.0, BLOCK_N, PAD, STEP)
    factor = score_scale(scale, alpha)

    # The query tiles to visit, as head in the group * tiles_q + tile: those whose rows all see all keys from the front
    # of the list, the others from its end.
    PARTS: tl.constexpr = BLOCK_N // TILE
    SPLIT: tl.constexpr = TILE // BLOCK_M  # a tile is visited in so many steps
    CHUNK: tl.constexpr = 64
    entries = group * tiles_q
    part = first // TILE + tl.arange(0, PARTS)
    first_tiles = batch * heads + first_head
    tiles += first_tiles * tile_rows * tile_words
    listed = lists + first_tiles * tiles_q * tiles_k + (first // TILE) * entries
    inner_count = 0
    edge_count = 0
    for start in range(0, entries, CHUNK):
        entry = start + tl.arange(0, CHUNK)
        first_row = entry % tiles_q * TILE
        last_row = tl.minimum(first_row + TILE, length_q) - 1
        _first, end_key = visible_keys(first_row, length_q, length_k, window_left, window_right)
        first_key, _end = visible_keys(last_row, length_q, length_k, window_left, window_right)
        whole = (first_key <= first) & (first + BLOCK_N <= end_key) & (first_row + TILE <= length_q)
        known = (entry < entries)[:, None] & (part < tiles_k)[None, :]
        words = (entry // tiles_q * tile_rows + entry % tiles_q) * tile_words
        bit = tile_bit(tiles + words[:, None], part[None, :], known)
        wanted = tl.max(bit.to(tl.int32), 1) > 0
        inner_count = append(listed, inner_count, entry, wanted & whole)
        edge_count = append(listed + entries - 1, edge_count, entry, wanted & ~whole, -1)
    tl.debug_barrier()

    dk = tl.zeros([BLOCK_N, PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, PAD], tl.float32)
    for EDGE in tl.static_range(2):
        for index in range((entries - edge_count) * SPLIT if EDGE else 0, (entries if EDGE else inner_count) * SPLIT):
            entry = tl.load(listed + index // SPLIT)
            member, first_row = entry // tiles_q, entry % tiles_q * TILE + part_of(index, SPLIT) * BLOCK_M
            row = first_row + tl.arange(0, BLOCK_M)
            here_q = query + member * query_head
            here_do = grad_out + member * grad_out_head
            q = load_rows(here_q, first_row, length_q, query_row, width, BLOCK_M, PAD, EDGE)
            do = load_rows(here_do, first_row, length_q, grad_out_row, width_v, BLOCK_M, PAD, EDGE)
            if EDGE:  # rows that see nothing may hold anything, and 0 * NaN would reach the sums
                first_key, end_key = visible_keys(row, length_q, length_k, window_left, window_right)
                sees = (first_key < end_key)[:, None]
                q = tl.where(sees, q, 0.0)
                do = tl.where(sees, do, 0.0)
            state = first_state + member.to(tl.int64) * rows_q
            m, t = load_state(row_state + 2 * state, row, length_q)
            shift = tl.load(delta + state + row, mask=row < length_q, other=0.0)
            s = products(
                k, key, first, length_k, key_row, here_q, first_row, length_q, query_row, width, sign,
                BLOCK_N, BLOCK_M, PAD, STEP, EDGE,
            )  # fmt: skip
            if EDGE:
                s = hide(s, first_key, end_key, 1, key_index)
            p, u = weights(s * factor - m[None, :], t[None, :], alpha, ALPHA)
            dv = dot(cast(p, do.dtype), do, dv)
            dp = products(
                v, value, first, length_k, value_row, here_do, first_row, length_q, grad_out_row, width_v, 1.0,
                BLOCK_N, BLOCK_M, PAD, STEP, EDGE,
            )  # fmt: skip
            ds = u * (dp - shift[None, :])
            if EDGE:
                ds = tl.where(u == 0.0, 0.0, ds)  # 0 * NaN
            dk = dot(cast(ds, q.dtype), q, dk)

    store_rows(
        grad_key, cast(dk * scale, grad_key.dtype.element_ty), first, extent_k, grad_key_row, width, BLOCK_N, PAD
    )
    store_rows(
        grad_value, cast(dv, grad_value.dtype.element_ty), first, extent_k, grad_value_row, width_v, BLOCK_N, PAD
    )
