"""score_few's work (few.py) where there is an index of keys: most keys are not read, and no bit changes.

The kernels after it ask for exact scores of the keys above row_max - 1 alone; whatever others have, they have no weight
and are in no sum. So instead of all keys

    turn_queries    turns the queries as the codes are turned, and cuts them to whole numbers
    scan_index      bounds every z from both sides, from the codes, and leaves the upper bounds of tiles that may hold
                    weight, each tile's largest, and each row's largest lower bound in a share of its tiles
    score_found     takes the largest of the latter, the row's floor, which row_max is not below; and computes the z of
                    those keys only that may be above it - 1, by the product that score_few forms, to the same bits

With q' the turned query and (n + 1/2) * scale the turned key that a code stands for (csrc/ops/key_index.h),

    |q.k - scale * sum q' (n + 1/2)| <= |q| * error

and with q' = unit * (high + low / 254) + rest, `high` and `low` of 8 bits,

    |sum q' (n + 1/2) - unit * (sum (high + low / 254) * n + sum (high + low / 254) / 2)| <= 127.5 * sqrt(R) * |rest|
"""

import triton
import triton.language as tl

from ..lib.call import block_of_program, has_many_queries, head_in_sequence, head_scale, key_rows_of
from ..lib.codes import LARGEST_NORM, LEVELS, SMALLEST, is_for, norm_of, strides_of, turned, whole_dot
from ..lib.matrices import MATRIX as MATRIX_FIELDS
from ..lib.matrices import dot, load_rows, max_or_nan, offsets_together, pages_of
from ..lib.scores import ScoreRules, scores_of
from ..lib.tile_lists import append
from ..lib.visibility import TILE
from ..lib.waiting import follow, lead
from ..spec import CALL, FEW, KEY_INDEX, MATRIX, Spec
from .few import (
    SCORES,
    few_rows,
    few_rows_at,
    keys_of_rows,
    kv_number,
    least_weighed,
    list_place,
    load_queries,
    row_of,
    score_place,
    share_of,
    tile_place,
    tiles_of,
    visible_of,
)

INDEXED = ("bf16",)  # types whose keys are found by an index; others are read
PLANES = tl.constexpr(2)  # that a turned query is cut to
PLANE_STEPS = tl.constexpr(127.0)  # to each side of zero
BETWEEN = tl.constexpr(254.0)  # steps of the second plane in one of the first
TERMS = tl.constexpr(4)  # numbers that are kept of a turned query, by which bounds are made: unit, middle, slack, norm
NEAR_ONE = tl.constexpr(1 + 2.0**-18)  # by which a norm is certainly not too small
SCORERS_TOGETHER = tl.constexpr(2)  # shares of scan_index that one program of score_found has: it mostly waits
TILES_SIEVED = tl.constexpr(16)  # tiles whose bounds of a row are looked at together
KEYS_SIEVED = tl.constexpr(16 * 64)  # their keys
ROWS_SIEVED = tl.constexpr(4)  # rows that are
SHARES_TOGETHER = tl.constexpr(128)  # shares of a row's tiles whose floors are


# ---- queries ---------------------------------------------------------------------------------------------------------


@triton.jit
def turn_queries(query, index, planes, terms, call, few, BLOCK_D: tl.constexpr, ARCH: tl.constexpr):
    """The planes of a turned query, the first before the second, and the terms by which bounds of q.k are made of
    products with a code's numbers: scale * (unit * product + middle -+ slack) -+ norm * error. Where the index is not
    one for these keys they are such that no bound says anything."""
    lead(ARCH)
    position, head, batch = block_of_program(few.queries, call.heads)
    at = head_in_sequence(call, batch, head)
    if has_many_queries(call, at.queries) | (position >= at.queries.length):
        return
    kv_head, place = row_of(call, few, head, position)
    number = list_place(call, few, at, kv_head, place)
    row = query.data + at.batch * query.batch_stride + at.head * query.head_stride
    row += (at.queries.offset + position) * query.row_stride
    t = turned(row, call.head_dim, BLOCK_D)
    largest = tl.max(tl.abs(t), 0)
    ROOT: tl.constexpr = BLOCK_D**0.5
    # The squares of what is so small are not what they should be.
    norm = tl.where(largest > SMALLEST, norm_of(row, call.head_dim, BLOCK_D) * NEAR_ONE, largest * (2 * ROOT))
    known = is_for(index) & (norm < LARGEST_NORM)
    cut = known & (largest > SMALLEST)
    unit = tl.where(cut, largest / PLANE_STEPS, 0.0)
    steps = tl.where(cut, t / tl.where(cut, unit, 1.0), 0.0)
    high = nearest(steps)
    low = nearest((steps - high) * BETWEEN)
    whole = high + low / BETWEEN
    rest = tl.where(cut, unit * tl.sqrt(tl.sum((steps - whole) * (steps - whole), 0)), norm) * NEAR_ONE
    column = tl.arange(0, BLOCK_D)
    to_planes = planes + number * (PLANES * BLOCK_D) + column
    tl.store(to_planes, high.to(tl.int8))
    tl.store(to_planes + BLOCK_D, low.to(tl.int8))
    to_terms = terms + number * TERMS
    tl.store(to_terms, unit)
    tl.store(to_terms + 1, 0.5 * unit * tl.sum(whole, 0))
    tl.store(to_terms + 2, rest * ROOT * (LEVELS - 0.5))
    tl.store(to_terms + 3, tl.where(known, norm, float("inf")))


@triton.jit
def nearest(x):
    return tl.floor(x + 0.5)


TURN_QUERIES = Spec(
    turn_queries,
    arguments=dict(query=MATRIX, index=KEY_INDEX, planes="*i8", terms="*fp32", call=CALL, few=FEW),
    writes=("planes", "terms"),
    constants=("BLOCK_D", "ARCH"),
    programs="a row, for few.queries * heads * batch",
    scratch=dict(
        planes="PLANES * BLOCK_D bytes for each row of a key head",
        terms="TERMS numbers for each of these rows",
    ),
    shapes="attention",
    alphas=("any",),
    types=INDEXED,
)  # fmt: skip


# ---- bounds ----------------------------------------------------------------------------------------------------------


@triton.jit
def scan_index(
    key, index, planes, terms, scores, tile_max, tile_bounds, floors, call, few,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, ALPHA: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """Upper bounds of z in tiles that may hold weight, the largest of each tile, -inf for the largest z itself, and
    each row's floor in a share of its tiles."""
    follow(ARCH)
    row_blocks = tl.cdiv(few.rows, BLOCK_M)
    program, kv_head, batch = block_of_program(few.scorers * row_blocks, call.heads // call.group)
    at = head_in_sequence(call, batch, kv_head * call.group)
    if has_many_queries(call, at.queries):
        return
    scorer = program // row_blocks  # neighbours read the same codes
    first_row = program % row_blocks * BLOCK_M
    rows = few_rows(first_row, call, few, kv_head, at.queries, BLOCK_M)
    visible = visible_of(rows, at.band)
    mine = share_of(tiles_of(keys_of_rows(visible)), scorer, few.scorers)
    scale = head_scale(call, batch, rows.head, ALPHA)
    rules = ScoreRules(rows.position, at.band, visible, scale.qk_slope[:, None])
    softmax = scale.alpha == 1.0

    number = list_place(call, few, at, kv_head, rows.place)
    of_row = terms + number * TERMS
    unit = tl.load(of_row, mask=rows.real, other=0.0)[:, None]
    middle = tl.load(of_row + 1, mask=rows.real, other=0.0)[:, None]
    slack = tl.load(of_row + 2, mask=rows.real, other=0.0)[:, None]
    norm = tl.load(of_row + 3, mask=rows.real, other=0.0)[:, None]
    # One product for both planes: those of all rows, and below them the others.
    stacked = tl.arange(0, PLANES * BLOCK_M)
    plane = stacked // BLOCK_M
    both = few_rows_at(first_row + stacked % BLOCK_M, call, few, kv_head, at.queries)
    place = list_place(call, few, at, kv_head, both.place) * PLANES + plane
    column = tl.arange(0, BLOCK_D)
    q = tl.load(planes + (place * BLOCK_D)[:, None] + column[None, :], mask=both.real[:, None], other=0)
    worth = tl.where(plane == 0, 1.0, 1.0 / BETWEEN)[:, None]
    page_stride, head_stride = strides_of(index)
    codes = index.codes + kv_head * head_stride
    norms = index.norms + kv_head * (head_stride // 4)

    to_scores = scores + score_place(call, few, at, kv_head, rows.place)
    tile_numbers = tile_place(call, few, at, kv_head, rows.place)
    floor = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for step in tl.range(mine.end - mine.first, num_stages=STAGES):  # said here, all loads are pipelined
        tile = mine.first + step
        keys = tile * TILE + tl.arange(0, BLOCK_N)
        there = keys < at.keys.length
        to_codes = offsets_in_index(key, at, tile * TILE, BLOCK_N, page_stride, BLOCK_D)
        to_norms = offsets_in_index(key, at, tile * TILE, BLOCK_N, page_stride // 4, 1)
        code = tl.load((codes + column)[None, :] + to_codes[:, None], mask=there[:, None], other=0)
        key_scale = tl.load(norms + to_norms, mask=there, other=0.0)[None, :]
        error = tl.load(norms + index.page_size + to_norms, mask=there, other=0.0)[None, :]
        products = whole_dot(q, tl.trans(code.to(tl.int8, bitcast=True))).to(tl.float32) * worth
        product = tl.sum(tl.reshape(products, [PLANES, BLOCK_M, BLOCK_N]), 0)
        # Errors are not negative; what stands there in an index of something else may be, times an infinite norm.
        off = key_scale * slack + norm * tl.abs(error)
        bound = key_scale * (unit * product + middle) + off
        z = scores_of(bound, rules, keys, 0, ALPHA, True) * scale.z[:, None]
        largest = max_or_nan(z, 1)
        tl.store(tile_bounds + tile_numbers + tile, largest, mask=rows.real)
        tl.store(tile_max + tile_numbers + tile, float("-inf"), mask=rows.real)
        # Of a bound that is infinite nothing is known; a maximum loses what is not a number.
        floor = tl.maximum(floor, tl.max(z - 2.0 * off * scale.z[:, None], 1))
        may_weigh = rows.real & (softmax | ~(largest < least_weighed(floor)))
        tl.store(to_scores[:, None] + keys[None, :], z, mask=may_weigh[:, None])
    tl.store(floors + number * few.scorers + scorer, floor, mask=rows.real)
    lead(ARCH)


@triton.jit
def offsets_in_index(key, at, first, ROWS: tl.constexpr, page_stride, row_stride):
    """Where what an index has of ROWS neighbours is, from the first page on, by so many elements from page to page and
    from key to key. A padded sequence is a page."""
    if len(key) > MATRIX_FIELDS:
        stride = page_stride.to(tl.int32)  # see uses_index in csrc/cuda/few.cpp
        return offsets_together(pages_of(key, at.batch), first, ROWS, at.keys.length, stride, row_stride)
    else:
        row = at.keys.offset + first + tl.arange(0, ROWS)
        return at.batch * page_stride + row * row_stride


SCAN_INDEX = Spec(
    scan_index,
    arguments=dict(
        key=MATRIX, index=KEY_INDEX, planes="*i8", terms="*fp32", scores=SCORES, tile_max="*fp32", tile_bounds="*fp32",
        floors="*fp32", call=CALL, few=FEW,
    ),
    writes=("scores", "tile_max", "tile_bounds", "floors"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D", "STAGES", "ALPHA", "ARCH"),
    programs="as of score_few",
    scratch=dict(
        scores="as of score_few",
        tile_max="as of score_few",
        tile_bounds="as tile_max",
        floors="a number for each row of a key head and each of few.scorers",
    ),
    shapes="attention",
    alphas=("any",),
    types=INDEXED,
)  # fmt: skip
SCAN_INDEX_EVEN = SCAN_INDEX.over_even_pages()


# ---- what bounds leave -----------------------------------------------------------------------------------------------


@triton.jit
def score_found(
    query, key, floors, found, scores, tile_max, tile_bounds, call, few,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ALPHA: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """What score_few leaves, but for keys without weight: those of a share's keys whose bound reaches the row's floor
    for any row are listed and scored, 64 at a time. All others keep their bounds, which are as weightless."""
    lead(ARCH)
    follow(ARCH)
    row_blocks = tl.cdiv(few.rows, BLOCK_M)
    scorers = tl.cdiv(few.scorers, SCORERS_TOGETHER)
    program, kv_head, batch = block_of_program(scorers * row_blocks, call.heads // call.group)
    at = head_in_sequence(call, batch, kv_head * call.group)
    if has_many_queries(call, at.queries):
        return
    scorer = program // row_blocks
    block = program % row_blocks
    rows = few_rows(block * BLOCK_M, call, few, kv_head, at.queries, BLOCK_M)
    visible = visible_of(rows, at.band)
    mine = share_of(tiles_of(keys_of_rows(visible)), scorer, scorers)
    if mine.first >= mine.end:
        return

    scale = head_scale(call, batch, rows.head, ALPHA)
    least = tl.full([BLOCK_M], float("inf"), tl.float32)
    entries = found + (kv_number(call, at, kv_head) * row_blocks + block) * call.keys.rows + mine.first * TILE
    here = tl.minimum(few.rows - block * BLOCK_M, BLOCK_M)
    count = 0
    for first in range(mine.first, mine.end, TILES_SIEVED):
        tile = first + tl.arange(0, TILES_SIEVED)
        keys = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        wanted = tl.zeros([TILES_SIEVED, TILE], tl.int1)
        for row in range(0, here, ROWS_SIEVED):
            for other in tl.static_range(ROWS_SIEVED):
                one = few_rows_at(block * BLOCK_M + row + other, call, few, kv_head, at.queries)
                floor = largest_floor(floors + list_place(call, few, at, kv_head, one.place) * few.scorers, one, few)
                # At alpha = 1 all keys have weight.
                softmax = head_scale(call, batch, one.head, ALPHA).alpha == 1.0
                bar = tl.where(softmax, float("-inf"), least_weighed(floor))
                least = tl.where(rows.place == one.place, bar, least)
                # What is not finite compares as if it had weight; hidden keys have -inf and none.
                bounds = tile_bounds + tile_place(call, few, at, kv_head, one.place) + tile
                end = tl.where(one.real, mine.end, 0)
                some = ~(tl.load(bounds, mask=tile < end, other=float("-inf")) < bar) & (tile < end)
                bounds = scores + score_place(call, few, at, kv_head, one.place) + keys
                bound = tl.load(bounds, mask=some[:, None], other=float("-inf"))
                wanted = wanted | (~(bound < bar) & (bound != float("-inf")))
        wanted = wanted & (keys < at.keys.length)
        count = append(entries, count, tl.reshape(keys, [KEYS_SIEVED]), tl.reshape(wanted, [KEYS_SIEVED]))
    tl.debug_barrier()  # what other threads wrote is read from here on

    q = load_queries(query, rows, call, at, BLOCK_D)
    rules = ScoreRules(rows.position, at.band, visible, scale.qk_slope[:, None])
    key_rows = key_rows_of(key, at, call.head_dim, at.keys.length)
    to_scores = scores + score_place(call, few, at, kv_head, rows.place)
    to_maxima = tile_max + tile_place(call, few, at, kv_head, rows.place)
    for first in tl.range(0, count, BLOCK_N):
        entry = first + tl.arange(0, BLOCK_N)
        keys = tl.load(entries + entry, mask=entry < count, other=at.keys.length)
        qk = dot(q, tl.trans(load_rows(key_rows, keys, BLOCK_N, BLOCK_D, True)))
        z = scores_of(qk, rules, keys, 0, ALPHA, True) * scale.z[:, None]
        known = rows.real[:, None] & (entry < count)[None, :]
        tl.store(to_scores[:, None] + keys[None, :], z, mask=known)
        # The largest of a tile, whichever comes first. No order of numbers has a place for NaN, which makes a row NaN
        # as infinity does.
        above = known & ~(z < least[:, None])
        z = tl.where(z == z, z, float("inf"))
        tl.atomic_max(to_maxima[:, None] + (keys // TILE)[None, :], z, mask=above, sem="relaxed")


@triton.jit
def largest_floor(floors, row, few):
    """The largest of one row's floors in all shares."""
    largest = tl.full([SHARES_TOGETHER], float("-inf"), tl.float32)
    for first in range(0, few.scorers, SHARES_TOGETHER):
        share = first + tl.arange(0, SHARES_TOGETHER)
        end = tl.where(row.real, few.scorers, 0)
        largest = tl.maximum(largest, tl.load(floors + share, mask=share < end, other=float("-inf")))
    return tl.max(largest, 0)


SCORE_FOUND = Spec(
    score_found,
    arguments=dict(
        query=MATRIX, key=MATRIX, floors="*fp32", found="*i32", scores=SCORES, tile_max="*fp32", tile_bounds="*fp32",
        call=CALL, few=FEW,
    ),
    writes=("found", "scores", "tile_max"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D", "ALPHA", "ARCH"),
    programs="as of score_few, but for every SCORERS_TOGETHER of few.scorers",
    scratch=dict(
        found="a number for each block of rows of a key head and each key",
        scores="as of score_few",
        tile_max="as of score_few",
    ),
    shapes="attention",
    alphas=("any",),
    types=INDEXED,
)  # fmt: skip
SCORE_FOUND_EVEN = SCORE_FOUND.over_even_pages()
