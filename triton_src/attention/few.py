"""The forward where a sequence has few queries, as in decoding: its keys are split over programs and read once.

A program of `attend` takes 64 query rows of one head, of which a single new query fills one, and walks all keys alone.
Here a program of `score_few` takes some tiles of keys for the rows of all query heads that share a key head, and leaves
each row's scores and the largest of each tile. The rest is about one row, with little to read, since few keys weigh:

    row_max     the largest of the tiles' largest scores
    a bound     gap of just these scores: a subset of the row's, so a lower bound of the row's own, and a close one
    a list      the keys above it, in tiles whose largest score is above it: a superset of the support
    gap, out    from that list

That is `solve_few`. A row with more than LISTED keys on its list, and any row at alpha = 1, is long: its values are
summed by `weigh_few`, split over programs again, and `join_few` adds up what they found.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..lib.call import (
    Head,
    block_of_program,
    first_state_row,
    has_many_queries,
    head_in_sequence,
    head_scale,
    key_rows_of,
    tile_row_of,
)
from ..lib.entmax import ALPHA_1_5, ALPHA_NUMBER, LOG2_E, fixed_alpha, newton_step, weights
from ..lib.matrices import INTERPRETED, any_row, cast, dot, load_rows, max_or_nan, rows_from
from ..lib.scores import ScoreRules, scores_of
from ..lib.tile_lists import WORD, append, first_tile_row
from ..lib.visibility import TILE, UNLIMITED, Span, visible_keys
from ..lib.waiting import follow, lead
from ..spec import CALL, FEW, MATRIX, Aligned, Spec

LISTED = tl.constexpr(1024)  # keys that a row's list has room for
LISTED_TILES = tl.constexpr(16)  # listed tiles of a row that are looked at together
ROW_TILES = tl.constexpr(32)  # tiles of a long row that are
ROW_STAGES = tl.constexpr(6)  # as many times that are on their way
TILES_TOGETHER = tl.constexpr(2048)  # tiles of a row that are; the first so many stay in registers
KEYS_AT_ONCE = tl.constexpr(64)  # keys of a list whose values are added together
SPLIT = tl.constexpr(16)  # tiles whose values one program sums
# Newton steps towards the bound; any number of them gives one.
BOUND_STEPS_1_5 = tl.constexpr(3)
BOUND_STEPS = tl.constexpr(5)
ATTEMPTS = tl.constexpr(64)  # a guard: steps converge quadratically
ROUNDING = tl.constexpr(2.0**-21)  # how much a bound of gap may be off, relative to 1 and to row_max
# How far from 1 the sum of weights may be before the last step, which leaves about the square of it: of the keys of a
# list, which are in registers, and of long rows, which are read again for every step.
NEAR = tl.constexpr(4e-6)
NEAR_LONG = tl.constexpr(1e-4)


SCORES = Aligned("*fp32")  # of tiles, whole


class FewRows(NamedTuple):
    """Some of the rows that share a key head in one sequence: those of its query heads, one head after the other."""

    place: tl.tensor  # among the rows of the key head
    head: tl.tensor
    position: tl.tensor  # the row's number in its sequence
    real: tl.tensor  # whether there is such a row


@triton.jit
def few_rows(first, call, few, kv_head, queries, ROWS: tl.constexpr):
    return few_rows_at(first + tl.arange(0, ROWS), call, few, kv_head, queries)


@triton.jit
def few_rows_at(place, call, few, kv_head, queries):
    """The FewRows in some places."""
    member = place // few.queries
    position = place - member * few.queries
    real = (member < call.group) & (position < queries.length)
    return FewRows(place, kv_head * call.group + tl.minimum(member, call.group - 1), position, real)


@triton.jit
def row_of(call, few, head, position):
    """(the key head of a head's row, the row's place among those of the key head)."""
    kv_head = head // call.group
    return kv_head, (head - kv_head * call.group) * few.queries + position


@triton.jit
def visible_of(rows, band):
    """The Span of keys that each of FewRows sees."""
    visible = visible_keys(rows.position, band)
    return Span(visible.first, tl.where(rows.real, visible.end, 0))


@triton.jit
def keys_of_rows(visible):
    """The Span of keys that some of some rows see."""
    sees = visible.first < visible.end
    return Span(tl.min(tl.where(sees, visible.first, UNLIMITED), 0), tl.max(tl.where(sees, visible.end, 0), 0))


@triton.jit
def tiles_of(keys):
    return Span(keys.first // TILE, tl.cdiv(keys.end, TILE))


@triton.jit
def share_of(tiles, index, sharers):
    """Those of some tiles that one of so many programs takes."""
    each = tl.cdiv(tl.maximum(tiles.end - tiles.first, 0), sharers)
    first = tiles.first + index * each
    return Span(first, tl.minimum(first + each, tiles.end))


@triton.jit
def some_of(tiles, split, each):
    """Those of some tiles that are in a split of `each` tiles."""
    first = tl.maximum(tiles.first, split * each)
    return Span(first, tl.maximum(tl.minimum(tiles.end, (split + 1) * each), first))


@triton.jit
def kv_number(call, at, kv_head):
    """kv_head_of where the key head is known: its number among those of all sequences."""
    return at.batch * (call.heads // call.group) + kv_head


@triton.jit
def tile_place(call, few, at, kv_head, place):
    """Where the numbers of a row's tiles are, by its place among those of a key head: that of tile 0."""
    kv_heads = call.heads // call.group
    return place * few.row_tiles + first_tile_row(call.keys, kv_heads, at.batch, kv_head, at.keys.offset)


@triton.jit
def score_place(call, few, at, kv_head, place):
    """Where a row's scores are: that of key 0. Tiles are stored whole, so that threads read several numbers at once."""
    return tile_place(call, few, at, kv_head, place) * TILE


@triton.jit
def list_place(call, few, at, kv_head, place):
    """The number of a row among those of all key heads and sequences."""
    return kv_number(call, at, kv_head) * few.rows + place


@triton.jit
def part_place(call, few, at, kv_head, splits, split, place):
    """The number of what a split adds to a row."""
    return (kv_number(call, at, kv_head) * splits + split) * few.rows + place


@triton.jit
def least_weighed(row_max):
    """What a z is at least that has weight in a row whose largest is `row_max` or more; and a little less, as the bound
    of solve_few may begin this much below row_max - 1."""
    return row_max - 1.0 - (1.0 + tl.abs(row_max)) * (2 * ROUNDING)


@triton.jit
def load_queries(query, rows, call, at, BLOCK_D: tl.constexpr):
    """The queries of FewRows, one below the other; zeros where there is none."""
    column = tl.arange(0, BLOCK_D)
    start = query.data + at.batch * query.batch_stride + at.queries.offset * query.row_stride
    row_start = rows.head * query.head_stride + rows.position.to(tl.int64) * query.row_stride
    inside = rows.real[:, None] & (column < call.head_dim)[None, :]
    return tl.load(start + row_start[:, None] + column[None, :], mask=inside, other=0.0)


# ---- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def score_few(
    query, key, scores, tile_max, call, few,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ALPHA: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """The largest z of each row in each tile, and all z of tiles that may hold weight. How many programs share the
    tiles, few.scorers, changes no bit."""
    row_blocks = tl.cdiv(few.rows, BLOCK_M)
    index, kv_head, batch = block_of_program(few.scorers * row_blocks, call.heads // call.group)
    at = head_in_sequence(call, batch, kv_head * call.group)
    if has_many_queries(call, at.queries):
        return
    scorer = index // row_blocks  # neighbours read the same keys
    rows = few_rows(index % row_blocks * BLOCK_M, call, few, kv_head, at.queries, BLOCK_M)
    visible = visible_of(rows, at.band)
    tiles = tiles_of(keys_of_rows(visible))

    q = load_queries(query, rows, call, at, BLOCK_D)
    scale = head_scale(call, batch, rows.head, ALPHA)
    rules = ScoreRules(rows.position, at.band, visible, scale.qk_slope[:, None])
    key_rows = key_rows_of(key, at, call.head_dim, at.keys.length)
    softmax = scale.alpha == 1.0
    to_scores = scores + score_place(call, few, at, kv_head, rows.place)
    to_maxima = tile_max + tile_place(call, few, at, kv_head, rows.place)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mine = share_of(tiles, scorer, few.scorers)
    for index in tl.range(mine.end - mine.first):
        tile = mine.first + index
        keys = tile * TILE + tl.arange(0, BLOCK_N)
        qk = dot(q, tl.trans(load_rows(key_rows, tile * TILE, BLOCK_N, BLOCK_D, True)))
        z = scores_of(qk, rules, keys, 0, ALPHA, True) * scale.z[:, None]
        largest = max_or_nan(z, 1)
        tl.store(to_maxima + tile, largest, mask=rows.real)
        row_max = tl.maximum(row_max, largest)
        worth = rows.real & (softmax | ~(largest < least_weighed(row_max)))  # where it is NaN too
        tl.store(to_scores[:, None] + keys[None, :], z, mask=worth[:, None])
    lead(ARCH)


SCORE_FEW = Spec(
    score_few,
    arguments=dict(query=MATRIX, key=MATRIX, scores=SCORES, tile_max="*fp32", call=CALL, few=FEW),
    writes=("scores", "tile_max"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D", "ALPHA", "ARCH"),
    programs="a block of BLOCK_M rows and one of few.scorers shares of its tiles, for all rows of all key heads and "
    "sequences",
    scratch=dict(
        scores="TILE numbers for each row of a key head and each tile of its keys",
        tile_max="one for each of these rows and each tile",
    ),
    shapes="attention",
    alphas=("any",),
)  # fmt: skip
SCORE_FEW_PAGED = SCORE_FEW.over_pages()
SCORE_FEW_EVEN = SCORE_FEW.over_even_pages(types=("bf16", "fp16"))


# ---- one row ---------------------------------------------------------------------------------------------------------


@triton.jit
def solve_few(
    value, out, row_state, tiles, scores, tile_max, tile_lists, listed_scores, listed_keys, is_long, call, few,
    BLOCK_D: tl.constexpr, ALPHA: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """row_state of a row; and, unless it is long, its output and the bits of tiles in which it weighs keys."""
    lead(ARCH)
    follow(ARCH)
    position, head, batch = block_of_program(few.queries, call.heads)
    at = head_in_sequence(call, batch, head)
    if has_many_queries(call, at.queries) | (position >= at.queries.extent):
        return
    kv_head, place = row_of(call, few, head, position)
    scale = head_scale(call, batch, head, ALPHA)
    visible = visible_keys(position, at.band)
    sees = visible.first < visible.end
    tiles_seen = tiles_of(Span(visible.first, tl.where(sees, visible.end, 0)))
    z_row = scores + score_place(call, few, at, kv_head, place)
    maxima = tile_max + tile_place(call, few, at, kv_head, place)
    bits = tiles + tile_row_of(call, at, position) * call.tile_words
    number = list_place(call, few, at, kv_head, place)

    first_maxima = load_maxima(maxima, tiles_seen, tiles_seen.first)
    row_max = largest_of(first_maxima, maxima, tiles_seen)
    sound = sees & (tl.abs(row_max) + scale.alpha < float("inf"))
    broken = sees & ~sound
    row_max = tl.where(sound, row_max, 0.0)
    gap = tl.where(sound, -1.0, float("inf"))
    long = 0
    count = 0
    entries = tile_lists + tile_place(call, few, at, kv_head, place)
    to_z = listed_scores + number * LISTED
    to_keys = listed_keys + number * LISTED
    if sound:
        if is_softmax(scale.alpha, ALPHA):
            long = 1
            gap = log_sum(z_row, tiles_seen, visible, row_max)
        else:
            gap = bound_of(first_maxima, maxima, tiles_seen, row_max, scale.alpha, ALPHA)
            candidates = list_tiles_above(entries, first_maxima, maxima, tiles_seen, row_max, gap)
            count = list_keys_above(to_z, to_keys, z_row, entries, candidates, visible, row_max, gap)
            long = (count > LISTED).to(tl.int32)
            if long > 0:
                gap = solve_row(z_row, maxima, tiles_seen, visible, row_max, gap, scale.alpha, ALPHA)
            else:
                gap = solve_list(to_z, count, row_max, gap, scale.alpha, ALPHA)
    tl.store(is_long + number, long)
    state = row_state + 2 * (first_state_row(call, at) + position)
    tl.store(state, tl.where(broken, float("nan"), row_max))
    tl.store(state + 1, tl.where(broken, float("nan"), gap))
    if broken & (few.marks_tiles > 0):  # NaN goes back to all keys that are seen
        for start in range(tiles_seen.first, tiles_seen.end, TILES_TOGETHER):
            tile = start + tl.arange(0, TILES_TOGETHER)
            mark_tiles(bits, tile, tile < tiles_seen.end)
    if long == 0:
        value_rows = key_rows_of(value, at, call.value_dim, at.keys.length)
        weighted = tl.zeros([BLOCK_D], tl.float32)
        sum_p = 0.0
        for start in range(0, count, KEYS_AT_ONCE):
            entry = start + tl.arange(0, KEYS_AT_ONCE)
            z = tl.load(to_z + entry, mask=entry < count, other=float("-inf"))
            keys = tl.load(to_keys + entry, mask=entry < count, other=0)
            p, _ = weights(excess(z, row_max, gap), scale.alpha, ALPHA, True)
            weigh = p > 0.0
            if few.marks_tiles > 0:
                mark_tiles(bits, keys // TILE, weigh)
            v = load_rows(value_rows, tl.where(weigh, keys, at.keys.length), KEYS_AT_ONCE, BLOCK_D, True)
            weighted += tl.sum(p[:, None] * v.to(tl.float32), 0)
            sum_p += tl.sum(p, 0)
        weighted /= tl.where(sound, sum_p, 1.0)
        store_row(out, at, position, tl.where(broken, float("nan"), weighted), call, BLOCK_D)


SOLVE_FEW = Spec(
    solve_few,
    arguments=dict(
        value=MATRIX, out=MATRIX, row_state="*fp32", tiles="*i32", scores=SCORES, tile_max="*fp32", tile_lists="*i32",
        listed_scores="*fp32", listed_keys="*i32", is_long="*i32", call=CALL, few=FEW,
    ),
    writes=("out", "row_state", "tiles", "tile_lists", "listed_scores", "listed_keys", "is_long"),
    constants=("BLOCK_D", "ALPHA", "ARCH"),
    programs="a row, for few.queries * heads * batch",
    scratch=dict(
        tile_lists="an entry for each row of a key head and each tile of its keys",
        listed_scores="LISTED numbers for each such row",
        listed_keys="LISTED numbers for each such row",
        is_long="a number for each such row",
    ),
    shapes="attention",
)  # fmt: skip
SOLVE_FEW_PAGED = SOLVE_FEW.over_pages()


@triton.jit
def store_row(out, at, position, x, call, BLOCK_D: tl.constexpr):
    column = tl.arange(0, BLOCK_D)
    row = at.queries.offset + position
    place = out.data + at.batch * out.batch_stride + at.head * out.head_stride + row * out.row_stride
    tl.store(place + column, cast(x, out.data.dtype.element_ty), mask=column < call.value_dim)


@triton.jit
def mark_tiles(bits, tile, mask):
    """Sets the bits of tiles, which rows of other programs may set too."""
    tl.atomic_or(bits + tile // WORD, mask.to(tl.int32) << (tile % WORD), mask=mask, sem="relaxed")


@triton.jit
def is_softmax(alpha, ALPHA: tl.constexpr):
    """Whether a row's alpha is 1, which it is in the code for any alpha alone."""
    if fixed_alpha(ALPHA):
        return False
    else:
        return alpha == 1.0


@triton.jit
def excess(z, row_max, gap):
    """[z - tau]+, from 0 to 1."""
    return tl.minimum(tl.maximum((z - row_max) - gap, 0.0), 1.0)


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def two_sums(a, b):
    """The sums of two vectors, which threads exchange together."""
    if INTERPRETED:  # a reduction with its own combine function is a Python loop there
        return tl.sum(a, 0), tl.sum(b, 0)
    else:
        return tl.reduce((a, b), 0, _add_both)


@triton.jit
def load_maxima(maxima, tiles_seen, first):
    """The largest scores of TILES_TOGETHER tiles from `first` on, -inf behind the last."""
    tile = first + tl.arange(0, TILES_TOGETHER)
    return tl.load(maxima + tile, mask=tile < tiles_seen.end, other=float("-inf"))


@triton.jit
def largest_of(first_maxima, maxima, tiles_seen):
    largest = first_maxima
    for start in range(tiles_seen.first + TILES_TOGETHER, tiles_seen.end, TILES_TOGETHER):
        here = load_maxima(maxima, tiles_seen, start)
        largest = tl.maximum(largest, here, propagate_nan=tl.PropagateNan.ALL)
    return max_or_nan(largest, 0)


@triton.jit
def bound_of(first_maxima, maxima, tiles_seen, row_max, alpha, ALPHA: tl.constexpr):
    """A lower bound of gap: that of the tiles' largest scores, less what rounding may do."""
    gap = -1.0
    for _ in range(BOUND_STEPS_1_5 if ALPHA == ALPHA_1_5 else BOUND_STEPS):
        part_p, part_u = weights(excess(first_maxima, row_max, gap), alpha, ALPHA, True)
        for start in range(tiles_seen.first + TILES_TOGETHER, tiles_seen.end, TILES_TOGETHER):
            p, u = weights(excess(load_maxima(maxima, tiles_seen, start), row_max, gap), alpha, ALPHA, True)
            part_p += p
            part_u += u
        sum_p, sum_u = two_sums(part_p, part_u)
        gap += tl.maximum(newton_step(sum_p, sum_u, alpha, ALPHA), 0.0)
    return gap - (1.0 + tl.abs(row_max)) * ROUNDING


@triton.jit
def list_tiles_above(entries, first_maxima, maxima, tiles_seen, row_max, gap):
    """How many tiles have a score above a bound of gap; they are listed."""
    tile = tiles_seen.first + tl.arange(0, TILES_TOGETHER)
    count = append(entries, 0, tile, first_maxima - row_max > gap)
    for start in range(tiles_seen.first + TILES_TOGETHER, tiles_seen.end, TILES_TOGETHER):
        tile = start + tl.arange(0, TILES_TOGETHER)
        count = append(entries, count, tile, load_maxima(maxima, tiles_seen, start) - row_max > gap)
    tl.debug_barrier()  # what other threads wrote is read from here on
    return count


@triton.jit
def scores_of_tiles(z_row, tile, wanted, visible):
    """(z, keys) of some tiles of a row, in their order; -inf where a tile is not wanted and for keys that are not
    seen."""
    keys = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    # Without the row's own borders: a thread reads several numbers at once where all or none of them are wanted.
    z = tl.load(z_row + keys, mask=wanted[:, None], other=float("-inf"))
    z = tl.where((keys >= visible.first) & (keys < visible.end) & wanted[:, None], z, float("-inf"))
    return z, keys


@triton.jit
def list_keys_above(to_z, to_keys, z_row, entries, candidates, visible, row_max, gap):
    """How many keys of the listed tiles are above a bound of gap, or some number above LISTED; up to LISTED are listed,
    with their z."""
    count = 0
    first = 0
    while (first < candidates) & (count <= LISTED):
        entry = first + tl.arange(0, LISTED_TILES)
        tile = tl.load(entries + entry, mask=entry < candidates, other=0)
        z, keys = scores_of_tiles(z_row, tile, entry < candidates, visible)
        z = tl.reshape(z, [LISTED_TILES * TILE])
        keys = tl.reshape(keys, [LISTED_TILES * TILE])
        wanted = z - row_max > gap
        place = count + tl.cumsum(wanted.to(tl.int32), 0) - 1
        room = wanted & (place < LISTED)
        tl.store(to_z + place, z, mask=room)
        tl.store(to_keys + place, keys, mask=room)
        count += tl.sum(wanted.to(tl.int32), 0)
        first += LISTED_TILES
    tl.debug_barrier()  # as above
    return count


@triton.jit
def solve_list(listed_z, count, row_max, gap, alpha, ALPHA: tl.constexpr):
    """gap of a list of at most LISTED scores, from a lower bound of it."""
    entry = tl.arange(0, LISTED)
    z = tl.load(listed_z + entry, mask=entry < count, other=float("-inf"))
    attempts = 0
    moving = 1
    while moving > 0:
        p, u = weights(excess(z, row_max, gap), alpha, ALPHA, True)
        sum_p, sum_u = two_sums(p, u)
        step = newton_step(sum_p, sum_u, alpha, ALPHA)
        attempts += 1
        moving = goes_on(sum_p, gap, step, attempts, NEAR)
        gap += step
    return gap


@triton.jit
def solve_row(z_row, maxima, tiles_seen, visible, row_max, gap, alpha, ALPHA: tl.constexpr):
    """gap of all scores of a row, from a lower bound of it. Scores of tiles below that are not known, nor needed."""
    bound = gap
    attempts = 0
    moving = 1
    while moving > 0:
        part_p = tl.zeros([ROW_TILES, TILE], tl.float32)
        part_u = tl.zeros([ROW_TILES, TILE], tl.float32)
        for start in tl.range(tiles_seen.first, tiles_seen.end, ROW_TILES, num_stages=ROW_STAGES):
            tile = start + tl.arange(0, ROW_TILES)
            there = tile < tiles_seen.end
            largest = tl.load(maxima + tile, mask=there, other=float("-inf"))
            z, _ = scores_of_tiles(z_row, tile, there, visible)
            z = tl.where((largest - row_max > bound)[:, None], z, float("-inf"))
            p, u = weights(excess(z, row_max, gap), alpha, ALPHA, True)
            part_p += p
            part_u += u
        sum_p, sum_u = two_sums(tl.ravel(part_p), tl.ravel(part_u))
        step = newton_step(sum_p, sum_u, alpha, ALPHA)
        attempts += 1
        moving = goes_on(sum_p, gap, step, attempts, NEAR_LONG)
        gap += step
    return gap


@triton.jit
def goes_on(sum_p, gap, step, attempts, near):
    """Whether another step is needed after this one."""
    return ((tl.abs(sum_p - 1.0) > near) & (gap + step != gap) & (attempts < ATTEMPTS)).to(tl.int32)


@triton.jit
def log_sum(z_row, tiles_seen, visible, row_max):
    """ln sum e^(z - row_max) over the keys that are seen."""
    sums = tl.zeros([ROW_TILES, TILE], tl.float32)
    for start in range(tiles_seen.first, tiles_seen.end, ROW_TILES):
        tile = start + tl.arange(0, ROW_TILES)
        z, _ = scores_of_tiles(z_row, tile, tile < tiles_seen.end, visible)
        sums += tl.exp2((z - row_max) * LOG2_E)
    return tl.maximum(tl.log(tl.sum(tl.ravel(sums), 0)), 0.0)


# ---- long rows -------------------------------------------------------------------------------------------------------


class LongRows(NamedTuple):
    """What weigh_few knows of some rows, of which some are long."""

    long: tl.tensor
    visible: Span
    alpha: tl.tensor
    row_max: tl.tensor
    gap: tl.tensor
    scores: tl.tensor  # where they are
    maxima: tl.tensor  # where those of their tiles are
    bits: tl.tensor  # where those of their tiles are
    least_marked: tl.tensor  # the weight of a tile above which its bit is set


@triton.jit
def weigh_few(
    value, row_state, tiles, scores, tile_max, is_long, weighted, weight_sums, call, few,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, ALPHA: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """Of long rows: weighted values and weights, summed over SPLIT tiles of keys. How many programs share the splits,
    few.weighers, changes no bit."""
    lead(ARCH)
    follow(ARCH)
    row_blocks = tl.cdiv(few.rows, BLOCK_M)
    splits = tl.cdiv(tl.cdiv(call.keys.max_seqlen, TILE), SPLIT)
    index, kv_head, batch = block_of_program(few.weighers * row_blocks, call.heads // call.group)
    at = head_in_sequence(call, batch, kv_head * call.group)
    if has_many_queries(call, at.queries):
        return
    rows = few_rows(index % row_blocks * BLOCK_M, call, few, kv_head, at.queries, BLOCK_M)
    number = list_place(call, few, at, kv_head, rows.place)
    long = rows.real & (tl.load(is_long + number, mask=rows.real, other=0) != 0)
    if not any_row(long):
        return
    visible = visible_of(rows, at.band)
    keys_seen = keys_of_rows(visible)
    tiles_seen = tiles_of(keys_seen)
    heads = Head(batch, rows.head, call.group, at.queries, at.keys, at.band)
    state = row_state + 2 * (first_state_row(call, heads) + rows.position)
    seen = LongRows(
        long,
        visible,
        head_scale(call, batch, rows.head, ALPHA).alpha,
        tl.load(state, mask=long, other=0.0),
        tl.load(state + 1, mask=long, other=float("inf")),
        scores + score_place(call, few, at, kv_head, rows.place),
        tile_max + tile_place(call, few, at, kv_head, rows.place),
        tiles + tile_row_of(call, heads, rows.position) * call.tile_words,
        tl.where(few.marks_tiles > 0, 0.0, float("inf")),
    )
    value_rows = key_rows_of(value, at, call.value_dim, at.keys.length)
    value_rows = rows_from(value_rows, keys_seen.first, keys_seen.end)
    # There powers would be most of the work, which for other types and sizes are products.
    WITHOUT_POWERS: tl.constexpr = value.data.dtype.element_ty != tl.float32 and BLOCK_D <= 128
    without_powers = (call.alpha.source == ALPHA_NUMBER) & (call.alpha.number == 1.5)
    first_split = tiles_seen.first // SPLIT
    for split in range(first_split + index // row_blocks, tl.cdiv(tiles_seen.end, SPLIT), few.weighers):
        mine = some_of(tiles_seen, split, SPLIT)
        if WITHOUT_POWERS and without_powers:
            sums, sum_p = weigh_tiles(seen, value_rows, mine, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, ALPHA_1_5)
        else:
            sums, sum_p = weigh_tiles(seen, value_rows, mine, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, ALPHA)
        part = part_place(call, few, at, kv_head, splits, split, rows.place)
        tl.store(weight_sums + part, sum_p, mask=long)
        tl.store(weighted + part[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :], sums, mask=long[:, None])


@triton.jit
def weigh_tiles(
    rows, value_rows, tiles, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """(weighted values, weights) of LongRows, summed over some tiles."""
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    sum_p = tl.zeros([BLOCK_M], tl.float32)
    for step in tl.range(tiles.end - tiles.first, num_stages=STAGES):  # said here, all loads are pipelined
        tile = tiles.first + step
        keys = tile * TILE + tl.arange(0, BLOCK_N)
        # A load that waited for another would not be pipelined, nor would a branch: z is read where it is unknown too.
        z = tl.load(rows.scores[:, None] + keys[None, :], mask=rows.long[:, None], other=float("-inf"))
        largest = tl.load(rows.maxima + tile, mask=rows.long, other=float("-inf"))
        known = largest - rows.row_max > rows.gap
        p, _ = weights(excess(z, rows.row_max[:, None], rows.gap[:, None]), rows.alpha[:, None], ALPHA, True)
        if not fixed_alpha(ALPHA):
            softmax = rows.alpha == 1.0
            known = known | softmax
            p = tl.where(softmax[:, None], tl.exp2(((z - rows.row_max[:, None]) - rows.gap[:, None]) * LOG2_E), p)
        visible = (keys[None, :] >= rows.visible.first[:, None]) & (keys[None, :] < rows.visible.end[:, None])
        p = tl.where((rows.long & known)[:, None] & visible, p, 0.0)
        here = tl.sum(p, 1)
        sum_p += here
        mark_tiles(rows.bits, tile, here > rows.least_marked)
        v = load_rows(value_rows, tile * TILE, BLOCK_N, BLOCK_D, True)
        sums = dot(cast(p, v.dtype), v, sums)
    return sums, sum_p


WEIGH_FEW = Spec(
    weigh_few,
    arguments=dict(
        value=MATRIX, row_state="*fp32", tiles="*i32", scores=SCORES, tile_max="*fp32", is_long="*i32",
        weighted="*fp32", weight_sums="*fp32", call=CALL, few=FEW,
    ),
    writes=("tiles", "weighted", "weight_sums"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D", "STAGES", "ALPHA", "ARCH"),
    programs="a block of BLOCK_M rows and every few.weighers-th split, for all rows of all key heads and sequences",
    scratch=dict(
        weighted="BLOCK_D numbers for each row of a key head and each SPLIT tiles of its keys",
        weight_sums="a number for each of these",
    ),
    shapes="attention",
    alphas=("any",),
)  # fmt: skip
WEIGH_FEW_PAGED = WEIGH_FEW.over_pages()
WEIGH_FEW_EVEN = WEIGH_FEW.over_even_pages(types=("bf16", "fp16"))


@triton.jit
def join_few(
    weighted, weight_sums, is_long, out, call, few,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """The output of a long row, from what weigh_few found in its splits."""
    follow(ARCH)
    position, head, batch = block_of_program(few.queries, call.heads)
    at = head_in_sequence(call, batch, head)
    if has_many_queries(call, at.queries) | (position >= at.queries.length):
        return
    kv_head, place = row_of(call, few, head, position)
    if tl.load(is_long + list_place(call, few, at, kv_head, place)) == 0:
        return
    visible = visible_keys(position, at.band)
    splits = tl.cdiv(tl.cdiv(call.keys.max_seqlen, TILE), SPLIT)
    end = tl.cdiv(tl.cdiv(visible.end, TILE), SPLIT)
    column = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_D], tl.float32)
    sum_p = 0.0
    for start in range(visible.first // (TILE * SPLIT), end, BLOCK_M):
        split = start + tl.arange(0, BLOCK_M)
        part = part_place(call, few, at, kv_head, splits, split, place)
        known = split < end
        sum_p += tl.sum(tl.load(weight_sums + part, mask=known, other=0.0), 0)
        here = tl.load(weighted + part[:, None] * BLOCK_D + column[None, :], mask=known[:, None], other=0.0)
        sums += tl.sum(here, 0)
    store_row(out, at, position, sums / sum_p, call, BLOCK_D)


JOIN_FEW = Spec(
    join_few,
    arguments=dict(weighted="*fp32", weight_sums="*fp32", is_long="*i32", out=MATRIX, call=CALL, few=FEW),
    writes=("out",),
    constants=("BLOCK_M", "BLOCK_D", "ARCH"),
    programs="a row, for few.queries * heads * batch",
    shapes="attention",
    alphas=("any",),
)  # fmt: skip
