"""Losses whose link is α-entmax, as cross-entropy's is softmax: convex, and exactly zero once the target leads by
1/(α−1).

They are the Fenchel–Young losses of Tsallis entropies, L(x, y) = Ω(p) + Σ_j p_j (x_j − x_y) with p = entmax(x, α) and
Ω(p) = (1 − Σ p_j^α) / (α(α−1)) (Blondel, Martins and Niculae, "Learning with Fenchel-Young Losses", 2020), with the
gradient p − e_y. At α = 1 that is cross-entropy. `entmax_loss` says what its arguments mean, for all of them.
"""

from typing import Optional, Union  # TorchScript knows these names on every torch we support

import torch
from torch import Tensor, nn

from adasplash._arguments import INTEGER, NUMBER, NUMBER_OR_TENSOR, OPTIONAL_TENSOR, TENSOR, check, explain, refuse
from adasplash.activation import entmax

_REDUCTIONS = "none, sum, mean or elementwise_mean"


def _sum_of_powers(p: Tensor, alpha: Union[float, Tensor]) -> Tensor:  # noqa: UP007
    """Σ p^α of each row."""
    if isinstance(alpha, Tensor):
        return p.pow(alpha).sum(-1)
    if alpha == 2.0:
        return (p * p).sum(-1)
    if alpha == 1.5:
        return (p * p.sqrt()).sum(-1)
    return p.pow(alpha).sum(-1)


def _entropy(p: Tensor, alpha: Union[float, Tensor]) -> Tensor:  # noqa: UP007
    """Ω(p) of each row; alpha is a number or has 1 in the last dimension."""
    rest = 1.0 - _sum_of_powers(p, alpha)
    if isinstance(alpha, Tensor):
        return rest / (alpha * (alpha - 1.0)).squeeze(-1)
    return rest / (alpha * (alpha - 1.0))


def _slope_in_alpha(p: Tensor, alpha: Tensor) -> Tensor:
    """∂Ω(p)/∂α of each row for p held fast, which is the loss's: p is where Ω(p) + p·x is largest.

    With l = ln p and L = (α−1) l, Ω = −Σ p l E(L) / α, E(L) = (e^L − 1)/L, as Σp = 1. So nothing cancels as α → 1 but
    in E', which a series gives where L is small.
    """
    held = p > 0
    log = torch.where(held, p, 1.0).log()
    large = (alpha - 1.0) * log
    apart = torch.where(large < -0.5, large, -1.0)
    e = torch.where(large < -0.5, torch.expm1(apart) / apart, 0.0)
    slope = torch.where(large < -0.5, (apart.exp() * (apart - 1.0) + 1.0) / (apart * apart), 0.0)
    small = torch.where(large < -0.5, 0.0, large)
    series, series_slope, power, factorial = (
        torch.ones_like(small),
        torch.zeros_like(small),
        torch.ones_like(small),
        1.0,
    )
    for k in range(1, 11):  # E(L) = Σ L^k / (k+1)!
        factorial = factorial * (k + 1)
        series_slope = series_slope + power * (k / factorial)
        power = power * small
        series = series + power / factorial
    e, slope = torch.where(large < -0.5, e, series), torch.where(large < -0.5, slope, series_slope)
    return (p * log * (e / alpha - log * slope)).sum(-1) / alpha.squeeze(-1)


def _with_alphas_gradient(losses: Tensor, p: Tensor, alpha: Union[float, Tensor]) -> Tensor:  # noqa: UP007
    """The losses, which know nothing of alpha yet, with their derivative in it."""
    if not isinstance(alpha, Tensor) or not alpha.requires_grad:
        return losses
    slope = _slope_in_alpha(p, alpha.detach())
    return losses + torch.ops.adasplash._with_gradient(torch.zeros_like(slope), alpha, slope.unsqueeze(-1))


def _of_classes(scores: Tensor, target: Tensor, alpha: Union[float, Tensor], ignore_index: int) -> Tensor:  # noqa: UP007
    """L(x, y) of each row (N, C) and class (N,); anything where the class is ignore_index."""
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        return nn.functional.cross_entropy(scores, target, ignore_index=ignore_index, reduction="none")
    known = scores.detach()
    p = entmax(known, alpha)
    # This says of a class that is out of bounds that it is a target.
    of_target = -nn.functional.nll_loss(known, target, ignore_index=ignore_index, reduction="none")
    # The target's score comes off all, so that nothing is lost where scores are large. Scores 1/(α−1) ≤ 100 below the
    # largest have no weight, so that cutting them off changes nothing but 0 · ∞.
    shift = torch.where(of_target.isfinite(), of_target, 0.0).unsqueeze(-1)
    expected = (p * (known - shift).clamp(min=-1e4)).sum(-1) - (of_target - shift.squeeze(-1))
    value = expected + _entropy(p, alpha)
    index = target.masked_fill(target == ignore_index, 0).unsqueeze(-1)
    gradient = p.scatter_add(-1, index, torch.full_like(shift, -1.0))
    return _with_alphas_gradient(torch.ops.adasplash._with_gradient(value, scores, gradient), p, alpha)


def _of_shares(scores: Tensor, shares: Tensor, alpha: Union[float, Tensor]) -> Tensor:  # noqa: UP007
    """Σ_c shares_c L(x, c) of each row (N, C), differentiable in both."""
    known = scores.detach()
    largest = known.amax(-1, keepdim=True) if known.size(-1) > 0 else known.new_zeros([known.size(0), 1])
    shift = torch.where(largest.isfinite(), largest, 0.0)
    if not isinstance(alpha, Tensor) and alpha == 1.0:
        of_best = (scores - shift).logsumexp(-1)
    else:
        p = entmax(known, alpha)
        value = (p * (known - shift).clamp(min=-1e4)).sum(-1) + _entropy(p, alpha)
        of_best = _with_alphas_gradient(torch.ops.adasplash._with_gradient(value, scores, p), p, alpha)
    losses = of_best.unsqueeze(-1) - (scores - shift)
    losses = torch.where((shares == 0) & (known == -torch.inf), 0.0, losses)  # no share of a masked class: 0 · ∞
    return (shares * losses).sum(-1)


def _check(
    function: str,
    input: Tensor,
    target: Tensor,
    alpha: Union[float, Tensor],  # noqa: UP007
    ignore_index: int,
    weight: Optional[Tensor],  # noqa: UP045
    label_smoothing: float,
) -> None:
    classes = list(input.shape)
    if len(classes) == 0:
        raise ValueError(function + ": input must be scores (..., C), got a tensor without dimensions")
    if not input.is_floating_point():
        raise ValueError(function + ": input must be float32, float16, bfloat16 or float64, got " + str(input.dtype))
    number = classes.pop()
    is_class = target.dtype == torch.int64 or target.dtype == torch.uint8
    if not (
        (is_class and list(target.shape) == classes) or (target.is_floating_point() and target.shape == input.shape)
    ):
        raise ValueError(
            function + ": target must be classes, int64 or uint8 of sizes " + str(classes) + " (input's without the "
            "last), or their probabilities, floating point of input's sizes " + str(list(input.shape)) + ", got "
            + str(target.dtype) + " of sizes " + str(list(target.shape))
        )  # fmt: skip
    if target.device != input.device:
        raise ValueError(
            function + ": target must be on input's device " + str(input.device) + ", got " + str(target.device)
        )
    if ignore_index >= 0 and not is_class:
        raise ValueError(
            function + ": ignore_index goes with a target of classes; for probabilities it must be negative, got "
            + str(ignore_index)
        )  # fmt: skip
    if weight is not None and (
        list(weight.shape) != [number] or not weight.is_floating_point() or weight.device != input.device
    ):
        raise ValueError(
            function + ": weight must be floating point of sizes " + str([number]) + ", a number for each class, on "
            "input's device " + str(input.device) + ", got " + str(weight.dtype) + " of sizes "
            + str(list(weight.shape)) + " on " + str(weight.device)
        )  # fmt: skip
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(function + ": label_smoothing must be from 0 to 1, got " + str(label_smoothing))
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise ValueError(function + ": alpha must be a number or a floating point tensor, got " + str(alpha.dtype))
        rows = classes + [1]  # noqa: RUF005  (TorchScript)
        fits = alpha.dim() <= len(rows)
        for d in range(1, alpha.dim() + 1):
            fits = fits and (alpha.size(-d) == 1 or alpha.size(-d) == rows[-d])
        if not fits:
            raise ValueError(
                function + ": alpha must broadcast over the rows of input, to sizes " + str(rows) + ", got "
                + str(list(alpha.shape))
            )  # fmt: skip
    elif alpha != 1.0 and not 1.01 <= alpha <= 2.0:
        raise RuntimeError(function + ": alpha must be 1 or from 1.01 to 2, got " + str(alpha))


def _computed(
    function: str,
    input: Tensor,
    target: Tensor,
    alpha: Union[float, Tensor],  # noqa: UP007
    ignore_index: int,
    reduction: str,
    weight: Optional[Tensor],  # noqa: UP045
    label_smoothing: float,
) -> Tensor:
    _check(function, input, target, alpha, ignore_index, weight, label_smoothing)
    rows, number = target.numel(), input.size(-1)
    if target.is_floating_point():
        rows = input.numel() // max(number, 1)
    # In float32 at least, one row behind the other.
    scores = input.float() if input.dtype == torch.half or input.dtype == torch.bfloat16 else input
    scores = scores.reshape(rows, number)
    if weight is not None:
        weight = weight.to(scores.dtype)
    if isinstance(alpha, Tensor):
        alpha = alpha.to(scores.dtype).expand(input.shape[:-1] + (1,)).reshape(rows, 1)  # noqa: RUF005  (TorchScript)

    if target.is_floating_point():
        shares = target.reshape(rows, number).to(scores.dtype)
        if label_smoothing > 0.0:
            shares = shares * (1.0 - label_smoothing) + label_smoothing / max(number, 1)
        if weight is not None:
            shares = shares * weight
        losses, count = _of_shares(scores, shares, alpha), torch.full([], rows, dtype=scores.dtype, device=input.device)
    else:
        classes = target.reshape(rows).long()
        kept = classes != ignore_index
        losses = _of_classes(scores, classes, alpha, ignore_index)
        count = kept.to(scores.dtype)
        if weight is not None:
            count = weight.gather(0, classes.masked_fill(~kept, 0)).masked_fill(~kept, 0.0)
            losses = losses * count
        if label_smoothing > 0.0:
            every = torch.ones_like(scores) if weight is None else weight.expand_as(scores)
            every = every * (label_smoothing / max(number, 1))
            losses = (1.0 - label_smoothing) * losses + _of_shares(scores, every, alpha)
        losses, count = losses.masked_fill(~kept, 0.0), count.sum()

    if reduction == "sum":
        losses = losses.sum()
    elif reduction == "mean" or reduction == "elementwise_mean":
        losses = losses.sum() / count
    elif reduction == "none":
        losses = losses.reshape(input.shape[:-1])
    else:
        raise ValueError(function + ": reduction must be none, sum, mean or elementwise_mean, got " + reduction)
    return losses.to(input.dtype)


def _in_eager_code(function, input, target, alpha, ignore_index, reduction, weight, label_smoothing) -> Tensor:
    """Asks for kinds, of which TorchScript's types leave nothing to ask."""
    check(function, "input", TENSOR, input)
    check(function, "target", TENSOR, target)
    check(function, "alpha", NUMBER_OR_TENSOR, alpha)
    check(function, "ignore_index", INTEGER, ignore_index)
    check(function, "weight", OPTIONAL_TENSOR, weight)
    check(function, "label_smoothing", NUMBER, label_smoothing)
    if not isinstance(reduction, str):
        refuse(function, "reduction", _REDUCTIONS, reduction)
    if torch.compiler.is_compiling():
        return _computed(function, input, target, alpha, ignore_index, reduction, weight, label_smoothing)
    try:
        return _computed(function, input, target, alpha, ignore_index, reduction, weight, label_smoothing)
    except IndexError as error:
        most = input.shape[-1] - 1
        raise IndexError(f"{function}: target must be from 0 to {most}, or ignore_index: {error}") from None
    except RuntimeError as error:  # of the activation's
        explain(function, error, {}, "entmax")


def _loss(
    function: str,
    input: Tensor,
    target: Tensor,
    alpha: Union[float, Tensor],  # noqa: UP007
    ignore_index: int,
    reduction: str,
    weight: Optional[Tensor],  # noqa: UP045
    label_smoothing: float,
) -> Tensor:
    if not torch.jit.is_scripting():
        return _in_eager_code(function, input, target, alpha, ignore_index, reduction, weight, label_smoothing)
    return _computed(function, input, target, alpha, ignore_index, reduction, weight, label_smoothing)


def entmax_loss(
    input: Tensor,
    target: Tensor,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    ignore_index: int = -100,
    reduction: str = "none",
    weight: Optional[Tensor] = None,  # noqa: UP045
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss whose link is `adasplash.entmax`; `entmax_bisect_loss` of the ``entmax`` package, without iterations.

    Targets, weights and smoothing mean what they do in ``torch.nn.functional.cross_entropy``, and at α = 1 the loss is
    that one, but for the place of the classes, which is the last dimension here. With L(x, c) the loss of class c:

    - a class y with label smoothing ε has the loss (1 − ε) w_y L(x, y) + ε/C Σ_c w_c L(x, c);
    - probabilities t have the loss Σ_c w_c t'_c L(x, c), t' = (1 − ε) t + ε/C. With Σ_c t_c = 1 and no weights that is
      Ω(p) + Σ_c (p_c − t'_c) x_c, with the gradient p − t': the Fenchel–Young loss of t', and Ω(t') more, a constant
      that makes it cross-entropy at α = 1, and not the divergence.

    Args:
        input: (..., C) scores, float32, float16, bfloat16, or float64 on the CPU.
        target: (...) classes from 0 to C − 1, or ignore_index, int64 or uint8; or (..., C) probabilities of the
            classes, floating point, which get a gradient.
        alpha: 1 (cross-entropy) or from 1.01 to 2; or a tensor as in `adasplash.entmax`, one α for each row (..., 1) or
            one for all (), from 1.01 to 2, which gets a gradient.
        ignore_index: target classes that have no loss and are left out of means.
        reduction: "none"; "sum"; "mean" or "elementwise_mean", the sum divided by that of the weights of the targets
            that are not ignored (their number without weights), or for probabilities by the number of rows.
        weight: (C,), a factor for each class.
        label_smoothing: ε, from 0 to 1.

    Returns:
        (...) losses, or one number, in input's type, computed in float32 at least. A target whose score is −∞ has the
        loss ∞. Differentiable once in input, alpha and probabilities.

    Raises:
        TypeError, ValueError: an argument is of another kind than said here, or does not fit; the message names it.
        IndexError: a class is out of range, on the CPU.
        RuntimeError: alpha is out of range; double backward.
    """
    return _loss("entmax_loss", input, target, alpha, ignore_index, reduction, weight, label_smoothing)


def sparsemax_loss(
    input: Tensor,
    target: Tensor,
    k: Optional[int] = None,  # noqa: UP045
    ignore_index: int = -100,
    reduction: str = "none",
    weight: Optional[Tensor] = None,  # noqa: UP045
    label_smoothing: float = 0.0,
) -> Tensor:
    """`entmax_loss` with α = 2 (Martins and Astudillo, "From Softmax to Sparsemax", 2016). k, in the ``entmax`` package
    how many of the largest scores are sorted first, is accepted and means nothing here."""
    return _loss("sparsemax_loss", input, target, 2.0, ignore_index, reduction, weight, label_smoothing)


def entmax15_loss(
    input: Tensor,
    target: Tensor,
    k: Optional[int] = None,  # noqa: UP045
    ignore_index: int = -100,
    reduction: str = "none",
    weight: Optional[Tensor] = None,  # noqa: UP045
    label_smoothing: float = 0.0,
) -> Tensor:
    """`entmax_loss` with α = 1.5; k as in `sparsemax_loss`."""
    return _loss("entmax15_loss", input, target, 1.5, ignore_index, reduction, weight, label_smoothing)


class EntmaxLoss(nn.Module):
    """`entmax_loss` as a module, for an α that is a number, with `weight` as a buffer. Its default reduction is the
    ``entmax`` package's, the mean."""

    weight: Optional[Tensor]  # noqa: UP045

    def __init__(
        self,
        alpha: float = 1.5,
        ignore_index: int = -100,
        reduction: str = "elementwise_mean",
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        check(type(self).__name__, "alpha", NUMBER, alpha)
        check(type(self).__name__, "ignore_index", INTEGER, ignore_index)
        check(type(self).__name__, "weight", OPTIONAL_TENSOR, weight)
        check(type(self).__name__, "label_smoothing", NUMBER, label_smoothing)
        if not isinstance(reduction, str):
            refuse(type(self).__name__, "reduction", _REDUCTIONS, reduction)
        self.alpha, self.ignore_index, self.reduction = float(alpha), ignore_index, reduction
        self.register_buffer("weight", weight)
        self.label_smoothing = float(label_smoothing)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return entmax_loss(
            input, target, self.alpha, self.ignore_index, self.reduction, self.weight, self.label_smoothing
        )

    def extra_repr(self) -> str:
        text = f"alpha={self.alpha:g}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        return text + (f", label_smoothing={self.label_smoothing:g}" if self.label_smoothing else "")


class SparsemaxLoss(EntmaxLoss):
    """`sparsemax_loss` as a module."""

    def __init__(
        self,
        k: int | None = None,
        ignore_index: int = -100,
        reduction: str = "elementwise_mean",
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__(2.0, ignore_index, reduction, weight, label_smoothing)


class Entmax15Loss(EntmaxLoss):
    """`entmax15_loss` as a module."""

    def __init__(
        self,
        k: int | None = None,
        ignore_index: int = -100,
        reduction: str = "elementwise_mean",
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
    ):
        super().__init__(1.5, ignore_index, reduction, weight, label_smoothing)
