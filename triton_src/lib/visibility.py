"""Which keys a row sees: lengths, causal order and windows, for one row, a block of rows and tiles of keys."""

from typing import NamedTuple

import triton
import triton.language as tl

TILE = tl.constexpr(64)  # side of the tiles that the op's tile bits speak of
# A window bound that never binds, small enough that adding a row index does not overflow; as a row it is beyond all.
UNLIMITED = tl.constexpr(1 << 30)

# How lengths are given (LengthsKind in csrc/cuda/embedded.h says the same).
LENGTHS_NONE = tl.constexpr(0)
LENGTHS_PADDED = tl.constexpr(1)  # (B,) length of every sequence of a right-padded batch
LENGTHS_PACKED = tl.constexpr(2)  # (B + 1,) offsets into a packed batch
LENGTHS_BOUNDS = tl.constexpr(3)  # (B, 2) first row and end of every sequence of a padded batch


class Sequences(NamedTuple):
    """The sequences of one side, queries or keys."""

    lengths: tl.tensor  # or offsets, or bounds
    lengths_kind: tl.tensor
    rows: tl.tensor  # of storage: of a sequence, or of a whole packed batch
    max_seqlen: tl.tensor  # most rows that one of them has
    tile_rows: tl.tensor  # of a head, see tile_lists


class Sequence(NamedTuple):
    """One of them: where it starts, how many rows it has, how many rows there are its to write."""

    offset: tl.tensor
    length: tl.tensor
    extent: tl.tensor


class Span(NamedTuple):
    """Keys, or rows: first <= j < end."""

    first: tl.tensor
    end: tl.tensor


class Band(NamedTuple):
    """What decides which keys a row sees: row i those around key i + first_place."""

    query_length: tl.tensor
    key_length: tl.tensor
    first_place: tl.tensor  # of row 0; by itself such that the last row stands beside the last key
    window_left: tl.tensor
    window_right: tl.tensor


class VisibleTiles(NamedTuple):
    """The tiles of keys that a block of rows sees: `inner` of them, from `inner_first` on, seen whole by all rows, and
    `edge` more around them, from `first` on."""

    first: tl.tensor
    inner_first: tl.tensor
    inner: tl.tensor
    edge: tl.tensor


@triton.jit
def sequence_bounds(sequences, batch):
    """One of the sequences. Lengths come from the user's GPU memory unchecked, so they are clamped: wrong ones give
    wrong rows, never a stray access. Offsets never fall, which the host sees to."""
    kind, rows, limit = sequences.lengths_kind, sequences.rows, sequences.max_seqlen
    starts = kind >= LENGTHS_PACKED  # whether each sequence has one of its own, with its end behind it
    place = sequences.lengths + tl.where(kind == LENGTHS_BOUNDS, 2 * batch, batch)
    given = tl.load(place, mask=kind != LENGTHS_NONE, other=limit)
    end = tl.load(place + 1, mask=starts, other=rows)
    offset = tl.where(starts, tl.minimum(tl.maximum(given, 0), rows), 0)
    length = tl.where(starts, tl.minimum(end, rows) - offset, given)
    length = tl.minimum(tl.maximum(length, 0), limit)
    # A padded sequence's rows go on behind its end; those before its start are zeroed by the host.
    extent = tl.where(kind == LENGTHS_PACKED, length, limit - offset)
    return Sequence(offset.to(tl.int64), length, extent)


@triton.jit
def visible_keys(row, band):
    """The Span of keys that a row sees. Causal order, window and lengths are known here, and solved for the row in
    `rows_that_see`; everything else asks these two.

    It must stay one interval whose ends never fall from a row to the next: `visible_tiles`, `keys_of_block` and
    `list_query_tiles` look at the first and the last row of a block only. Masks of another shape need more than a
    change here."""
    diagonal = diagonal_of(row, band)
    first = tl.maximum(diagonal - band.window_left, 0)
    end = tl.minimum(diagonal + band.window_right + 1, band.key_length)
    return Span(first, tl.where(row < band.query_length, end, 0))


@triton.jit
def diagonal_of(row, band):
    """The key that is a row's own, if there is one: it may be before the first key, or behind the last."""
    return row + band.first_place


@triton.jit
def rows_that_see(band):
    """The Span of rows that see a key: what `visible_keys` says, solved for the row."""
    first = tl.maximum(-band.first_place - band.window_right, 0)
    return Span(first, tl.minimum(band.key_length + band.window_left - band.first_place, band.query_length))


@triton.jit
def visible_tiles(row, band, ROWS: tl.constexpr):
    """The VisibleTiles of a block of ROWS rows from `row` on."""
    last_row = tl.minimum(row + ROWS, band.query_length) - 1
    lowest = visible_keys(row, band)
    highest = visible_keys(last_row, band)
    first = lowest.first // TILE
    end = tl.where(row < band.query_length, tl.maximum(tl.cdiv(tl.maximum(highest.end, 0), TILE), first), first)
    inner_first = tl.minimum(tl.cdiv(highest.first, TILE), end)
    inner = tl.maximum(tl.minimum(tl.maximum(lowest.end, 0) // TILE, end) - inner_first, 0)
    return VisibleTiles(first, inner_first, inner, end - first - inner)


@triton.jit
def ordered_tile(index, tiles_seen):
    """The visible tiles in the order of visit: the inner ones, then those left of them, then those right of them."""
    inner_first, inner = tiles_seen.inner_first, tiles_seen.inner
    edge = tiles_seen.first + index - inner
    return tl.where(index < inner, inner_first + index, tl.where(edge >= inner_first, edge + inner, edge))


@triton.jit
def keys_of_block(row, band, ROWS: tl.constexpr):
    """The Span of keys that some row of a block sees. What others hold, NaN too, must not get into sums over the
    block."""
    lowest = visible_keys(row, band)
    last_row = tl.minimum(row + ROWS, band.query_length) - 1
    highest = visible_keys(last_row, band)
    return Span(lowest.first, highest.end)
