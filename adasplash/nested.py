"""``entmax_attn`` for jagged nested tensors (``torch.nested``, ``layout=torch.jagged``), which are the packed form and
its offsets in one object."""

from typing import Any

import torch
from torch import Tensor

_SHAPES = "query, key and value must be jagged nested tensors of shape (batch, heads, ragged, head_dim)"


def any_is_nested(query: object, key: object, value: object) -> bool:
    """Asked in every eager call, of whatever was given."""
    return (
        (isinstance(query, Tensor) and query.is_nested)
        or (isinstance(key, Tensor) and key.is_nested)
        or (isinstance(value, Tensor) and value.is_nested)
    )


def entmax_attn_jagged(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """What ``entmax_attn`` does where a tensor is nested: ``entmax_attn_varlen`` of its values and offsets.

    Returns:
        (batch, heads, ragged, value_dim), ragged as query is, so that the two can be added.

    Raises:
        RuntimeError: a tensor is not jagged, not of that shape, or has holes between its sequences; key and value are
            ragged in different ways; or an option is given that is of the padded form.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or not tensor.is_nested:
            raise RuntimeError(f"entmax_attn: {_SHAPES}, got a {name} that is not nested")
        if tensor.layout != torch.jagged:
            raise RuntimeError(f"entmax_attn: {_SHAPES}, got a {name} of layout {tensor.layout}")
        if tensor.dim() != 4 or tensor._ragged_idx != 2:
            raise RuntimeError(
                f"entmax_attn: {_SHAPES}, got a {name} of {tensor.dim()} dimensions, ragged in dimension "
                f"{tensor._ragged_idx}"
            )
        if tensor.lengths() is not None:
            raise RuntimeError(
                f"entmax_attn: {name} must have its sequences one behind the other, and this nested tensor has holes "
                "between them, as torch.nested.narrow leaves; call contiguous() on it first"
            )
    for name in ("q_seqlens", "kv_seqlens", "kv_starts"):
        if options.pop(name, None) is not None:
            raise RuntimeError(f"entmax_attn: {name} goes with padded tensors; nested tensors know their lengths")
    if options.pop("key_index", None) is not None:
        raise RuntimeError("entmax_attn: key_index goes with padded tensors, whose keys have slots; got nested ones")
    if not _same_offsets(key, value):
        raise RuntimeError("entmax_attn: key and value must be ragged in the same way, got different offsets")

    from adasplash.functional import entmax_attn_varlen

    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = entmax_attn_varlen(
        query.values(),
        key.values(),
        value.values(),
        query.offsets(),
        key.offsets(),
        _longest(query),
        _longest(key),
        **options,
    )
    return torch.nested.nested_tensor_from_jagged(
        out, query.offsets(), min_seqlen=query._maybe_min_seqlen, max_seqlen=query._maybe_max_seqlen
    ).transpose(1, 2)


def _longest(tensor: Tensor) -> int:
    """The length of the longest sequence. A compiler, where it isn't known, gets a bound, so that nothing is read."""
    if tensor._maybe_max_seqlen is None and torch.compiler.is_compiling():
        return tensor.values().shape[0]
    return tensor._get_max_seqlen()


def _same_offsets(one: Tensor, other: Tensor) -> bool:
    if one.offsets() is other.offsets():
        return True
    return torch.equal(one.offsets(), other.offsets())
