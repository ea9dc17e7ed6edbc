"""The backward, over what holds weight and nothing else. No atomics on gradients: every one has one writer.

Within a tile with weight few keys may have any. Of long sequences `mark` first probes how many, for each key head.
Where they are few it notes which, and the kernels after it gather them, if they are MARKED: grad_query the keys that a
block of rows weighs, grad_key_value the rows that weigh a block of keys. Elsewhere the same kernels, not MARKED, walk
tiles. Both are launched, and one of them returns at once: only the GPU knows which.

With u_j = p_j^(2-alpha) on the support, dP_j = dO.v_j and delta = sum u dP / sum u,
    dS_j = u_j (dP_j - delta),   dq = scale sum_j dS_j k_j,   dk_j = scale sum_rows dS_j q,   dv_j = sum_rows p_j dO.
grad_query finds delta and dq in one pass, since dq / scale = sum u dP k - delta sum u k. So that this difference does
not cancel, a number of the row near delta is taken off dP first: c = dO.out, which is sum p dP where delta has u for p.
"""

import triton
import triton.language as tl

from .common import (
    ALPHA_ANY,
    ALPHA_NUMBER,
    CHUNK,
    GROUP,
    PROBED,
    ROOM,
    TILE,
    WORD,
    add,
    alpha_of,
    alpha_term,
    append,
    bits_set,
    cast,
    column_sums,
    dot,
    excess,
    far_away,
    first_row_that_sees,
    first_tile_row,
    gathers,
    hide,
    keys_of_block,
    list_marked,
    list_weighing,
    listed_step,
    listed_tile,
    load_factor,
    load_rows,
    log2,
    marks_of,
    numbers_of,
    part_of,
    products,
    program,
    rows_of_step,
    score_scale,
    sequence,
    slope_of,
    stages,
    store_rows,
    threshold_pair,
    visible_keys,
    visible_scores,
    visible_tiles,
    weights,
)


@triton.jit
def load_thresholds(row_state, place, inside, EXACT: tl.constexpr):
    """(high, low, t) of the rows at some places: what `excess` takes, and t, NaN for NaN rows. Rows that are not
    `inside` weigh nothing."""
    m = tl.load(row_state + 2 * place, mask=inside, other=0.0)
    t = tl.load(row_state + 2 * place + 1, mask=inside, other=float("inf"))
    high, low = threshold_pair(m, t, EXACT)
    return high, low, t


@triton.jit
def mark(
    query, query_batch, query_head, query_row,
    key, key_batch, key_head, key_row,
    row_state, tiles, lists, key_marks, row_marks, shares, gather_below, probe_from,
    lengths_q, lengths_k, alphas, slopes, slopes_batch, state_batch,
    heads, group, rows_q, rows_k, limit_q, limit_k, tile_rows, key_tile_rows, tile_words, width, width_v,
    kind_q, kind_k, kind_alpha, has_slopes, window_left, window_right, scale, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Which keys of a tile with weight some row weighs, and which rows weigh some key: two words of bits each. Rows
    that are NaN weigh all. Of other tiles nothing is written, and nothing read. As a probe, if `probe_from` is above 0,
    it adds to the `shares` of a key head how many keys weigh, and of how many, in some tiles of sequences as long.

    Programs: ceil(limit_q / BLOCK_M) * heads * batch, of a probe the PROBED-th part of the blocks; BLOCK_M is TILE.
    Scratch: two words of `key_marks` and four numbers of `row_marks` where `lists` has an entry."""
    blocks = tl.cdiv(limit_q, BLOCK_M)
    block, head, batch = program(tl.where(probe_from > 0, tl.cdiv(blocks, PROBED), blocks), heads)
    block *= tl.where(probe_from > 0, PROBED, 1)
    shares += 2 * (batch * (heads // group) + head // group)
    if (probe_from == 0) & (gathers(shares, 0, gather_below) == 0):
        return
    offset_q, length_q, extent_q = sequence(lengths_q, kind_q, batch, rows_q, limit_q)
    offset_k, length_k, _extent_k = sequence(lengths_k, kind_k, batch, rows_k, limit_k)
    query += batch * query_batch + head * query_head + offset_q * query_row
    key += batch * key_batch + (head // group) * key_head + offset_k * key_row
    first_state = batch * state_batch + head * rows_q + offset_q
    tiles_k = tl.cdiv(limit_k, TILE)
    if probe_from > 0:  # as if the sequence were alone, so that what is done does not depend on others
        if tl.minimum(length_q, length_k) < probe_from:
            return
        blocks = tl.cdiv(length_q, BLOCK_M)
    first_row = (blocks - 1 - block) * BLOCK_M  # in causal order the last are longest, and go first
    if (first_row < 0) | (first_row >= extent_q):
        return

    row = first_row + tl.arange(0, BLOCK_M)
    diagonal = row + length_k - length_q
    first_key, end_key = visible_keys(row, length_q, length_k, window_left, window_right)
    q = load_factor(query, first_row, length_q, query_row, width, BLOCK_M, PAD, STEP)
    EXACT: tl.constexpr = key.dtype.element_ty == tl.float32
    high, low, t = load_thresholds(row_state, first_state + row, row < length_q, EXACT)
    alpha = alpha_of(alphas, kind_alpha, head, alpha, ALPHA)
    factor = score_scale(scale, alpha)
    slope = slope_of(slopes, has_slopes, slopes_batch, batch, head, factor, alpha, ALPHA)

    SPLIT: tl.constexpr = TILE // BLOCK_N  # a tile is visited in so many steps
    tile_row = first_tile_row(kind_q, batch, heads, head, offset_q, tile_rows) + first_row // TILE
    listed = lists + tile_row * tiles_k
    key_marks += tile_row * tiles_k * (TILE // WORD)
    row_marks += tile_row * tiles_k * (TILE // GROUP)
    FIRST: tl.constexpr = 1 if ALPHA == ALPHA_ANY else 0  # every tile counts as an edge, as in `attend`
    first, inner_first, inner, edge = visible_tiles(first_row, BLOCK_M, length_q, length_k, window_left, window_right)
    every = tl.where(probe_from > 0, tl.maximum((inner + edge) // PROBED, 1), 1)
    tiles += tile_row * tile_words
    inner_count, count = list_weighing(listed, tiles, first, inner_first, inner, edge, FIRST, every)
    word = tl.arange(0, TILE // WORD)
    for start in range(0, count, CHUNK):
        index = start + tl.arange(0, CHUNK)
        tile = tl.load(listed + index, mask=index < count, other=0)
        no_bits = tl.zeros([CHUNK, TILE // WORD], tl.int32)
        tl.store(key_marks + tile[:, None] * (TILE // WORD) + word[None, :], no_bits, mask=(index < count)[:, None])
    tl.debug_barrier()

    groups = tl.arange(0, TILE // GROUP)
    of_step = tl.arange(0, BLOCK_N // WORD)
    row_bits = tl.zeros([TILE // GROUP], tl.int32)
    for EDGE in tl.static_range(FIRST, 2):
        begin, end = (inner_count * SPLIT, count * SPLIT) if EDGE else (0, inner_count * SPLIT)
        ahead = listed_tile(listed, begin, end, SPLIT)
        for index in tl.range(begin, end, num_stages=stages(EDGE, ALPHA)):
            tile = ahead
            ahead = listed_tile(listed, index + 1, end, SPLIT)
            part = part_of(index, SPLIT)
            s = visible_scores(
                q, query, first_row, length_q, query_row, key, tile * TILE + part * BLOCK_N, length_k, key_row, width,
                first_key, end_key, diagonal, slope, BLOCK_M, BLOCK_N, PAD, STEP, ALPHA, EDGE,
            )  # fmt: skip
            key_bits, here = marks_of(s, factor, high, low, t != t, EXACT)
            # Each group of rows for itself: no warp waits for another.
            place = key_marks + tile * (TILE // WORD) + part * (BLOCK_N // WORD) + of_step
            place = place[None, :] + tl.zeros(key_bits.shape, tl.int32)  # 3.6's interpreter misreads a broadcast_to
            tl.atomic_or(place, key_bits, mask=key_bits != 0, sem="relaxed")
            row_bits = tl.where(part > 0, row_bits, 0) | here
            tl.store(row_marks + tile * (TILE // GROUP) + groups, row_bits.to(tl.int16))

    if probe_from > 0:
        weigh = 0
        tl.debug_barrier()
        for start in range(0, count, CHUNK):
            entry = start + tl.arange(0, CHUNK)
            marked = tl.load(listed + entry, mask=entry < count, other=0)
            place = key_marks + marked[:, None] * (TILE // WORD) + word[None, :]
            weigh += tl.sum(tl.sum(bits_set(tl.load(place, mask=(entry < count)[:, None], other=0)), 1), 0)
        tl.atomic_add(shares, weigh, sem="relaxed")
        tl.atomic_add(shares + 1, count * TILE, sem="relaxed")


@triton.jit
def grad_query(
    query, query_batch, query_head, query_row,
    key, key_batch, key_head, key_row,
    value, value_batch, value_head, value_row,
    out, out_batch, out_head, out_row,
    grad_out, grad_out_batch, grad_out_head, grad_out_row,
    grad_query, grad_query_batch, grad_query_head, grad_query_row,
    terms, alpha_terms, row_state, tiles, lists, marks, chosen, shares, gather_below,
    lengths_q, lengths_k, alphas, slopes, slopes_batch, state_batch,
    heads, group, rows_q, rows_k, limit_q, limit_k, tile_rows, key_tile_rows, tile_words, width, width_v,
    kind_q, kind_k, kind_alpha, has_slopes, window_left, window_right, scale, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr, ALPHA: tl.constexpr,
    MARKED: tl.constexpr,
):  # fmt: skip
    """dq, and for grad_key_value four `terms` of each row: what `excess` takes (2), delta, and a share: fp32
    weights are multiplied by it (1 / sum p), to others it is added (0); NaN for NaN rows. `alpha_terms` are the rows'
    parts of the gradient of alpha, where that is asked for. Visits the keys that are in `marks` if MARKED, else all of
    tiles with weight, of the key heads that `shares` say so of; `chosen` is scratch, ROOM entries a block.

    Programs: ceil(limit_q / BLOCK_M) * heads * batch; BLOCK_M is TILE."""
    block, head, batch = program(tl.cdiv(limit_q, BLOCK_M), heads)
    if gathers(shares, batch * (heads // group) + head // group, gather_below) != MARKED:
        return
    offset_q, length_q, extent_q = sequence(lengths_q, kind_q, batch, rows_q, limit_q)
    offset_k, length_k, _extent_k = sequence(lengths_k, kind_k, batch, rows_k, limit_k)
    query += batch * query_batch + head * query_head + offset_q * query_row
    key += batch * key_batch + (head // group) * key_head + offset_k * key_row
    value += batch * value_batch + (head // group) * value_head + offset_k * value_row
    out += batch * out_batch + head * out_head + offset_q * out_row
    grad_out += batch * grad_out_batch + head * grad_out_head + offset_q * grad_out_row
    grad_query += batch * grad_query_batch + head * grad_query_head + offset_q * grad_query_row
    first_state = batch * state_batch + head * rows_q + offset_q
    tiles_k = tl.cdiv(limit_k, TILE)
    first_row = (tl.cdiv(limit_q, BLOCK_M) - 1 - block) * BLOCK_M  # in causal order the last are longest, and go first
    if first_row >= extent_q:
        return

    row = first_row + tl.arange(0, BLOCK_M)
    diagonal = row + length_k - length_q
    first_key, end_key = visible_keys(row, length_q, length_k, window_left, window_right)
    q = load_factor(query, first_row, length_q, query_row, width, BLOCK_M, PAD, STEP)
    do = load_factor(grad_out, first_row, length_q, grad_out_row, width_v, BLOCK_M, PAD, STEP)
    EXACT: tl.constexpr = key.dtype.element_ty == tl.float32
    high, low, t = load_thresholds(row_state, first_state + row, row < length_q, EXACT)
    alpha = alpha_of(alphas, kind_alpha, head, alpha, ALPHA)
    factor = score_scale(scale, alpha)
    slope = slope_of(slopes, has_slopes, slopes_batch, batch, head, factor, alpha, ALPHA)

    # The keys to visit: those that are marked of the tiles with weight, inner ones first.
    tile_row = first_tile_row(kind_q, batch, heads, head, offset_q, tile_rows) + first_row // TILE
    listed = lists + tile_row * tiles_k
    chosen += tile_row * ROOM
    marks += tile_row * tiles_k * (TILE // WORD)
    seen_first, seen_end = keys_of_block(first_row, BLOCK_M, length_q, length_k, window_left, window_right)
    FIRST: tl.constexpr = 1 if ALPHA == ALPHA_ANY else 0  # every tile counts as an edge, as in `attend`
    first, inner_first, inner, edge = visible_tiles(first_row, BLOCK_M, length_q, length_k, window_left, window_right)
    inner_count, count = list_weighing(listed, tiles + tile_row * tile_words, first, inner_first, inner, edge, FIRST)

    rows = do
    if STEP != PAD:
        rows = load_rows(grad_out, first_row, length_q, grad_out_row, width_v, BLOCK_M, PAD, True)
    o = load_rows(out, first_row, length_q, out_row, width_v, BLOCK_M, PAD, True)
    c = tl.sum(rows.to(tl.float32) * o.to(tl.float32), 1)
    c = tl.where(tl.abs(c) < float("inf"), c, 0.0)  # keys of no weight may have made NaN of the output
    if ALPHA == ALPHA_ANY:
        # The term of a row's largest weight, (-t)^(1/(alpha-1)), is taken off all: as sum dS = 0 only rounding changes,
        # and where weights are nearly equal so are the terms.
        largest_term = alpha_term(-t, log2(-t, EXACT) / (alpha - 1.0), alpha)
    part_p = tl.zeros([BLOCK_M, 8], tl.float32)
    lost = tl.zeros([BLOCK_M, 8], tl.float32)
    part_u = tl.zeros([BLOCK_M, 8], tl.float32)
    part_d = tl.zeros([BLOCK_M, 8], tl.float32)  # sum u (dP - c)
    part_ua = tl.zeros([BLOCK_M, 8], tl.float32)  # the same two sums for the gradient of alpha
    part_da = tl.zeros([BLOCK_M, 8], tl.float32)
    sum_dk = tl.zeros([BLOCK_M, PAD], tl.float32)  # sum u (dP - c) k
    sum_uk = tl.zeros([BLOCK_M, PAD], tl.float32)
    start = 0
    while start < count:
        if MARKED:
            n, inner_n, start = list_marked(chosen, listed, 0, marks, 1, start, inner_count, count)
        else:
            n, inner_n, start = count * TILE, inner_count * TILE, count
        for EDGE in tl.static_range(FIRST, 2):
            begin, end = (inner_n // BLOCK_N, tl.cdiv(n, BLOCK_N)) if EDGE else (0, inner_n // BLOCK_N)
            ahead = listed_step(chosen, listed, begin, n, BLOCK_N, MARKED)
            # Steps of a whole tile (D = 64): fewer stages for edges made all of it 4 % slower (docs/cuda.md).
            for index in tl.range(begin, end, num_stages=stages(EDGE and BLOCK_N < TILE, ALPHA)):
                keys = rows_of_step(ahead, index, BLOCK_N, MARKED)
                ahead = listed_step(chosen, listed, index + 1, n, BLOCK_N, MARKED)
                k = load_rows(key, keys, seen_end, key_row, width, BLOCK_N, PAD, EDGE, seen_first)
                s = visible_scores(  # of the same rows of keys: one load for both
                    q, query, first_row, length_q, query_row, key, keys, seen_end, key_row, width,
                    first_key, end_key, diagonal, slope, BLOCK_M, BLOCK_N, PAD, STEP, ALPHA, EDGE, seen_first,
                )  # fmt: skip
                p, u = weights(excess(s, factor, high[:, None], low[:, None], EXACT), alpha, ALPHA, EXACT)
                dp = products(
                    do, grad_out, first_row, length_q, grad_out_row, value, keys, seen_end, value_row, width_v,
                    BLOCK_M, BLOCK_N, PAD, STEP, EDGE, seen_first,
                )  # fmt: skip
                if EXACT:
                    part_p, lost = add(part_p, lost, column_sums(p), True)
                part_u += column_sums(u)
                ds = u * (dp - c[:, None])
                if EDGE:
                    ds = tl.where(u == 0.0, 0.0, ds)  # 0 * NaN
                part_d += column_sums(ds)
                if ALPHA == ALPHA_ANY:  # noqa: SIM102
                    if kind_alpha != ALPHA_NUMBER:
                        term = alpha_term(p, log2(p, EXACT), alpha) - largest_term[:, None]
                        part_ua += column_sums(u * term)
                        part_da += column_sums(ds * term)
                sum_dk = dot(cast(ds, k.dtype), k, sum_dk)
                sum_uk = dot(cast(u, k.dtype), k, sum_uk)

    sum_u = tl.sum(part_u, 1)
    sum_d = tl.sum(part_d, 1)
    mean = tl.where(sum_u > 0.0, sum_d / sum_u, 0.0)  # delta - c
    mean = tl.where(t == t, mean, float("nan"))
    sees = first_key < end_key  # the other rows' queries and incoming gradients may be anything
    dq = tl.where(sees[:, None], (sum_dk - mean[:, None] * sum_uk) * scale, 0.0)
    share = tl.where(t == t, 0.0, float("nan"))
    if EXACT:  # no fp32 threshold makes the sum of thousands of weights quite one
        sum_p = tl.sum(part_p, 1)
        share += 1.0 / tl.where(sum_p == 0.0, 1.0, sum_p)
    share = tl.where(sees, share, 0.0)
    store_terms(terms + 4 * (first_state + row), high, low, tl.where(sees, mean + c, 0.0), share, row < extent_q)
    if ALPHA == ALPHA_ANY:  # noqa: SIM102
        if kind_alpha != ALPHA_NUMBER:
            of_alpha = tl.sum(part_da, 1) - mean * tl.sum(part_ua, 1)
            tl.store(alpha_terms + first_state + row, tl.where(sees, of_alpha, 0.0), mask=row < extent_q)
    store_rows(
        grad_query, cast(dq, grad_query.dtype.element_ty), first_row, extent_q, grad_query_row, width, BLOCK_M, PAD
    )


@triton.jit
def store_terms(place, high, low, delta, share, mask):
    tl.store(place, high, mask=mask)
    tl.store(place + 1, low, mask=mask)
    tl.store(place + 2, delta, mask=mask)
    tl.store(place + 3, share, mask=mask)


@triton.jit
def load_terms(terms, first, limit, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """(high, low, delta, share) of rows as in load_rows; those from `limit` on weigh nothing, but for a vector's absent
    ones (4 * UNLIMITED is 0), which see no key. One load, as those of fewer numbers than there are threads are repeated
    by all threads that need a number."""
    if len(first.shape) > 0:
        place = tl.reshape(4 * first[:, None] + tl.arange(0, 4)[None, :], [4 * ROWS])
    else:
        terms += 4 * first
        limit -= first
        place = tl.arange(0, 4 * ROWS)
    x = tl.load(terms + place, mask=place < 4 * limit, other=float("inf")) if MASKED else tl.load(terms + place)
    even, odd = tl.split(tl.reshape(x, [ROWS, 2, 2]))
    high, delta = tl.split(even)
    low, share = tl.split(odd)
    return high, low, delta, share


@triton.jit
def grad_key_value(
    query, query_batch, query_head, query_row,
    key, key_batch, key_head, key_row,
    value, value_batch, value_head, value_row,
    grad_out, grad_out_batch, grad_out_head, grad_out_row,
    grad_key, grad_key_batch, grad_key_head, grad_key_row,
    grad_value, grad_value_batch, grad_value_head, grad_value_row,
    terms, tiles, lists, marks, chosen, shares, gather_below,
    lengths_q, lengths_k, alphas, slopes, slopes_batch, state_batch,
    heads, group, rows_q, rows_k, limit_q, limit_k, tile_rows, key_tile_rows, tile_words, width, width_v,
    kind_q, kind_k, kind_alpha, has_slopes, window_left, window_right, scale, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr, ALPHA: tl.constexpr,
    MARKED: tl.constexpr,
):  # fmt: skip
    """dk and dv: a block of keys against the query rows, of all heads that share it, where it holds weight; MARKED
    and what goes with it as in grad_query.

    Programs: ceil(limit_k / BLOCK_N) * heads / group * batch; BLOCK_N is TILE. Blocks are transposed: keys down,
    queries across."""
    block, head_kv, batch = program(tl.cdiv(limit_k, BLOCK_N), heads // group)
    if gathers(shares, batch * (heads // group) + head_kv, gather_below) != MARKED:
        return
    offset_q, length_q, _extent_q = sequence(lengths_q, kind_q, batch, rows_q, limit_q)
    offset_k, length_k, extent_k = sequence(lengths_k, kind_k, batch, rows_k, limit_k)
    first_head = head_kv * group
    query += batch * query_batch + first_head * query_head + offset_q * query_row
    grad_out += batch * grad_out_batch + first_head * grad_out_head + offset_q * grad_out_row
    key += batch * key_batch + head_kv * key_head + offset_k * key_row
    value += batch * value_batch + head_kv * value_head + offset_k * value_row
    grad_key += batch * grad_key_batch + head_kv * grad_key_head + offset_k * grad_key_row
    grad_value += batch * grad_value_batch + head_kv * grad_value_head + offset_k * grad_value_row
    terms += 4 * (batch * state_batch + first_head * rows_q + offset_q)
    first = block * BLOCK_N
    if first >= extent_k:
        return

    key_index = first + tl.arange(0, BLOCK_N)
    k = load_factor(key, first, length_k, key_row, width, BLOCK_N, PAD, STEP)
    v = load_factor(value, first, length_k, value_row, width_v, BLOCK_N, PAD, STEP)
    EXACT: tl.constexpr = key.dtype.element_ty == tl.float32

    FIRST: tl.constexpr = 1 if ALPHA == ALPHA_ANY else 0  # every tile counts as an edge, as in `attend`
    tile = first // TILE
    tiles_k = tl.cdiv(limit_k, TILE)
    tiles_q = tl.cdiv(limit_q, TILE)
    tile_row = first_tile_row(kind_q, batch, heads, first_head, offset_q, tile_rows)
    tiles += tile_row * tile_words + tile // WORD
    marks += (tile_row * tiles_k + tile) * (TILE // WORD)
    key_tile_row = first_tile_row(kind_k, batch, heads // group, head_kv, offset_k, key_tile_rows) + tile
    listed = lists + key_tile_row * tiles_q
    chosen += key_tile_row * ROOM
    # Rows before that see nothing: they may hold anything, and 0 * NaN would reach the sums.
    sees_first = first_row_that_sees(length_q, length_k, window_right)

    dk = tl.zeros([BLOCK_N, PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, PAD], tl.float32)
    for member in range(group):
        own_alpha = alpha_of(alphas, kind_alpha, first_head + member, alpha, ALPHA)
        factor = score_scale(scale, own_alpha)
        slope = slope_of(slopes, has_slopes, slopes_batch, batch, first_head + member, factor, own_alpha, ALPHA)
        # The query tiles to visit: those whose rows all see all keys from the front of the list, others from its end.
        inner_count = 0
        edge_count = 0
        tl.debug_barrier()  # the old list may still be read
        for start in range(0, tl.cdiv(length_q, TILE), CHUNK):
            tile_q = start + tl.arange(0, CHUNK)
            first_row = tile_q * TILE
            last_row = tl.minimum(first_row + TILE, length_q) - 1
            _first, end_key = visible_keys(first_row, length_q, length_k, window_left, window_right)
            first_key, _end = visible_keys(last_row, length_q, length_k, window_left, window_right)
            whole = (first_key <= first) & (first + BLOCK_N <= end_key) & (first_row + TILE <= length_q)
            if FIRST:
                whole = first_row < 0
            word = tl.load(tiles + tile_q * tile_words, mask=first_row < length_q, other=0)
            wanted = ((word >> (tile % WORD)) & 1) != 0
            inner_count = append(listed, inner_count, tile_q, wanted & whole)
            edge_count = append(listed + tiles_q - 1, edge_count, tile_q, wanted & ~whole, -1)
        tl.debug_barrier()
        gap = tiles_q - edge_count - inner_count
        count = inner_count + edge_count
        start = 0
        while start < count:
            if MARKED:
                n, inner_n, start = list_marked(chosen, listed, gap, marks, tiles_k, start, inner_count, count)
            else:
                n, inner_n, start = count * TILE, inner_count * TILE, count
            for EDGE in tl.static_range(FIRST, 2):
                begin, end = (inner_n // BLOCK_M, tl.cdiv(n, BLOCK_M)) if EDGE else (0, inner_n // BLOCK_M)
                tiles_listed = listed + gap if EDGE else listed
                ahead = listed_step(chosen, tiles_listed, begin, n, BLOCK_M, MARKED)
                for index in tl.range(begin, end, num_stages=stages(EDGE, ALPHA)):
                    rows = rows_of_step(ahead, index, BLOCK_M, MARKED)
                    ahead = listed_step(chosen, tiles_listed, index + 1, n, BLOCK_M, MARKED)
                    q = load_rows(query, rows, length_q, query_row, width, BLOCK_M, PAD, EDGE, sees_first)
                    do = load_rows(grad_out, rows, length_q, grad_out_row, width_v, BLOCK_M, PAD, EDGE, sees_first)
                    high, low, delta, share = load_terms(terms, rows, length_q, BLOCK_M, EDGE)
                    s = products(
                        k, key, first, length_k, key_row, query, rows, length_q, query_row, width,
                        BLOCK_N, BLOCK_M, PAD, STEP, EDGE, sees_first,
                    )  # fmt: skip
                    row = numbers_of(rows, BLOCK_M)
                    s = far_away(s, slope, row + length_k - length_q, key_index, 1, ALPHA)
                    if EDGE:
                        first_key, end_key = visible_keys(row, length_q, length_k, window_left, window_right)
                        s = hide(s, first_key, end_key, 1, key_index)
                    p, u = weights(excess(s, factor, high[None, :], low[None, :], EXACT), own_alpha, ALPHA, EXACT)
                    p = p * share[None, :] if EXACT else p + share[None, :]
                    if EDGE:
                        p = tl.where(s == float("-inf"), 0.0, p)
                    dv = dot(cast(p, do.dtype), do, dv)
                    dp = products(
                        v, value, first, length_k, value_row, grad_out, rows, length_q, grad_out_row, width_v,
                        BLOCK_N, BLOCK_M, PAD, STEP, EDGE, sees_first,
                    )  # fmt: skip
                    ds = u * (dp - delta[None, :])
                    if EDGE:
                        ds = tl.where(s == float("-inf"), 0.0, ds)  # 0 * NaN
                    dk = dot(cast(ds, q.dtype), q, dk)
        query += query_head
        grad_out += grad_out_head
        terms += 4 * rows_q
        tiles += tile_rows * tile_words
        marks += tile_rows * tiles_k * (TILE // WORD)

    dk *= tl.abs(scale)  # with its sign the queries came; dq takes it as it is, as the keys did not
    store_rows(grad_key, cast(dk, grad_key.dtype.element_ty), first, extent_k, grad_key_row, width, BLOCK_N, PAD)
    store_rows(
        grad_value, cast(dv, grad_value.dtype.element_ty), first, extent_k, grad_value_row, width_v, BLOCK_N, PAD
    )
