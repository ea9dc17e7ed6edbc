"""How many floating point operations ``torch.utils.flop_counter.FlopCounterMode`` counts for attention: as many as it
counts for ``scaled_dot_product_attention`` of the same shapes, so that models can be compared.

That is the dense work, of every query with every key, whatever the mask, the lengths and the weights leave of it; in
the packed form the sum over the sequences. The activation counts as none, like ``softmax``, and so does what a summary
adds.

Nothing here imports ``torch.utils.flop_counter``: the formulas are registered when that is loaded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from adasplash._when_imported import when_imported


def register() -> None:
    """Registers the formulas once ``torch.utils.flop_counter`` is loaded."""
    when_imported("torch.utils.flop_counter", _register)


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.adasplash
    # The counter sees the private ops, and the public ones in inference mode, never both.
    register_flop_formula([ops.entmax_attn, ops.entmax_attn_summary], get_raw=True)(_padded)
    register_flop_formula([ops.entmax_attn_varlen, ops.entmax_attn_varlen_summary], get_raw=True)(_packed)
    register_flop_formula([ops._entmax_attn_forward, ops._entmax_attn_indexed], get_raw=True)(_forward)
    register_flop_formula(ops.entmax_attn_paged, get_raw=True)(_paged)
    register_flop_formula(ops._entmax_attn_backward, get_raw=True)(_backward)


def _padded(query, key, value, *options, out_val=None, **more) -> int:
    return _forward(query, key, value)


def _packed(
    query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, out_val=None, **more
) -> int:
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _forward(query, key, value, None, 1.5, False, None, None, None, *offsets)


def _paged(
    query, key_cache, value_cache, block_table, kv_seqlens, alpha=1.5, is_causal=True, *, cu_seqlens_q=None,
    max_seqlen_q=1, out_val=None, **more
) -> int:  # fmt: skip
    """Of sequences of their own lengths; where those have no values, of as many keys as the tables have room for."""
    from torch.utils.flop_counter import sdpa_flop_count

    heads, size, value_size = query.shape[1], query.shape[-1], value_cache.shape[-1]
    room = block_table.shape[1] * key_cache.shape[1]
    keys = [room] * len(kv_seqlens) if _has_no_values(kv_seqlens) else kv_seqlens.tolist()
    queries = [max_seqlen_q] * len(keys) if cu_seqlens_q is None else _lengths(cu_seqlens_q, max_seqlen_q)
    return sum(
        sdpa_flop_count((1, heads, m, size), (1, heads, n, size), (1, heads, n, value_size))
        for m, n in zip(queries, keys, strict=True)
    )


def _forward(
    query, key, value, head_alpha=None, alpha=1.5, is_causal=False, scale=None, q_seqlens=None, kv_seqlens=None,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0, *options, out_val=None, **more
) -> int:  # fmt: skip
    from torch.utils.flop_counter import sdpa_flop_count

    return _sum_over_sequences(
        sdpa_flop_count, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    )


def _backward(
    grad_out, query, key, value, row_state, support, tiles, head_alpha, alpha, is_causal, scale, q_seqlens, kv_seqlens,
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *options, out_val=None, **more
) -> int:  # fmt: skip
    from torch.utils.flop_counter import sdpa_backward_flop_count

    def count(query_shape, key_shape, value_shape):
        grad_shape = (*query_shape[:-1], value_shape[-1])
        return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)

    return _sum_over_sequences(count, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def _sum_over_sequences(
    count: Callable[..., int], query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
) -> int:
    """Torch's `count` of shapes (B, H, length, D). Key and value count as repeated for every query head: that is the
    same number, and torch 2.11 takes nothing else."""
    heads, size, value_size = query.shape[1], query.shape[-1], value.shape[-1]

    def of_lengths(batch, queries, keys):
        return count((batch, heads, queries, size), (batch, heads, keys, size), (batch, heads, keys, value_size))

    if cu_seqlens_q is None:
        return of_lengths(query.shape[0], query.shape[2], key.shape[2])
    lengths = zip(_lengths(cu_seqlens_q, max_seqlen_q), _lengths(cu_seqlens_k, max_seqlen_k), strict=True)
    return sum(of_lengths(1, queries, keys) for queries, keys in lengths)


def _lengths(offsets: Tensor, longest: int) -> list[int]:
    """Those of the sequences; where the offsets have no values, the longest for each, as torch takes it."""
    if _has_no_values(offsets):
        return [longest] * (offsets.shape[0] - 1)
    return offsets.diff().tolist()


def _has_no_values(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor | FunctionalTensor)
