"""Forward and backward through each kernel of the attention, small enough for compute-sanitizer; `make sanitize`.

Half types with head sizes 64 and 128, every kind of alpha, softmax in some heads, dropout, grouped queries, a window,
packed lengths and a negative scale; few queries, of which some rows are long; bfloat16 at 256 and float32 once; a
summary; a paged cache that is written to and read. Walks tiles, then gathers.
"""

import argparse

import torch

from adasplash import entmax_attn, entmax_attn_summary, entmax_attn_varlen
from common import MANY, gather

BF16 = torch.bfloat16


def leaves(device, dtype, *shapes):
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def padded(device, dtype, head_dim, heads=(2, 1), lengths=(150, 203), **options):
    query, key = ((1, h, n, head_dim) for h, n in zip(heads, lengths, strict=True))
    entmax_attn(*leaves(device, dtype, query, key, key), **options).square().sum().backward()


def packed(device, dtype, head_dim, **options):
    ends = torch.tensor([0, 70, 70, 200], device=device, dtype=torch.int32)
    inputs = leaves(device, dtype, *[(200, 1, head_dim)] * 3)
    entmax_attn_varlen(*inputs, ends, ends, 130, 130, **options).square().sum().backward()


def packed_few(device, head_dim):
    """A sequence of three queries beside a long one."""
    queries, keys = (torch.tensor(ends, device=device, dtype=torch.int32) for ends in ([0, 3, 73], [0, 200, 300]))
    query, key = leaves(device, BF16, (73, 2, head_dim), (300, 1, head_dim))
    some_heads = torch.tensor([1.0, 1.4], device=device)
    entmax_attn_varlen(query, key, key, queries, keys, 70, 200, some_heads, is_causal=True).sum().backward()


def in_pages(device, dtype, head_dim, page, counts, lengths, alpha):
    """Tokens appended, some with a slot that another has or with none, then `counts` queries of each sequence."""
    pages = [-(-length // page) for length in lengths]
    table = torch.full((len(lengths), max(pages) + 1), -1, dtype=torch.int32)
    order = iter(torch.randperm(sum(pages)).tolist())
    for row, used in zip(table, pages, strict=True):
        row[:used] = torch.tensor([next(order) for _ in range(used)])
    caches = [torch.randn(sum(pages), page, 2, head_dim, device=device, dtype=dtype) for _ in range(2)]
    for tokens in (5, 1100):
        new = [torch.randn(tokens, 2, head_dim, device=device, dtype=dtype) for _ in range(2)]
        slots = torch.randint(-2, sum(pages) * page + 2, (tokens,), device=device)
        torch.ops.adasplash.entmax_cache_append(*new, *caches, slots)
    query = torch.randn(sum(counts), 4, head_dim, device=device, dtype=dtype)
    ends, lengths = (torch.tensor(x, device=device, dtype=torch.int32) for x in ([0, *counts], lengths))
    torch.ops.adasplash.entmax_attn_paged(
        query, *caches, table.to(device), lengths, alpha, cu_seqlens_q=ends.cumsum(0).int(), max_seqlen_q=max(counts)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    for from_length in (MANY, 1):
        gather(from_length)
        for head_dim in (64, 128):
            for alpha in (1.5, 2.0, 1.3):
                padded(device, BF16, head_dim, alpha=alpha, is_causal=True)
                padded(device, BF16, head_dim, lengths=(5, 203), alpha=alpha, is_causal=True)
            padded(device, BF16, head_dim, lengths=(1, 4000), scale=1e-3)
            packed_few(device, head_dim)
            padded(device, BF16, head_dim, heads=(1, 1), lengths=(130, 500), window=(300, 70))
            packed(device, BF16, head_dim, is_causal=True, scale=-0.3)
            some_heads = torch.tensor([1.0, 1.4], device=device)
            padded(device, BF16, head_dim, alpha=some_heads, is_causal=True, dropout_p=0.3)
            padded(device, BF16, head_dim, alpha=1.0, window=(40, 3))
            packed(device, BF16, head_dim, alpha=1.0, is_causal=True)
            for alpha in (1.5, 2.0, some_heads):
                query, key = leaves(device, BF16, (1, 2, 150, head_dim), (1, 1, 203, head_dim))
                entmax_attn_summary(query, key, key, alpha, is_causal=True)
            for alpha in (1.0, 1.5, 2.0):
                in_pages(device, BF16, head_dim, 16, (1, 70, 3), (500, 203, 3), alpha)
                in_pages(device, BF16, head_dim, 17, (1, 1), (500, 33), alpha)
        in_pages(device, torch.float32, 64, 16, (1, 70), (500, 203), 1.5)
        in_pages(device, BF16, 256, 3, (1, 70), (100, 203), 1.5)
        padded(device, torch.float32, 64, is_causal=True)
        padded(device, BF16, 256, is_causal=True)
        print("gathered" if from_length == 1 else "walked", flush=True)


if __name__ == "__main__":
    main()
