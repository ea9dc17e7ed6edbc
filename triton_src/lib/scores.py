"""Scores: what is made of the products q.k before they are weighed. Whatever changes a score is in `scores_of`, for all
kernels and both ways that blocks lie; the scale is in z_scale, by which scores become z at last."""

from typing import NamedTuple

import triton
import triton.language as tl

from .entmax import fixed_alpha, rate_of
from .matrices import Factor, PagedRows, Rows, RowsFrom, products, row_numbers
from .visibility import Band, Span, diagonal_of, visible_keys


class Scores(NamedTuple):
    """What makes a score of q.k, and hides it."""

    slopes: tl.tensor
    slopes_batch_stride: tl.tensor
    has_slopes: tl.tensor
    scale: tl.tensor
    window_left: tl.tensor
    window_right: tl.tensor
    q_positions: tl.tensor  # (B,) places of the first queries, see Band
    has_positions: tl.tensor


class ScoreRules(NamedTuple):
    """What the scores of some rows depend on beside the products; `score_rules` makes them."""

    row: tl.tensor  # the numbers of the rows
    band: Band
    visible: Span | None  # the keys that each row sees; None: to be found where they are needed
    qk_slope: tl.tensor  # ALiBi's, in units of q.k


class HeadScale(NamedTuple):
    """A head's alpha, and what turns q.k into z: the factor, and ALiBi's slope in units of q.k."""

    alpha: tl.tensor
    z: tl.tensor
    qk_slope: tl.tensor


class QueryBlock(NamedTuple):
    """A block of queries against the keys of its head: what scores are made of, and turned into z by."""

    q: Factor
    key_rows: Rows | RowsFrom | PagedRows
    rules: ScoreRules
    scale: HeadScale


@triton.jit
def z_scale_of(scale, alpha, ALPHA: tl.constexpr):
    """(alpha - 1) * |scale|, for alpha = 1 |scale|, by which q.k becomes z: for a negative scale the kernels are given
    -query, so that q.k orders keys as z does. Never quite zero, so that the -inf of a hidden key stays -inf."""
    return tl.maximum(tl.abs(scale) * rate_of(alpha, ALPHA), 1e-30)


@triton.jit
def qk_slope_of(scores, batch, head, alpha, z_scale, ALPHA: tl.constexpr):
    """A head's ALiBi slope, in units of q.k."""
    if fixed_alpha(ALPHA):
        return 0.0
    else:
        given = tl.where(scores.has_slopes != 0, head, -1) >= 0
        slope = tl.load(scores.slopes + batch * scores.slopes_batch_stride + head, mask=given, other=0.0)
        return slope * rate_of(alpha, ALPHA) / z_scale


@triton.jit
def score_rules(row, band, visible, scale):
    """The ScoreRules of rows by their numbers, in a head with a HeadScale, where it is known what they see. Without
    that they are made in place: Triton 3.6 can't return a tuple that has None in it."""
    return ScoreRules(row, band, visible, scale.qk_slope)


@triton.jit
def scores_of(qk, rules, key, row_axis: tl.constexpr, ALPHA: tl.constexpr, EDGE: tl.constexpr):
    """Scores in units of q.k from the products of rows along `row_axis` with keys (a vector of their numbers): lowered
    by ALiBi, and -inf where an EDGE hides keys from rows."""
    qk = subtract_alibi(qk, rules, key, row_axis, ALPHA)
    return mask_scores(qk, rules, key, row_axis) if EDGE else qk


@triton.jit
def subtract_alibi(qk, rules, key, row_axis: tl.constexpr, ALPHA: tl.constexpr):
    """Scores lowered by the slope times the distance from the row's diagonal."""
    if fixed_alpha(ALPHA):
        return qk
    else:
        diagonal = tl.expand_dims(diagonal_of(rules.row, rules.band).to(tl.float32), 1 - row_axis)
        return qk - rules.qk_slope * tl.abs(diagonal - tl.expand_dims(key.to(tl.float32), row_axis))


@triton.jit
def mask_scores(qk, rules, key, row_axis: tl.constexpr):
    """-inf for keys that a row does not see. One comparison for both ends: as an unsigned number what is before the
    first is above all."""
    visible = visible_keys(rules.row, rules.band) if rules.visible is None else rules.visible
    after_first = tl.expand_dims(key, row_axis) - tl.expand_dims(visible.first, 1 - row_axis)
    count = tl.expand_dims(tl.maximum(visible.end - visible.first, 0), 1 - row_axis)
    return tl.where(after_first.to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True), qk, float("-inf"))


@triton.jit
def block_scores(queries, first, CODE, EDGE: tl.constexpr):
    """The (BLOCK_M, BLOCK_N) scores of a QueryBlock and the keys from `first` on, or those that a vector `first`
    names."""
    qk = products(queries.q, queries.key_rows, first, CODE.BLOCK_M, CODE.BLOCK_N, CODE, EDGE)
    return scores_of(qk, queries.rules, row_numbers(first, CODE.BLOCK_N), 0, CODE.ALPHA, EDGE)


@triton.jit
def turned_scores(queries, first, CODE, EDGE: tl.constexpr):
    """The same scores as (BLOCK_N, BLOCK_M): keys first."""
    qk = products(queries.q, queries.key_rows, first, CODE.BLOCK_M, CODE.BLOCK_N, CODE, EDGE, TURNED=True)
    return scores_of(qk, queries.rules, row_numbers(first, CODE.BLOCK_N), 1, CODE.ALPHA, EDGE)
