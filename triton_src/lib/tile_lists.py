"""Lists of the tiles to visit, in global memory. Loops over a list have a known trip count and no branch, which is what
keeps them pipelined.

Tile bits and lists are kept by tile rows: of each head one for 64 queries of a sequence (or 64 keys, where keys are
down). Those of a packed batch stand as close as they can be placed by lengths alone.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .entmax import fixed_alpha
from .visibility import LENGTHS_PACKED, TILE, ordered_tile

WORD = tl.constexpr(32)  # tile bits in a word
LIST_CHUNK = tl.constexpr(128)  # tiles of a row or column that are looked at together


class TileList(NamedTuple):
    """A list of tiles: `inner` ones first, which all rows see whole, of `count`."""

    entries: tl.tensor
    inner: tl.tensor
    count: tl.tensor


def count_tile_rows(rows: int, sequences: int | None = None) -> int:
    """Tile rows of a head with so many rows: those of one sequence, or of a packed batch of so many sequences. For
    Python: tile_row_count in csrc/ops/attention.cpp says the same."""
    tiles = -(-rows // TILE.value) if sequences is None else rows // TILE.value + sequences
    return 2 * -(-tiles // 2)


def count_tile_words(keys: int) -> int:
    """Words of a tile row with a bit for every tile of so many keys (saved_sizes in csrc/ops/attention.cpp)."""
    return 2 * -(-keys // (2 * WORD.value * TILE.value))


@triton.jit
def first_tile_row(sequences, heads, batch, head, offset):
    """Where a sequence's tile rows start among those of all (packed_tile_row in csrc/ops/attention.h)."""
    packed = head * sequences.tile_rows + offset // TILE + batch
    return tl.where(sequences.lengths_kind == LENGTHS_PACKED, packed, (batch * heads + head) * sequences.tile_rows)


@triton.jit
def append(entries, count, entry, wanted, STEP: tl.constexpr = 1):
    """Appends the wanted ones of a vector of entries to a list, upwards or downwards; returns its new length."""
    place = count + tl.cumsum(wanted.to(tl.int32), 0) - 1
    tl.store(entries + place * STEP, entry, mask=wanted)
    return count + tl.sum(wanted.to(tl.int32), 0)


@triton.jit
def tile_bit(words, tile, mask):
    """Whether the tile's bit is set in a row of words."""
    word = tl.load(words + tile // WORD, mask=mask, other=0)
    return ((word >> (tile % WORD)) & 1) != 0


@triton.jit
def list_tiles(is_wanted, context, entries, tiles_seen, ALPHA: tl.constexpr):
    """The TileList of the visible tiles that are wanted: `is_wanted`, a function, is given tiles, their places in the
    order of visit, which of these there are, and the context."""
    count = 0
    inner = 0
    for start in range(0, tiles_seen.inner + tiles_seen.edge, LIST_CHUNK):
        index = start + tl.arange(0, LIST_CHUNK)
        tile = ordered_tile(index, tiles_seen)
        wanted = is_wanted(tile, index, index < tiles_seen.inner + tiles_seen.edge, context)
        count = append(entries, count, tile, wanted)
        inner += tl.sum((wanted & (index < tiles_seen.inner)).to(tl.int32), 0)
    tl.debug_barrier()  # what other threads wrote is read from here on
    return TileList(entries, 0 if all_edges(ALPHA) else inner, count)


@triton.jit
def list_weighing(entries, bits, tiles_seen, ALPHA: tl.constexpr, every=1):
    """The TileList of the visible tiles whose bit is set, or of `every` so many visible ones only of one."""
    return list_tiles(has_weight, (bits, every), entries, tiles_seen, ALPHA)


@triton.jit
def has_weight(tile, index, known, context):
    bits, every = context
    return tile_bit(bits, tile, known) & (index % every == 0)


@triton.jit
def list_where(tile_list, condition):
    """A TileList, or an empty one unless a condition holds: where two codes are for one list, each under a condition of
    its own, sums go through both, and need not come out of a branch."""
    inner = tl.where(condition, tile_list.inner, 0)
    return TileList(tile_list.entries, inner, tl.where(condition, tile_list.count, 0))


@triton.constexpr_function
def all_edges(ALPHA):
    """1 in code that treats every tile as one at an edge: half the code, where hiding keys is little of the time."""
    return 0 if fixed_alpha(ALPHA) else 1


@triton.constexpr_function
def stages(EDGE, ALPHA):
    """How deep a loop over tiles is pipelined; None: as the variant says. Over edges it is mostly a step or two, and a
    deeper one only begins and ends for longer. For any alpha all tiles count as edges."""
    return 2 if EDGE and fixed_alpha(ALPHA) else None


@triton.jit
def steps(tile_list, PARTS: tl.constexpr, EDGE: tl.constexpr):
    """(first, end) of a loop's steps over the inner tiles of a list, or over those at an EDGE, if each takes PARTS."""
    if EDGE:
        return tile_list.inner * PARTS, tile_list.count * PARTS
    else:
        return 0, tile_list.inner * PARTS


@triton.jit
def visit_tiles(add, sums, context, tile_list, CODE):
    """Sums over the keys of a TileList. At each step `add`, a function, is given the sums so far, a tile, the number of
    the step, from which part_of tells which BLOCK_N keys of the tile to take, the context, CODE and whether rows may
    not see all of the tile; what it returns are the sums from then on."""
    PARTS: tl.constexpr = TILE // CODE.BLOCK_N  # a tile is visited in so many steps
    for EDGE in tl.static_range(all_edges(CODE.ALPHA), 2):
        begin, end = steps(tile_list, PARTS, EDGE)
        # Read a step ahead: waiting for what addresses come from took a fifth of the time.
        ahead = listed_tile(tile_list.entries, begin, end, PARTS)
        for index in tl.range(begin, end, num_stages=stages(EDGE, CODE.ALPHA)):
            tile = ahead
            ahead = listed_tile(tile_list.entries, index + 1, end, PARTS)
            sums = add(sums, tile, index, context, CODE, EDGE)
    return sums


@triton.jit
def listed_tile(entries, index, end, PARTS: tl.constexpr):
    """The entry for the index-th step of a loop over a list, 0 from `end` on, where none is wanted."""
    return tl.load(entries + index // PARTS, mask=index < end, other=0)


@triton.jit
def part_of(index, PARTS: tl.constexpr):
    """Which part of its tile the index-th step of a loop over a list works on, if a tile takes PARTS steps."""
    return index - index // PARTS * PARTS  # the interpreter's loop indices know no %
