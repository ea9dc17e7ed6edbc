"""``entmax_attn`` and ``entmax_attn_varlen`` with a summary of what they attended to, cheap enough to log in training.

Annotations are real types, so that TorchScript compiles modules that call these.
"""

from typing import NamedTuple, Optional, Tuple, Union  # noqa: UP035  (TorchScript knows these names everywhere)

import torch
from torch import Tensor

from adasplash.functional import attend, attend_packed, resolve
from adasplash.nested import any_is_nested


class AttentionStats(NamedTuple):
    """Facts about the rows of an attention matrix that was never built; (B, H, M), packed (H, T_q), unless said
    otherwise. None has a gradient.

    ``tau``, ``maximum`` and ``gap`` are the kernel's own, in units of z = (α−1) · score: a key has weight if its z is
    above tau. They are float32, and float64 for float64 queries. The kernel works with ``maximum`` and ``gap``; where
    scores are large and close to each other, one float32 for ``tau`` says less than the two. For α = 1, softmax, z is
    the score.
    """

    #: The threshold, maximum + gap; −∞ for α = 1. ∞ for a row that sees no key, NaN for a NaN row.
    tau: Tensor
    #: The row's largest z. 0 for a row that sees no key, NaN for a NaN row.
    maximum: Tensor
    #: tau − maximum, from −1 to 0; for α = 1 log Σ exp(z − maximum). ∞ for a row that sees no key, NaN for a NaN row.
    gap: Tensor
    #: How many keys are above tau, int64; one whose weight rounds to 0 may count or not. For α = 1 all that are seen. 0
    #: for a row that sees no key and for a NaN row.
    support_size: Tensor
    #: The largest weight, in tau's type. 0 for a row that sees no key, NaN for a NaN row.
    largest_weight: Tensor
    #: The share of tiles without any weight among the 64×64 tiles in which some query sees some key, (B, H) float64.
    #: 0 where no tile is visible. What a NaN row sees counts as having weight.
    empty_tiles: Tensor


def stats_of(
    alpha: Union[float, Tensor],  # noqa: UP007
    support_size: Tensor,
    largest_weight: Tensor,
    maximum: Tensor,
    gap: Tensor,
    empty_tiles: Tensor,
) -> AttentionStats:
    """From what the op returns behind the output."""
    tau = maximum + gap
    if isinstance(alpha, Tensor):
        softmax = (alpha == 1).reshape([-1, 1]) & (tau < torch.inf)
        tau = tau.masked_fill(softmax, -torch.inf)
    elif alpha == 1:
        tau = tau.masked_fill(tau < torch.inf, -torch.inf)
    return AttentionStats(tau, maximum, gap, support_size.long(), largest_weight, empty_tiles)


def entmax_attn_summary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    is_causal: bool = False,
    scale: Union[float, Tensor, None] = None,  # noqa: UP007
    q_seqlens: Optional[Tensor] = None,  # noqa: UP045
    kv_seqlens: Optional[Tensor] = None,  # noqa: UP045
    window: Tuple[int, int] = (-1, -1),  # noqa: UP006
    alibi_slopes: Optional[Tensor] = None,  # noqa: UP045
    kv_starts: Optional[Tensor] = None,  # noqa: UP045
    dropout_p: float = 0.0,
    dropout_seed: Optional[Tensor] = None,  # noqa: UP045
    q_positions: Optional[Tensor] = None,  # noqa: UP045
    dropout_origin: Optional[Tensor] = None,  # noqa: UP045
) -> Tuple[Tensor, AttentionStats]:  # noqa: UP006
    """``entmax_attn`` and what it attended to, for little more than its own time.

    On a GPU a row's support is counted in the tiles that hold weight, by one more product of queries and keys there; on
    the CPU the forward has counted it. Where α is the number 1 and torch's own attention serves, the facts take a
    forward of this library beside it.

    Args:
        query, key, value, alpha, is_causal, scale: as in ``entmax_attn``.
        q_seqlens, kv_seqlens, window, alibi_slopes, kv_starts, q_positions: likewise.
        dropout_p, dropout_seed, dropout_origin: as there; of the output alone.

    Returns:
        The output of ``entmax_attn``, its bits and gradients, and :class:`AttentionStats`, which have none.

    Raises:
        TypeError, RuntimeError, NotImplementedError: as in ``entmax_attn``.
    """
    if not torch.jit.is_scripting():
        if any_is_nested(query, key, value):
            raise RuntimeError(
                "entmax_attn_summary: query, key and value must not be nested tensors; entmax_attn_varlen_summary "
                "takes their values and offsets"
            )
        out, size, largest, maximum, gap, empty = attend(
            "entmax_attn_summary", query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window,
            alibi_slopes, kv_starts, dropout_p, dropout_seed, op=torch.ops.adasplash.entmax_attn_summary,
            q_positions=q_positions, dropout_origin=dropout_origin,
        )  # fmt: skip
        return out, stats_of(alpha, size, largest, maximum, gap, empty)
    query, factor, dropout_seed = resolve(query, scale, dropout_p, dropout_seed)
    if isinstance(alpha, Tensor):  # a branch for each overload, as in entmax_attn
        out, size, largest, maximum, gap, empty = torch.ops.adasplash.entmax_attn_summary(
            query, key, value, alpha, is_causal, scale=factor, q_seqlens=q_seqlens, kv_seqlens=kv_seqlens,
            window=list(window), alibi_slopes=alibi_slopes, kv_starts=kv_starts, dropout_p=dropout_p,
            dropout_seed=dropout_seed, q_positions=q_positions, dropout_origin=dropout_origin,
        )  # fmt: skip
        return out, stats_of(alpha, size, largest, maximum, gap, empty)
    else:
        out, size, largest, maximum, gap, empty = torch.ops.adasplash.entmax_attn_summary(
            query, key, value, alpha, is_causal, scale=factor, q_seqlens=q_seqlens, kv_seqlens=kv_seqlens,
            window=list(window), alibi_slopes=alibi_slopes, kv_starts=kv_starts, dropout_p=dropout_p,
            dropout_seed=dropout_seed, q_positions=q_positions, dropout_origin=dropout_origin,
        )  # fmt: skip
        return out, stats_of(alpha, size, largest, maximum, gap, empty)


def entmax_attn_varlen_summary(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    is_causal: bool = False,
    scale: Union[float, Tensor, None] = None,  # noqa: UP007
    window: Tuple[int, int] = (-1, -1),  # noqa: UP006
    alibi_slopes: Optional[Tensor] = None,  # noqa: UP045
    dropout_p: float = 0.0,
    dropout_seed: Optional[Tensor] = None,  # noqa: UP045
    q_positions: Optional[Tensor] = None,  # noqa: UP045
    dropout_origin: Optional[Tensor] = None,  # noqa: UP045
) -> Tuple[Tensor, AttentionStats]:  # noqa: UP006
    """``entmax_attn_varlen`` and what it attended to; see ``entmax_attn_summary``.

    Args:
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in ``entmax_attn_varlen``.
        alpha, is_causal, scale, window, alibi_slopes, q_positions: likewise.
        dropout_p, dropout_seed, dropout_origin: as there; of the output alone.

    Returns:
        The output of ``entmax_attn_varlen``, its bits and gradients, and :class:`AttentionStats`, of which empty_tiles
        has a row for each sequence, (B, H).

    Raises:
        TypeError, RuntimeError, NotImplementedError: as in ``entmax_attn``.
    """
    if not torch.jit.is_scripting():
        out, size, largest, maximum, gap, empty = attend_packed(
            "entmax_attn_varlen_summary", query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            alpha, is_causal, scale, window, alibi_slopes, dropout_p, dropout_seed,
            op=torch.ops.adasplash.entmax_attn_varlen_summary, q_positions=q_positions, dropout_origin=dropout_origin,
        )  # fmt: skip
        return out, stats_of(alpha, size, largest, maximum, gap, empty)
    query, factor, dropout_seed = resolve(query, scale, dropout_p, dropout_seed)
    if isinstance(alpha, Tensor):
        out, size, largest, maximum, gap, empty = torch.ops.adasplash.entmax_attn_varlen_summary(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alpha, is_causal, scale=factor,
            window=list(window), alibi_slopes=alibi_slopes, dropout_p=dropout_p, dropout_seed=dropout_seed,
            q_positions=q_positions, dropout_origin=dropout_origin,
        )  # fmt: skip
        return out, stats_of(alpha, size, largest, maximum, gap, empty)
    else:
        out, size, largest, maximum, gap, empty = torch.ops.adasplash.entmax_attn_varlen_summary(
            query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alpha, is_causal, scale=factor,
            window=list(window), alibi_slopes=alibi_slopes, dropout_p=dropout_p, dropout_seed=dropout_seed,
            q_positions=q_positions, dropout_origin=dropout_origin,
        )  # fmt: skip
        return out, stats_of(alpha, size, largest, maximum, gap, empty)
