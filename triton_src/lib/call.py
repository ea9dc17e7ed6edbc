"""What a call is, and what every program of attention begins with: which head of which sequence it works on.

attend, mark and grad_query begin alike, but between the loads that they share some have others. The compiler keeps the
order of loads, and one function for all of the beginning would change it; so they share the functions here instead.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .dropout import Dropout
from .entmax import Alpha, alpha_of_head
from .matrices import MATRIX, Rows, paged_rows_of_head, rows_of_head
from .scores import HeadScale, Scores, qk_slope_of, z_scale_of
from .tile_lists import first_tile_row
from .visibility import TILE, Band, Sequence, Sequences, sequence_bounds


class Call(NamedTuple):
    """The shape and options of a call, which all kernels of attention take."""

    queries: Sequences
    keys: Sequences
    alpha: Alpha
    scores: Scores
    dropout: Dropout
    state_batch_stride: tl.tensor  # rows of row_state from a sequence to the next; 0 if packed
    heads: tl.tensor
    group: tl.tensor  # query heads per key head
    tile_words: tl.tensor  # of a tile row
    head_dim: tl.tensor
    value_dim: tl.tensor
    few_queries: tl.tensor  # most queries that a sequence of few queries has; -1 where those go no way of their own


class Few(NamedTuple):
    """What the kernels of attention/few.py are told beside the call, of its sequences of few queries."""

    queries: tl.tensor  # most queries that such a sequence of this call has
    rows: tl.tensor  # of a key head, if it has that many: its query heads' one after the other
    row_tiles: tl.tensor  # tiles that each row of a key head has numbers for, those of all key heads
    scorers: tl.tensor  # programs that share the tiles of a block of rows
    weighers: tl.tensor  # programs that share the splits of the rows that are long
    marks_tiles: tl.tensor  # whether bits of tiles are wanted


class Head(NamedTuple):
    """A head of queries, in one sequence of them and of keys."""

    batch: tl.tensor
    head: tl.tensor
    group: tl.tensor  # heads that share a key head
    queries: Sequence
    keys: Sequence
    band: Band


@triton.jit
def block_of_program(blocks, heads):
    """(block, head, batch) of this program in a grid of one dimension; the others end at 65535. Head and batch are 64
    bits wide, and so is every offset that begins with one of them."""
    index = tl.program_id(0)
    head = index // blocks
    return index % blocks, (head % heads).to(tl.int64), (head // heads).to(tl.int64)


@triton.jit
def head_in_sequence(call, batch, head):
    queries = sequence_bounds(call.queries, batch)
    keys = sequence_bounds(call.keys, batch)
    return Head(batch, head, call.group, queries, keys, band_of(call, batch, queries, keys))


@triton.jit
def has_many_queries(call, queries):
    """Whether `attend` takes a sequence, and not the kernels of attention/few.py. It follows from the sequence alone,
    whatever else is in the batch."""
    return queries.length > call.few_queries


@triton.jit
def without_few(call, at):
    """The Head, as if a sequence of few queries had none."""
    queries = Sequence(
        at.queries.offset, tl.where(has_many_queries(call, at.queries), at.queries.length, 0), at.queries.extent
    )
    band = Band(queries.length, at.keys.length, at.band.first_place, at.band.window_left, at.band.window_right)
    return Head(at.batch, at.head, at.group, queries, at.keys, band)


@triton.jit
def query_rows_of(matrix, at, columns, end):
    """A Head's Rows in a matrix with a row for each query."""
    return rows_of_head(matrix, at.batch, at.head, at.queries.offset, columns, end)


@triton.jit
def key_rows_of(matrix, at, columns, end):
    """The rows of a Head's key head in a matrix with a row for each key, which may be in a paged cache."""
    if len(matrix) > MATRIX:
        return paged_rows_of_head(matrix, at.batch, at.head // at.group, columns, end)
    else:
        # As rows_of_head has it, but that the division comes after a product: the compiler keeps this order.
        start = at.batch * matrix.batch_stride
        start = start + (at.head // at.group) * matrix.head_stride + at.keys.offset * matrix.row_stride
        return Rows(matrix.data + start, matrix.row_stride, columns, end)


@triton.jit
def kv_head_of(call, batch, head):
    """The number of a head's key head among those of all sequences."""
    return batch * (call.heads // call.group) + head // call.group


@triton.jit
def first_state_row(call, at):
    """Where a Head's rows start in row_state and whatever else has numbers for each query."""
    return at.batch * call.state_batch_stride + at.head * call.queries.rows + at.queries.offset


@triton.jit
def band_of(call, batch, queries, keys):
    last_beside_last = keys.length - queries.length
    place = tl.load(call.scores.q_positions + batch, mask=call.scores.has_positions != 0, other=last_beside_last)
    return Band(queries.length, keys.length, place, call.scores.window_left, call.scores.window_right)


@triton.jit
def head_scale(call, batch, head, ALPHA: tl.constexpr):
    alpha = alpha_of_head(call.alpha, head, ALPHA)
    z_scale = z_scale_of(call.scores.scale, alpha, ALPHA)
    return HeadScale(alpha, z_scale, qk_slope_of(call.scores, batch, head, alpha, z_scale, ALPHA))


@triton.jit
def tile_row_of(call, at, first_row):
    """The tile row of a Head's rows from `first_row` on."""
    return first_tile_row(call.queries, call.heads, at.batch, at.head, at.queries.offset) + first_row // TILE
