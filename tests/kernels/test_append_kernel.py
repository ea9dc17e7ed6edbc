"""The kernel that writes to a paged cache: triton_src/cache.py."""

import math

import pytest
import torch
from checked import TYPES
from interpreted import matrix

from common import assert_same_bits
from emulated.interpreter import patched_once
from triton_src.cache import APPEND
from triton_src.lib.matrices import Matrix


def cache_matrix(cache):
    return Matrix(cache, cache.stride(0), cache.stride(2), cache.stride(1))


def append(key, value, key_cache, value_cache, slots, compared=None):
    """As append_to_cache (csrc/cuda/cache.cpp) launches it, with blocks of two heads and at most 64 slots compared."""
    tokens, heads, head_dim = key.shape
    with patched_once():
        APPEND.kernel[(tokens * math.ceil(heads / 2),)](
            key=matrix(key),
            value=matrix(value),
            key_cache=cache_matrix(key_cache),
            value_cache=cache_matrix(value_cache),
            slots=slots,
            compared=tokens if compared is None else compared,
            heads=heads,
            head_dim=head_dim,
            value_dim=value.shape[-1],
            page_size=key_cache.shape[1],
            blocks=key_cache.shape[0],
            BLOCK_M=2,
            BLOCK_N=64,
            BLOCK_D=32,
        )


def written_one_by_one(key, value, key_cache, value_cache, slots):
    caches = key_cache.clone(), value_cache.clone()
    page = key_cache.shape[1]
    for token, slot in enumerate(slots.tolist()):
        if 0 <= slot < key_cache.shape[0] * page:
            for new, cache in zip((key, value), caches, strict=True):
                cache[slot // page, slot % page] = new[token]
    return caches


@TYPES
@pytest.mark.parametrize("page", (1, 3, 16))
def test_what_is_written(dtype, page):
    """Three heads, of which a program takes two; slots twice, three times, -1 and out of range; any strides."""
    key, value = (torch.randn(9, 3, 50)[..., :size].to(dtype) for size in (20, 9))
    caches = [torch.randn(7, 3, page, size).to(dtype).transpose(1, 2) for size in (20, 9)]
    last = 7 * page - 1
    slots = torch.tensor([last, 2, -1, 2, last + 1, 0, 1 << 40, 2, -(1 << 40)])
    expected = written_one_by_one(key, value, *caches, slots)
    append(key, value, *caches, slots)
    assert_same_bits(caches, expected)


def test_slots_that_the_host_has_sorted_out_are_not_compared():
    key, value = torch.randn(2, 3, 1, 8)
    caches = [torch.zeros(1, 4, 1, 8) for _ in range(2)]
    slots = torch.tensor([-1, 1, -1])
    append(key, value, *caches, slots, compared=0)
    assert_same_bits(caches, written_one_by_one(key, value, *(torch.zeros_like(x) for x in caches), slots))
