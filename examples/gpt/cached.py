"""The model of model.py with a paged cache of keys and values, so that a new byte costs one byte's work.

Any number of sequences go through it together, chunks of prompts beside single bytes, their tokens behind each other.
The cache is the caller's: a step writes to it in place, and to an index of its keys if there is one. It is scripted and
exported as it stands, and C++ serves it (../libtorch/server.h, beside engine.py in Python).
"""

from typing import Final, Optional

from torch import Tensor, nn

import adasplash
from model import GPT, CausalSelfAttention, turn


class CachedAttention(nn.Module):
    """Attention of new tokens to their sequences' keys in the cache, of which each sees the last `context`."""

    alpha: Final[float]
    heads: Final[int]
    context: Final[int]

    def __init__(self, attention: CausalSelfAttention, context: int) -> None:
        super().__init__()
        self.alpha = attention.alpha if attention.entmax else 1.0  # which is softmax
        self.heads, self.context = attention.heads, context
        self.query_key_value, self.output = attention.query_key_value, attention.output

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        cu_seqlens_q: Tensor,
        block_table: Tensor,
        kv_seqlens: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        key_index: Optional[Tensor],  # noqa: UP045  (TorchScript knows this name on every torch)
    ) -> Tensor:
        query, key, value = self.query_key_value(x).unflatten(1, [3, self.heads, -1]).unbind(1)
        query, key = turn(query, cos, sin), turn(key, cos, sin)
        adasplash.entmax_cache_append(key, value, key_cache, value_cache, slots, key_index)
        mixed = adasplash.entmax_attn_paged(
            query,
            key_cache,
            value_cache,
            block_table,
            kv_seqlens,
            self.alpha,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=x.size(0),
            window=(self.context - 1, -1),
            key_index=key_index,
        )
        return self.output(mixed.flatten(1))


class CachedGPT(nn.Module):
    """A trained model, with the weights that it has, as a function that reads and writes a cache.

    Args:
        indexed: whether the cache has an index of its keys. Logits are the same.
    """

    context: Final[int]
    layers: Final[int]
    heads: Final[int]
    head_size: Final[int]
    indexed: Final[bool]

    def __init__(self, model: GPT, indexed: bool = False) -> None:
        super().__init__()
        self.indexed = indexed
        attention = [block.attention for block in model.blocks]
        self.context, self.layers, self.heads = model.context, len(attention), attention[0].heads
        self.head_size = attention[0].output.in_features // attention[0].heads
        self.embedding, self.norm, self.head = model.embedding, model.norm, model.head
        self.attention_norms = nn.ModuleList(block.attention_norm for block in model.blocks)
        self.attentions = nn.ModuleList(CachedAttention(each, model.context) for each in attention)
        self.feed_forwards = nn.ModuleList(block.feed_forward for block in model.blocks)
        self.register_buffer("frequency", attention[0].rotary.frequency, persistent=False)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        cu_seqlens_q: Tensor,
        block_table: Tensor,
        kv_seqlens: Tensor,
        key_caches: list[Tensor],
        value_caches: list[Tensor],
        key_indexes: list[Tensor],
    ) -> Tensor:
        """One step of all sequences.

        Args:
            tokens: (T,) int64, the new ones of all sequences behind each other.
            positions: (T,) int64, their places in their sequences.
            slots: (T,) int64, where their keys go in the cache.
            cu_seqlens_q: (B + 1,) int32, where each sequence's tokens begin.
            block_table: (B, W) int32, the pages that each sequence has.
            kv_seqlens: (B,) int32, how many keys each has once these are there.
            key_caches: (blocks, page, heads, head size) of each layer, as are value_caches; all are changed. They are
                tensors of their own, as torch.compile confuses parts of one tensor where its sizes are not fixed.
            key_indexes: of adasplash.make_key_index, for each of key_caches and changed with it; none unless `indexed`.

        Returns:
            logits of the byte after each token, (T, 256).
        """
        angle = positions[:, None, None] * self.frequency
        cos, sin = angle.cos(), angle.sin()
        x = self.embedding(tokens)
        layers = zip(self.attention_norms, self.attentions, self.feed_forwards)  # noqa: B905  (TorchScript's has no strict)
        for layer, (norm, attention, feed_forward) in enumerate(layers):
            keys, values = key_caches[layer], value_caches[layer]
            index = key_indexes[layer] if self.indexed else None
            x = x + attention(norm(x), cos, sin, slots, cu_seqlens_q, block_table, kv_seqlens, keys, values, index)
            x = x + feed_forward(x)
        return self.head(self.norm(x))
