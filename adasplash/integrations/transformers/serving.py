"""Continuous batching (``model.generate_batch``): chunks of prompts and single tokens of many requests in one forward,
which lie behind each other in one row.

transformers keeps all keys in a paged cache, and in every layer and step copies those of the batch out of it. Layers
that see all keys do not need that here: they are given the pages, and a table of those that belong to each request.
Layers with a window keep a ring of their last keys, which has no such order, so they take the copy, as do batches
that have nothing in the cache yet.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.generation import continuous_batching

from adasplash.cache import entmax_attn_paged, entmax_cache_append
from adasplash.functional import entmax_attn_varlen
from adasplash.integrations.transformers.configuration import WORD


def can_serve() -> bool:
    """Whether this version of transformers has the cache as it is used here. In older ones, down to 5.2, a ring loses a
    key once it is full, and some models (GPT-2) tell their layers nothing of the cache."""
    manager = continuous_batching.ContinuousBatchingManager
    takes = inspect.signature(continuous_batching.PagedAttentionCache.update).parameters
    return hasattr(manager, "switch_to_cb_friendly_attn") and "kwargs" in takes


def is_served(kwargs: dict[str, Any]) -> bool:
    """Whether a layer with these further arguments is part of a forward of continuous batching."""
    return kwargs.get("read_index") is not None


def window_of_cache(module: nn.Module) -> int | None:
    """The sliding window that the cache has for a layer: its config decides, also where the layer says nothing."""
    kinds, window = getattr(module.config, "layer_types", None), getattr(module.config, "sliding_window", None)
    slides = window is not None if kinds is None else kinds[module.layer_idx] == "sliding_attention"
    return window if slides else None


@torch.compiler.disable  # as transformers has it: keys and values are views of one tensor
def attend_to_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    scale: float,
    window: int | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """α-entmax attention of a row of requests, (1, T, H, D_v).

    Args:
        query, key, value: (1, H, T, D), (1, H_kv, N, D) and (1, H_kv, N, D_v): new keys, and where the cache gave
            copies of older ones these too.
        window: how far a query sees to the left, None for all keys.
        kwargs: what transformers gives to layers, as the cache has changed it.
    """
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    offsets_q, offsets_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
    longest_q, longest_k = kwargs["max_length_q"], kwargs["max_length_k"]
    # Where forwards are padded to a few sizes, tokens of no request are behind the others, and longest_q is their sum.
    padded = longest_q >= queries.shape[0] > 1
    if padded:
        offsets_q = functional.pad(offsets_q, (0, 1), value=queries.shape[0])
    options: dict[str, Any] = {"is_causal": True, "scale": scale}
    if window is not None:
        options["window"] = (window, 0)
    if kwargs.get("k_cache") is None:
        if padded:
            offsets_k, longest_k = functional.pad(offsets_k, (0, 1), value=keys.shape[0]), keys.shape[0]
        packed = queries, keys, values, offsets_q, offsets_k, longest_q, longest_k
        return entmax_attn_varlen(*packed, alpha, **options)[None]

    key_pages, value_pages, table = kwargs["k_cache"], kwargs["v_cache"], kwargs["block_table"]
    lengths, slots = offsets_k.diff(), kwargs.get("slots")
    if slots is None:  # one token for each request, and transformers has made a table only
        page, last = key_pages.shape[1], (lengths - 1).long()
        number = table.long().gather(1, last.clamp(min=0).div(page, rounding_mode="floor")[:, None])[:, 0]
        slots = torch.where(lengths > 0, number * page + last % page, -1)
    else:
        options |= {"cu_seqlens_q": offsets_q, "max_seqlen_q": longest_q}
        if padded:
            lengths, table = functional.pad(lengths, (0, 1)), functional.pad(table, (0, 0, 0, 1))
    entmax_cache_append(keys, values, key_pages, value_pages, slots)
    return entmax_attn_paged(queries, key_pages, value_pages, table, lengths, alpha, **options)[None]


@torch.compiler.disable  # in its place
def leave_in_pages(
    theirs: Callable, cache: Any, key_states: Tensor, value_states: Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """In the place of ``PagedAttentionCache.update``. For a batch of single tokens that writes and copies nothing where
    an attention function can use a block table, but adds the pages to `kwargs`; here it does so for all batches."""
    allocator = cache.layer_to_allocator[layer_idx]
    if cache.config._attn_implementation == WORD and allocator.supports_block_table:
        read_index = kwargs["read_index"][allocator.index]
        if kwargs.get("block_table") is None and read_index.shape[0] > 0:
            offsets, longest = (kwargs[name][allocator.layer_type] for name in ("cu_seq_lens_k", "max_length_k"))
            table = _table_of(read_index, offsets, longest, allocator.tokens_per_page)
            kwargs |= {"block_table": {allocator.index: table}, "slots": kwargs["write_index"][allocator.index]}
    return theirs(cache, key_states, value_states, layer_idx, kwargs)


def keep_the_word(theirs: Callable, manager: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """In the place of ``switch_to_cb_friendly_attn``, which refuses words that it does not know, or where flash-attn is
    installed runs softmax with it instead."""
    if model.config.get_text_config()._attn_implementation != WORD:
        theirs(manager, model, *args, **kwargs)


def take_block_tables(theirs: Callable, config: Any, cb_config: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of ``ensure_decode_fast_path_is_available``, which has block tables for flash-attn only."""
    their_cache = continuous_batching.cache
    kinds = [their_cache.ATTN_TYPE_TO_ALLOCATOR[kind] for kind in their_cache.group_layers_by_attn_type(config)]
    if config._attn_implementation != WORD or not all(kind.supports_block_table for kind in kinds):
        theirs(config, cb_config, *args, **kwargs)


def _table_of(read_index: Tensor, offsets: Tensor, longest: int, page: int) -> Tensor:
    """(B, W), the pages in which the keys of each request lie: read_index has a place for each key, those of a request
    behind each other from `offsets` on."""
    begins = torch.arange(0, max(longest, 1), page, device=offsets.device)
    keys = (offsets[:-1, None] + begins).clamp(max=read_index.shape[0] - 1)
    return read_index[keys].div(page, rounding_mode="floor")
