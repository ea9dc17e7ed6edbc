"""The forward: a program looks at every key tile its rows see once, solves for tau, and gathers where it must.

For a block of query rows and the keys j that a row sees,
    m = max_j z_j,    p_j = [z_j - tau]+^(1/(alpha-1)) with sum_j p_j = 1,    out = sum_j p_j v_j,
and only keys with z_j > m - 1 can have weight. A running maximum knows a superset of those: while it finds m, `scan`
writes four numbers a tile, one for 16 rows: the largest (row's maximum in the tile - row's running maximum). It also
keeps the largest score of each of CLASSES classes of keys: a subset of the row's keys, whose tau is a lower bound of
the row's own, and a close one. `attend` then walks the list of the tiles with a number above that bound of t = tau - m:

  1. sums over the row at t, and a step towards the solution, until the next step arrives (mostly once);
  2. the output, divided by the sum of the weights it was made with. That sum also tells whether t was good enough for
     the type: where it was not, the output is made again, a step further, and if need be sums again.
"""

import triton
import triton.language as tl

from .common import (
    ALPHA_1_5,
    ALPHA_2,
    ALPHA_ANY,
    CHUNK,
    GROUP,
    TILE,
    WORD,
    add,
    alpha_of,
    append,
    cast,
    column_counts,
    column_sums,
    dot,
    excess,
    first_tile_row,
    keys_of_block,
    listed_tile,
    load_factor,
    load_rows,
    max_or_nan,
    newton_step,
    ordered_tile,
    part_of,
    program,
    score_scale,
    sequence,
    slope_of,
    stages,
    store_rows,
    threshold_pair,
    threshold_step,
    visible_keys,
    visible_scores,
    visible_tiles,
    weights,
)

CLASSES = tl.constexpr(64)  # of keys, whose maxima scan keeps
# Newton steps towards tau of those: any number gives a lower bound, these come within about a thousandth.
BOUND_STEPS_1_5 = tl.constexpr(3)
BOUND_STEPS = tl.constexpr(5)
# How much an fp32 z - m or a bound of t may be off, relative to m or to 1: a few roundings.
ROUNDING = tl.constexpr(2.0**-21)
ATTEMPTS = tl.constexpr(64)  # a guard: steps converge quadratically


@triton.jit
def scan(
    q, query, first_row, length_q, query_row, key, length_k, key_row, width, numbers,
    first_key, end_key, diagonal, first, inner_first, inner, edge, slope, factor, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """(m, a lower bound of t) of each row. Writes the numbers of each visible tile, as the upper half of an fp32;
    `numbers` are pointers to those of tile 0. BLOCK_N is a multiple of TILE."""
    # Inner tiles are taken BLOCK_N keys at a time; those left over count as edges, which go one by one.
    MANY: tl.constexpr = BLOCK_N // TILE
    whole = inner // MANY * MANY
    edge += inner - whole
    never = tl.where(first_key < end_key, 0.0, float("-inf"))  # rows that see nothing ask for no tile
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of q.k; z follows by one multiplication at the end
    largest = tl.full([BLOCK_M, CLASSES], float("-inf"), tl.float32)
    for EDGE in tl.static_range(1, -1, -1):  # the diagonal first: where queries look nearby, they find m there
        for index in tl.range(edge if EDGE else whole // MANY, num_stages=stages(EDGE, ALPHA)):
            if EDGE:
                tile = ordered_tile(whole + edge - 1 - index, first, inner_first, whole)
            else:
                tile = inner_first + index * MANY
            s = visible_scores(
                q, query, first_row, length_q, query_row, key, tile * TILE, length_k, key_row, width,
                first_key, end_key, diagonal, slope, BLOCK_M, TILE if EDGE else BLOCK_N, PAD, STEP, ALPHA, EDGE,
            )  # fmt: skip
            m, largest, above = maxima(s, m, largest)
            number = largest_of_groups(above + (tl.abs(m) * ROUNDING + never)[:, None, None]) * factor
            tiles = tile + tl.arange(0, 1 if EDGE else MANY)
            tl.store(numbers[:, None] + tiles[None, :], upper_half(number))

    m *= factor
    t = tl.full([BLOCK_M], -1.0, tl.float32)
    # Not unrolled: it is rarely much of the time, and would be most of the code.
    for _ in range(BOUND_STEPS_1_5 if ALPHA == ALPHA_1_5 else BOUND_STEPS):
        p, u = weights(excess(largest, factor, (m + t)[:, None], t[:, None], False), alpha, ALPHA, False)
        t += tl.maximum(newton_step(tl.sum(p, 1), tl.sum(u, 1), alpha, ALPHA), 0.0)
    return m, t - (1.0 + tl.abs(m)) * ROUNDING


@triton.jit
def maxima(s, m, largest):
    """(m, largest, (rows, tiles, 4) numbers whose maximum is a tile's largest score less m) with the scores s of some
    tiles' keys. Keys of one class are those that a thread holds itself: equal modulo 8."""
    ROWS: tl.constexpr = s.shape[0]
    TILES: tl.constexpr = s.shape[1] // TILE
    SPAN: tl.constexpr = CLASSES // TILES  # classes that a tile's keys fall into
    here = max_or_nan(tl.reshape(s, [ROWS, TILES, SPAN // 8, TILE // SPAN, 8]), 3)
    largest = tl.maximum(largest, tl.reshape(here, [ROWS, CLASSES]))
    of_tile = max_or_nan(tl.reshape(max_or_nan(here, 2), [ROWS, TILES, 4, 2]), 3)  # of each such thread
    m = tl.maximum(m, max_or_nan(max_or_nan(of_tile, 1), 1), propagate_nan=tl.PropagateNan.ALL)
    return m, largest, of_tile - m[:, None, None]


@triton.jit
def largest_of_groups(x):
    """(groups, tiles): the largest of (rows, tiles, n) in GROUP rows of a tile, NaN only where all are. x is above 0 by
    no more than rounding. As integers, which one instruction reduces over a warp: with the sign bit set the largest
    number is the lowest one, and NaN is above all."""
    bits = x.to(tl.int32, bitcast=True) | -(2**31)
    bits = tl.reshape(bits, [x.shape[0] // GROUP, GROUP, x.shape[1], x.shape[2]])
    bits = tl.reshape(tl.permute(bits, [0, 2, 1, 3]), [x.shape[0] // GROUP, x.shape[1], GROUP * x.shape[2]])
    return tl.min(bits, 2).to(tl.float32, bitcast=True)


@triton.jit
def upper_half(x):
    """The upper 16 bits of an fp32. For x <= 0 that rounds up, so that a number stays a bound."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def list_candidates(listed, numbers, t, first, inner_first, inner, edge):
    """Lists the visible tiles with a number above the lowest t of its rows: (inner ones, all), inner first."""
    threshold = tl.min(tl.reshape(t, [TILE // GROUP, GROUP]), 1)[:, None]
    count = 0
    inner_count = 0
    for start in range(0, inner + edge, CHUNK):
        index = start + tl.arange(0, CHUNK)
        tile = ordered_tile(index, first, inner_first, inner)
        known = index < inner + edge
        number = tl.load(numbers[:, None] + tile[None, :], mask=known[None, :], other=0).to(tl.int32) << 16
        above = number.to(tl.float32, bitcast=True) > threshold
        wanted = known & (tl.max(above.to(tl.int32), 0) > 0)
        count = append(listed, count, tile, wanted)
        inner_count += tl.sum((wanted & (index < inner)).to(tl.int32), 0)
    tl.debug_barrier()  # what other threads wrote is read from here on
    return inner_count, count


@triton.jit
def tolerance(DTYPE: tl.constexpr):
    """How far from 1 the sum of a row's weights may be when the output is divided by it: what the type rounds away."""
    if DTYPE == tl.float32:  # noqa: SIM300
        return 4e-6
    elif DTYPE == tl.float16:  # noqa: SIM300
        return 2.0**-10
    else:
        return 2.0**-7


@triton.jit
def far(DTYPE: tl.constexpr, ALPHA: tl.constexpr):
    """How far from 1 the sum may be for a step that is taken unseen. What it leaves goes with the square of that, on
    usual inputs a tenth of it or less for alpha = 1.5, whose steps know the curve. Found by trying: most blocks of rows
    need no second sum, and few a second output."""
    KNOWN: tl.constexpr = ALPHA == ALPHA_1_5
    if DTYPE == tl.float32:  # noqa: SIM300
        return 0.001
    elif DTYPE == tl.float16:  # noqa: SIM300
        return 0.06 if KNOWN else 0.01
    else:
        return 0.4 if KNOWN else 0.033


@triton.jit
def attend(
    query, query_batch, query_head, query_row,
    key, key_batch, key_head, key_row,
    value, value_batch, value_head, value_row,
    out, out_batch, out_head, out_row,
    row_state, tiles, numbers, lists,
    lengths_q, lengths_k, alphas, slopes, slopes_batch, state_batch,
    heads, group, rows_q, rows_k, limit_q, limit_k, tile_rows, key_tile_rows, tile_words, width, width_v,
    kind_q, kind_k, kind_alpha, has_slopes, window_left, window_right, scale, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAD: tl.constexpr, STEP: tl.constexpr, ALPHA: tl.constexpr,
    SCAN_N: tl.constexpr,
):  # fmt: skip
    """m and t = tau - m of each row into row_state, the output, and one bit for each (64 rows) x (64 keys) tile that
    holds weight.

    Programs: ceil(limit_q / BLOCK_M) * heads * batch; BLOCK_M is TILE. scan takes SCAN_N keys at a time. Scratch:
    `numbers`, (4 ceil(limit_q / 64), ceil(limit_k / 64)) a head, and `lists`, one entry where those have four."""
    block, head, batch = program(tl.cdiv(limit_q, BLOCK_M), heads)
    offset_q, length_q, extent_q = sequence(lengths_q, kind_q, batch, rows_q, limit_q)
    offset_k, length_k, _extent_k = sequence(lengths_k, kind_k, batch, rows_k, limit_k)
    query += batch * query_batch + head * query_head + offset_q * query_row
    key += batch * key_batch + (head // group) * key_head + offset_k * key_row
    value += batch * value_batch + (head // group) * value_head + offset_k * value_row
    out += batch * out_batch + head * out_head + offset_q * out_row
    row_state += 2 * (batch * state_batch + head * rows_q + offset_q)
    tiles_k = tl.cdiv(limit_k, TILE)
    first_row = (tl.cdiv(limit_q, BLOCK_M) - 1 - block) * BLOCK_M  # in causal order the last are longest, and go first
    if first_row >= extent_q:
        return

    row = first_row + tl.arange(0, BLOCK_M)
    diagonal = row + length_k - length_q
    first_key, end_key = visible_keys(row, length_q, length_k, window_left, window_right)
    visible = first_key < end_key
    q = load_factor(query, first_row, length_q, query_row, width, BLOCK_M, PAD, STEP)
    alpha = alpha_of(alphas, kind_alpha, head, alpha, ALPHA)
    factor = score_scale(scale, alpha)
    slope = slope_of(slopes, has_slopes, slopes_batch, batch, head, factor, alpha, ALPHA)
    first, inner_first, inner, edge = visible_tiles(first_row, BLOCK_M, length_q, length_k, window_left, window_right)
    seen_first, seen_end = keys_of_block(first_row, BLOCK_M, length_q, length_k, window_left, window_right)
    tile_row = first_tile_row(kind_q, batch, heads, head, offset_q, tile_rows) + first_row // TILE
    numbers += (tile_row * (TILE // GROUP) + tl.arange(0, TILE // GROUP)) * tiles_k
    listed = lists + tile_row * tiles_k

    m, t = scan(
        q, query, first_row, length_q, query_row, key, length_k, key_row, width, numbers,
        first_key, end_key, diagonal, first, inner_first, inner, edge, slope, factor, alpha,
        BLOCK_M, SCAN_N, PAD, STEP, ALPHA,
    )  # fmt: skip
    finite = visible & (tl.abs(m) + alpha < float("inf"))  # alpha may be NaN
    m = tl.where(finite, m, 0.0)
    t = tl.where(finite, t, float("inf"))  # rows that see nothing, and rows that are NaN, weigh nothing below
    tl.debug_barrier()  # what other threads wrote is read from here on
    inner_count, count = list_candidates(listed, numbers, t, first, inner_first, inner, edge)
    # Half the code, where hiding keys is little of the time: every tile counts as an edge.
    FIRST: tl.constexpr = 1 if ALPHA == ALPHA_ANY else 0
    if FIRST:
        inner_count = 0

    EXACT: tl.constexpr = key.dtype.element_ty == tl.float32
    SPLIT: tl.constexpr = TILE // BLOCK_N  # a tile is visited in so many steps
    acc = tl.zeros([BLOCK_M, PAD], tl.float32)
    sum_p = tl.zeros([BLOCK_M], tl.float32)
    sum_u = tl.zeros([BLOCK_M], tl.float32)
    slope_u = tl.zeros([BLOCK_M], tl.float32)
    solved = t
    moving = finite  # rows that look for t; the others stay as they are, so that no row's bits depend on its neighbours
    attempts = 0
    outputs = 0
    more = 1
    while more > 0:
        # 1. Sums at t, until all rows are a step away. Before a second output they mostly are; for a third it takes new
        # sums, as what sum u is guessed from then is two steps old.
        distant = moving & (outputs % 2 == 0)
        while tl.max(distant.to(tl.int32), 0) > 0:
            high, low = threshold_pair(m, t, EXACT)
            part_p = tl.zeros([BLOCK_M, 8], tl.float32)
            part_u = tl.zeros([BLOCK_M, 8], tl.float32)
            part_n = tl.zeros([BLOCK_M, 8], tl.int32)
            lost = tl.zeros([BLOCK_M, 8], tl.float32)
            for EDGE in tl.static_range(FIRST, 2):
                begin, end = (inner_count * SPLIT, count * SPLIT) if EDGE else (0, inner_count * SPLIT)
                ahead = listed_tile(listed, begin, end, SPLIT)
                for index in tl.range(begin, end, num_stages=stages(EDGE, ALPHA)):
                    first_j = ahead * TILE + part_of(index, SPLIT) * BLOCK_N
                    ahead = listed_tile(listed, index + 1, end, SPLIT)
                    s = visible_scores(
                        q, query, first_row, length_q, query_row, key, first_j, length_k, key_row, width,
                        first_key, end_key, diagonal, slope, BLOCK_M, BLOCK_N, PAD, STEP, ALPHA, EDGE,
                    )  # fmt: skip
                    x = excess(s, factor, high[:, None], low[:, None], EXACT)
                    p, u = weights(x, alpha, ALPHA, EXACT)
                    part_p, lost = add(part_p, lost, column_sums(p), EXACT)
                    if ALPHA == ALPHA_2:
                        part_n += column_counts(x)
                    else:
                        part_u += column_sums(u)
            sum_p = tl.sum(part_p, 1)
            here_u = tl.sum(part_n, 1).to(tl.float32) if ALPHA == ALPHA_2 else tl.sum(part_u, 1)
            near = tl.abs(sum_p - 1.0) <= far(key.dtype.element_ty, ALPHA)
            step, here_u, here_slope = threshold_step(sum_p, here_u, t, near, alpha, ALPHA)
            moved = (t + step != t) & (attempts < ATTEMPTS)
            attempts += 1
            t = tl.where(distant, t + step, t)
            sum_u = tl.where(distant, here_u, sum_u)
            slope_u = tl.where(distant, here_slope, slope_u)
            distant = distant & moved & ~near

        # 2. The output, and its sums.
        high, low = threshold_pair(m, t, EXACT)
        acc = tl.zeros([BLOCK_M, PAD], tl.float32)
        part_p = tl.zeros([BLOCK_M, 8], tl.float32)
        part_u = tl.zeros([BLOCK_M, 8], tl.float32)
        lost = tl.zeros([BLOCK_M, 8], tl.float32)
        weight = tl.zeros([TILE // GROUP], tl.int32)
        for EDGE in tl.static_range(FIRST, 2):
            begin, end = (inner_count * SPLIT, count * SPLIT) if EDGE else (0, inner_count * SPLIT)
            ahead = listed_tile(listed, begin, end, SPLIT)
            for index in tl.range(begin, end, num_stages=stages(EDGE, ALPHA)):
                tile = ahead
                ahead = listed_tile(listed, index + 1, end, SPLIT)
                first_j = tile * TILE + part_of(index, SPLIT) * BLOCK_N
                s = visible_scores(
                    q, query, first_row, length_q, query_row, key, first_j, length_k, key_row, width,
                    first_key, end_key, diagonal, slope, BLOCK_M, BLOCK_N, PAD, STEP, ALPHA, EDGE,
                )  # fmt: skip
                p, u = weights(excess(s, factor, high[:, None], low[:, None], EXACT), alpha, ALPHA, EXACT)
                v = load_rows(value, first_j, seen_end, value_row, width_v, BLOCK_N, PAD, EDGE, seen_first)
                acc = dot(cast(p, v.dtype), v, acc)
                here = column_sums(p)
                part_p, lost = add(part_p, lost, here, EXACT)
                if ALPHA == ALPHA_ANY:
                    here = column_sums(u)
                    part_u += here
                weight = tl.where(part_of(index, SPLIT) > 0, weight, 0)
                here = tl.reshape(here.to(tl.int32, bitcast=True), [TILE // GROUP, GROUP * 8])
                weight = tl.maximum(weight, tl.max(here, 1))  # as integers, which order as numbers from 0 on do
                tl.store(numbers + tile, (weight > 0).to(tl.int16))
        sum_p = tl.sum(part_p, 1)
        here_u = tl.sum(part_u, 1) if ALPHA == ALPHA_ANY else sum_u + slope_u * sum_p
        if ALPHA == ALPHA_1_5:  # u <= -t, so this is a bound: no step passes the maximum, settled support or not
            here_u = tl.maximum(here_u, sum_p / -t)
        step = newton_step(sum_p, here_u, alpha, ALPHA)
        attempts += 1
        outputs += 1
        solved = tl.where(moving, t + step, solved)
        moved = (t + step != t) & (attempts < ATTEMPTS)
        moving = moving & moved & (tl.abs(sum_p - 1.0) > tolerance(key.dtype.element_ty))
        t = tl.where(moving, t + step, t)
        more = tl.max(moving.to(tl.int32), 0)

    broken = visible & ~finite
    m = tl.where(broken, float("nan"), m)
    tl.store(row_state + 2 * row, m, mask=row < extent_q)
    tl.store(row_state + 2 * row + 1, tl.where(broken, float("nan"), solved), mask=row < extent_q)
    acc *= (1.0 / tl.where(finite & (sum_p > 0.0), sum_p, 1.0))[:, None]
    acc = tl.where(broken[:, None], float("nan"), acc)
    store_rows(out, cast(acc, out.dtype.element_ty), first_row, extent_q, out_row, width_v, BLOCK_M, PAD)

    tiles += tile_row * tile_words
    spoilt = tl.max(broken.to(tl.int32), 0) > 0  # NaN goes back to all keys that were seen
    words = tl.arange(0, CHUNK // WORD)
    tl.debug_barrier()
    for start in range(0, tile_words, CHUNK // WORD):
        tile = start * WORD + tl.arange(0, CHUNK)
        seen = (tile >= first) & (tile < first + inner + edge)
        # 1 where a visited tile holds weight; those of scan are negative or NaN
        number = tl.load(numbers[:, None] + tile[None, :], mask=seen[None, :], other=0)
        marked = seen & (spoilt | (tl.max((number == 1).to(tl.int32), 0) > 0))
        bits = tl.reshape(marked.to(tl.int32) << (tile % WORD), [CHUNK // WORD, WORD])
        tl.store(tiles + start + words, tl.sum(bits, 1), mask=start + words < tile_words)
