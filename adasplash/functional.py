"""The ops as Python functions, with the same arguments as in ``torch.ops.adasplash``.

Annotations are real types, and options are not keyword-only, so that TorchScript compiles modules that call these.
"""

from typing import Optional, Tuple, Union  # noqa: UP035  (TorchScript knows these names on every torch we support)

import torch
from torch import Tensor

from adasplash.nested import entmax_attn_jagged


def _call(op, *args, alpha, window, **options):
    """An eager call of an op (``OpOverloadPacket``), by the overload that takes this alpha and with the options that
    say something: torch tries overloads that are not named in turn and reads all options, which on small tensors takes
    as long as the op does."""
    overload = op.per_head if isinstance(alpha, Tensor) else op.default
    given = {name: option for name, option in options.items() if option is not None}
    if window != (-1, -1):
        given["window"] = window
    return overload(*args, **given)


def _number(length):
    """A length that may be a tensor of one number, read here: an op reads it itself, but not while it is compiled."""
    return length.item() if isinstance(length, Tensor) else length


def entmax_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
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
        query: (B, H, M, D), float32, float16, bfloat16, or float64 on the CPU. Query, key and value may also be jagged
            nested tensors, ragged in M and N; they go to ``entmax_attn_varlen``, and the result is ragged as query is.
        key: (B, H_kv, N, D), of query's type and device; H is a multiple of H_kv, and H / H_kv neighbouring query
            heads share one head of key and value.
        value: (B, H_kv, N, D_v). D and D_v are from 1 to 256.
        alpha: a number, or a tensor of shape (H,) or () for α per head, through which gradients flow too. A number is 1
            or from 1.01 to 2; larger is sparser. 2 is sparsemax. 1 is softmax, which goes to torch's
            ``scaled_dot_product_attention``, takes no option below but ``scale`` and needs D_v = D, and M = N if
            causal. A tensor is float32, float64 or of query's type, on query's device, with values from 1.01 to 2:
            others are an error on the CPU and NaN on the GPU.
        is_causal: query i sees the keys up to i + N − M: the mask is aligned bottom right, as in flash-attn, so that
            the last query sees every key.
        scale: factor of the scores, 1/√D unless given.
        q_seqlens: (B,) int32 or int64, on query's device: the lengths of a right-padded batch, each from 0 to M. Then M
            in what is said here is the batch entry's own length. Padded queries give zeros. Padding may hold anything:
            it reaches no result and no gradient, and its own gradients are zeros. Lengths out of range are an error on
            the CPU and wrong rows on the GPU.
        kv_seqlens: (B,), the same for key and value, each from 0 to N.
        window: (left, right), inclusive, −1 for no limit: query i sees the keys from i + N − M − left to
            i + N − M + right. Time grows with the window, not with N.
        alibi_slopes: (H,) or (B, H), float32, on query's device: takes slope · |i + N − M − j| off the scaled score of
            key j (Press, Smith and Lewis, "Train Short, Test Long", 2022). They get no gradient.

    Returns:
        (B, H, M, D_v), contiguous, in query's type. A query that sees no key gives zeros. Differentiable once in
        query, key, value and, where it is a tensor, alpha.

    Raises:
        RuntimeError: an argument does not fit; the message names it. NotImplementedError, a subclass, for options that
            a backend does not have yet, for double backward and for forward-mode AD.
    """
    if not torch.jit.is_scripting():
        if isinstance(query, Tensor) and query.is_nested:
            return entmax_attn_jagged(
                query,
                key,
                value,
                alpha=alpha,
                is_causal=is_causal,
                scale=scale,
                q_seqlens=q_seqlens,
                kv_seqlens=kv_seqlens,
                window=window,
                alibi_slopes=alibi_slopes,
            )
        return _call(
            torch.ops.adasplash.entmax_attn,
            query,
            key,
            value,
            alpha,
            is_causal,
            alpha=alpha,
            window=window,
            scale=scale,
            q_seqlens=q_seqlens,
            kv_seqlens=kv_seqlens,
            alibi_slopes=alibi_slopes,
        )
    # TorchScript knows no overload by name; it chooses one for each branch by the type that alpha has there.
    if isinstance(alpha, Tensor):
        return torch.ops.adasplash.entmax_attn(
            query,
            key,
            value,
            alpha,
            is_causal,
            scale=scale,
            q_seqlens=q_seqlens,
            kv_seqlens=kv_seqlens,
            window=list(window),
            alibi_slopes=alibi_slopes,
        )
    else:
        return torch.ops.adasplash.entmax_attn(
            query,
            key,
            value,
            alpha,
            is_causal,
            scale=scale,
            q_seqlens=q_seqlens,
            kv_seqlens=kv_seqlens,
            window=list(window),
            alibi_slopes=alibi_slopes,
        )


def entmax_attn_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    is_causal: bool = False,
    scale: Optional[float] = None,  # noqa: UP045
    window: Tuple[int, int] = (-1, -1),  # noqa: UP006
    alibi_slopes: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """``entmax_attn`` for a batch of sequences of different lengths, packed behind each other without padding.

    Arguments are those of flash-attn's varlen functions. On the CPU the result is, bit for bit, that of every sequence
    alone.

    Args:
        query: (T_q, H, D): the queries of all B sequences.
        key: (T_k, H_kv, D).
        value: (T_k, H_kv, D_v).
        cu_seqlens_q: (B + 1,) int32 or int64, on query's device: sequence b has the queries cu_seqlens_q[b] to
            cu_seqlens_q[b + 1] − 1. Starts at 0, never decreases, ends at T_q. What contradicts that is an error on
            the CPU and gives wrong rows on the GPU.
        cu_seqlens_k: (B + 1,), the same for key and value, up to T_k.
        max_seqlen_q: the number of queries of the longest sequence, or more. An int, or (not in TorchScript) a tensor
            of one integer, which is then read on the host; torch.compile breaks the graph there unless
            ``torch._dynamo.config.capture_scalar_outputs`` is set.
        max_seqlen_k: the number of keys of the longest sequence, or more; likewise.
        alpha: as in ``entmax_attn``, but not 1.
        is_causal: as in ``entmax_attn``, where M and N are the lengths of the sequence; so for the options below.
        scale: factor of the scores, 1/√D unless given.
        window: (left, right), inclusive, −1 for no limit.
        alibi_slopes: (H,) or (B, H), float32, on query's device.

    Returns:
        (T_q, H, D_v), contiguous, in query's type. Differentiable once in query, key, value and, where it is a tensor,
        alpha.

    Raises:
        RuntimeError: an argument does not fit; the message names it. NotImplementedError, a subclass, for options that
            a backend does not have yet, for double backward and for forward-mode AD.
    """
    if not torch.jit.is_scripting():
        return _call(
            torch.ops.adasplash.entmax_attn_varlen,
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            _number(max_seqlen_q),
            _number(max_seqlen_k),
            alpha,
            is_causal,
            alpha=alpha,
            window=window,
            scale=scale,
            alibi_slopes=alibi_slopes,
        )
    if isinstance(alpha, Tensor):  # as above
        return torch.ops.adasplash.entmax_attn_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            alpha,
            is_causal,
            scale=scale,
            window=list(window),
            alibi_slopes=alibi_slopes,
        )
    else:
        return torch.ops.adasplash.entmax_attn_varlen(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            alpha,
            is_causal,
            scale=scale,
            window=list(window),
            alibi_slopes=alibi_slopes,
        )
