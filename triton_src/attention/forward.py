"""The forward: a program scans every key that its rows see once, solves for tau, and gathers where it must.

For a block of query rows and the keys j that a row sees,
    row_max = max_j z_j,    p_j = [z_j - tau]+^(1/(alpha-1)) with sum_j p_j = 1,    out = sum_j p_j v_j,
and only few keys can have weight. scan.py says how row_max, a lower bound of gap = tau - row_max, and the candidates
are found, which are tiles of keys. `solve` then walks the list of those, or of the keys in them that are marked:

  1. sums over the row at gap, and a step towards the solution, until the next step arrives (mostly once). Rows of
     which some hundreds of keys weigh, or more, begin with a sample, `sampled_gap`;
  2. the output, divided by the sum of the weights it was made with. That sum also tells whether gap was good enough for
     the type: where it was not, the output is made again, a step further, and if need be sums again.

For alpha = 1 every key that a row sees has weight, and there is nothing to look for: `softmax` makes the output in one
pass over the visible tiles.
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
    query_rows_of,
    tile_row_of,
    without_few,
)
from ..lib.dropout import SequenceDropout, drop, dropout_of_sequence, row_seeds_of
from ..lib.entmax import (
    ALPHA_1,
    ALPHA_1_5,
    ALPHA_2,
    ALPHA_ANY,
    LOG2_E,
    Threshold,
    column_counts,
    excess_of,
    newton_step,
    threshold_of,
    threshold_step,
    weigh,
    weights,
)
from ..lib.marks import (
    GATHER_ROOM,
    WARP_ROWS,
    MarkedKeys,
    MarkedRows,
    kept_marks,
    kept_or_lent,
    list_at_once,
    mark_keys,
    visit_marked,
)
from ..lib.matrices import (
    ROW_PARTS,
    Code,
    RowsFrom,
    any_row,
    cast,
    column_sums,
    dot,
    kahan_add,
    load_factor,
    load_rows,
    max_or_nan,
    row_numbers,
    rows_from,
    store_rows,
)
from ..lib.scores import QueryBlock, block_scores, score_rules
from ..lib.tile_lists import (
    LIST_CHUNK,
    WORD,
    TileList,
    all_edges,
    listed_tile,
    part_of,
    stages,
    steps,
    visit_tiles,
)
from ..lib.visibility import TILE, keys_of_block, visible_keys, visible_tiles
from ..spec import CALL, MATRIX, Spec
from .scan import ROUNDING, expected_support, list_candidates, margins_of, scan_tiles, sound_rows

ATTEMPTS = tl.constexpr(64)  # a guard: steps converge quadratically
SAMPLED = tl.constexpr(512)  # keys of a sample, see sampled_gap
SAMPLED_FROM = tl.constexpr(24)  # inner tiles from which on it is taken: below, all keys are little more
SAMPLED_STEPS = tl.constexpr(2)


@triton.jit
def attend(
    query, key, value, out, row_state, support, tiles, support_capacity, tile_margins, tile_lists, remaining, gathered,
    gather_from, gather_below, call,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEP_D: tl.constexpr, ALPHA: tl.constexpr,
    SCAN_N: tl.constexpr, AHEAD: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """row_max and gap of each row into row_state, the output, and one bit for each (64 rows) x (64 keys) tile that
    holds weight. In sequences with `gather_from` or more keys blocks of rows that are expected to weigh few keys remain
    for the code with GATHER, which looks for the keys that may weigh and works on these alone: less than `gather_below`
    per cent of those of the candidates, added up over the rows. More than 100 per cent: all blocks of rows. Its marks
    stay in `support` for the backward, where that has room (kept_marks)."""
    EXACT: tl.constexpr = key.data.dtype.element_ty == tl.float32
    CODE: tl.constexpr = Code(BLOCK_M, BLOCK_N, BLOCK_D, STEP_D, ALPHA, EXACT)
    SCAN_CODE: tl.constexpr = Code(BLOCK_M, SCAN_N, BLOCK_D, STEP_D, ALPHA, EXACT)
    blocks = tl.cdiv(call.queries.max_seqlen, BLOCK_M)
    block, head, batch = block_of_program(blocks, call.heads)
    at = without_few(call, head_in_sequence(call, batch, head))
    query_rows = query_rows_of(query, at, call.head_dim, at.queries.length)
    key_rows = key_rows_of(key, at, call.head_dim, at.keys.length)
    value_rows = key_rows_of(value, at, call.value_dim, at.keys.length)
    out_rows = query_rows_of(out, at, call.value_dim, at.queries.extent)
    state_row = first_state_row(call, at)
    row_state += 2 * state_row
    key_tiles = tl.cdiv(call.keys.max_seqlen, TILE)
    first_row = (blocks - 1 - block) * BLOCK_M  # in causal order the last are longest, and go first
    may_remain = at.keys.length >= gather_from
    if first_row >= at.queries.extent:
        return
    tile_row = tile_row_of(call, at, first_row)
    remaining += 2 * tile_row
    if GATHER:
        remaining_count = tl.load(remaining, mask=may_remain, other=-1)
        if remaining_count < 0:
            return

    row = first_row + tl.arange(0, BLOCK_M)
    visible = visible_keys(row, at.band)
    sees = visible.first < visible.end
    q = load_factor(query_rows, first_row, BLOCK_M, CODE)
    scale = head_scale(call, batch, head, ALPHA)
    queries = QueryBlock(q, key_rows, score_rules(row, at.band, visible, scale), scale)
    tiles_seen = visible_tiles(first_row, at.band, BLOCK_M)
    keys_seen = keys_of_block(first_row, at.band, BLOCK_M)
    value_rows = rows_from(value_rows, keys_seen.first, keys_seen.end)
    values = ValueBlock(
        value_rows, dropout_of_sequence(call.dropout, batch, ALPHA), row_seeds_of(call.dropout, batch, head, row, ALPHA)
    )
    margins = margins_of(tile_margins, tile_row, key_tiles)
    entries = tile_lists + tile_row * key_tiles
    tiles += tile_row * call.tile_words

    if ALPHA == ALPHA_ANY and not GATHER:  # noqa: SIM102
        if scale.alpha == 1.0:
            tl.store(remaining, -1, mask=may_remain)
            SOFTMAX_CODE: tl.constexpr = Code(BLOCK_M, BLOCK_N, BLOCK_D, STEP_D, ALPHA_1, EXACT)
            weighted, sum_p, row_max = softmax(queries, values, tiles_seen, SOFTMAX_CODE)
            sound = sees & (tl.abs(row_max) < float("inf"))
            gap = tl.where(sound, tl.maximum(tl.log(sum_p), 0.0), float("inf"))
            row_max = tl.where(sound, row_max, 0.0)
            store_results(weighted, sum_p, row_max, gap, sees, sound, row_state, out_rows, first_row, CODE)
            store_tile_bits(tiles, call.tile_words, margins, tiles_seen, True)
            return

    if GATHER:
        row_max, gap = load_state(row_state, row, at.queries.extent)
        sound, row_max, gap = sound_rows(row_max, gap, sees, scale)
        candidates = TileList(entries, tl.load(remaining + 1), remaining_count)
        # Marks that are not kept take the place of the margins, which nobody needs any more: as many numbers a tile.
        words = tile_margins + tile_row * key_tiles * (TILE // WARP_ROWS)
        words = words.to(tl.pointer_type(tl.int32), bitcast=True)  # of two groups of 16 keys each
        kept, kept_count, of_row = kept_marks(support, support_capacity, state_row, first_row, at.queries, at.keys)
        marks = kept_or_lent(kept, of_row, words)
        MARK_CODE: tl.constexpr = Code(BLOCK_M, TILE, BLOCK_D, STEP_D, ALPHA, EXACT)
        marked = mark_keys(queries, threshold_of(row_max, gap, EXACT), candidates, marks, MARK_CODE)
        tl.debug_barrier()  # what other threads wrote is read from here on
        rows = MarkedRows(marks, gathered + tile_row * GATHER_ROOM)
        keys = MarkedKeys(rows, candidates, marked, list_at_once(rows, candidates, marked))
        found = solve(queries, values, row_max, gap, gap, sound, keys, tiles, call.tile_words, CODE, AHEAD, True)
        weighted, sum_p, gap = found
        broken = store_results(weighted, sum_p, row_max, gap, sees, sound, row_state, out_rows, first_row, CODE)
        if any_row(broken):
            store_tile_bits(tiles, call.tile_words, margins, tiles_seen, True)
        else:
            tl.store(kept_count, marked, mask=kept)
    else:
        row_max, gap, largest = scan_tiles(queries, sees, tiles_seen, margins, SCAN_CODE, AHEAD)
        sound, row_max, gap = sound_rows(row_max, gap, sees, scale)
        may_sample = tiles_seen.inner >= SAMPLED_FROM
        expected = tl.zeros([BLOCK_M], tl.float32)
        if may_remain | may_sample:
            expected = expected_support(largest, row_max, gap, scale)
        tl.debug_barrier()  # what other threads wrote is read from here on
        candidates = list_candidates(entries, margins, gap, tiles_seen, ALPHA)
        if may_remain:
            few = tl.sum(expected, 0) * 100 < candidates.count.to(tl.float32) * (TILE * gather_below)
            few = few | (gather_below > 100)
            tl.store(remaining, tl.where(few, candidates.count, -1))
            tl.store(remaining + 1, candidates.inner)
            if few:
                store_state(row_state, row_max, tl.where(sees & ~sound, float("nan"), gap), row, at.queries.extent)
                return
        bound = gap
        if may_sample:
            crowded = (expected == float("inf")) & sound
            if any_row(crowded):
                gap = tl.where(crowded, sampled_gap(queries, row_max, gap, tiles_seen, CODE), gap)
        found = solve(queries, values, row_max, gap, bound, sound, candidates, margins, 0, CODE, AHEAD, False)
        weighted, sum_p, gap = found
        broken = store_results(weighted, sum_p, row_max, gap, sees, sound, row_state, out_rows, first_row, CODE)
        store_tile_bits(tiles, call.tile_words, margins, tiles_seen, any_row(broken))


ATTEND = Spec(
    attend,
    arguments=dict(
        query=MATRIX, key=MATRIX, value=MATRIX, out=MATRIX,
        row_state="*fp32", support="*i32", tiles="*i32", support_capacity="i32", tile_margins="*i16",
        tile_lists="*i32", remaining="*i32", gathered="*i32", gather_from="i32", gather_below="i32", call=CALL,
    ),
    writes=("out", "row_state", "support", "tiles", "tile_margins", "tile_lists", "remaining", "gathered"),
    constants=("BLOCK_M", "BLOCK_N", "BLOCK_D", "STEP_D", "ALPHA", "SCAN_N", "AHEAD", "GATHER"),
    programs="a block of BLOCK_M = TILE rows, for ceil(longest query sequence / BLOCK_M) * heads * batch",
    scratch=dict(
        tile_margins="four numbers for each tile row of queries and each tile of keys",
        tile_lists="an entry for each of those",
        remaining="two numbers for each tile row of queries, where keys may be gathered",
        gathered="GATHER_ROOM entries for each tile row of queries, there too",
    ),
    shapes="attention",
    gathers=True,
)  # fmt: skip
ATTEND_PAGED = ATTEND.over_pages(alphas=("any", "1_5"))  # what is rare there is not worth the time to compile


# ---- tau, and the output ---------------------------------------------------------------------------------------------


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
def a_step_away(DTYPE: tl.constexpr, ALPHA: tl.constexpr):
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
def solve(
    queries, values, row_max, gap, bound, sound, candidates, seen_to_weigh, words, CODE, AHEAD: tl.constexpr,
    GATHER: tl.constexpr,
):  # fmt: skip
    """(the weighted values, the sum of their weights, gap) of each row, as the file's head says. The gap is a step
    ahead of the one that the values were weighted at. It starts anywhere from `bound` on, a lower bound of the
    solution, and never falls below: keys that weigh there may be in tiles that are candidates of other rows alone, or
    of none. Candidates are a TileList, and tiles that weigh become known by their margins; if GATHER they are
    MarkedKeys, and by `words` words of bits, and gap starts from the bound itself, which needs no look then."""
    DTYPE: tl.constexpr = values.rows.data.dtype.element_ty
    weighted = tl.zeros([CODE.BLOCK_M, CODE.BLOCK_D], tl.float32)
    sum_p = tl.zeros([CODE.BLOCK_M], tl.float32)
    sum_u = tl.zeros([CODE.BLOCK_M], tl.float32)
    slope_u = tl.zeros([CODE.BLOCK_M], tl.float32)  # of sum u as sum p moves
    solved = gap
    moving = sound  # rows that look for gap; the others stay as they are: no row takes a step for its neighbours
    attempts = 0
    outputs_made = 0
    more = 1
    while more > 0:
        # 1. Sums at gap, until all rows are a step away. Before a second output they mostly are; for a third it takes
        # new sums, as what sum u is guessed from then is two steps old.
        distant = moving & (outputs_made % 2 == 0)
        while any_row(distant):
            threshold = threshold_of(row_max, gap, CODE.EXACT)
            if GATHER:
                sum_p, here_u = sum_marked_weights(queries, threshold, candidates, CODE)
            else:
                sum_p, here_u = sum_weights(queries, threshold, candidates, CODE, AHEAD)
            near = tl.abs(sum_p - 1.0) <= a_step_away(DTYPE, CODE.ALPHA)
            step, here_u, here_slope = threshold_step(sum_p, here_u, gap, near, queries.scale.alpha, CODE.ALPHA)
            stepped = gap + step if GATHER else tl.maximum(gap + step, bound)
            moved = (stepped != gap) & (attempts < ATTEMPTS)
            attempts += 1
            gap = tl.where(distant, stepped, gap)
            sum_u = tl.where(distant, here_u, sum_u)
            slope_u = tl.where(distant, here_slope, slope_u)
            distant = distant & moved & ~near

        # 2. The output, and its sums.
        threshold = threshold_of(row_max, gap, CODE.EXACT)
        if GATHER:
            weighted, sum_p, here_u = weigh_marked_values(
                queries, values, threshold, candidates, seen_to_weigh, words, CODE
            )
        else:
            weighted, sum_p, here_u = weigh_values(queries, values, threshold, candidates, seen_to_weigh, CODE)
        if CODE.ALPHA != ALPHA_ANY:
            here_u = sum_u + slope_u * sum_p
        if CODE.ALPHA == ALPHA_1_5:  # u <= -gap, so this is a bound: no step passes row_max, settled support or not
            here_u = tl.maximum(here_u, sum_p / -gap)
        step = newton_step(sum_p, here_u, queries.scale.alpha, CODE.ALPHA)
        attempts += 1
        outputs_made += 1
        stepped = gap + step if GATHER else tl.maximum(gap + step, bound)
        solved = tl.where(moving, stepped, solved)
        moved = (stepped != gap) & (attempts < ATTEMPTS)
        moving = moving & moved & (tl.abs(sum_p - 1.0) > tolerance(DTYPE))
        gap = tl.where(moving, stepped, gap)
        more = tl.max(moving.to(tl.int32), 0)
    return weighted, sum_p, solved


@triton.jit
def sampled_gap(queries, row_max, gap, tiles_seen, CODE):
    """A gap to begin with for rows of which so many keys weigh, some hundreds or more, that all classes of keys have
    one: the bound from the classes says little there. Newton's steps from it, with sums over SAMPLED keys that stand
    for all. They are blocks of neighbours, evenly spread over the inner tiles, whichever of these are candidates: where
    they lie follows from what the block of rows sees. The solution of a sample may be above that of the row; no step
    passes it, so that some key of the sample weighs at what is found, less what rounding may do."""
    COUNT: tl.constexpr = SAMPLED // CODE.BLOCK_N
    blocks = (tiles_seen.inner * (TILE // CODE.BLOCK_N)).to(tl.int64)
    stands_for = ((tiles_seen.inner + tiles_seen.edge) * TILE).to(tl.float32) / SAMPLED
    found = gap
    for _ in range(SAMPLED_STEPS):
        context = (queries, threshold_of(row_max, found, CODE.EXACT))
        sums = no_sums(CODE)
        for index in tl.range(COUNT):
            block = ((2 * index + 1) * blocks // (2 * COUNT)).to(tl.int32)
            first_key = tiles_seen.inner_first * TILE + block * CODE.BLOCK_N
            sums = add_weights(sums, first_key, context, CODE, all_edges(CODE.ALPHA) == 1)
        sum_p, sum_u = sums_of_row(sums, CODE)
        found += tl.maximum(newton_step(sum_p * stands_for, sum_u * stands_for, queries.scale.alpha, CODE.ALPHA), 0.0)
    return tl.maximum(gap, found - (1.0 + tl.abs(row_max)) * ROUNDING)


@triton.jit
def sum_weights(queries, threshold, candidates, CODE, AHEAD: tl.constexpr):
    """(sum p, sum u) of each row; for alpha = 2 u is 1, and counted."""
    sums = no_sums(CODE)
    for EDGE in tl.static_range(all_edges(CODE.ALPHA), 2):
        if AHEAD and not EDGE:
            sums = sum_inner(sums, queries, threshold, candidates, CODE)
        else:
            sums = sum_listed(sums, queries, threshold, candidates, CODE, EDGE)
    return sums_of_row(sums, CODE)


@triton.jit
def no_sums(CODE):
    """Sums of p, of u, of counts, and what kahan_add loses of the first: in ROW_PARTS parts."""
    zeros = tl.zeros([CODE.BLOCK_M, ROW_PARTS], tl.float32)
    return zeros, zeros, tl.zeros([CODE.BLOCK_M, ROW_PARTS], tl.int32), zeros


@triton.jit
def sums_of_row(sums, CODE):
    """(sum p, sum u) of each row from their parts."""
    part_p, part_u, part_n, _ = sums
    sum_p = tl.sum(part_p, 1)
    return sum_p, tl.sum(part_n, 1).to(tl.float32) if CODE.ALPHA == ALPHA_2 else tl.sum(part_u, 1)


@triton.jit
def sum_listed(sums, queries, threshold, candidates, CODE, EDGE: tl.constexpr):
    """The loop of visit_tiles, but that a step's keys are known before the next tile is read, which spills less."""
    PARTS: tl.constexpr = TILE // CODE.BLOCK_N  # a tile is visited in so many steps
    begin, end = steps(candidates, PARTS, EDGE)
    ahead = listed_tile(candidates.entries, begin, end, PARTS)
    for index in tl.range(begin, end, num_stages=stages(EDGE, CODE.ALPHA)):
        first_key = ahead * TILE + part_of(index, PARTS) * CODE.BLOCK_N
        ahead = listed_tile(candidates.entries, index + 1, end, PARTS)
        sums = add_weights(sums, first_key, (queries, threshold), CODE, EDGE)
    return sums


@triton.jit
def sum_inner(sums, queries, threshold, candidates, CODE):
    """The same over inner tiles, in code whose products go AHEAD: those of a step begin before the step before is
    finished, so that a program's own arithmetic runs beside them. Triton lets products run on if what reads them is
    within a branch, and waits at the branch: so it is in one, always taken. What is left of the step before is in a
    branch of its own, as the assembler moves arithmetic up within a block, before products begin; the branch around
    both keeps their order."""
    PARTS: tl.constexpr = TILE // CODE.BLOCK_N
    end = candidates.inner * PARTS
    ahead = listed_tile(candidates.entries, 0, end, PARTS)
    qk = tl.full([CODE.BLOCK_M, CODE.BLOCK_N], float("-inf"), tl.float32)
    excess = tl.zeros([CODE.BLOCK_M, CODE.BLOCK_N], tl.float32)
    for index in tl.range(end):
        first_key = ahead * TILE + part_of(index, PARTS) * CODE.BLOCK_N
        ahead = listed_tile(candidates.entries, index + 1, end, PARTS)
        qk = block_scores(queries, first_key, CODE, False)
        if end > 0:
            if index > 0:
                sums = add_excess(sums, excess, queries, CODE)
            if index < end:
                excess = excess_of(qk, queries.scale.z, threshold, 0, CODE.EXACT)
    return add_excess(sums, excess_of(qk, queries.scale.z, threshold, 0, CODE.EXACT), queries, CODE)


@triton.jit
def sum_marked_weights(queries, threshold, keys, CODE):
    """The same over MarkedKeys."""
    return sums_of_row(visit_marked(add_weights, no_sums(CODE), (queries, threshold), keys, CODE.BLOCK_N, CODE), CODE)


@triton.jit
def add_weights(sums, first_key, context, CODE, EDGE: tl.constexpr):
    queries, threshold = context
    p, u = weigh(block_scores(queries, first_key, CODE, EDGE), queries.scale, threshold, 0, CODE)
    return add_to_sums(sums, p, u, CODE)


@triton.jit
def add_excess(sums, excess, queries, CODE):
    p, u = weights(excess, queries.scale.alpha, CODE.ALPHA, CODE.EXACT)
    return add_to_sums(sums, p, u, CODE)


@triton.jit
def add_to_sums(sums, p, u, CODE):
    part_p, part_u, part_n, lost = sums
    part_p, lost = kahan_add(part_p, lost, column_sums(p), CODE.EXACT)
    if CODE.ALPHA == ALPHA_2:
        part_n += column_counts(p)
    else:
        part_u += column_sums(u)
    return part_p, part_u, part_n, lost


class ValueBlock(NamedTuple):
    """What a block of rows weighs: values, of which it drops some."""

    rows: RowsFrom
    dropout: SequenceDropout
    row_seeds: tl.tensor


class ValueSums(NamedTuple):
    """Sums over a row's keys; but for the first in ROW_PARTS parts."""

    p_v: tl.tensor
    p: tl.tensor
    u: tl.tensor  # in the code for any alpha
    lost: tl.tensor  # of p, see kahan_add
    weight: tl.tensor  # of the tile that is being visited, for each WARP_ROWS rows: above 0 if any of its keys weighs


@triton.jit
def weigh_values(queries, values, threshold, candidates, margins, CODE):
    """(sum p v, sum p, sum u) of each row, the last in the code for any alpha alone. The margins of a tile become 1 if
    its keys weigh for any of their rows, else 0."""
    zeros = tl.zeros([CODE.BLOCK_M, ROW_PARTS], tl.float32)
    weighted = tl.zeros([CODE.BLOCK_M, CODE.BLOCK_D], tl.float32)
    sums = ValueSums(weighted, zeros, zeros, zeros, tl.zeros([TILE // WARP_ROWS], tl.int32))
    sums = visit_tiles(add_values, sums, (queries, values, threshold, margins), candidates, CODE)
    return sums.p_v, tl.sum(sums.p, 1), tl.sum(sums.u, 1)


@triton.jit
def add_values(sums, tile, index, context, CODE, EDGE: tl.constexpr):
    queries, values, threshold, margins = context
    PARTS: tl.constexpr = TILE // CODE.BLOCK_N
    part_u = sums.u
    first_key = tile * TILE + part_of(index, PARTS) * CODE.BLOCK_N
    qk = block_scores(queries, first_key, CODE, EDGE)
    p, u = weigh(qk, queries.scale, threshold, 0, CODE)
    weighted = add_weighted(sums.p_v, p, values, first_key, CODE, EDGE)
    here = column_sums(p)
    part_p, lost = kahan_add(sums.p, sums.lost, here, CODE.EXACT)
    if CODE.ALPHA == ALPHA_ANY:
        here = column_sums(u)
        part_u += here
    weight = tl.where(part_of(index, PARTS) > 0, sums.weight, 0)
    here = tl.reshape(here.to(tl.int32, bitcast=True), [TILE // WARP_ROWS, WARP_ROWS * ROW_PARTS])
    weight = tl.maximum(weight, tl.max(here, 1))  # as integers, which order as numbers from 0 on do
    tl.store(margins + tile, (weight > 0).to(tl.int16))
    return ValueSums(weighted, part_p, part_u, lost, weight)


@triton.jit
def weigh_marked_values(queries, values, threshold, keys, bits, words, CODE):
    """The same over MarkedKeys. Of the `words` words of tile bits those of tiles that weigh are set, the others 0."""
    for start in range(0, words, LIST_CHUNK):
        word = start + tl.arange(0, LIST_CHUNK)
        tl.store(bits + word, tl.zeros([LIST_CHUNK], tl.int32), mask=word < words)
    tl.debug_barrier()
    zeros = tl.zeros([CODE.BLOCK_M, ROW_PARTS], tl.float32)
    sums = (tl.zeros([CODE.BLOCK_M, CODE.BLOCK_D], tl.float32), zeros, zeros, zeros)
    context = (queries, values, threshold, bits, words)
    weighted, part_p, part_u, _ = visit_marked(add_marked_values, sums, context, keys, CODE.BLOCK_N, CODE)
    tl.debug_barrier()
    return weighted, tl.sum(part_p, 1), tl.sum(part_u, 1)


@triton.jit
def add_marked_values(sums, first_key, context, CODE, EDGE: tl.constexpr):
    queries, values, threshold, bits, words = context
    weighted, part_p, part_u, lost = sums
    p, u = weigh(block_scores(queries, first_key, CODE, EDGE), queries.scale, threshold, 0, CODE)
    weighted = add_weighted(weighted, p, values, first_key, CODE, EDGE)
    part_p, lost = kahan_add(part_p, lost, column_sums(p), CODE.EXACT)
    if CODE.ALPHA == ALPHA_ANY:
        part_u += column_sums(u)
    # As add_values has it: u may be above 0 where p has become 0. As integers, which order as numbers from 0 on do.
    weighs = tl.max((u if CODE.ALPHA == ALPHA_ANY else p).to(tl.int32, bitcast=True), 0) > 0
    tile = first_key // TILE
    weighs = weighs & (tile // WORD < words)  # there may be none
    tl.atomic_or(bits + tile // WORD, tl.full(tile.shape, 1, tl.int32) << (tile % WORD), mask=weighs, sem="relaxed")
    return weighted, part_p, part_u, lost


@triton.jit
def add_weighted(total, p, values, first_key, CODE, EDGE: tl.constexpr):
    """The sum of weighted values with those of some more keys."""
    v = load_rows(values.rows, first_key, CODE.BLOCK_N, CODE.BLOCK_D, EDGE)
    p = drop(p, values.dropout, values.row_seeds, row_numbers(first_key, CODE.BLOCK_N), CODE)
    return dot(cast(p, v.dtype), v, total)


# ---- alpha = 1 -------------------------------------------------------------------------------------------------------


@triton.jit
def softmax(queries, values, tiles_seen, CODE):
    """(sum p v, sum p, row_max) of each row with p = e^(z - row_max). Of the keys so far: where a row's maximum grows,
    what was summed is made smaller."""
    PARTS: tl.constexpr = TILE // CODE.BLOCK_N
    row_max = tl.full([CODE.BLOCK_M], float("-inf"), tl.float32)
    weighted = tl.zeros([CODE.BLOCK_M, CODE.BLOCK_D], tl.float32)
    part_p = tl.zeros([CODE.BLOCK_M, ROW_PARTS], tl.float32)
    lost = tl.zeros([CODE.BLOCK_M, ROW_PARTS], tl.float32)
    for index in tl.range((tiles_seen.inner + tiles_seen.edge) * PARTS):
        first_key = tiles_seen.first * TILE + index * CODE.BLOCK_N
        qk = block_scores(queries, first_key, CODE, True)
        here = max_or_nan(qk, 1) * queries.scale.z
        grown = tl.maximum(row_max, here, propagate_nan=tl.PropagateNan.ALL)
        base = tl.where(grown == float("-inf"), 0.0, grown)  # while a row has seen nothing
        shrink = tl.exp2((row_max - base) * LOG2_E)[:, None]
        row_max = grown
        p, _ = weigh(qk, queries.scale, Threshold(base, tl.zeros_like(base)), 0, CODE)
        part_p, lost = kahan_add(part_p * shrink, lost * shrink, column_sums(p), CODE.EXACT)
        weighted = add_weighted(weighted * shrink, p, values, first_key, CODE, True)
    return weighted, tl.sum(part_p, 1), row_max


# ---- what is written -------------------------------------------------------------------------------------------------


@triton.jit
def store_state(row_state, row_max, gap, row, end):
    tl.store(row_state + 2 * row, row_max, mask=row < end)
    tl.store(row_state + 2 * row + 1, gap, mask=row < end)


@triton.jit
def load_state(row_state, row, end):
    """(row_max, gap) of rows whose gap is only known to be as large: broken ones have NaN."""
    row_max = tl.load(row_state + 2 * row, mask=row < end, other=0.0)
    return row_max, tl.load(row_state + 2 * row + 1, mask=row < end, other=float("inf"))


@triton.jit
def store_results(weighted, sum_p, row_max, gap, sees, sound, row_state, out_rows, first_row, CODE):
    """row_state and the output of rows, from the weighted values and the sum of their weights. Returns which of them
    are broken: they see keys and are not sound."""
    row = first_row + tl.arange(0, CODE.BLOCK_M)
    broken = sees & ~sound
    row_max = tl.where(broken, float("nan"), row_max)
    store_state(row_state, row_max, tl.where(broken, float("nan"), gap), row, out_rows.end)
    weighted *= (1.0 / tl.where(sound & (sum_p > 0.0), sum_p, 1.0))[:, None]
    weighted = tl.where(broken[:, None], float("nan"), weighted)
    store_rows(out_rows, weighted, first_row, CODE.BLOCK_M, CODE.BLOCK_D)
    return broken


@triton.jit
def store_tile_bits(bits, tile_words, margins, tiles_seen, any_broken):
    """The words of a tile row: a bit for each tile that holds weight; all that are seen if any row is
    broken, as NaN goes back to all keys that were seen."""
    words = tl.arange(0, LIST_CHUNK // WORD)
    tl.debug_barrier()
    for start in range(0, tile_words, LIST_CHUNK // WORD):
        tile = start * WORD + tl.arange(0, LIST_CHUNK)
        seen = (tile >= tiles_seen.first) & (tile < tiles_seen.first + tiles_seen.inner + tiles_seen.edge)
        # 1 where a visited tile holds weight; those of scan are negative or NaN
        margin = tl.load(margins[:, None] + tile[None, :], mask=seen[None, :], other=0)
        weighs = seen & (any_broken | (tl.max((margin == 1).to(tl.int32), 0) > 0))
        tile_bits = tl.reshape(weighs.to(tl.int32) << (tile % WORD), [LIST_CHUNK // WORD, WORD])
        tl.store(bits + start + words, tl.sum(tile_bits, 1), mask=start + words < tile_words)
