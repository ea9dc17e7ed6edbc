"""Attention under masks that ``entmax_attn`` has no option for: masks of keys as channels of its heads, and any other
with a tensor of all weights. What takes masks (modules, torch's function, other libraries' models) comes here."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adasplash.activation import entmax
from adasplash.functional import entmax_attn

#: The largest head of ``entmax_attn``.
MOST_CHANNELS = 256

#: So many weights are computed without being asked for, and no more: 1 GiB of them in float32.
MOST_WEIGHTS = 1 << 28

#: The least α above 1 that is served. A schedule steps over what lies between.
LEAST_ALPHA = 1.01

_warned: set[str] = set()


def allow_dense(who: str, option: str, weights: int, stacklevel: int = 3) -> None:
    """Warns once that `option` makes attention dense; raises where that is too large. Compiled code does neither."""
    if torch.compiler.is_compiling():
        return
    if weights > MOST_WEIGHTS:
        raise NotImplementedError(
            f"{who}: {option} is not served without a tensor of all weights, and {weights} are too many for that; "
            f"shorten the sequences or split the batch to at most {MOST_WEIGHTS}"
        )
    warn_of_dense(who, option, stacklevel + 1)


def warn_of_dense(who: str, option: str, stacklevel: int, hint: str = "") -> None:
    """Warns, once for each `option`, that it makes attention dense."""
    if torch.compiler.is_compiling() or option in _warned:
        return
    _warned.add(option)
    message = f"{who}: {option} is not served without a tensor of all weights, so there is one now{hint}"
    warnings.warn(message, stacklevel=stacklevel)


def parts(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a mask hides, and what it adds to the scores of the rest. Boolean, it has True where a key is seen; floating
    point, its type's least number or −∞ where a key is hidden."""
    if mask.dtype == torch.bool:
        return ~mask, None
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    return hidden, mask.masked_fill(hidden, 0.0)


_FAR = {torch.float16: 6e4}


def hides_by_channels(dtype: torch.dtype, scale: float) -> bool:
    """Whether :func:`attend_by_keys` can put hidden keys far enough below all others, of which those that weigh are at
    most 1 / (α − 1) apart, so 100."""
    return _FAR.get(dtype, 1e18) ** 2 * scale >= 1e3


def attend_by_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    mask: Tensor,
    is_causal: bool,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """``entmax_attn`` under a mask of keys, of which nothing is read on the host and no M×N tensor is built: in up to
    two more channels of each head. Far below all other scores a key has no weight, exactly.

    Args:
        query, key, value, alpha, is_causal, dropout_p: as in ``entmax_attn``, D up to 254.
        mask: (B or 1, N), as in :func:`parts`.
        scale: one for which :func:`hides_by_channels`.
    """
    hidden, added = parts(mask)
    far = _FAR.get(query.dtype, 1e18)
    # What hidden keys hold reaches nothing.
    key, value = (x.masked_fill(hidden[:, None, :, None], 0.0) for x in (key, value))

    def column(of_keys: Tensor) -> Tensor:
        return of_keys[:, None, :, None].expand(*key.shape[:-1], 1)

    queries, keys = [query, torch.full_like(query[..., :1], far)], [key, column(hidden.to(key.dtype) * -far)]
    if added is not None:
        # Weights do not change with what all keys have in common, and what is left of large ones keeps its digits.
        largest = added.masked_fill(hidden, -torch.inf).amax(1, keepdim=True).detach()
        added = added - torch.where(largest.isfinite(), largest, 0.0)
        most = min(torch.finfo(each.dtype).max for each in (key, added)) / 4
        added = (added / scale).clamp(-most, most).to(key.dtype)
        queries, keys = [*queries, torch.ones_like(query[..., :1])], [*keys, column(added)]
    queries, keys = torch.cat(queries, -1), torch.cat(keys, -1)
    out = entmax_attn(queries, keys, value, alpha, is_causal, scale, dropout_p=dropout_p)
    sees = (~hidden).cumsum(1) > 0 if is_causal else (~hidden).any(1, keepdim=True)
    return torch.where(sees[:, None, :, None], out, 0.0)


def attend_densely(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    scale: float,
    masks: Sequence[Tensor | None] = (),
    dropout_p: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result and the weights, (B, H, M, D_v) and (B, H, M, N).

    Args:
        query, key, value, alpha: as in ``entmax_attn``, with heads of any size.
        masks: each as in :func:`parts`, of a shape that broadcasts to (B, H, M, N). A row that sees nothing has no
            weights.
        softcap: scores are softcap · tanh(score / softcap).
        sinks: (H,), a score of each head that takes part and has no value.
    """
    group = query.shape[1] // max(key.shape[1], 1)
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = (query @ key.transpose(-2, -1)) * scale
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    hides = False
    for mask in masks:
        if mask is None:
            continue
        hides = True
        hidden, added = parts(mask)
        scores = (scores if added is None else scores + added).masked_fill(hidden, -torch.inf)
    keys = scores.shape[-1]
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = _weights(torch.cat([scores, column], -1), alpha)[..., :keys]
    elif hides:
        blind = (scores == -torch.inf).all(-1, keepdim=True)  # softmax of such a row is NaN
        weights = _weights(scores.masked_fill(blind, 0.0), alpha).masked_fill(blind, 0.0)
    else:
        weights = _weights(scores, alpha)
    weights = nn.functional.dropout(weights, dropout_p).to(value.dtype)
    return weights @ value, weights


def _weights(scores: Tensor, alpha: float | Tensor) -> Tensor:
    if not isinstance(alpha, Tensor):
        return entmax(scores, alpha)
    alpha = alpha.reshape(-1, 1, 1)  # entmax takes no tensor that is 1
    sparse = entmax(scores, alpha.clamp(min=LEAST_ALPHA))
    return torch.where(alpha == 1, entmax(scores, 1.0), sparse)
