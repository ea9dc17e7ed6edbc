"""Attention over a paged cache of keys and values, as a server keeps one, and what writes to it.

A cache is two tensors, keys (blocks, page, H_kv, D) and values (blocks, page, H_kv, D_v): `blocks` pages with room for
`page` keys each, of any strides, so that vLLM's (blocks, 2, page, H_kv, D) is ``cache.unbind(1)``. The pages of a
sequence need not be neighbours: a block table (B, W) names them in order. A slot is a place for one key, as one number:
page number · page + row.

A key index is one uint8 tensor beside a cache: a code of 8 bits a channel of each key, by which attention of few
queries need not read most keys. It changes no bit of a result.

None of it has a gradient, waits for a GPU or plans on the host, so one captured CUDA graph serves every length.
"""

from typing import Optional, Tuple, Union  # noqa: UP035  (TorchScript knows these names on every torch we support)

import torch
from torch import Tensor

from adasplash._arguments import INTEGER, LENGTH, OPTIONAL_TENSOR, TENSOR, check, explain
from adasplash.functional import call_attention, resolve

_PAGED = {
    "query": TENSOR,
    "key_cache": TENSOR,
    "value_cache": TENSOR,
    "block_table": TENSOR,
    "kv_seqlens": TENSOR,
}
_APPEND = {
    "key": TENSOR,
    "value": TENSOR,
    "key_cache": TENSOR,
    "value_cache": TENSOR,
    "slots": TENSOR,
    "key_index": OPTIONAL_TENSOR,
}
_UPDATE = {"key_cache": TENSOR, "slots": TENSOR, "key_index": TENSOR}


def entmax_attn_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    kv_seqlens: Tensor,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    is_causal: bool = True,
    cu_seqlens_q: Optional[Tensor] = None,  # noqa: UP045
    max_seqlen_q: int = 1,
    scale: Union[float, Tensor, None] = None,  # noqa: UP007
    window: Tuple[int, int] = (-1, -1),  # noqa: UP006
    alibi_slopes: Optional[Tensor] = None,  # noqa: UP045
    key_index: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """α-entmax attention of B sequences to their keys in a paged cache.

    A sequence has kv_seqlens[b] keys, and its queries are the last of its tokens, as a causal mask is aligned bottom
    right: after a chunk of a prompt or a new token is in the cache, its queries are attended with. Chunks and single
    tokens may be in one call. What a sequence gets does not depend on the others, on pages or on their order: it is
    what :func:`adasplash.entmax_attn` gives over the same keys in one tensor (docs/contract.md says where to the bit).

    Args:
        query: (T, H, D), the queries of all sequences behind each other: ``max_seqlen_q`` each, T = B · max_seqlen_q,
            unless ``cu_seqlens_q`` is given.
        key_cache: (blocks, page, H_kv, D), of query's type and on its device. H is a multiple of H_kv, D from 1 to 256.
            Pages of any size, any strides; on a GPU rows must be dense and start at multiples of 16 bytes, as a cache
            is never copied.
        value_cache: (blocks, page, H_kv, D_v).
        block_table: (B, W) int32 or int64: key j of sequence b is row j mod page of page block_table[b, j // page].
            Entries behind a sequence's last key, or before the first that its window leaves, may hold anything, and so
            may pages that no sequence names.
        kv_seqlens: (B,) int32 or int64, each from 0 to W · page.
        alpha: as in ``entmax_attn``, as are the options that are not named here.
        is_causal: whether a query sees only the keys up to its own; for single tokens that is all of them.
        cu_seqlens_q: (B + 1,) int32 or int64: sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1] − 1.
        max_seqlen_q: how many queries a sequence has; with ``cu_seqlens_q`` a bound of that.
        key_index: the cache's index, from :func:`make_key_index`, by which few queries need not read most keys, or
            None. The result has the same bits, as long as the index knows every change of the keys that are attended
            to; the CPU reads all keys all the same.

    Returns:
        (T, H, D_v), contiguous, in query's type. A query that sees no key gives zeros.

    Raises:
        TypeError, RuntimeError: an argument does not fit; the message names it. Lengths and pages out of range are an
            error on the CPU; a GPU clamps them, and never reads outside the cache. A tensor that requires a gradient
            while gradients are recorded is an error, as there is none.
    """
    if not torch.jit.is_scripting():
        if type(max_seqlen_q) is not int:
            check("entmax_attn_paged", "max_seqlen_q", LENGTH, max_seqlen_q)
        tensors = (query, key_cache, value_cache, block_table, kv_seqlens)
        options = {"cu_seqlens_q": cu_seqlens_q, "alibi_slopes": alibi_slopes, "key_index": key_index}
        return call_attention(
            torch.ops.adasplash.entmax_attn_paged,
            "entmax_attn_paged",
            _PAGED,
            tensors,
            alpha,
            is_causal,
            scale,
            window,
            options,
            numbers={"max_seqlen_q": max_seqlen_q},
        )
    query, factor, _ = resolve(query, scale, 0.0, None)
    if isinstance(alpha, Tensor):
        return torch.ops.adasplash.entmax_attn_paged(
            query,
            key_cache,
            value_cache,
            block_table,
            kv_seqlens,
            alpha,
            is_causal,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            scale=factor,
            window=list(window),
            alibi_slopes=alibi_slopes,
            key_index=key_index,
        )
    else:
        return torch.ops.adasplash.entmax_attn_paged(
            query,
            key_cache,
            value_cache,
            block_table,
            kv_seqlens,
            alpha,
            is_causal,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            scale=factor,
            window=list(window),
            alibi_slopes=alibi_slopes,
            key_index=key_index,
        )


def entmax_cache_append(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    key_index: Optional[Tensor] = None,  # noqa: UP045
) -> None:
    """Writes the keys and values of T tokens to a paged cache, in place.

    Args:
        key: (T, H_kv, D), of the cache's type and on its device.
        value: (T, H_kv, D_v).
        key_cache: (blocks, page, H_kv, D), of any strides; on a GPU rows must be dense.
        value_cache: (blocks, page, H_kv, D_v).
        slots: (T,) int32 or int64: page number · page + row for each token, or −1 for one that is not kept. Of equal
            slots the last token's key and value stay.
        key_index: the cache's index, from :func:`make_key_index`, in which the entries of these slots are made anew; or
            None, for a cache without one.

    Raises:
        TypeError, RuntimeError: an argument does not fit; the message names it. A slot out of range is an error on the
            CPU, where nothing is written then; a GPU skips it.
    """
    if not torch.jit.is_scripting():
        given = (key, value, key_cache, value_cache, slots, key_index)
        return _change(torch.ops.adasplash.entmax_cache_append.default, "entmax_cache_append", _APPEND, given)
    torch.ops.adasplash.entmax_cache_append(key, value, key_cache, value_cache, slots, key_index=key_index)


def make_key_index(key_cache: Tensor) -> Tensor:
    """An empty index for a cache of these sizes, this type and device.

    It says nothing of any key, so that all are read, until :func:`entmax_cache_append` or
    :func:`entmax_key_index_update` makes its entries. A cache may have one index; one for keys (B, H_kv, N, D), as
    ``entmax_attn`` takes them, is of ``key.transpose(1, 2)``.

    Args:
        key_cache: (blocks, page, H_kv, D), float32, float16, bfloat16, or float64 on the CPU; D from 1 to 256. What it
            holds is not read.

    Returns:
        (1 + blocks, width) uint8: width is H_kv times page · (R + 8) rounded up to 16, at least 64, and R the least
        power of two from 64 on that is not less than D. Row 1 + b belongs to page b, and is copied where that page is
        copied; the rest is the library's own.

    Raises:
        TypeError, RuntimeError: key_cache does not fit; the message says why.
    """
    if not torch.jit.is_scripting():
        check("make_key_index", "key_cache", TENSOR, key_cache)
    return torch.ops.adasplash.entmax_make_key_index(key_cache)


def entmax_key_index_update(key_cache: Tensor, slots: Tensor, key_index: Tensor) -> None:
    """Makes the entries of an index anew, in place, from what the cache holds: for keys that were written otherwise
    than by :func:`entmax_cache_append` with this index.

    Args:
        key_cache: (blocks, page, H_kv, D), of any strides.
        slots: (T,) int32 or int64: page number · page + row of each key, or −1 for none.
        key_index: the cache's index, from :func:`make_key_index`.

    Raises:
        TypeError, RuntimeError: an argument does not fit; the message names it. A slot out of range is an error on the
            CPU, where nothing is written then; a GPU skips it. A tensor that requires a gradient while gradients are
            recorded is an error.
    """
    if not torch.jit.is_scripting():
        given = (key_cache, slots, key_index)
        return _change(torch.ops.adasplash.entmax_key_index_update.default, "entmax_key_index_update", _UPDATE, given)
    torch.ops.adasplash.entmax_key_index_update(key_cache, slots, key_index)


def _change(op, function, kinds, given) -> None:
    """A call in eager code, so that errors name what is of the wrong kind."""
    given = dict(zip(kinds, given, strict=True))
    if torch.compiler.is_compiling():
        return op(**given)
    try:
        return op(**given)
    except (RuntimeError, TypeError) as error:
        explain(function, error, {name: (kind, given[name]) for name, kind in kinds.items()}, function)


def entmax_attn_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Optional[Tensor] = None,  # noqa: UP045
    value: Optional[Tensor] = None,  # noqa: UP045
    cache_seqlens: Union[int, Tensor, None] = None,  # noqa: UP007
    block_table: Optional[Tensor] = None,  # noqa: UP045
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    is_causal: bool = True,
    scale: Union[float, Tensor, None] = None,  # noqa: UP007
    window: Tuple[int, int] = (-1, -1),  # noqa: UP006
    alibi_slopes: Optional[Tensor] = None,  # noqa: UP045
    key_index: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """A step of decoding, as flash-attn's ``flash_attn_with_kvcache``: appends new keys and values to
    the cache, if there are any, and attends to all of it. It is :func:`entmax_cache_append` and
    :func:`entmax_attn_paged` in turn.

    Args:
        query: (B, M, H, D). M is a constant where this is traced (``torch.jit.trace``).
        key_cache: (B, N, H_kv, D), or with ``block_table`` (blocks, page, H_kv, D). Changed in place.
        value_cache: the same with D_v.
        key: (B, M_new, H_kv, D), for the places behind those that the cache holds, or None.
        value: (B, M_new, H_kv, D_v), or None.
        cache_seqlens: (B,) int32 or int64: how many keys the cache holds before this call; or one number for all.
            Needed with ``key``; without both the cache is full.
        block_table: (B, W) int32 or int64, as in ``entmax_attn_paged``. A cache whose entries are in another order
            than the batch takes their numbers as ``block_table[:, None]``.
        alpha: as in ``entmax_attn``, as are scale, window and alibi_slopes.
        is_causal: as in ``entmax_attn_paged``.
        key_index: the cache's index, from :func:`make_key_index`, which is kept and attended with, or None.

    Returns:
        (B, M, H, D_v). Query i of a sequence stands at its token cache_seqlens + M_new − M + i.

    Raises:
        TypeError, RuntimeError: an argument does not fit; the message names it. In eager code the cache is as it was
            then; scripted, compiled and traced code may have appended already. A cache without room for the new keys is
            an error on the CPU; a GPU does not write those that have none.
    """
    if not torch.jit.is_scripting():
        _check_kinds(query, key_cache, value_cache, key, value, cache_seqlens, block_table, key_index)
    _check_sizes("query", query, 4, "(batch, queries, heads, head_dim)")
    _check_sizes("key_cache", key_cache, 4, "(blocks, page, kv_heads, head_dim)")
    batch, queries, page = query.shape[0], query.shape[1], key_cache.shape[1]
    if block_table is None:
        _check_batch("key_cache, without a block_table,", key_cache, batch)
        table = torch.arange(batch, device=query.device)[:, None]
    else:
        table = block_table
        _check_sizes("block_table", table, 2, "(batch, pages)")
        _check_batch("block_table", table, batch)
    if isinstance(cache_seqlens, Tensor):
        held = cache_seqlens
        _check_sizes("cache_seqlens", held, 1, "(batch,)")
        _check_batch("cache_seqlens", held, batch)
    else:
        if cache_seqlens is None and key is not None:
            raise RuntimeError("entmax_attn_with_kvcache: cache_seqlens must be given with key, got None")
        everywhere = table.shape[1] * page if cache_seqlens is None else cache_seqlens
        held = torch.full([batch], everywhere, dtype=torch.int64, device=query.device)
    if (key is None) != (value is None):
        raise RuntimeError("entmax_attn_with_kvcache: key and value go together, got one of them")
    if key is not None and value is not None:
        _check_sizes("key", key, 4, "(batch, new keys, kv_heads, head_dim)")
        _check_batch("key", key, batch)
        _check_sizes("value", value, 4, "(batch, new keys, kv_heads, value_dim)")
        _check_batch("value", value, batch)
        if not torch.jit.is_scripting():
            options = {"alpha": alpha, "is_causal": is_causal, "scale": scale, "window": window}
            options |= {"alibi_slopes": alibi_slopes, "key_index": key_index}
            _check_before_append(query, key_cache, value_cache, table, held, key.shape[1], options)
        slots = slots_of(table, held, key.shape[1], page, key_cache.shape[0])
        entmax_cache_append(key.flatten(0, 1), value.flatten(0, 1), key_cache, value_cache, slots.flatten(), key_index)
        held = held + key.shape[1]
    out = entmax_attn_paged(
        query.flatten(0, 1),
        key_cache,
        value_cache,
        table,
        held,
        alpha,
        is_causal,
        None,
        queries,
        scale,
        window,
        alibi_slopes,
        key_index,
    )
    return out.unflatten(0, [batch, queries])


def _check_kinds(query, key_cache, value_cache, key, value, cache_seqlens, block_table, key_index) -> None:
    """In eager code; TorchScript's types leave nothing to check."""
    for name, given in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        check("entmax_attn_with_kvcache", name, TENSOR, given)
    optional = (("key", key), ("value", value), ("block_table", block_table), ("key_index", key_index))
    for name, given in optional:
        check("entmax_attn_with_kvcache", name, OPTIONAL_TENSOR, given)
    if isinstance(cache_seqlens, Tensor):
        if cache_seqlens.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(
                f"entmax_attn_with_kvcache: cache_seqlens must be int32 or int64, got {cache_seqlens.dtype}"
            )
    elif cache_seqlens is not None:
        check("entmax_attn_with_kvcache", "cache_seqlens", INTEGER, cache_seqlens)


def _check_before_append(query, key_cache, value_cache, block_table, held, new, options) -> None:
    """In eager code: all that attention would refuse, asked of no queries; and on the CPU that there is room. A step
    that fails should leave the cache as it was."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    known = type(held) is Tensor and held.device.type == "cpu" and held.numel() > 0  # others may have no values
    page, pages = key_cache.shape[1], block_table.shape[1]
    if known:
        room = pages * page - new
        least, most = int(held.min()), int(held.max())
        if least < 0 or most > room:
            raise RuntimeError(
                f"entmax_attn_with_kvcache: cache_seqlens must be from 0 to {room}, so that there is room for {new} "
                f"more, got {least if least < 0 else most}"
            )
    nothing = query[:, :0].flatten(0, 1)
    entmax_attn_paged(nothing, key_cache, value_cache, block_table, held, max_seqlen_q=0, **options)
    if not known or query.shape[1] == 0:
        return
    wrong = (block_table < 0) | (block_table >= key_cache.shape[0])
    if not wrong.any():
        return
    # Of those, pages that a query sees keys of (`pages_of` in csrc/cpu/options.cpp, which is not asked where there are
    # no queries); those behind a window may have been given away.
    keys = held.long() + new
    first = torch.zeros_like(keys)
    if options["window"][0] >= 0:
        first = (keys - query.shape[1] - options["window"][0]).clamp(min=0)
    place = torch.arange(pages) * page
    wrong &= (place < keys[:, None]) & (place + page > first[:, None])
    if wrong.any():
        entry = tuple(wrong.nonzero()[0].tolist())
        raise RuntimeError(
            f"entmax_attn_with_kvcache: block_table must name pages from 0 to {key_cache.shape[0] - 1} where keys of a "
            f"sequence are, got {int(block_table[entry])} at {list(entry)}"
        )


def _check_sizes(name: str, tensor: Tensor, dims: int, shape: str) -> None:
    if tensor.dim() != dims:
        raise RuntimeError(
            f"entmax_attn_with_kvcache: {name} must have {dims} dimensions {shape}, got sizes {list(tensor.shape)}"
        )


def _check_batch(name: str, tensor: Tensor, batch: int) -> None:
    if tensor.shape[0] != batch:
        raise RuntimeError(
            f"entmax_attn_with_kvcache: {name} must have query's batch size {batch}, got {tensor.shape[0]}"
        )


def slots_of(block_table: Tensor, held: Tensor, new: int, page: int, blocks: int) -> Tensor:
    """(B, new): the slots of the next keys of sequences that have `held` (B,) in a cache already. Where the table has
    no room or no page for one, it is a slot that no cache of so many blocks has."""
    places = held.long()[:, None] + torch.arange(new, device=held.device)
    entry = places.div(max(page, 1), rounding_mode="floor")
    there = (entry >= 0) & (entry < block_table.shape[1])
    if block_table.shape[1] == 0:
        return torch.full_like(places, blocks * page)
    number = block_table.gather(1, entry.clamp(0, block_table.shape[1] - 1)).long()
    there = there & (number >= 0) & (number < blocks)
    return torch.where(there, number * page + places % max(page, 1), blocks * page)
