"""Attention with an M×N tensor of weights: for what ``entmax_attn`` does not have, and where weights are asked for."""

import warnings

import torch
from torch import Tensor, nn

from adasplash.activation import entmax
from adasplash.integrations.transformers.configuration import LEAST_ALPHA

#: So many weights are computed without being asked for, and no more: 1 GiB of them in float32.
MOST_WEIGHTS = 1 << 28

_warned: set[str] = set()


def allow(layer: str, option: str, weights: int) -> None:
    """Warns once that `option` of a layer makes it dense; raises where that is too large."""
    if torch.compiler.is_compiling():
        return
    if weights > MOST_WEIGHTS:
        raise NotImplementedError(
            f"adasplash: {layer}: {option} is not served without a tensor of all weights, and {weights} are too many "
            f"for that; shorten the sequences or split the batch to at most {MOST_WEIGHTS}"
        )
    if option not in _warned:
        _warned.add(option)
        warnings.warn(
            f"adasplash: {layer}: {option} is not served without a tensor of all weights, so there is one now",
            stacklevel=4,
        )


def attend_densely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    scale: float,
    mask: Tensor | None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result and the weights, (B, H, M, D_v) and (B, H, M, N).

    Args:
        mask: Boolean, True where a key is seen, or floating point, added to the scores, with its type's least number or
            −∞ where a key is hidden.
        softcap: scores are softcap · tanh(score / softcap).
        position_bias: is added to the scores.
        sinks: (H,), a score of each head that takes part and has no value.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-2, -1)) * scale
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    hidden = None
    if mask is not None and mask.dtype == torch.bool:
        hidden = ~mask
    elif mask is not None:
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        scores = scores + mask.masked_fill(hidden, 0.0)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    keys = scores.shape[-1]
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    elif hidden is not None:
        blind = hidden.all(-1, keepdim=True)
        return _with_value(_weights(scores.masked_fill(blind, 0.0), alpha).masked_fill(blind, 0.0), value, dropout_p)
    return _with_value(_weights(scores, alpha)[..., :keys], value, dropout_p)


def _with_value(weights: Tensor, value: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    weights = nn.functional.dropout(weights, dropout_p).to(value.dtype)
    return weights @ value, weights


def _weights(scores: Tensor, alpha: float | Tensor) -> Tensor:
    if not isinstance(alpha, Tensor):
        return entmax(scores, alpha)
    alpha = alpha.reshape(-1, 1, 1)  # entmax takes no tensor that is 1
    sparse = entmax(scores, alpha.clamp(min=LEAST_ALPHA))
    return torch.where(alpha == 1, torch.softmax(scores, -1), sparse)
