"""The scan: one look at every key that a block of rows sees, and what it tells of where their weights are.

For a block of query rows and the keys j that a row sees, row_max = max_j z_j, and only keys with z_j > row_max - 1 can
have weight. A running maximum knows a superset of those: while it finds row_max, `scan_tiles` writes four margins a
tile, one for 16 rows: the largest (row's maximum in the tile - row's running maximum). It also keeps the largest score
of each of CLASSES classes of keys: a subset of the row's keys, whose tau is a lower bound of the row's own, and a close
one. Tiles with a margin above the lowest such bound of their 16 rows are candidates.

In a candidate few keys may weigh. The number of classes with a key above the bound tells of how many, without looking
again: `expected_support`.
"""

import triton
import triton.language as tl

from ..lib.entmax import ALPHA_1_5, Threshold, excess_of, newton_step, weights
from ..lib.marks import WARP_ROWS
from ..lib.matrices import ROW_PARTS, Code, max_or_nan
from ..lib.scores import block_scores
from ..lib.tile_lists import list_tiles, stages
from ..lib.visibility import TILE, VisibleTiles, ordered_tile

CLASSES = tl.constexpr(64)  # of keys, whose maxima scan_tiles keeps
# Newton steps towards tau of those: any number gives a lower bound, these come within about a thousandth.
BOUND_STEPS_1_5 = tl.constexpr(3)
BOUND_STEPS = tl.constexpr(5)
# How much an fp32 z - row_max or a bound of gap may be off, relative to row_max or to 1: a few roundings.
ROUNDING = tl.constexpr(2.0**-21)


@triton.jit
def margins_of(tile_margins, tile_row, key_tiles):
    """Pointers to the four margins of a tile row's tile 0."""
    return tile_margins + (tile_row * (TILE // WARP_ROWS) + tl.arange(0, TILE // WARP_ROWS)) * key_tiles


@triton.jit
def sound_rows(row_max, gap, sees, scale):
    """(which rows are sound, row_max, gap), with numbers for the others by which they weigh nothing: rows that see
    nothing, and rows that see a NaN or an infinite score, and all rows where alpha is NaN, which are broken: their
    output is NaN."""
    sound = sees & (tl.abs(row_max) + scale.alpha < float("inf")) & (gap == gap)
    return sound, tl.where(sound, row_max, 0.0), tl.where(sound, gap, float("inf"))


# ---- row_max, and which tiles may hold weight ------------------------------------------------------------------------


@triton.jit
def scan_tiles(queries, sees, tiles_seen, margins, CODE, AHEAD: tl.constexpr):
    """(row_max, a lower bound of gap, the largest score of each of CLASSES classes of keys) of each row. Writes the
    margins of each visible tile, as the upper half of an fp32; `margins` are those of tile 0, see margins_of. BLOCK_N
    is a multiple of TILE."""
    # Inner tiles are taken BLOCK_N keys at a time; those left over count as edges, which go one by one.
    MANY: tl.constexpr = CODE.BLOCK_N // TILE
    EDGE_CODE: tl.constexpr = Code(CODE.BLOCK_M, TILE, CODE.BLOCK_D, CODE.STEP_D, CODE.ALPHA, CODE.EXACT)
    steps = tiles_seen.inner // MANY
    whole = steps * MANY
    edge = tiles_seen.edge + (tiles_seen.inner - whole)
    one_by_one = VisibleTiles(tiles_seen.first, tiles_seen.inner_first, whole, edge)
    never = tl.where(sees, 0.0, float("-inf"))  # added to margins: a row that sees no key makes no tile a candidate
    row_max = tl.full([CODE.BLOCK_M], float("-inf"), tl.float32)  # of q.k; z follows by one multiplication at the end
    largest = tl.full([CODE.BLOCK_M, CLASSES], float("-inf"), tl.float32)
    context = (margins, never, queries.scale.z)
    # The diagonal first: where queries look nearby, they find row_max there.
    for index in tl.range(edge, num_stages=stages(True, CODE.ALPHA)):
        tile = ordered_tile(whole + edge - 1 - index, one_by_one)
        here = class_maxima(block_scores(queries, tile * TILE, EDGE_CODE, True))
        row_max, largest = add_maxima(row_max, largest, here, tile, context, AHEAD)
    if AHEAD:  # see sum_inner in forward.py
        qk = tl.full([CODE.BLOCK_M, CODE.BLOCK_N], float("-inf"), tl.float32)
        here = class_maxima(qk)
        for index in tl.range(steps):
            tile = tiles_seen.inner_first + index * MANY
            qk = block_scores(queries, tile * TILE, CODE, False)
            if steps > 0:
                if index > 0:
                    row_max, largest = add_maxima(row_max, largest, here, tile - MANY, context, AHEAD)
                if index < steps:
                    here = class_maxima(qk)
        if steps > 0:
            here = class_maxima(qk)
            last = tiles_seen.inner_first + whole - MANY
            row_max, largest = add_maxima(row_max, largest, here, last, context, AHEAD)
    else:
        for index in tl.range(steps):
            tile = tiles_seen.inner_first + index * MANY
            here = class_maxima(block_scores(queries, tile * TILE, CODE, False))
            row_max, largest = add_maxima(row_max, largest, here, tile, context, AHEAD)

    row_max *= queries.scale.z
    return row_max, gap_of_classes(largest, row_max, queries.scale, CODE.ALPHA), largest


@triton.jit
def class_maxima(qk):
    """(rows, tiles, classes of a tile, ROW_PARTS) of the scores of some tiles' keys: the largest of each class. Keys of
    one class are equal modulo ROW_PARTS, so that one thread holds them."""
    TILES: tl.constexpr = qk.shape[1] // TILE
    SPAN: tl.constexpr = CLASSES // TILES  # classes that a tile's keys fall into
    return max_or_nan(tl.reshape(qk, [qk.shape[0], TILES, SPAN // ROW_PARTS, TILE // SPAN, ROW_PARTS]), 3)


@triton.jit
def add_maxima(row_max, largest, here, tile, context, AHEAD: tl.constexpr):
    """(row_max, largest) with the maxima of some tiles' keys, of which `tile` is the first. Writes their margins: four
    threads hold a row of a tile, and as a margin is the largest of 16 rows they need not agree on theirs first."""
    margins, never, z_scale = context
    ROWS: tl.constexpr = here.shape[0]
    TILES: tl.constexpr = here.shape[1]
    largest = tl.maximum(largest, tl.reshape(here, [ROWS, CLASSES]))
    of_thread = max_or_nan(tl.reshape(max_or_nan(here, 2), [ROWS, TILES, ROW_PARTS // 2, 2]), 3)
    row_max = tl.maximum(row_max, max_or_nan(max_or_nan(of_thread, 1), 1), propagate_nan=tl.PropagateNan.ALL)
    above = (of_thread - row_max[:, None, None]) + (tl.abs(row_max) * ROUNDING + never)[:, None, None]
    margin = upper_half(largest_of_warps(above) * z_scale)
    place = margins[:, None] + (tile + tl.arange(0, TILES))[None, :]
    if AHEAD:
        store_by_lane(place, margin)
    else:
        tl.store(place, margin)
    return row_max, largest


@triton.jit
def store_by_lane(place, x):
    """Stores (groups, n) numbers, of which all lanes of a warp hold a group, by one lane. A plain store would send them
    to another warp through shared memory, for which all warps wait, in the middle of what is to run beside products."""
    LANES: tl.constexpr = 16
    lane = tl.arange(0, LANES)[None, :, None]
    of_lanes = tl.broadcast_to(x[:, None, :], [x.shape[0], LANES, x.shape[1]])
    tl.store(place[:, None, :] + tl.zeros([1, LANES, 1], tl.int32), of_lanes, mask=lane == 0)


@triton.jit
def gap_of_classes(largest, row_max, scale, ALPHA: tl.constexpr):
    """A lower bound of gap: that of the largest scores of each class of keys, less what rounding may do."""
    gap = tl.full(row_max.shape, -1.0, tl.float32)
    # Not unrolled: it is rarely much of the time, and would be most of the code.
    for _ in range(BOUND_STEPS_1_5 if ALPHA == ALPHA_1_5 else BOUND_STEPS):
        excess = excess_of(largest, scale.z, Threshold(row_max + gap, gap), 0, False)
        p, u = weights(excess, scale.alpha, ALPHA, False)
        gap += tl.maximum(newton_step(tl.sum(p, 1), tl.sum(u, 1), scale.alpha, ALPHA), 0.0)
    return gap - (1.0 + tl.abs(row_max)) * ROUNDING


@triton.jit
def expected_support(largest, row_max, gap, scale):
    """How many keys of a row weigh, if c of n classes have one and keys fall into classes at random: -n ln(1 - c/n),
    infinity if all have. None of a row that is not sound."""
    above = excess_of(largest, scale.z, Threshold(row_max + gap, gap), 0, False) > 0.0
    filled = tl.sum(above.to(tl.int32), 1).to(tl.float32) / CLASSES
    return tl.log(1.0 - filled) * -CLASSES


@triton.jit
def largest_of_warps(x):
    """(groups, tiles): the largest of (rows, tiles, n) in WARP_ROWS rows of a tile, NaN only where all are. x is above
    0 by no more than rounding. As integers, which one instruction reduces over a warp: with the sign bit set the
    largest number is the lowest one, and NaN is above all."""
    GROUPS: tl.constexpr = x.shape[0] // WARP_ROWS
    bits = x.to(tl.int32, bitcast=True) | -(2**31)
    bits = tl.reshape(bits, [GROUPS, WARP_ROWS, x.shape[1], x.shape[2]])
    bits = tl.reshape(tl.permute(bits, [0, 2, 1, 3]), [GROUPS, x.shape[1], WARP_ROWS * x.shape[2]])
    return tl.min(bits, 2).to(tl.float32, bitcast=True)


@triton.jit
def upper_half(x):
    """The upper 16 bits of an fp32. For x <= 0 that rounds up, so that a number stays a bound."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def list_candidates(entries, margins, gap, tiles_seen, ALPHA: tl.constexpr):
    """The TileList of the visible tiles with a margin above the lowest gap of their rows."""
    lowest_gap = tl.min(tl.reshape(gap, [TILE // WARP_ROWS, WARP_ROWS]), 1)[:, None]
    return list_tiles(may_weigh, (margins, lowest_gap), entries, tiles_seen, ALPHA)


@triton.jit
def may_weigh(tile, index, known, context):
    margins, lowest_gap = context
    margin = tl.load(margins[:, None] + tile[None, :], mask=known[None, :], other=0).to(tl.int32) << 16
    above = margin.to(tl.float32, bitcast=True) > lowest_gap
    return known & (tl.max(above.to(tl.int32), 0) > 0)
