"""Rows of matrices: blocks of them loaded, multiplied, summed and stored."""

from typing import NamedTuple

import triton
import triton.language as tl
from triton import knobs

# The interpreter keeps bfloat16 as integers: products of them are garbage and casts cut bits off.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)

# Sums over a row are kept in so many parts, those of columns that are equal modulo it: in the matrix units' layout a
# thread holds these columns itself.
ROW_PARTS = tl.constexpr(8)


class Matrix(NamedTuple):
    """Rows of all heads of a batch, and how many elements apart batches, heads and rows are."""

    data: tl.tensor
    batch_stride: tl.tensor
    head_stride: tl.tensor
    row_stride: tl.tensor


class PagedMatrix(NamedTuple):
    """Rows of keys or values in a paged cache: its blocks, each a page of rows of all heads, how many elements apart
    blocks, heads and rows are, and a table that names the blocks of each sequence in order."""

    data: tl.tensor
    block_stride: tl.tensor
    head_stride: tl.tensor
    row_stride: tl.tensor
    table: tl.tensor
    table_stride: tl.tensor  # entries from a sequence to the next
    blocks: tl.tensor
    page_size: tl.tensor  # rows of a page
    page_inverse: tl.tensor  # row * page_inverse >> 30 + page_shift is row // page_size, for rows below 2^30
    page_shift: tl.tensor


class EvenPagedMatrix(NamedTuple):
    """A PagedMatrix whose pages have 16, 32, 64 or another power of two of rows. Sixteen neighbours are in one page
    there, which is looked up once for all of them and found without a division."""

    data: tl.tensor
    block_stride: tl.tensor
    head_stride: tl.tensor
    row_stride: tl.tensor
    table: tl.tensor
    table_stride: tl.tensor
    blocks: tl.tensor
    page_bits: tl.tensor  # a page has 2^page_bits rows


ROWS_TOGETHER = tl.constexpr(16)  # whose page is looked up once
# By which code tells matrices apart.
MATRIX = tl.constexpr(len(Matrix._fields))
EVEN_PAGED_MATRIX = tl.constexpr(len(EvenPagedMatrix._fields))


class Rows(NamedTuple):
    """The rows of one head of a sequence, and which of them count: those before `end`, with columns below `columns`.
    What is read elsewhere is zero, and nothing is written there."""

    data: tl.tensor  # where row 0 is
    stride: tl.tensor
    columns: tl.tensor
    end: tl.tensor


class RowsFrom(NamedTuple):
    """Rows of which those before `begin` do not count either. A type of its own, with one part more: Triton 3.6 can't
    return a tuple that has None for a bound that there is not."""

    data: tl.tensor
    stride: tl.tensor
    columns: tl.tensor
    end: tl.tensor
    begin: tl.tensor


class Pages(NamedTuple):
    """Where the pages of one sequence are."""

    table: tl.tensor  # its entry of page 0
    block_stride: tl.tensor
    blocks: tl.tensor
    size: tl.tensor
    inverse: tl.tensor
    shift: tl.tensor


class EvenPages(NamedTuple):
    """The same where pages are those of an EvenPagedMatrix."""

    table: tl.tensor
    block_stride: tl.tensor
    blocks: tl.tensor
    bits: tl.tensor


EVEN_PAGES = tl.constexpr(len(EvenPages._fields))


class PagedRows(NamedTuple):
    """Rows of one head of a sequence that lie in pages, of which those with begin <= row < end count."""

    data: tl.tensor  # where row 0 of block 0 is
    stride: tl.tensor  # from a row to the next of a page
    columns: tl.tensor
    end: tl.tensor
    begin: tl.tensor
    pages: Pages | EvenPages


# By which code tells the three apart; those that are bounded twice have as many fields as RowsFrom, or more.
BOUNDED_TWICE = tl.constexpr(len(RowsFrom._fields))
IN_PAGES = tl.constexpr(len(PagedRows._fields))


class Factor(NamedTuple):
    """A block of rows that stays in registers or shared memory while it is multiplied by others, as load_factor loaded
    it, and where it is from."""

    block: tl.tensor
    rows: Rows | RowsFrom | PagedRows
    first: tl.tensor


class Code(NamedTuple):
    """What a kernel's code is made for, all of it known when it is compiled."""

    BLOCK_M: tl.constexpr  # query rows at a time
    BLOCK_N: tl.constexpr  # keys at a time
    BLOCK_D: tl.constexpr  # head dimensions, a power of two
    STEP_D: tl.constexpr  # head dimensions that a product takes at a time
    ALPHA: tl.constexpr  # as in entmax
    EXACT: tl.constexpr  # fp32


@triton.jit
def rows_of_head(matrix, batch, head, offset, columns, end):
    """The Rows of a head, row 0 of which is row `offset` of the matrix."""
    start = batch * matrix.batch_stride + head * matrix.head_stride + offset * matrix.row_stride
    return Rows(matrix.data + start, matrix.row_stride, columns, end)


@triton.jit
def pages_of(matrix, batch):
    """Where the pages of a sequence are."""
    table = matrix.table + batch * matrix.table_stride
    if len(matrix) == EVEN_PAGED_MATRIX:
        return EvenPages(table, matrix.block_stride, matrix.blocks, matrix.page_bits)
    else:
        return Pages(
            table, matrix.block_stride, matrix.blocks, matrix.page_size, matrix.page_inverse, matrix.page_shift
        )


@triton.jit
def paged_rows_of_head(matrix, batch, head, columns, end):
    """The rows of a head of a sequence in pages."""
    pages = pages_of(matrix, batch)
    return PagedRows(matrix.data + head * matrix.head_stride, matrix.row_stride, columns, end, 0, pages)


@triton.jit
def rows_from(rows, begin, end):
    """The same rows, of which those count for which begin <= row < end."""
    if len(rows) == IN_PAGES:
        return PagedRows(rows.data, rows.stride, rows.columns, end, begin, rows.pages)
    else:
        return RowsFrom(rows.data, rows.stride, rows.columns, end, begin)


@triton.jit
def columns_from(rows, column):
    """The same rows without the columns before one."""
    if len(rows) == IN_PAGES:
        return PagedRows(rows.data + column, rows.stride, rows.columns - column, rows.end, rows.begin, rows.pages)
    elif len(rows) == BOUNDED_TWICE:
        return RowsFrom(rows.data + column, rows.stride, rows.columns - column, rows.end, rows.begin)
    else:
        return Rows(rows.data + column, rows.stride, rows.columns - column, rows.end)


@triton.jit
def row_numbers(first, ROWS: tl.constexpr):
    """The numbers of a block's rows: `first` itself if it is a vector of them, else first, first + 1, ..."""
    return first if len(first.shape) > 0 else first + tl.arange(0, ROWS)


@triton.jit
def load_rows(rows, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """A (ROWS, BLOCK_D) block: rows first, first + 1, ..., or those that a vector `first` names. If not MASKED all are
    known to lie within begin and end. A row's place is 64 bits wide; offsets inside a block of neighbours are 32, which
    the host sees to (kMostApart in csrc/cuda/portable/call.cpp)."""
    column = tl.arange(0, BLOCK_D)
    mask = (column < rows.columns)[None, :]
    if MASKED:
        row = row_numbers(first, ROWS)
        mask = mask & (row < rows.end)[:, None]
        if len(rows) >= BOUNDED_TWICE:
            mask = mask & (row >= rows.begin)[:, None]
    if len(rows) == IN_PAGES:
        place = (rows.data + column)[None, :] + offsets_in_pages(rows, first, ROWS, MASKED)[:, None]
    elif len(first.shape) > 0:  # both factors fit 32 bits: one instruction
        place = (rows.data + column)[None, :] + (first.to(tl.int64) * rows.stride.to(tl.int32).to(tl.int64))[:, None]
    else:
        offset = tl.arange(0, ROWS)[:, None] * rows.stride.to(tl.int32) + column[None, :]
        place = rows.data + first.to(tl.int64) * rows.stride + offset
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def offsets_in_pages(rows, first, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Where some rows of PagedRows are: neighbours from `first` on, or those that a vector names."""
    pages = rows.pages
    if len(pages) == EVEN_PAGES and len(first.shape) == 0:
        return offsets_together(pages, first, ROWS, rows.end, pages.block_stride, rows.stride.to(tl.int32))
    else:
        # Neighbours may lie in different pages, so each row's block is looked up. This is most of the work of a block
        # of keys, so it goes without a division, and by products of 32 bits.
        row = row_numbers(first, ROWS)
        if len(pages) == EVEN_PAGES:
            page = row >> pages.bits
            in_page = row - (page << pages.bits)
        else:
            page = (tl.umulhi((row * 4).to(tl.uint32), pages.inverse.to(tl.uint32)) >> pages.shift).to(tl.int32)
            in_page = row - page * pages.size
        block = block_of_page(pages, page, (row >= rows.begin) & (row < rows.end) if MASKED else None)
        # Factors of 32 bits, as in load_rows.
        return block * pages.block_stride.to(tl.int64) + in_page.to(tl.int64) * rows.stride.to(tl.int32).to(tl.int64)


@triton.jit
def offsets_together(pages, first, ROWS: tl.constexpr, end, block_stride, row_stride):
    """Where ROWS neighbours in EvenPages are, the first of which is a multiple of ROWS_TOGETHER; of those before `end`.
    The strides, of 32 bits, may be those of something else that is kept for each row."""
    row = first + tl.arange(0, ROWS)
    start = row // ROWS_TOGETHER * ROWS_TOGETHER  # so that the compiler knows which rows have one page
    page = start >> pages.bits
    block = block_of_page(pages, page, start < end)
    in_page = row - (page << pages.bits)
    return block * block_stride + in_page.to(tl.int64) * row_stride


@triton.jit
def block_of_page(pages, page, known):
    """The block that the table names for pages, those that are `known` to have an entry; None: all. The table comes
    from the user's GPU memory unchecked: an entry that names no block is clamped, and gives wrong rows, never a stray
    access. Behind a sequence's last page it may have no entries."""
    entry = pages.table + page
    block = tl.load(entry) if known is None else tl.load(entry, mask=known, other=0)
    return tl.minimum(tl.maximum(block, 0), pages.blocks - 1).to(tl.int64)


@triton.jit
def store_rows(rows, x, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores the (ROWS, BLOCK_D) block x, in fp32, as rows first, first + 1, ..."""
    x = cast(x, rows.data.dtype.element_ty)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    mask = (column < rows.columns)[None, :] & (first + row < rows.end)[:, None]
    offset = row[:, None] * rows.stride.to(tl.int32) + column[None, :]
    tl.store(rows.data + first.to(tl.int64) * rows.stride + offset, x, mask=mask)


@triton.jit
def load_factor(rows, first, ROWS: tl.constexpr, CODE):
    """The Factor of the rows from `first` on. Products read its block from shared memory: as it was loaded, since what
    is computed first goes through registers again in every product. There is none where products go by columns."""
    block = load_rows(rows, first, ROWS, CODE.BLOCK_D, True) if CODE.STEP_D == CODE.BLOCK_D else 0
    return Factor(block, rows, first)


@triton.jit
def products(
    a, b, first, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr, CODE, MASKED: tl.constexpr, TURNED: tl.constexpr = False
):
    """a_i.b_j of the rows of a Factor a and of the rows of b from `first` on (see load_rows). If STEP_D is less than
    BLOCK_D (large fp32 heads, which fit neither registers nor shared memory) both go by STEP_D columns at a time and
    are read again. If TURNED the rows of b lie along the first axis: what is reduced over the rows of a then stays
    within a thread of the matrix units' layout."""
    if CODE.STEP_D == CODE.BLOCK_D:
        found = row_products(a.block, load_rows(b, first, B_ROWS, CODE.BLOCK_D, MASKED), None, TURNED)
    else:
        found = tl.zeros([B_ROWS, A_ROWS] if TURNED else [A_ROWS, B_ROWS], tl.float32)
        for column in range(0, a.rows.columns, CODE.STEP_D):
            a_part = columns_from(a.rows, column)
            b_part = columns_from(b, column)
            a_block = load_rows(a_part, a.first, A_ROWS, CODE.STEP_D, True)
            b_block = load_rows(b_part, first, B_ROWS, CODE.STEP_D, MASKED)
            found = row_products(a_block, b_block, found, TURNED)
    return found


@triton.jit
def row_products(a, b, acc, TURNED: tl.constexpr):
    """The products of all rows of two blocks, added to `acc` if there is one."""
    if TURNED:
        return dot(b, tl.trans(a), acc)
    else:
        return dot(a, tl.trans(b), acc)


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) in fp32. fp32 operands are split into three bf16 each, whose six largest products keep all digits,
    and take as long as three tf32 products, which lose two bits."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc=acc, input_precision="bf16x6" if a.dtype == tl.float32 else "tf32")


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x (fp32) in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def _larger_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_or_nan(x, axis: tl.constexpr):
    """Maximum along an axis; unlike tl.max it does not lose a NaN."""
    if INTERPRETED:  # a reduction with its own combine function is a Python loop there
        return tl.where(tl.sum((x != x).to(tl.int32), axis) > 0, float("nan"), tl.max(x, axis))
    else:
        return tl.reduce(x, axis, _larger_or_nan)


@triton.jit
def any_row(x):
    """Whether a condition holds for any of some rows."""
    return tl.max(x.to(tl.int32), 0) > 0


@triton.jit
def column_sums(x):
    """The sums over the columns of (rows, columns) in ROW_PARTS parts. A row's sum, which threads share, is then taken
    once, after a loop."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // ROW_PARTS, ROW_PARTS]), 1)


@triton.jit
def kahan_add(total, lost, x, EXACT: tl.constexpr):
    """(total + x, what that rounds away, to be given to the next addition if EXACT), after Kahan. A plain sum of
    thousands of equal numbers is off by as many equal roundings. Adding 0 changes nothing, so that no bits depend on
    which tiles without weight are visited."""
    if EXACT:
        y = x - lost
        grown = total + y
        return tl.where(x == 0.0, total, grown), tl.where(x == 0.0, lost, (grown - total) - y)
    else:
        return total + x, lost
