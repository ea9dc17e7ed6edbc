"""The activation of rows of numbers, and its gradient: rows that fit in registers, several a program, and longer ones
in passes over memory. Every number has one writer and every sum one order: no atomics.

Scores are x, y = (alpha - 1) (x - max x), and p = [y - gap]+^(1/(alpha-1)) with sum p = 1. With u = p^(2-alpha) and
delta = sum u dp / sum u, the gradient dp of the weights leads to
    u_j (dp_j - delta)                                            of score j,
    sum of u_j (dp_j - delta) (e^L (1 - L) - 1) / (alpha - 1)^2   of alpha, where L = (alpha - 1) ln p_j,
where nothing cancels as alpha goes to 1.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .lib.entmax import alpha_or_nan, alpha_term, log2, newton_step, weights
from .lib.matrices import any_row, cast, max_or_nan
from .spec import Spec

TOLERANCE = tl.constexpr(4e-6)  # of a row's sum of weights: one more step is then taken unseen


class RowBatch(NamedTuple):
    """Contiguous rows, of which all or none (`own_alphas`) have an alpha of their own."""

    row_alpha: tl.tensor
    own_alphas: tl.tensor
    rows: tl.tensor
    length: tl.tensor
    alpha: tl.tensor  # of those that have none


@triton.jit
def alpha_of_rows(batch, row):
    return alpha_or_nan(tl.load(batch.row_alpha + row, mask=row < batch.own_alphas, other=batch.alpha))


@triton.jit
def excess_above(y, gap):
    """[y - gap]+ of (rows, numbers)."""
    return tl.maximum(y - gap[:, None], 0.0)


@triton.jit
def finish(p, sum_p, row_max, alpha):
    """Weights divided by their sum, which is one but for the rounding of gap. Rows that are -inf throughout have none;
    NaN, +inf or an alpha out of range make a row NaN."""
    p = tl.where((sum_p > 0.0)[:, None], p / sum_p[:, None], 0.0)
    broken = (row_max != row_max) | (row_max == float("inf")) | (alpha != alpha)
    return tl.where(broken[:, None], float("nan"), p)


@triton.jit
def short_rows(input, out, batch, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALPHA: tl.constexpr):
    """BLOCK_M rows of up to BLOCK_N scores, in registers."""
    EXACT: tl.constexpr = input.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = row < batch.rows
    mask = inside[:, None] & (column < batch.length)[None, :]
    place = row[:, None] * batch.length + column[None, :]
    x = tl.load(input + place, mask=mask, other=float("-inf")).to(tl.float32)
    alpha = alpha_of_rows(batch, row)

    row_max = max_or_nan(x, 1)
    y = (x - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None]) * (alpha - 1.0)[:, None]
    gap = tl.full([BLOCK_M], -1.0, tl.float32)
    refined = inside
    while any_row(refined):
        p, u = weights(excess_above(y, gap), alpha[:, None], ALPHA, EXACT)
        sum_p = tl.sum(p, 1)
        risen = tl.where(refined, gap + newton_step(sum_p, tl.sum(u, 1), alpha, ALPHA), gap)
        refined = (sum_p > 1.0 + TOLERANCE) & (risen > gap)
        gap = tl.where(risen > gap, risen, gap)
    p, u = weights(excess_above(y, gap), alpha[:, None], ALPHA, EXACT)
    tl.store(out + place, cast(finish(p, tl.sum(p, 1), row_max, alpha), out.dtype.element_ty), mask=mask)


@triton.jit
def chunk(base, start, length, other, BLOCK_N: tl.constexpr):
    """(1, BLOCK_N) numbers of a row, from `start` on, in fp32."""
    column = start + tl.arange(0, BLOCK_N)
    return tl.load(base + column, mask=column < length, other=other).to(tl.float32)[None, :]


@triton.jit
def long_row(input, out, batch, BLOCK_N: tl.constexpr, ALPHA: tl.constexpr):
    """One row of any length. The two largest scores of each of BLOCK_N columns are kept in registers while the maximum
    is found: the threshold of that subset is never above the row's own, and mostly close."""
    EXACT: tl.constexpr = input.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    first = tl.program_id(0).to(tl.int64) * batch.length
    input += first
    out += first
    alpha = alpha_of_rows(batch, row)

    largest = tl.full([1, BLOCK_N], float("-inf"), tl.float32)
    second = largest
    for start in range(0, batch.length, BLOCK_N):
        x = chunk(input, start, batch.length, float("-inf"), BLOCK_N)
        second = tl.maximum(second, tl.minimum(largest, x))
        largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
    row_max = max_or_nan(largest, 1)
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)[:, None]
    rate = (alpha - 1.0)[:, None]
    largest = (largest - shift) * rate
    second = (second - shift) * rate

    gap = tl.full([1], -1.0, tl.float32)
    refined = row < batch.rows
    while any_row(refined):
        p, u = weights(excess_above(largest, gap), alpha[:, None], ALPHA, EXACT)
        second_p, second_u = weights(excess_above(second, gap), alpha[:, None], ALPHA, EXACT)
        sum_p = tl.sum(p + second_p, 1)
        risen = gap + newton_step(sum_p, tl.sum(u + second_u, 1), alpha, ALPHA)
        refined = (sum_p > 1.0 + TOLERANCE) & (risen > gap)
        gap = tl.where(risen > gap, risen, gap)

    refined = row < batch.rows
    sum_p = tl.zeros([1], tl.float32)
    while any_row(refined):
        sum_p = tl.zeros([1], tl.float32)
        sum_u = tl.zeros([1], tl.float32)
        for start in range(0, batch.length, BLOCK_N):
            y = (chunk(input, start, batch.length, float("-inf"), BLOCK_N) - shift) * rate
            p, u = weights(excess_above(y, gap), alpha[:, None], ALPHA, EXACT)
            sum_p += tl.sum(p, 1)
            sum_u += tl.sum(u, 1)
        risen = gap + newton_step(sum_p, sum_u, alpha, ALPHA)
        # What is written is divided by this sum, so it must be that of the last gap.
        refined = (tl.abs(sum_p - 1.0) > TOLERANCE) & (risen > gap)
        gap = tl.where(refined, risen, gap)

    for start in range(0, batch.length, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        y = (chunk(input, start, batch.length, float("-inf"), BLOCK_N) - shift) * rate
        p, u = weights(excess_above(y, gap), alpha[:, None], ALPHA, EXACT)
        p = finish(p, sum_p, row_max, alpha)
        tl.store(out + column[None, :], cast(p, out.dtype.element_ty), mask=(column < batch.length)[None, :])


@triton.jit
def activate(
    input, out, row_alpha, own_alphas, rows, length, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LONG: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Weights of contiguous rows: if LONG one of any length a program, else BLOCK_M of up to BLOCK_N."""
    batch = RowBatch(row_alpha, own_alphas, rows, length, alpha)
    if LONG:
        long_row(input, out, batch, BLOCK_N, ALPHA)
    else:
        short_rows(input, out, batch, BLOCK_M, BLOCK_N, ALPHA)


ROW_BATCH = dict(own_alphas="i64", rows="i64", length="i32", alpha="fp32")
ACTIVATE = Spec(
    activate,
    arguments=dict(input="*T", out="*T", row_alpha="*fp32", **ROW_BATCH),
    writes=("out",),
    constants=("BLOCK_M", "BLOCK_N", "LONG", "ALPHA"),
    programs="BLOCK_M rows, ceil(rows / BLOCK_M) of them",
    shapes="activation",
)


# ---- the gradient ----------------------------------------------------------------------------------------------------


@triton.jit
def u_of(p, log, alpha):
    """u = p^(2-alpha) from the weight and its log2; zero where p is, NaN where p is."""
    return tl.where(p == 0.0, 0.0, tl.exp2((2.0 - alpha) * log))


@triton.jit
def delta_of(sum_u_dp, sum_u):
    """delta; rows without weight have none."""
    return tl.where(sum_u == 0.0, 0.0, sum_u_dp / sum_u)


@triton.jit
def grad_of_short_rows(grad_out, output, grad_input, grad_alpha, batch, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The gradient of BLOCK_M rows of up to BLOCK_N weights."""
    EXACT: tl.constexpr = output.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = row < batch.rows
    mask = inside[:, None] & (column < batch.length)[None, :]
    place = row[:, None] * batch.length + column[None, :]
    p = tl.load(output + place, mask=mask, other=0.0).to(tl.float32)
    dp = tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32)
    alpha = alpha_of_rows(batch, row)[:, None]
    dp = tl.where(p == 0.0, 0.0, dp)
    log = log2(p, EXACT)
    u = u_of(p, log, alpha)
    ds = u * (dp - delta_of(tl.sum(u * dp, 1), tl.sum(u, 1))[:, None])
    tl.store(grad_input + place, cast(ds, grad_input.dtype.element_ty), mask=mask)
    of_alpha = tl.where(p == 0.0, 0.0, ds * alpha_term(p, log, alpha))
    tl.store(grad_alpha + row, tl.sum(of_alpha, 1), mask=row < batch.own_alphas)


@triton.jit
def grad_of_long_row(grad_out, output, grad_input, grad_alpha, batch, BLOCK_N: tl.constexpr):
    """The same for one row of any length, in two passes."""
    EXACT: tl.constexpr = output.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    first = tl.program_id(0).to(tl.int64) * batch.length
    grad_out += first
    output += first
    grad_input += first
    alpha = alpha_of_rows(batch, row)[:, None]
    sum_u_dp = tl.zeros([1, BLOCK_N], tl.float32)
    sum_u = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, batch.length, BLOCK_N):
        p = chunk(output, start, batch.length, 0.0, BLOCK_N)
        u = u_of(p, log2(p, EXACT), alpha)
        sum_u_dp += tl.where(p == 0.0, 0.0, u * chunk(grad_out, start, batch.length, 0.0, BLOCK_N))
        sum_u += u
    delta = delta_of(tl.sum(sum_u_dp, 1), tl.sum(sum_u, 1))[:, None]
    of_alpha = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, batch.length, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        p = chunk(output, start, batch.length, 0.0, BLOCK_N)
        dp = chunk(grad_out, start, batch.length, 0.0, BLOCK_N)
        log = log2(p, EXACT)
        ds = tl.where(p == 0.0, 0.0, u_of(p, log, alpha) * (dp - delta))
        inside = (column < batch.length)[None, :]
        tl.store(grad_input + column[None, :], cast(ds, grad_input.dtype.element_ty), mask=inside)
        of_alpha += tl.where(p == 0.0, 0.0, ds * alpha_term(p, log, alpha))
    tl.store(grad_alpha + row, tl.sum(of_alpha, 1), mask=row < batch.own_alphas)


@triton.jit
def activate_grad(
    grad_out, output, grad_input, row_alpha, grad_alpha, own_alphas, rows, length, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Gradients of scores, and of alpha where there is one for each row. Rows as for `activate`."""
    batch = RowBatch(row_alpha, own_alphas, rows, length, alpha)
    if LONG:
        grad_of_long_row(grad_out, output, grad_input, grad_alpha, batch, BLOCK_N)
    else:
        grad_of_short_rows(grad_out, output, grad_input, grad_alpha, batch, BLOCK_M, BLOCK_N)


ACTIVATE_GRAD = Spec(
    activate_grad,
    arguments=dict(grad_out="*T", output="*T", grad_input="*T", row_alpha="*fp32", grad_alpha="*fp32", **ROW_BATCH),
    writes=("grad_input", "grad_alpha"),
    constants=("BLOCK_M", "BLOCK_N", "LONG"),
    programs="BLOCK_M rows, ceil(rows / BLOCK_M) of them",
    shapes="activation",
    alphas=("any",),
)
