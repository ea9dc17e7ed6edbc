"""The codes of keys in a key index, whose layout csrc/ops/key_index.h has: how rows are turned, what is kept of them,
and how codes are read.

A turned row is H x / sqrt(R), with H[i][j] = (-1)^popcount(i & j) and R the row's padded length. Products of two turned
rows are those of the rows themselves; but a turned row has no element that stands out, so few bits say much of it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

ROOM = tl.constexpr(2.0**-11)  # kKeyIndexRoom
LARGEST_NORM = tl.constexpr(2.0**60)  # kLargestIndexedNorm
SMALLEST = tl.constexpr(2.0**-60)  # kSmallestIndexed
MAGIC = tl.constexpr(0x494B6441)
VERSION = tl.constexpr(2)
LEVELS = tl.constexpr(128)  # to each side of zero
CHUNKS = tl.constexpr(16)  # bytes that chunks of an index are multiples of
TURN_STEP = tl.constexpr(32)  # elements that a turn takes at a time


class KeyIndex(NamedTuple):
    """A key index, from the first page and key head of a call on."""

    codes: tl.tensor
    norms: tl.tensor  # the first page's scales, behind which are its errors
    header: tl.tensor
    page_stride: tl.tensor  # bytes from a page to the next
    head_stride: tl.tensor  # bytes from a key head to the next
    blocks: tl.tensor  # this and what follows: of the cache, which the header must be for
    page_size: tl.tensor
    kv_heads: tl.tensor
    head_dim: tl.tensor
    element: tl.tensor


@triton.jit
def strides_of(index):
    """(page_stride, head_stride) of a KeyIndex, such that the compiler knows what they are multiples of, and loads 16
    bytes at once."""
    return index.page_stride // CHUNKS * CHUNKS, index.head_stride // CHUNKS * CHUNKS


@triton.jit
def is_for(index):
    """Whether the header of a KeyIndex is that of an index for this cache."""
    header = index.header
    sound = (tl.load(header) == MAGIC) & (tl.load(header + 1) == VERSION) & (tl.load(header + 2) == index.blocks)
    sound = sound & (tl.load(header + 3) == index.page_size) & (tl.load(header + 4) == index.kv_heads)
    return sound & (tl.load(header + 5) == index.head_dim) & (tl.load(header + 6) == index.element)


@triton.jit
def turned(row, columns, BLOCK_D: tl.constexpr):
    """(BLOCK_D,) the turned row that a pointer says, of so many columns."""
    column = tl.arange(0, BLOCK_D)
    sums = tl.zeros([TURN_STEP, BLOCK_D], tl.float32)
    for start in tl.static_range(0, BLOCK_D, TURN_STEP):
        some = start + tl.arange(0, TURN_STEP)
        x = tl.load(row + some, mask=some < columns, other=0.0).to(tl.float32)[:, None]
        sums += tl.where(is_odd(some[:, None] & column[None, :]), -x, x)
    SCALE: tl.constexpr = BLOCK_D**-0.5
    return tl.sum(sums, 0) * SCALE


@triton.jit
def is_odd(x):
    """Whether a number of up to 8 bits has an odd number of them set."""
    x ^= x >> 4
    x ^= x >> 2
    x ^= x >> 1
    return (x & 1) != 0


@triton.jit
def norm_of(row, columns, BLOCK_D: tl.constexpr):
    """The 2-norm of the row that a pointer says."""
    column = tl.arange(0, BLOCK_D)
    x = tl.load(row + column, mask=column < columns, other=0.0).to(tl.float32)
    return tl.sqrt(tl.sum(x * x, 0))


@triton.jit
def code_of(row, columns, BLOCK_D: tl.constexpr):
    """(code, scale, error) of the key that a pointer says; the code as (BLOCK_D,) bytes."""
    norm = norm_of(row, columns, BLOCK_D)
    t = turned(row, columns, BLOCK_D)
    largest = tl.max(tl.abs(t), 0)
    finite = norm < LARGEST_NORM  # NaN is not
    coded = finite & (largest >= SMALLEST)
    scale = tl.where(coded, largest / LEVELS, 0.0)
    steps = tl.where(coded, t / tl.where(coded, scale, 1.0), 0.0)
    n = tl.minimum(tl.maximum(tl.floor(steps), -1.0 * LEVELS), LEVELS - 1.0)
    left = tl.where(coded, steps - (n + 0.5), 0.0)
    error = scale * tl.sqrt(tl.sum(left * left, 0)) + norm * ROOM
    # The squares of what is so small are not what they should be.
    ROOT: tl.constexpr = BLOCK_D**0.5
    error = tl.where(coded, error, largest * (2 * ROOT))
    return (n.to(tl.int32) & 255).to(tl.uint8), scale, tl.where(finite, error, float("inf"))


@triton.jit
def whole_dot(a, b, acc=None):
    """a @ b (+ acc) of int8, in int32."""
    return tl.dot(a, b, acc=acc, out_dtype=tl.int32)
