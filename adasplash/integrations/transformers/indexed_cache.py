"""A static cache of transformers that keeps an index of its keys, from which steps of decoding can tell which keys they
need. A GPU reads it where keys are many (docs/serving.md).

An attention function is given a layer's keys as the cache returns them, and nothing else of the cache. So the index is
an attribute of that tensor: where a model changes keys on their way, it is gone, and all keys are read as without one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer

from adasplash.cache import entmax_key_index_update, make_key_index
from adasplash.integrations.transformers.configuration import WORD


def index_of(keys: Tensor | None) -> Tensor | None:
    """The index of these keys, if they are those of an :class:`IndexedStaticLayer`."""
    return getattr(keys, "entmax_key_index", None)


class IndexedStaticLayer(StaticLayer):
    """Keys (B, H_kv, N, D), values, and the index of the keys, which is never changed apart from them."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        index = make_key_index(self.keys.transpose(1, 2))
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(index)  # as keys and values are
        self.keys.entmax_key_index = index

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        new = torch.arange(key_states.shape[2], device=keys.device)
        if hasattr(self, "cumulative_length"):
            places = self.cumulative_length - key_states.shape[2] + new
        else:  # in older versions, down to 5.2, the layer is told
            told = args[0] if args else kwargs.get("cache_kwargs")
            places = (told or {}).get("cache_position")
            places = new if places is None else places
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None] * self.max_cache_len
        with torch.no_grad():  # an index has no gradient, and calls that record one do not read it
            entmax_key_index_update(keys.transpose(1, 2), (rows + places).flatten(), index_of(keys))
        return keys, values

    def reset(self) -> None:
        super().reset()
        if self.is_initialized:
            index_of(self.keys).copy_(make_key_index(self.keys.transpose(1, 2)))

    def offload(self) -> None:
        self._take_along(super().offload, lambda index: index.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._take_along(super().prefetch, lambda index: index.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        def reordered(index: Tensor) -> Tensor:
            rows = torch.nn.functional.pad(beam_idx + 1, (1, 0))  # its first row belongs to none of the batch
            return index.index_select(0, rows.to(index.device))

        self._take_along(lambda: super(IndexedStaticLayer, self).reorder_cache(beam_idx), reordered)

    def _take_along(self, move_keys: Callable[[], None], move: Callable[[Tensor], Tensor]) -> None:
        """Where the layer's keys become another tensor, its index becomes theirs."""
        before = self.keys
        move_keys()
        if self.keys is not before:
            self.keys.entmax_key_index = move(index_of(before))


class IndexedStaticCache(StaticCache):
    """A ``StaticCache`` whose layers keep an index of their keys beside them, which takes D + 8 bytes a key and key
    head (D rounded up to 64, 128 or 256)::

        cache = IndexedStaticCache(config=model.config, max_cache_len=4096)
        model.generate(**prompt, past_key_values=cache)

    No bit of a result differs from StaticCache's. Layers with a window have no index, as they read few keys anyway, nor
    have those that cache other things than keys and values.

    Args:
        config: of a model with ``attn_implementation="adasplash"``.
        max_cache_len: how many tokens it has room for.
        options: what else StaticCache takes.

    Raises:
        ValueError: the model has another attention, or no layer that could have an index.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int, **options: Any):
        decoder = config.get_text_config(decoder=True)
        if decoder._attn_implementation != WORD:
            raise ValueError(
                f'adasplash: IndexedStaticCache needs the config of a model with attn_implementation="{WORD}", got '
                f'"{decoder._attn_implementation}"'
            )
        super().__init__(config=config, max_cache_len=max_cache_len, **options)
        self.layers = [IndexedStaticLayer(max_cache_len) if type(each) is StaticLayer else each for each in self.layers]
        if not any(isinstance(each, IndexedStaticLayer) for each in self.layers):
            raise ValueError(
                "adasplash: IndexedStaticCache needs a model with layers that see all keys, and every layer here has a "
                "window or another kind of cache; take StaticCache"
            )
