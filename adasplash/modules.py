"""``EntmaxAttention``, a multi-head attention layer over ``entmax_attn``."""

import math
from typing import Final, Optional, Tuple  # noqa: UP035  (TorchScript knows these names on every torch we support)

import torch
from torch import Tensor, nn

from adasplash.functional import entmax_attn


class EntmaxAttention(nn.Module):
    """Multi-head α-entmax attention with its projections, in the place of ``torch.nn.MultiheadAttention``.

    Names and initialisation are those of ``nn.MultiheadAttention`` with ``batch_first=True``: Xavier-uniform
    projections of the inputs, biases of zero. It has no dropout and returns no weights;
    :func:`adasplash.attention_weights` gives those.

    Args:
        embed_dim: size E of query and of the result.
        num_heads: query heads.
        num_kv_heads: heads of key and value, a divisor of num_heads, each shared by num_heads / num_kv_heads
            neighbouring query heads (grouped queries); num_heads unless given.
        head_dim: size of a head, from 1 to 256; embed_dim / num_heads unless given.
        bias: whether the four projections have biases.
        kdim: size of key; embed_dim unless given.
        vdim: size of value; embed_dim unless given.
        is_causal: query i sees the keys up to i + N − M (aligned bottom right).
        window: (left, right), inclusive, −1 unlimited: query i sees keys from i + N − M − left to i + N − M + right.
        alpha: 1 or from 1.01 to 2; larger is sparser. With learn_alpha it is where learning starts, inside (1.05, 2).
        learn_alpha: whether every head learns its own α = 1.05 + 0.95 · sigmoid(``alpha_logit``).
        device, dtype: of the parameters.

    Shape:
        query (B, M, E), key (B, N, kdim), value (B, N, vdim) → (B, M, E).

    Raises:
        ValueError: sizes do not fit each other, or α cannot be learned from where it starts.
    """

    lowest_alpha: Final[float] = 1.05  # what learned α stay above and below; full accuracy ends there
    highest_alpha: Final[float] = 2.0

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: Optional[int] = None,  # noqa: UP045
        head_dim: Optional[int] = None,  # noqa: UP045
        bias: bool = True,
        kdim: Optional[int] = None,  # noqa: UP045
        vdim: Optional[int] = None,  # noqa: UP045
        is_causal: bool = False,
        window: Tuple[int, int] = (-1, -1),  # noqa: UP006
        alpha: float = 1.5,
        learn_alpha: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads != 0:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if head_dim is None:
            if embed_dim % num_heads != 0:
                raise ValueError(
                    f"embed_dim must be a multiple of num_heads where head_dim is not given, got {embed_dim} and "
                    f"{num_heads}"
                )
            head_dim = embed_dim // num_heads
        if learn_alpha and not self.lowest_alpha < alpha < self.highest_alpha:
            raise ValueError(
                f"alpha must be above {self.lowest_alpha} and below {self.highest_alpha} to be learned, got {alpha}"
            )
        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim or embed_dim, vdim or embed_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.is_causal, self.window, self.alpha = is_causal, (window[0], window[1]), float(alpha)

        options = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(self.embed_dim, num_heads * head_dim, **options)
        self.k_proj = nn.Linear(self.kdim, num_kv_heads * head_dim, **options)
        self.v_proj = nn.Linear(self.vdim, num_kv_heads * head_dim, **options)
        self.out_proj = nn.Linear(num_heads * head_dim, embed_dim, **options)
        logit = nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) if learn_alpha else None
        self.register_parameter("alpha_logit", logit)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Starts anew, learned α included."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight)
        self.out_proj.reset_parameters()
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if self.alpha_logit is not None:
            share = (self.alpha - self.lowest_alpha) / (self.highest_alpha - self.lowest_alpha)
            nn.init.constant_(self.alpha_logit, math.log(share / (1 - share)))

    def head_alpha(self) -> Tensor:
        """α of each head, (num_heads,), differentiable in what learns it; float32, or float64 for a float64 module."""
        logit = self.alpha_logit
        if logit is None:
            return torch.full((self.num_heads,), self.alpha, device=self.q_proj.weight.device)
        if logit.dtype != torch.float64:
            logit = logit.float()  # half types cannot tell apart what training changes
        return self.lowest_alpha + (self.highest_alpha - self.lowest_alpha) * torch.sigmoid(logit)

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,  # noqa: UP045
        value: Optional[Tensor] = None,  # noqa: UP045
        q_seqlens: Optional[Tensor] = None,  # noqa: UP045
        kv_seqlens: Optional[Tensor] = None,  # noqa: UP045
    ) -> Tensor:
        """Attends from query to key and value.

        Args:
            query: (B, M, E).
            key: (B, N, kdim); query unless given (self-attention).
            value: (B, N, vdim); key unless given.
            q_seqlens: (B,) int32 or int64 on query's device: how many positions of each batch entry are no padding, for
                batches padded on the right.
            kv_seqlens: the same for key and value. In self-attention one of the two stands for both.

        Returns:
            (B, M, E). For padding it is out_proj's bias.

        Raises:
            ValueError: value is given and key is not.
            RuntimeError: an argument does not fit; the message names it.
        """
        if key is None:
            if value is not None:
                raise ValueError("EntmaxAttention: value goes with key, got value alone")
            key = query
            q_seqlens = kv_seqlens if q_seqlens is None else q_seqlens
            kv_seqlens = q_seqlens if kv_seqlens is None else kv_seqlens
        if value is None:
            value = key
        q = self.q_proj(query).unflatten(-1, [self.num_heads, self.head_dim]).transpose(1, 2)
        k = self.k_proj(key).unflatten(-1, [self.num_kv_heads, self.head_dim]).transpose(1, 2)
        v = self.v_proj(value).unflatten(-1, [self.num_kv_heads, self.head_dim]).transpose(1, 2)
        if self.alpha_logit is None:
            out = entmax_attn(q, k, v, self.alpha, self.is_causal, None, q_seqlens, kv_seqlens, self.window)
        else:
            out = entmax_attn(q, k, v, self.head_alpha(), self.is_causal, None, q_seqlens, kv_seqlens, self.window)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        alpha = "learned" if self.alpha_logit is not None else str(self.alpha)
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, is_causal={self.is_causal}, window={self.window}, alpha={alpha}"
        )
