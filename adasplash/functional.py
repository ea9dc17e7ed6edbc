"""The ops as Python functions, with the same arguments as in ``torch.ops.adasplash``.

Annotations are real types, and options are not keyword-only, so that TorchScript compiles modules that call these.
"""

from typing import Optional, Tuple  # noqa: UP035  (TorchScript knows these names on every torch we support)

import torch
from torch import Tensor


def entmax_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float = 1.5,
    is_causal: bool = False,
    scale: Optional[float] = None,  # noqa: UP045
    q_seqlens: Optional[Tensor] = None,  # noqa: UP045
    kv_seqlens: Optional[Tensor] = None,  # noqa: UP045
    window: Tuple[int, int] = (-1, -1),  # noqa: UP006
    alibi_slopes: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """Attention whose weights are the α-entmax of the scaled scores: exactly zero for most keys.

    For one query with scores s_j = scale · q·k_j over the keys it sees, the weights are
    p_j = [(α−1) s_j − τ]₊^(1/(α−1)), with τ such that they sum to one (Peters, Niculae and Martins, "Sparse
    Sequence-to-Sequence Models", 2019, equation 6), and the result is Σ p_j v_j. No M×N tensor is ever built.

    Args:
        query: (B, H, M, D), float32, float16, bfloat16, or float64 on the CPU.
        key: (B, H_kv, N, D), of query's type and device; H is a multiple of H_kv, and H / H_kv neighbouring query
            heads share one head of key and value.
        value: (B, H_kv, N, D_v). D and D_v are from 1 to 256.
        alpha: 1 or from 1.01 to 2; larger is sparser. 2 is sparsemax. 1 is softmax, which goes to torch's
            ``scaled_dot_product_attention`` and needs D_v = D, and M = N if causal.
        is_causal: query i sees the keys up to i + N − M: the mask is aligned bottom right, as in flash-attn, so that
            the last query sees every key.
        scale: factor of the scores, 1/√D unless given.
        q_seqlens: not available yet.
        kv_seqlens: not available yet.
        window: not available yet.
        alibi_slopes: not available yet.

    Returns:
        (B, H, M, D_v), contiguous, in query's type. A query that sees no key gives zeros. Differentiable once in
        query, key and value.

    Raises:
        RuntimeError: an argument does not fit; the message names it. NotImplementedError, a subclass, for options that
            are not available yet, for double backward and for forward-mode AD.
    """
    return torch.ops.adasplash.entmax_attn(
        query,
        key,
        value,
        alpha,
        is_causal,
        scale=scale,
        q_seqlens=q_seqlens,
        kv_seqlens=kv_seqlens,
        window=[window[0], window[1]],
        alibi_slopes=alibi_slopes,
    )
