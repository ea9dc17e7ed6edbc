"""Losses whose link is α-entmax, as cross-entropy's is softmax: convex, and exactly zero once the target leads by
1/(α−1).

They are the Fenchel–Young losses of Tsallis entropies, L(x, y) = Ω(p) + Σ_j p_j (x_j − x_y) with p = entmax(x, α) and
Ω(p) = (1 − Σ p_j^α) / (α(α−1)) (Blondel, Martins and Niculae, "Learning with Fenchel-Young Losses", 2020), with the
gradient p − e_y. At α = 1 that is cross-entropy.
"""

import torch
from torch import Tensor, nn

from adasplash.activation import entmax


def _losses(input: Tensor, target: Tensor, alpha: float) -> Tensor:
    """(...,) losses in float32, or float64 for float64; target holds classes only."""
    scores = input.float() if input.dtype == torch.half or input.dtype == torch.bfloat16 else input
    of_target = scores.gather(-1, target.unsqueeze(-1))
    if alpha == 1.0:
        return scores.logsumexp(-1) - of_target.squeeze(-1)
    known = scores.detach()
    p = entmax(known, alpha)
    # The target's score comes off all, so that nothing is lost where scores are large. Scores 1/(α−1) ≤ 100 below the
    # largest have no weight, so that cutting them off changes nothing but 0 · ∞.
    of_target = of_target.detach()
    shift = torch.where(of_target.isfinite(), of_target, 0.0)
    expected = (p * (known - shift).clamp(min=-1e4)).sum(-1) - (of_target - shift).squeeze(-1)
    if alpha == 2.0:
        powers = p * p
    elif alpha == 1.5:
        powers = p * p.sqrt()
    else:
        powers = p.pow(alpha)
    value = expected + (1.0 - powers.sum(-1)) / (alpha * (alpha - 1.0))
    gradient = p.scatter_add(-1, target.unsqueeze(-1), torch.full_like(of_target, -1.0))
    return torch.ops.adasplash._with_gradient(value, scores, gradient)


def entmax_loss(
    input: Tensor, target: Tensor, alpha: float = 1.5, ignore_index: int = -100, reduction: str = "none"
) -> Tensor:
    """The loss whose link is `adasplash.entmax`; `entmax_bisect_loss` of the ``entmax`` package, without iterations.

    Args:
        input: (..., C) scores, float32, float16, bfloat16, or float64 on the CPU.
        target: (...) int64 classes from 0 to C − 1, or ignore_index.
        alpha: 1 (cross-entropy) or from 1.01 to 2.
        ignore_index: targets that have no loss and are left out of means.
        reduction: "none"; "sum"; "mean" or "elementwise_mean", the sum divided by the number of targets that are not
            ignored.

    Returns:
        (...) losses, or one number, in input's type, computed in float32 at least. A target whose score is −∞ has the
        loss ∞. Differentiable once in input.
    """
    kept = target != ignore_index
    losses = _losses(input, target.masked_fill(~kept, 0), alpha).masked_fill(~kept, 0.0)
    if reduction == "sum":
        losses = losses.sum()
    elif reduction == "mean" or reduction == "elementwise_mean":
        losses = losses.sum() / kept.sum()
    elif reduction != "none":
        raise ValueError("entmax_loss: reduction must be none, sum, mean or elementwise_mean, got " + reduction)
    return losses.to(input.dtype)


def sparsemax_loss(
    input: Tensor, target: Tensor, k: int | None = None, ignore_index: int = -100, reduction: str = "none"
) -> Tensor:
    """`entmax_loss` with α = 2 (Martins and Astudillo, "From Softmax to Sparsemax", 2016). k, in the ``entmax`` package
    how many of the largest scores are sorted first, is accepted and means nothing here."""
    return entmax_loss(input, target, 2.0, ignore_index, reduction)


def entmax15_loss(
    input: Tensor, target: Tensor, k: int | None = None, ignore_index: int = -100, reduction: str = "none"
) -> Tensor:
    """`entmax_loss` with α = 1.5; k as in `sparsemax_loss`."""
    return entmax_loss(input, target, 1.5, ignore_index, reduction)


class EntmaxLoss(nn.Module):
    """`entmax_loss` as a module; its default reduction is the ``entmax`` package's, the mean."""

    def __init__(self, alpha: float = 1.5, ignore_index: int = -100, reduction: str = "elementwise_mean"):
        super().__init__()
        self.alpha, self.ignore_index, self.reduction = float(alpha), ignore_index, reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return entmax_loss(input, target, self.alpha, self.ignore_index, self.reduction)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class SparsemaxLoss(EntmaxLoss):
    """`sparsemax_loss` as a module."""

    def __init__(self, k: int | None = None, ignore_index: int = -100, reduction: str = "elementwise_mean"):
        super().__init__(2.0, ignore_index, reduction)


class Entmax15Loss(EntmaxLoss):
    """`entmax15_loss` as a module."""

    def __init__(self, k: int | None = None, ignore_index: int = -100, reduction: str = "elementwise_mean"):
        super().__init__(1.5, ignore_index, reduction)
