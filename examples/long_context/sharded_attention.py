"""Attention of transformers' layers over sequences that are sharded over processes: one more `attn_implementation`."""

from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adasplash.distributed import entmax_attn_context_parallel

NAME = "adasplash_sharded"
ALPHA = 1.5


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of this process' tokens, (B, H, N / W, D), to those of all; (B, N / W, H, D)."""
    out = entmax_attn_context_parallel(
        query, key, value, ALPHA, is_causal=True, scale=scaling, dropout_p=dropout if module.training else 0.0
    )
    return out.transpose(1, 2).contiguous(), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The causal mask is the attention's own, and there is no padding."""


def register() -> None:
    """Makes the name known to transformers."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, no_mask)
