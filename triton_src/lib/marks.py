"""Marks: which keys of a tile weigh, and for which rows; and lists of what is marked."""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .matrices import INTERPRETED
from .scores import turned_scores
from .tile_lists import WORD, TileList, all_edges, part_of, stages, visit_tiles
from .visibility import TILE, UNLIMITED

WARP_ROWS = tl.constexpr(16)  # of one warp in the matrix units' layout: for what is kept of each, no other warp waits
PROBE_EVERY = tl.constexpr(16)  # one of so many blocks of rows is probed, at about so many tiles of it
TILES_AT_ONCE = tl.constexpr(32)  # tiles whose marked rows are listed together
GATHER_ROOM = tl.constexpr(2560)  # rows that a list of marked ones has room for
# With so many or less of them there is room for those of TILES_AT_ONCE tiles more.
ROOM_AT_LEAST = tl.constexpr(GATHER_ROOM.value - TILES_AT_ONCE.value * TILE.value)
# How many places of a row of `support` come before those for marks: what says that its keys are not listed, and in the
# first row of 64 how many keys are marked.
PLACES_BEFORE_MARKS = tl.constexpr(2)


class TileMarks(NamedTuple):
    """Where the marks of tiles are: of each two words, with a bit for each of its 64 keys or rows. The others are how
    many words it is from the first to the second, from a tile to the next, and from WORD tiles to the next WORD."""

    words: tl.tensor  # the first one of tile 0
    to_half: tl.tensor
    to_tile: tl.tensor
    to_many: tl.tensor


@triton.jit
def mark_words(marks, tile, half):
    """Pointers to halves, 0 or 1, of the marks of tiles."""
    in_many = tile % WORD * marks.to_tile + half * marks.to_half
    return marks.words + tile.to(tl.int64) // WORD * marks.to_many + in_many


@triton.jit
def kept_or_lent(kept, of_row, words):
    """The TileMarks of a tile row: those that are kept, or in lent memory, where they follow each other from `words`
    on."""
    return TileMarks(
        tl.where(kept, of_row.words, words),
        tl.where(kept, of_row.to_half, 1),
        tl.where(kept, of_row.to_tile, TILE // WORD),
        tl.where(kept, of_row.to_many, TILE),
    )


@triton.jit
def kept_marks(support, capacity, state_row, first_row, queries, keys):
    """(whether there is room, where their number is, TileMarks) for the marks of a tile row that the forward keeps in
    its rows of `support`, behind what says there that no keys are listed: a column for WORD tiles, so that 64 rows of
    queries have a word for each of their halves. Rows that are fewer have no room. The number is negative where the
    forward kept no marks."""
    room = (capacity - PLACES_BEFORE_MARKS) * WORD
    fits = (first_row + TILE <= queries.length) & (tl.cdiv(keys.length, TILE) <= room)
    of_row = support + (state_row + first_row) * capacity
    marks = TileMarks(of_row + PLACES_BEFORE_MARKS, capacity, capacity * (TILE // WORD), 1)
    return fits, of_row + 1, marks


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def any_bits(x, axis: tl.constexpr):
    """The bits that are set in any number along an axis."""
    if INTERPRETED:  # as in max_or_nan
        bit = tl.arange(0, WORD)
        return tl.sum(tl.max((tl.expand_dims(x, len(x.shape)) >> bit) & 1, axis) << bit, len(x.shape) - 1)
    else:
        return tl.reduce(x, axis, _or)


@triton.jit
def bits_set(x):
    """How many bits of a number are set."""
    if INTERPRETED:
        return tl.sum((tl.expand_dims(x, len(x.shape)) >> tl.arange(0, WORD)) & 1, len(x.shape))
    else:
        return libdevice.popc(x)


@triton.jit
def marks_of_keys(qk, z_scale, threshold, EXACT: tl.constexpr):
    """Of a block of keys and rows with scores qk, (keys, rows): (groups of WARP_ROWS keys,) bits of the keys that a row
    weighs. What `excess_of` takes the positive part of is negated here, so that its sign is the mark."""
    KEYS: tl.constexpr = qk.shape[0]
    high, low = threshold.high[None, :], threshold.low[None, :]
    below = (high - qk * z_scale) + low if EXACT else high - qk * z_scale
    signs = any_bits(below.to(tl.int32, bitcast=True), 1)
    bit = tl.full([KEYS], 1, tl.int32) << (tl.arange(0, KEYS) % WARP_ROWS)
    return any_bits(tl.reshape((signs >> 31) & bit, [KEYS // WARP_ROWS, WARP_ROWS]), 1)


@triton.jit
def mark_keys(queries, threshold, tile_list, marks, CODE):
    """Marks the keys of the tiles of a list that any row weighs at a threshold, in TileMarks, a whole tile at a step.
    Returns how many they are. A warp has 16 keys, and all rows, so it waits for no other."""
    marked = tl.zeros([TILE // WARP_ROWS], tl.int32)
    marked = visit_tiles(add_key_marks, marked, (queries, threshold, marks), tile_list, CODE)
    return tl.sum(marked, 0)


@triton.jit
def add_key_marks(marked, tile, index, context, CODE, EDGE: tl.constexpr):
    queries, threshold, marks = context
    qk = turned_scores(queries, tile * TILE, CODE, EDGE)
    bits = marks_of_keys(qk, queries.scale.z, threshold, CODE.EXACT)
    group = tl.arange(0, TILE // WARP_ROWS)  # two to a word
    word = mark_words(marks, tile, group // 2)
    tl.store(word.to(tl.pointer_type(tl.int16), bitcast=True) + group % 2, bits.to(tl.int16))
    return marked + bits_set(bits)


@triton.jit
def bits_of_rows(marked):
    """Of (rows, n) conditions: (groups of WARP_ROWS rows, n) bits of the rows for which they hold."""
    ROWS: tl.constexpr = marked.shape[0]
    bit = tl.full([ROWS], 1, tl.int32) << (tl.arange(0, ROWS) % WARP_ROWS)
    bits = tl.where(marked, bit[:, None], 0)
    return any_bits(tl.reshape(bits, [ROWS // WARP_ROWS, WARP_ROWS, marked.shape[1]]), 1)


@triton.jit
def add_row_marks(row_marks, marked, key):
    """Marks rows of tiles of keys for which a condition, (rows, keys), holds: of the tiles that some keys are in."""
    bits = bits_of_rows(marked)
    group = tl.arange(0, TILE // WARP_ROWS)[:, None]  # two to a word
    place = row_marks + (key // TILE * (TILE // WORD))[None, :] + group // 2
    tl.atomic_or(place, bits << (group % 2 * WARP_ROWS), mask=bits != 0, sem="relaxed")


@triton.jit
def gathers(probe_counts, kv_head, gather_below):
    """Whether of the probed keys of a key head (numbered through all sequences, see kv_head_of) less than
    `gather_below` per cent weigh, so that to gather them pays. 0 per cent: nothing was probed."""
    weigh = tl.load(probe_counts + 2 * kv_head, mask=gather_below > 0, other=0)
    probed = tl.load(probe_counts + 2 * kv_head + 1, mask=gather_below > 0, other=0)
    return weigh.to(tl.int64) * 100 < probed.to(tl.int64) * gather_below


class MarkedRows(NamedTuple):
    """The marks of tiles, and room for a list of the rows that they mark."""

    marks: TileMarks
    gathered: tl.tensor


@triton.jit
def visit_rows(
    add, sums, context, tile_list, unused, marked, ROWS: tl.constexpr, SHORT_EDGES: tl.constexpr, CODE,
    GATHER: tl.constexpr,
):  # fmt: skip
    """Sums over all rows of the tiles of a list, or if GATHER over the marked ones; rows are of either side. The list
    has `unused` entries after its inner tiles. At each step `add`, a function, is given the sums so far, ROWS rows as
    load_rows takes them, the context, CODE and whether the other side may not see all of them; what it returns are the
    sums from then on. SHORT_EDGES are pipelined as `stages` says, others as inner tiles are."""
    start = 0
    while start < tile_list.count:
        if GATHER:
            n, inner_n, start = list_marked(marked, tile_list, unused, start, ROOM_AT_LEAST)
        else:
            n, inner_n, start = tile_list.count * TILE, tile_list.inner * TILE, tile_list.count
        entries = tile_list.entries
        sums = visit_steps(add, sums, context, marked, entries, unused, n, inner_n, ROWS, SHORT_EDGES, CODE, GATHER)
    return sums


@triton.jit
def visit_steps(
    add, sums, context, marked, entries, unused, n, inner_n, ROWS: tl.constexpr, SHORT_EDGES: tl.constexpr, CODE,
    GATHER: tl.constexpr,
):  # fmt: skip
    """The loops of visit_rows, over n rows of a list or of its tiles, the first inner_n of which are in inner tiles."""
    for EDGE in tl.static_range(all_edges(CODE.ALPHA), 2):
        begin, end = (inner_n // ROWS, tl.cdiv(n, ROWS)) if EDGE else (0, inner_n // ROWS)
        of_edge = entries + unused if EDGE else entries
        ahead = listed_step(marked.gathered, of_edge, begin, n, ROWS, GATHER)
        for index in tl.range(begin, end, num_stages=stages(EDGE and SHORT_EDGES, CODE.ALPHA)):
            first = first_of_step(ahead, index, ROWS, GATHER)
            ahead = listed_step(marked.gathered, of_edge, index + 1, n, ROWS, GATHER)
            sums = add(sums, first, context, CODE, EDGE)
    return sums


class MarkedKeys(NamedTuple):
    """The marked keys of a list of tiles, for sums over them that are taken more than once."""

    marked: MarkedRows
    tiles: TileList
    count: tl.tensor
    inner: tl.tensor  # of them those in inner tiles, as list_at_once says


@triton.jit
def list_at_once(marked, tile_list, count):
    """Lists all marked rows of a list of tiles, which are `count`, if there is room for them; returns how many are in
    inner tiles."""
    inner = 0
    start = tl.where(count <= GATHER_ROOM, 0, tile_list.count)
    while start < tile_list.count:
        _, inner, start = list_marked(marked, tile_list, 0, start, GATHER_ROOM)
    return inner


@triton.jit
def visit_marked(add, sums, context, keys, ROWS: tl.constexpr, CODE):
    """Sums over MarkedKeys, ROWS at a step. Those that are too many for one list are listed part by part, anew each
    time."""
    start = 0
    while start < keys.tiles.count:
        n, inner_n = keys.count, keys.inner
        if keys.count <= GATHER_ROOM:
            start = keys.tiles.count
        else:
            n, inner_n, start = list_marked(keys.marked, keys.tiles, 0, start, ROOM_AT_LEAST)
        sums = visit_steps(add, sums, context, keys.marked, keys.tiles.entries, 0, n, inner_n, ROWS, False, CODE, True)
    return sums


@triton.jit
def list_marked(marked, tile_list, unused, start, most):
    """Lists the marked rows of the tiles of a list from the start-th on, until there are more than `most`: (how many,
    how many of them in inner tiles, which come first, the tile to go on with)."""
    n = 0
    inner_n = 0
    bit = tl.arange(0, WORD)
    below = (tl.full([WORD], 1, tl.int32) << bit) - 1
    half = tl.arange(0, TILE // WORD)
    tl.debug_barrier()  # the old list may still be read
    while (start < tile_list.count) & (n <= most):
        index = start + tl.arange(0, TILES_AT_ONCE)
        known = index < tile_list.count
        place = tile_list.entries + index + tl.where(index < tile_list.inner, 0, unused)
        tile = tl.load(place, mask=known, other=0)
        word = mark_words(marked.marks, tile[:, None], half[None, :])
        words = tl.reshape(tl.load(word, mask=known[:, None], other=0), [TILES_AT_ONCE * TILE // WORD])
        first = tl.reshape(tile[:, None] * TILE + half[None, :] * WORD, [TILES_AT_ONCE * TILE // WORD])
        counts = bits_set(words)
        before = n + tl.cumsum(counts, 0) - counts
        place = before[:, None] + bits_set(words[:, None] & below[None, :])
        is_marked = ((words[:, None] >> bit[None, :]) & 1) != 0
        tl.store(marked.gathered + place, first[:, None] + bit[None, :], mask=is_marked)
        of_tile = tl.sum(tl.reshape(counts, [TILES_AT_ONCE, TILE // WORD]), 1)
        inner_n += tl.sum(tl.where(index < tile_list.inner, of_tile, 0), 0)
        n += tl.sum(of_tile, 0)
        start += TILES_AT_ONCE
    tl.debug_barrier()  # what other threads wrote is read from here on
    return n, inner_n, start


@triton.jit
def listed_step(gathered, entries, index, count, ROWS: tl.constexpr, GATHER: tl.constexpr):
    """What the index-th step of a loop over `count` rows takes: ROWS gathered ones, far beyond all rows where there is
    none, or the tile that they are in. Read a step ahead, as in visit_tiles."""
    first = index * ROWS
    if GATHER:
        place = tl.arange(0, ROWS)
        return tl.load(gathered + first + place, mask=place < count - first, other=UNLIMITED)
    else:
        return tl.load(entries + index // (TILE // ROWS), mask=first < count, other=0)


@triton.jit
def first_of_step(entry, index, ROWS: tl.constexpr, GATHER: tl.constexpr):
    """The rows of that step as load_rows takes them."""
    return entry if GATHER else entry * TILE + part_of(index, TILE // ROWS) * ROWS
