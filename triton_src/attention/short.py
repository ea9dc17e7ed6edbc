"""The forward where a sequence has few keys: the scores of a block of rows are made once, and stay in registers.

`attend` makes the scores of a tile again whenever it needs them, as those of all keys fit nowhere. Those of 64 rows and
a few hundred keys fit the registers of a program, so that nothing is listed here and nothing comes back from memory:

    row_max     of the scores
    a bound     gap of the largest score of each class of keys, as in `attend`
    gap         sums over all scores and a step, weights there and their sum; again, until that is 1 within what the
                type rounds away
    out         one product of the weights and the values, divided by their sum

A program loads the keys and values of its sequence once, and takes every `sharers`-th block of rows of a head.
"""

from dataclasses import replace
from typing import NamedTuple

import triton
import triton.language as tl

from ..lib.call import (
    block_of_program,
    first_state_row,
    has_many_queries,
    head_in_sequence,
    head_scale,
    key_rows_of,
    query_rows_of,
    tile_row_of,
)
from ..lib.entmax import (
    ALPHA_1_5,
    ALPHA_ANY,
    LOG2_E,
    fixed_alpha,
    newton_step,
    threshold_step,
    weights,
)
from ..lib.marks import any_bits
from ..lib.matrices import ROW_PARTS, Code, any_row, cast, dot, load_rows, max_or_nan
from ..lib.scores import mask_scores, score_rules, scores_of
from ..lib.visibility import TILE, visible_keys, visible_tiles
from ..spec import CALL, MATRIX, Spec
from .forward import ATTEMPTS, ATTEND_PAGED, a_step_away, gap_of_classes, store_results, tolerance


class Weighed(NamedTuple):
    """A block of rows with its keys: their weights, each row's sum of them, bits of the tiles that hold any, and each
    row's gap a step ahead of the one that they are made at."""

    p: tl.tensor
    sum_p: tl.tensor
    tile_bits: tl.tensor
    gap: tl.tensor


@triton.jit
def attend_short(
    query, key, value, out, row_state, tiles, fewest_keys, sharers, call,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """What `attend` leaves of a sequence, for those of fewest_keys to BLOCK_N keys. How many programs share the blocks
    of a head's rows, `sharers`, changes no bit."""
    CODE: tl.constexpr = Code(BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_D, ALPHA, False)
    DTYPE: tl.constexpr = query.data.dtype.element_ty
    sharer, head, batch = block_of_program(sharers, call.heads)
    at = head_in_sequence(call, batch, head)
    mine = (at.keys.length >= fewest_keys) & (at.keys.length <= BLOCK_N) & has_many_queries(call, at.queries)
    blocks = tl.where(mine, tl.cdiv(at.queries.extent, BLOCK_M), 0)
    if sharer >= blocks:
        return
    query_rows = query_rows_of(query, at, call.head_dim, at.queries.length)
    key_rows = key_rows_of(key, at, call.head_dim, at.keys.length)
    value_rows = key_rows_of(value, at, call.value_dim, at.keys.length)
    out_rows = query_rows_of(out, at, call.value_dim, at.queries.extent)
    row_state += 2 * first_state_row(call, at)
    scale = head_scale(call, batch, head, ALPHA)
    keys = load_tiles(key_rows, CODE)
    values = load_rows(value_rows, tl.full([], 0, tl.int32), BLOCK_N, BLOCK_D, True)
    values_broken = 0
    if hides_keys(at.band):
        finite = is_finite(values)
        values = tl.where(finite, values, 0.0)
        values_broken = tl.max(tl.max((~finite).to(tl.int32), 1), 0)

    for block in range(sharer, blocks, sharers):
        first_row = block * BLOCK_M
        row = first_row + tl.arange(0, BLOCK_M)
        visible = visible_keys(row, at.band)
        sees = visible.first < visible.end
        tiles_seen = visible_tiles(first_row, at.band, BLOCK_M)
        q = load_rows(query_rows, first_row, BLOCK_M, BLOCK_D, True)
        rules = score_rules(row, at.band, visible, scale)
        qk = tile_scores(q, keys, rules, tiles_seen.inner * TILE < BLOCK_N, ALPHA)
        largest = largest_of_tiles(qk)
        row_max = max_or_nan(largest, 1) * scale.z
        # As in `attend`: rows that see a NaN or an infinite score are broken, and all rows where alpha is NaN.
        sound = sees & (tl.abs(row_max) + scale.alpha < float("inf"))
        row_max = tl.where(sound, row_max, 0.0)
        below = below_max(qk, row_max, scale)
        weighed = weigh(below, largest, row_max, sound, scale, DTYPE, CODE)
        p = side_by_side(weighed.p)
        weighted = tl.where(sees[:, None], dot(p, values), 0.0)
        if values_broken > 0:
            weighted = tl.where(weighs_broken(p, value_rows, CODE)[:, None], float("nan"), weighted)
        broken = store_results(
            weighted, weighed.sum_p, row_max, weighed.gap, sees, sound, row_state, out_rows, first_row, CODE
        )
        bits = tiles + tile_row_of(call, at, first_row) * call.tile_words
        all_seen = any_row(broken)
        if not fixed_alpha(ALPHA):
            all_seen = all_seen | (scale.alpha == 1.0)
        store_tile_bits(bits, call.tile_words, weighed.tile_bits, tiles_seen, all_seen)


ATTEND_SHORT = Spec(
    attend_short,
    arguments=dict(
        query=MATRIX, key=MATRIX, value=MATRIX, out=MATRIX, row_state="*fp32", tiles="*i32", fewest_keys="i32",
        sharers="i32", call=CALL,
    ),
    writes=("out", "row_state", "tiles"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D", "ALPHA"),
    programs="every `sharers`-th block of BLOCK_M = TILE rows, for sharers * heads * batch",
    shapes="attention",
)  # fmt: skip
# Those of up to so many keys, which take as many registers and as much shared memory, however few there are.
ATTEND_SHORT_256, ATTEND_SHORT_512 = (replace(ATTEND_SHORT, suffix=f"_{keys}") for keys in (256, 512))
ATTEND_SHORT_256_PAGED, ATTEND_SHORT_512_PAGED = (
    replace(ATTEND_SHORT.over_pages(alphas=ATTEND_PAGED.alphas), suffix=f"_{keys}_paged") for keys in (256, 512)
)


# ---- keys and values -------------------------------------------------------------------------------------------------


@triton.jit
def appended(tiles, tile):
    return tiles + (tile,)  # noqa: RUF005 - Triton knows no other form


@triton.jit
def load_tiles(rows, CODE):
    """The rows of a sequence, a tile each: what is computed of a tile's scores at a time needs few registers."""
    tiles = ()
    for tile in tl.static_range(CODE.BLOCK_N // TILE):
        tiles = appended(tiles, load_rows(rows, tl.full([], tile * TILE, tl.int32), TILE, CODE.BLOCK_D, True))
    return tiles


@triton.jit
def hides_keys(band):
    """Whether some row of a sequence does not see some key. Then a value that is not finite must be kept from sums: a
    weight of zero would not keep it from rows that do not see it."""
    lowest = visible_keys(0, band)
    highest = visible_keys(band.query_length - 1, band)
    return (highest.first > 0) | (lowest.end < band.key_length)


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def weighs_broken(p, value_rows, CODE):
    """Which rows give weight to a key whose value is not finite."""
    values = load_rows(value_rows, tl.full([], 0, tl.int32), CODE.BLOCK_N, CODE.BLOCK_D, True)
    broken = tl.max((~is_finite(values)).to(tl.int32), 1)
    return tl.max(tl.where(p.to(tl.float32) > 0.0, broken[None, :], 0), 1) > 0


# ---- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def tile_scores(q, keys, rules, edge, ALPHA: tl.constexpr):
    """The scores of rows and all keys in units of q.k, a block for each tile; `edge` if some row does not see some of
    them. That this is decided at run time also keeps Triton from taking these products and that with the values for a
    chain, of which it would give all warps the same rows, so that eight would hold the scores of 64 rows twice."""
    scores = ()
    for tile in tl.static_range(len(keys)):
        qk = dot(q, tl.trans(keys[tile]))
        key = tl.arange(0, TILE) + tile * TILE
        qk = scores_of(qk, rules, key, 0, ALPHA, False)
        if edge:
            qk = mask_scores(qk, rules, key, 0)
        scores = appended(scores, qk)
    return scores


@triton.jit
def largest_of_tiles(qk):
    """(rows, TILE): the largest score of each class of keys, here those that are equal modulo TILE."""
    largest = qk[0]
    for tile in tl.static_range(1, len(qk)):
        largest = tl.maximum(largest, qk[tile], propagate_nan=tl.PropagateNan.ALL)
    return largest


@triton.jit
def below_max(qk, row_max, scale):
    """z - row_max of all scores."""
    below = ()
    for tile in tl.static_range(len(qk)):
        below = appended(below, qk[tile] * scale.z - row_max[:, None])
    return below


# ---- tau, and the weights --------------------------------------------------------------------------------------------


@triton.jit
def weigh(below, largest, row_max, sound, scale, DTYPE: tl.constexpr, CODE):
    """What is Weighed of the rows that are sound; the others weigh nothing."""
    gap = gap_of_classes(largest, row_max, scale, CODE.ALPHA)
    if fixed_alpha(CODE.ALPHA):
        return solve(below, tl.where(sound, gap, float("inf")), sound, scale, DTYPE, CODE)
    else:  # at alpha = 1 weights of any sum are divided by it, and there is nothing to look for
        softmax = sound & (tl.zeros_like(row_max) + scale.alpha == 1.0)
        gap = tl.where(sound, tl.where(softmax, 0.0, gap), float("inf"))
        weighed = solve(below, gap, sound & ~softmax, scale, DTYPE, CODE)
        gap = tl.where(softmax, tl.maximum(tl.log(weighed.sum_p), 0.0), weighed.gap)
        return Weighed(weighed.p, weighed.sum_p, weighed.tile_bits, gap)


@triton.jit
def solve(below, gap, sound, scale, DTYPE: tl.constexpr, CODE):
    """What is Weighed, from a lower bound of each row's gap."""
    no_weights = ()
    for _ in tl.static_range(len(below)):
        no_weights = appended(no_weights, tl.zeros([CODE.BLOCK_M, TILE], DTYPE))
    weighed = Weighed(no_weights, tl.zeros([CODE.BLOCK_M], tl.float32), tl.full([], 0, tl.int32), gap)
    moving = sound  # rows that look for gap; the others stay as they are: no row's bits depend on its neighbours
    attempts = 0
    more = 1
    while more > 0:
        sum_p, sum_u = sum_weights(below, gap, scale, CODE.ALPHA)
        near = tl.abs(sum_p - 1.0) <= a_step_away(DTYPE, CODE.ALPHA)
        step, sum_u, slope_u = threshold_step(sum_p, sum_u, gap, near, scale.alpha, CODE.ALPHA)
        gap = tl.where(moving, gap + step, gap)
        p, sum_p, here_u, tile_bits = weigh_tiles(below, gap, scale, DTYPE, CODE.ALPHA)
        if CODE.ALPHA != ALPHA_ANY:
            here_u = sum_u + slope_u * sum_p
        if CODE.ALPHA == ALPHA_1_5:  # u <= -gap, so this is a bound: no step passes row_max
            here_u = tl.maximum(here_u, sum_p / -gap)
        ahead = gap + newton_step(sum_p, here_u, scale.alpha, CODE.ALPHA)
        weighed = Weighed(p, sum_p, tile_bits, tl.where(moving, ahead, weighed.gap))
        attempts += 1
        moving = moving & (tl.abs(sum_p - 1.0) > tolerance(DTYPE)) & (ahead != gap) & (attempts < ATTEMPTS)
        gap = tl.where(moving, ahead, gap)
        more = tl.max(moving.to(tl.int32), 0)
    return weighed


@triton.jit
def weights_of(below, gap, scale, ALPHA: tl.constexpr):
    """(p, u) of some keys from z - row_max. NaN gives 0, as rows that see one are broken."""
    above = below - gap[:, None]
    excess = tl.minimum(tl.maximum(above, 0.0), 1.0)
    if fixed_alpha(ALPHA):
        return weights(excess, scale.alpha, ALPHA, False)
    else:
        if scale.alpha == 1.0:
            p = tl.exp2(above * LOG2_E)
            u = p
        else:
            p, u = weights(excess, scale.alpha, ALPHA, False)
        return p, u


@triton.jit
def sum_weights(below, gap, scale, ALPHA: tl.constexpr):
    """(sum p, sum u) of each row."""
    part_p, part_u = weights_of(below[0], gap, scale, ALPHA)
    for tile in tl.static_range(1, len(below)):
        p, u = weights_of(below[tile], gap, scale, ALPHA)
        part_p += p
        part_u += u
    return tl.sum(part_p, 1), tl.sum(part_u, 1)


@triton.jit
def weigh_tiles(below, gap, scale, DTYPE: tl.constexpr, ALPHA: tl.constexpr):
    """(p of all keys, sum p, in the code for any alpha sum u, bits of the tiles that hold weight)."""
    ROWS: tl.constexpr = below[0].shape[0]
    PARTS: tl.constexpr = 2  # of a tile's columns: those of different warps, so that none waits for another
    part_p = tl.zeros([ROWS, PARTS, ROW_PARTS], tl.float32)
    part_u = tl.zeros([ROWS, TILE], tl.float32)
    bits = tl.zeros([ROWS, PARTS, ROW_PARTS], tl.int32)
    found = ()
    for tile in tl.static_range(len(below)):
        p, u = weights_of(below[tile], gap, scale, ALPHA)
        here = tl.sum(tl.reshape(p, [ROWS, PARTS, TILE // ROW_PARTS // PARTS, ROW_PARTS]), 2)
        part_p += here
        bits |= (here > 0.0).to(tl.int32) << tile
        if ALPHA == ALPHA_ANY:
            part_u += u
        found = appended(found, cast(p, DTYPE))
    bits = any_bits(any_bits(any_bits(bits, 2), 1), 0)
    return found, tl.sum(tl.sum(part_p, 2), 1), tl.sum(part_u, 1), bits


@triton.jit
def side_by_side(tiles):
    """One block of all tiles' columns."""
    if len(tiles) == 1:
        return tiles[0]
    else:
        HALF: tl.constexpr = len(tiles) // 2
        both = tl.join(side_by_side(tiles[:HALF]), side_by_side(tiles[HALF:]))
        return tl.reshape(tl.permute(both, [0, 2, 1]), [both.shape[0], 2 * both.shape[1]])


@triton.jit
def store_tile_bits(words, tile_words, bits, tiles_seen, all_seen):
    """The words of a tile row: some bits, or those of all tiles that are seen."""
    seen = ((1 << (tiles_seen.inner + tiles_seen.edge)) - 1) << tiles_seen.first
    bits = tl.where(all_seen, seen, bits & seen)
    word = tl.arange(0, 2)
    for start in range(0, tile_words, 2):
        tl.store(words + start + word, tl.where(start + word == 0, bits, 0))
