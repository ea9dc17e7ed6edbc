"""The activation of rows of numbers, and its gradient: rows that fit in registers, several a program, and longer ones
in passes over memory. Every number has one writer and every sum one order: no atomics.

Scores are x, y = (alpha - 1) (x - max x), and p = [y - t]+^(1/(alpha-1)) with sum p = 1. With u = p^(2-alpha) and
delta = sum u g / sum u, the gradient g of the weights leads to
    u_j (g_j - delta)                                            of score j,
    sum of u_j (g_j - delta) (e^L (1 - L) - 1) / (alpha - 1)^2   of alpha, where L = (alpha - 1) ln p_j,
where nothing cancels as alpha goes to 1.
"""

import triton
import triton.language as tl

from .common import alpha_or_nan, alpha_term, cast, log2, max_or_nan, newton_step, weights

TOLERANCE = tl.constexpr(4e-6)  # of a row's sum of weights: one more step is then taken unseen


@triton.jit
def alphas_of(row_alpha, own_alphas, row, alpha):
    """alpha of rows, of which all or none (`own_alphas`) have one of their own."""
    return alpha_or_nan(tl.load(row_alpha + row, mask=row < own_alphas, other=alpha))


@triton.jit
def finish(p, total, m, a):
    """Weights divided by their sum, which is one but for the rounding of t. Rows that are -inf throughout have none;
    NaN, +inf or an alpha out of range make a row NaN."""
    p = tl.where((total > 0.0)[:, None], p / total[:, None], 0.0)
    broken = (m != m) | (m == float("inf")) | (a != a)
    return tl.where(broken[:, None], float("nan"), p)


@triton.jit
def short_rows(
    input, out, row_alpha, own_alphas, rows, length, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of up to BLOCK_N scores, in registers."""
    EXACT: tl.constexpr = input.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = row < rows
    mask = inside[:, None] & (column < length)[None, :]
    place = row[:, None] * length + column[None, :]
    x = tl.load(input + place, mask=mask, other=float("-inf")).to(tl.float32)
    a = alphas_of(row_alpha, own_alphas, row, alpha)

    m = max_or_nan(x, 1)
    y = (x - tl.where(m == float("-inf"), 0.0, m)[:, None]) * (a - 1.0)[:, None]
    t = tl.full([BLOCK_M], -1.0, tl.float32)
    refined = inside
    while tl.max(refined.to(tl.int32), 0) > 0:
        p, u = weights(tl.maximum(y - t[:, None], 0.0), a[:, None], ALPHA, EXACT)
        total = tl.sum(p, 1)
        risen = tl.where(refined, t + newton_step(total, tl.sum(u, 1), a, ALPHA), t)
        refined = (total > 1.0 + TOLERANCE) & (risen > t)
        t = tl.where(risen > t, risen, t)
    p, u = weights(tl.maximum(y - t[:, None], 0.0), a[:, None], ALPHA, EXACT)
    tl.store(out + place, cast(finish(p, tl.sum(p, 1), m, a), out.dtype.element_ty), mask=mask)


@triton.jit
def chunk(base, start, length, other, BLOCK_N: tl.constexpr):
    """(1, BLOCK_N) numbers of a row, from `start` on, in fp32."""
    column = start + tl.arange(0, BLOCK_N)
    return tl.load(base + column, mask=column < length, other=other).to(tl.float32)[None, :]


@triton.jit
def long_row(input, out, row_alpha, own_alphas, rows, length, alpha, BLOCK_N: tl.constexpr, ALPHA: tl.constexpr):
    """One row of any length. The two largest scores of each of BLOCK_N columns are kept in registers while the maximum
    is found: the threshold of that subset is never above the row's own, and mostly close."""
    EXACT: tl.constexpr = input.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    first = tl.program_id(0).to(tl.int64) * length
    input += first
    out += first
    a = alphas_of(row_alpha, own_alphas, row, alpha)

    largest = tl.full([1, BLOCK_N], float("-inf"), tl.float32)
    second = largest
    for start in range(0, length, BLOCK_N):
        x = chunk(input, start, length, float("-inf"), BLOCK_N)
        second = tl.maximum(second, tl.minimum(largest, x))
        largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
    m = max_or_nan(largest, 1)
    shift = tl.where(m == float("-inf"), 0.0, m)[:, None]
    rate = (a - 1.0)[:, None]
    largest = (largest - shift) * rate
    second = (second - shift) * rate

    t = tl.full([1], -1.0, tl.float32)
    refined = row < rows
    while tl.max(refined.to(tl.int32), 0) > 0:
        p, u = weights(tl.maximum(largest - t[:, None], 0.0), a[:, None], ALPHA, EXACT)
        p2, u2 = weights(tl.maximum(second - t[:, None], 0.0), a[:, None], ALPHA, EXACT)
        total = tl.sum(p + p2, 1)
        risen = t + newton_step(total, tl.sum(u + u2, 1), a, ALPHA)
        refined = (total > 1.0 + TOLERANCE) & (risen > t)
        t = tl.where(risen > t, risen, t)

    refined = row < rows
    total = tl.zeros([1], tl.float32)
    while tl.max(refined.to(tl.int32), 0) > 0:
        total = tl.zeros([1], tl.float32)
        sum_u = tl.zeros([1], tl.float32)
        for start in range(0, length, BLOCK_N):
            y = (chunk(input, start, length, float("-inf"), BLOCK_N) - shift) * rate
            p, u = weights(tl.maximum(y - t[:, None], 0.0), a[:, None], ALPHA, EXACT)
            total += tl.sum(p, 1)
            sum_u += tl.sum(u, 1)
        risen = t + newton_step(total, sum_u, a, ALPHA)
        # What is written is divided by this sum, so it must be that of the last t.
        refined = (tl.abs(total - 1.0) > TOLERANCE) & (risen > t)
        t = tl.where(refined, risen, t)

    for start in range(0, length, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        y = (chunk(input, start, length, float("-inf"), BLOCK_N) - shift) * rate
        p, u = weights(tl.maximum(y - t[:, None], 0.0), a[:, None], ALPHA, EXACT)
        p = finish(p, total, m, a)
        tl.store(out + column[None, :], cast(p, out.dtype.element_ty), mask=(column < length)[None, :])


@triton.jit
def activate(
    input, out, row_alpha, own_alphas, rows, length, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LONG: tl.constexpr, ALPHA: tl.constexpr,
):  # fmt: skip
    """Weights of contiguous rows. Programs: ceil(rows / BLOCK_M); if LONG, BLOCK_M is 1 and rows are of any length,
    else of up to BLOCK_N."""
    if LONG:
        long_row(input, out, row_alpha, own_alphas, rows, length, alpha, BLOCK_N, ALPHA)
    else:
        short_rows(input, out, row_alpha, own_alphas, rows, length, alpha, BLOCK_M, BLOCK_N, ALPHA)


# ---- the gradient ----------------------------------------------------------------------------------------------------


@triton.jit
def u_of(p, log, a):
    """u = p^(2-alpha) from the weight and its log2; zero where p is, NaN where p is."""
    return tl.where(p == 0.0, 0.0, tl.exp2((2.0 - a) * log))


@triton.jit
def mean_of(sum_ug, sum_u):
    """delta; rows without weight have none."""
    return tl.where(sum_u == 0.0, 0.0, sum_ug / sum_u)


@triton.jit
def grad_of_short_rows(
    grad_out, output, grad_input, row_alpha, grad_alpha, own_alphas, rows, length, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M rows of up to BLOCK_N weights."""
    EXACT: tl.constexpr = output.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = row < rows
    mask = inside[:, None] & (column < length)[None, :]
    place = row[:, None] * length + column[None, :]
    p = tl.load(output + place, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32)
    a = alphas_of(row_alpha, own_alphas, row, alpha)[:, None]
    g = tl.where(p == 0.0, 0.0, g)
    log = log2(p, EXACT)
    u = u_of(p, log, a)
    change = u * (g - mean_of(tl.sum(u * g, 1), tl.sum(u, 1))[:, None])
    tl.store(grad_input + place, cast(change, grad_input.dtype.element_ty), mask=mask)
    of_alpha = tl.where(p == 0.0, 0.0, change * alpha_term(p, log, a))
    tl.store(grad_alpha + row, tl.sum(of_alpha, 1), mask=row < own_alphas)


@triton.jit
def grad_of_long_row(
    grad_out, output, grad_input, row_alpha, grad_alpha, own_alphas, rows, length, alpha, BLOCK_N: tl.constexpr
):
    """The same for one row of any length, in two passes."""
    EXACT: tl.constexpr = output.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    first = tl.program_id(0).to(tl.int64) * length
    grad_out += first
    output += first
    grad_input += first
    a = alphas_of(row_alpha, own_alphas, row, alpha)[:, None]
    ug = tl.zeros([1, BLOCK_N], tl.float32)
    total = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, length, BLOCK_N):
        p = chunk(output, start, length, 0.0, BLOCK_N)
        u = u_of(p, log2(p, EXACT), a)
        ug += tl.where(p == 0.0, 0.0, u * chunk(grad_out, start, length, 0.0, BLOCK_N))
        total += u
    delta = mean_of(tl.sum(ug, 1), tl.sum(total, 1))[:, None]
    of_alpha = tl.zeros([1, BLOCK_N], tl.float32)
    for start in range(0, length, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        p = chunk(output, start, length, 0.0, BLOCK_N)
        g = chunk(grad_out, start, length, 0.0, BLOCK_N)
        log = log2(p, EXACT)
        change = tl.where(p == 0.0, 0.0, u_of(p, log, a) * (g - delta))
        tl.store(
            grad_input + column[None, :], cast(change, grad_input.dtype.element_ty), mask=(column < length)[None, :]
        )
        of_alpha += tl.where(p == 0.0, 0.0, change * alpha_term(p, log, a))
    tl.store(grad_alpha + row, tl.sum(of_alpha, 1), mask=row < own_alphas)


@triton.jit
def activate_grad(
    grad_out, output, grad_input, row_alpha, grad_alpha, own_alphas, rows, length, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LONG: tl.constexpr,
):  # fmt: skip
    """Gradients of scores, and of alpha where there is one for each row. Programs as for `activate`."""
    if LONG:
        grad_of_long_row(grad_out, output, grad_input, row_alpha, grad_alpha, own_alphas, rows, length, alpha, BLOCK_N)
    else:
        grad_of_short_rows(
            grad_out, output, grad_input, row_alpha, grad_alpha, own_alphas, rows, length, alpha, BLOCK_M, BLOCK_N
        )
