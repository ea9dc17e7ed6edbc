"""Attention over sequences that are sharded over the processes of a group: context parallelism.

This package is not imported by ``import adasplash``, as torch may be built without ``torch.distributed``::

    import adasplash.distributed

    tokens, labels = (adasplash.distributed.shard(x, dim=1) for x in (tokens, labels))
    ...
    out = adasplash.distributed.entmax_attn_context_parallel(query, key, value, is_causal=True)

A sequence of N tokens over W processes is cut into 2W chunks of N / 2W, and process r has chunks r and 2W − 1 − r: one
from the head and one from the tail. Under a causal mask the first sees few keys and the second many, so that every
process has the same work (Llama Team, "The Llama 3 Herd of Models", 2024, section 3.3.2; the imbalance of plain shards
is described by Brandon et al., "Striped Attention", 2023). docs/distributed.md says which method to choose.

Collectives are called as ops of ``torch.ops._c10d_functional``, which torch.compile traces.
"""

from adasplash.distributed.attention import entmax_attn_context_parallel
from adasplash.distributed.layout import shard, unshard
from adasplash.distributed.plan import ContextParallel, context_parallel

__all__ = ["ContextParallel", "context_parallel", "entmax_attn_context_parallel", "shard", "unshard"]
