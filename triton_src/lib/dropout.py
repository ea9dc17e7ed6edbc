"""Dropout: which weights become zero. It is decided for each weight by its place in the whole call and a seed alone, so
that forward and backward, tiles and gathered keys, padded and packed batches, GPU and CPU drop the same ones:

    (first, second, _, _) = Philox4x32-10(key = the seed's low and high word, counter = (row, head, batch entry, 0))
    x = mix(key number ^ first),  x = mix(x + second),  dropped if x < threshold

with rows and keys counted from the start of their sequence, or all four from an origin that the call gives. Philox is
that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011), mix is Ellis' lowbias32. Philox for each
weight would take several times as long; and after one mix with a word of the row, two rows that have similar words
would drop the same weights in another order."""

from typing import NamedTuple

import triton
import triton.language as tl

from .entmax import fixed_alpha


class Dropout(NamedTuple):
    """Which weights are dropped: those with 32 random bits below a threshold, none if that is 0."""

    seed: tl.tensor  # where it is
    threshold: tl.tensor  # the bits of a number without sign
    scale: tl.tensor  # of weights that are kept
    first_batch: tl.tensor  # the launch's first batch entry and head among those of the whole call
    first_head: tl.tensor
    origins: tl.tensor  # (B, 4): what each sequence is counted from, see origin_of
    has_origins: tl.tensor


class SequenceDropout(NamedTuple):
    """Of one sequence, what factors of weights depend on beside its rows' seeds."""

    threshold: tl.tensor
    scale: tl.tensor
    first_key: tl.tensor


@triton.jit
def origin_of(dropout, batch, which: tl.constexpr, otherwise):
    """What a sequence is counted from: its own number (0), that of its first head (1), query (2) and key (3)."""
    return tl.load(dropout.origins + 4 * batch + which, mask=dropout.has_origins != 0, other=otherwise)


@triton.jit
def dropout_of_sequence(dropout, batch, ALPHA: tl.constexpr):
    first_key = 0
    if not fixed_alpha(ALPHA):
        first_key = origin_of(dropout, batch, 3, 0)
    return SequenceDropout(dropout.threshold, dropout.scale, first_key)


@triton.jit
def row_seeds_of(dropout, batch, head, row, ALPHA: tl.constexpr):
    """What each row's weights are dropped by: its two random words in one number. 0 if nothing is dropped."""
    seeds = tl.zeros(row.shape, tl.uint64)
    if not fixed_alpha(ALPHA):  # noqa: SIM102
        if dropout.threshold != 0:
            call_head = (dropout.first_head + head).to(tl.int32) + origin_of(dropout, batch, 1, 0)
            call_batch = origin_of(dropout, batch, 0, (dropout.first_batch + batch).to(tl.int32))
            call_row = row + origin_of(dropout, batch, 2, 0)
            first, second, _, _ = tl.philox(tl.load(dropout.seed), call_row, call_head, call_batch, 0)
            seeds = second.to(tl.uint64) << 32 | first.to(tl.uint64)
    return seeds


@triton.jit
def dropout_factors(dropout, row_seeds, key, row_axis: tl.constexpr):
    """What the weights of some keys (a vector of their numbers) are multiplied by, in rows along `row_axis`."""
    first = tl.expand_dims(row_seeds.to(tl.uint32), 1 - row_axis)
    second = tl.expand_dims((row_seeds >> 32).to(tl.uint32), 1 - row_axis)
    x = mix(tl.expand_dims(key + dropout.first_key, row_axis).to(tl.uint32, bitcast=True) ^ first)
    dropped = mix(x + second) < dropout.threshold.to(tl.uint32, bitcast=True)
    return tl.where(dropped, 0.0, dropout.scale)


@triton.jit
def mix(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def drop(x, dropout, row_seeds, key, CODE):
    """x, which has a number for each weight of a block of rows and some keys, times the factors."""
    if not fixed_alpha(CODE.ALPHA):  # noqa: SIM102
        if dropout.threshold != 0:
            x *= dropout_factors(dropout, row_seeds, key, 0)
    return x
