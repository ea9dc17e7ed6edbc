"""Paged caches for the tests of `entmax_attn_paged`, and the same keys and values packed behind each other."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common import Inputs
from packing import packed

LAYOUTS = ("pages", "keys beside values", "heads first", "a head apart")


class Paged(NamedTuple):
    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_table: Tensor
    kv_seqlens: Tensor


def empty_caches(blocks: int, page: int, heads: int, sizes: tuple[int, int], layout: str, like: Tensor) -> list[Tensor]:
    """Caches of keys and values (blocks, page, heads, size), all NaN."""
    if layout == "keys beside values":  # one tensor of both, as wide as the wider ones
        both = like.new_full((blocks, 2, page, heads, max(sizes)), torch.nan)
        return [x[..., :size] for x, size in zip(both.unbind(1), sizes, strict=True)]
    if layout == "heads first":
        return [like.new_full((blocks, heads, page, size), torch.nan).transpose(1, 2) for size in sizes]
    if layout == "a head apart":  # rows that lie where no dense ones could, and an element of each is far from the next
        return [like.new_full((blocks, page, heads, size, 3), torch.nan)[..., 1] for size in sizes]
    return [like.new_full((blocks, page, heads, size), torch.nan) for size in sizes]


def page_of(inputs: Inputs, lengths: Sequence[int], page: int, layout: str = "pages", int_type=torch.int32) -> Paged:
    """Puts packed keys and values of these lengths into a cache's pages in a random order. NaN is in every row that no
    sequence has, and in the table -1 behind the pages of a sequence."""
    query, key, value = inputs
    counts = [-(-length // page) for length in lengths]
    blocks, most = sum(counts) + 3, max(counts, default=0) + 2
    caches = empty_caches(blocks, page, key.shape[1], (key.shape[2], value.shape[2]), layout, key)
    order = iter(torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).tolist())
    table, token = torch.full((len(lengths), most), -1, dtype=int_type), 0
    for b, length in enumerate(lengths):
        for w in range(counts[b]):
            rows = min(page, length - w * page)
            table[b, w] = number = next(order)
            for cache, tokens in zip(caches, (key, value), strict=True):
                cache[number, :rows] = tokens[token : token + rows]
            token += rows
    kv_seqlens = torch.tensor(lengths, dtype=int_type, device=key.device)
    return Paged(query, *caches, table.to(key.device), kv_seqlens)


def make_paged(q_lengths, k_lengths, page: int, device: str, layout="pages", int_type=torch.int32, **options):
    """The same tokens twice: packed inputs with their lengths as `packed` gives them, and in pages."""
    inputs, lengths = packed(q_lengths, k_lengths, device, int_type, **options)
    return inputs, lengths, page_of(inputs, k_lengths, page, layout, int_type)
