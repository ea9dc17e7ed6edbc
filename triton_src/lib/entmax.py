"""Entmax of a row, piece by piece: alpha, thresholds, weights, and the steps that find a threshold.

The notation is that of docs/architecture.md: z = (alpha - 1) * score, row_max is a row's largest z,
gap = tau - row_max, excess = [z - tau]+, p = excess^(1/(alpha-1)) a weight, and u = p^(2-alpha).

For alpha = 1, softmax, z = score, tau is the logarithm of a row's sum of e^z, and p = u = e^(z - tau). With these all
that follows from weights is as for other alphas.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .matrices import INTERPRETED, column_sums

# Which code serves an alpha: two values have code of their own, everything else goes through powers at run time.
# ALPHA_1 is part of the code for any alpha, which branches to it for the heads whose alpha is 1.
ALPHA_ANY = tl.constexpr(0)
ALPHA_1_5 = tl.constexpr(1)
ALPHA_2 = tl.constexpr(2)
ALPHA_1 = tl.constexpr(3)

# Where alpha is (AlphaSource in csrc/cuda/embedded.h says the same).
ALPHA_NUMBER = tl.constexpr(0)
ALPHA_SHARED = tl.constexpr(1)
ALPHA_PER_HEAD = tl.constexpr(2)

LEAST_ALPHA = tl.constexpr(1.0078125)  # 1.01 as bfloat16 rounds it, which a tensor of that type holds

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
BELOW_ALL = tl.constexpr(-3.4028234663852886e38)  # the least number: below every score but that of a hidden key


@triton.constexpr_function
def fixed_alpha(ALPHA):
    """Whether a variant is for one alpha. Its code does not look for another, and has no ALiBi: its time is short."""
    return ALPHA in (ALPHA_1_5, ALPHA_2)


class Alpha(NamedTuple):
    """Where alpha is: a number, or in memory, one for all heads or for each."""

    per_head: tl.tensor
    source: tl.tensor
    number: tl.tensor


class Threshold(NamedTuple):
    """tau as `excess_of` takes it: (tau, unused), or (row_max, gap) in EXACT code and for alpha = 1, as z - row_max is
    exact near the maximum, where their sum would be rounded."""

    high: tl.tensor
    low: tl.tensor


@triton.jit
def alpha_or_nan(alpha):
    """alpha, NaN where it is out of its range, which only the GPU can see of a tensor; so is all that comes of it."""
    return tl.where((alpha >= LEAST_ALPHA) & (alpha <= 2.0), alpha, float("nan"))


@triton.jit
def alpha_of_head(alpha, head, ALPHA: tl.constexpr):
    """A head's alpha, which may be 1; or those of a vector of heads."""
    if fixed_alpha(ALPHA):
        return alpha.number
    else:
        place = tl.where(alpha.source == ALPHA_PER_HEAD, head, 0)
        in_memory = tl.where(alpha.source != ALPHA_NUMBER, place, -1) >= 0
        given = tl.load(alpha.per_head + place, mask=in_memory, other=alpha.number)
        return tl.where(given == 1.0, given, alpha_or_nan(given))


@triton.jit
def rate_of(alpha, ALPHA: tl.constexpr):
    """What makes z of a score: alpha - 1, and 1 for alpha = 1."""
    if fixed_alpha(ALPHA):
        return alpha - 1.0
    else:
        return tl.where(alpha == 1.0, 1.0, alpha - 1.0)


@triton.jit
def threshold_of(row_max, gap, EXACT: tl.constexpr):
    if EXACT:
        return Threshold(row_max, gap)
    else:
        return Threshold(row_max + gap, gap)


@triton.jit
def weights_threshold(threshold, row_max, alpha, ALPHA: tl.constexpr):
    """The Threshold that `weigh` takes in a head: `softmax_weights` wants row_max and gap."""
    if fixed_alpha(ALPHA):
        return threshold
    else:
        return Threshold(tl.where(alpha == 1.0, row_max, threshold.high), threshold.low)


@triton.jit
def mark_threshold(threshold, alpha, ALPHA: tl.constexpr):
    """The Threshold above which a key weighs. For alpha = 1 every key does that a row sees."""
    if fixed_alpha(ALPHA):
        return threshold
    else:
        softmax = alpha == 1.0
        return Threshold(tl.where(softmax, BELOW_ALL, threshold.high), tl.where(softmax, 0.0, threshold.low))


@triton.jit
def excess_of(qk, z_scale, threshold, row_axis: tl.constexpr, EXACT: tl.constexpr):
    """[z - tau]+ of scores in units of q.k, whose rows lie along `row_axis`: from 0 to 1 as gap >= -1. It is written so
    that the compiler makes one instruction of it, a multiply-add that saturates, where it is not EXACT. NaN gives 0:
    rows that see one are marked by their maximum."""
    high, low = tl.expand_dims(threshold.high, 1 - row_axis), tl.expand_dims(threshold.low, 1 - row_axis)
    above = (qk * z_scale - high) - low if EXACT else qk * z_scale - high
    return tl.minimum(tl.maximum(above, 0.0), 1.0)


@triton.jit
def log2(x, EXACT: tl.constexpr):
    """log2 x, x >= 0; if not EXACT by the one instruction that is right to 22 bits, where the other takes fifteen."""
    if EXACT or INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def weights(excess, alpha, ALPHA: tl.constexpr, EXACT: tl.constexpr):
    """(p, u): p = excess^(1/(alpha-1)) and u = p^(2-alpha)."""
    if ALPHA == ALPHA_1_5:
        return excess * excess, excess
    elif ALPHA == ALPHA_2:
        return excess, is_positive(excess)
    else:
        exponent = 1.0 / (alpha - 1.0)  # on its own, so that the one division leaves the loop
        log = log2(excess, EXACT) * exponent
        return tl.exp2(log), tl.where(excess > 0.0, tl.exp2((2.0 - alpha) * log), 0.0)


@triton.jit
def softmax_weights(qk, z_scale, threshold, row_axis: tl.constexpr):
    """e^(z - tau) of scores as `excess_of` takes them, where a Threshold holds row_max and gap in all code."""
    high, low = tl.expand_dims(threshold.high, 1 - row_axis), tl.expand_dims(threshold.low, 1 - row_axis)
    return tl.exp2(((rounded_z(qk, z_scale) - high) - low) * LOG2_E)


@triton.jit
def rounded_z(qk, z_scale):
    """z, rounded as row_max was, so that their difference is 0 or less, whatever their size. As one multiply-add, which
    the maximum keeps the compiler from, it would be off by the rounding of row_max, and e to it might overflow."""
    return tl.maximum(qk * z_scale, BELOW_ALL)


@triton.jit
def weigh(qk, scale, threshold, row_axis: tl.constexpr, CODE):
    """(p, u) of scores in units of q.k, whose rows lie along `row_axis`, of a head with a HeadScale."""
    if CODE.ALPHA == ALPHA_1:
        p = softmax_weights(qk, scale.z, threshold, row_axis)
        return p, p
    else:
        return weights(excess_of(qk, scale.z, threshold, row_axis, CODE.EXACT), scale.alpha, CODE.ALPHA, CODE.EXACT)


@triton.jit
def is_positive(x):
    """1 where x > 0, else 0, for x >= 0: one saturating multiplication instead of a comparison and a selection."""
    return tl.minimum(tl.maximum(x * 1e30, 0.0), 1.0)


@triton.jit
def column_counts(x):
    """Counts of x > 0 over the columns that `column_sums` adds, for x >= +0. As integers: the lesser of the bits and 1,
    three of which one instruction adds."""
    return column_sums(tl.minimum(x.to(tl.int32, bitcast=True), 1))


@triton.jit
def alpha_term(p, log, alpha):
    """(t - t ln t - 1) / (alpha - 1)^2 of an excess t. Times the gradient ds of its score it is what a key adds to the
    gradient of alpha: p = t^(1/(alpha-1)) and t = (alpha - 1) score - tau give dp/dalpha = u (t - t ln t + c) /
    (alpha - 1)^2 with a c that all keys of a row share. As the ds of a row sum to 0, any c will do, and with -1 nothing
    cancels near t = 1. Here t = e^x with x = (alpha - 1) ln p, and near x = 0 its series is taken, which starts at
    -x^2/2. `log` is log2 p."""
    rate = alpha - 1.0
    x = rate * LN_2 * tl.where(p == 0.0, 0.0, tl.maximum(log, -150.0))  # the log of a denormal number may be -inf
    series = 1 / 2 + x * (1 / 3 + x * (1 / 8 + x * (1 / 30 + x * (1 / 144 + x * (1 / 840 + x * (1 / 5760))))))
    closed = tl.exp2(x / LN_2) * (1.0 - x) - 1.0
    return tl.where(tl.abs(x) < 0.5, -x * x * series, closed) / (rate * rate)


@triton.jit
def softmax_alpha_term(p, qk, z_scale, threshold):
    """The same at alpha = 1, to which -(ln p)^2 / 2 is the limit. gap^2 / 2 is put to it, as any c will do: with
    x = z - row_max = ln p + gap that leaves -x (x - 2 gap) / 2, where nothing cancels if weights are nearly equal."""
    x = rounded_z(qk, z_scale) - threshold.high[:, None]
    x = tl.where(p == 0.0, 0.0, x)  # where it may be -inf
    return x * (threshold.low[:, None] - 0.5 * x)


@triton.jit
def newton_step(sum_p, sum_u, alpha, ALPHA: tl.constexpr):
    """How far tau may rise. Newton's step for ||excess|| = 1 in the norm of exponent e = 1/(alpha-1), which is convex,
    decreasing and nearly straight: it never passes the solution and needs neither a bracket nor a third sum.
    ||x||_e = sum_p^(alpha-1), so the step is (sum_p - sum_p^(2-alpha)) / sum_u."""
    if ALPHA == ALPHA_1_5:
        power = tl.sqrt(sum_p)
    elif ALPHA == ALPHA_2:
        power = tl.full(sum_p.shape, 1.0, tl.float32)
    else:
        power = tl.exp2((2.0 - alpha) * tl.log2(sum_p))
    return tl.where(sum_u > 0.0, (sum_p - power) / sum_u, 0.0)


@triton.jit
def threshold_step(sum_p, sum_u, gap, near, alpha, ALPHA: tl.constexpr):
    """(step, a, b) from sums over the row at `gap`: how far tau should rise or, if negative, fall; and what sum u is
    there, a + b P, once the sum P of p there is known.

    For alpha = 1.5 p is excess^2 and u is excess. If n keys have weight before and after, a step takes
    step (2 sum u - n step) off sum p, so the step is the root of a polynomial of the second degree. Counting n would be
    a quarter of the instructions, so it is guessed from the sums. It is never below (sum u)^2 / sum p, which it is
    where all excesses are equal; that is taken for rows far from their solution, and makes the step `newton_step`. For
    rows that are `near` it is 2 (sum u)^2 / sum p - (sum u) / L, with L = -gap the largest excess there can be. This is
    right where the excesses x from 0 to L are as dense as (1 - x/L)^b with any b > -1: equal ones (b near -1), uniform
    ones (b = 0), and exponential ones (large b) are.

    Once P is known, so is sum u after the step: what the step took off sum p is step times (sum u before + after).
    After small steps that difference is mostly rounding, and sum u - n step does better. For alpha = 2 the polynomial
    is of the first degree, and its root is newton_step."""
    if ALPHA == ALPHA_1_5:
        least = sum_u * sum_u / sum_p
        count = tl.where(near, 2.0 * least + sum_u / gap, least)
        root = tl.sqrt(tl.maximum(sum_u * sum_u - count * (sum_p - 1.0), 0.0))
        step = (sum_p - 1.0) / (sum_u + root)
        large = tl.abs(sum_p - 1.0) > 0.01
        there = tl.where(large, sum_p / step - sum_u, sum_u - count * step)
        some = sum_u > 0.0
        return tl.where(some, step, 0.0), tl.where(some, there, 0.0), tl.where(some & large, -1.0 / step, 0.0)
    else:
        return newton_step(sum_p, sum_u, alpha, ALPHA), sum_u, tl.zeros(sum_u.shape, tl.float32)


@triton.jit
def load_thresholds(row_state, place, inside, EXACT: tl.constexpr):
    """(Threshold, row_max, gap) of the rows at some places of row_state; gap is NaN for NaN rows. Rows that are not
    `inside` weigh nothing."""
    row_max = tl.load(row_state + 2 * place, mask=inside, other=0.0)
    gap = tl.load(row_state + 2 * place + 1, mask=inside, other=float("inf"))
    return threshold_of(row_max, gap, EXACT), row_max, gap
