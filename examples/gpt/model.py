"""A byte-level GPT whose attention is α-entmax or softmax, by one switch.

Every byte is a token, so there is no tokenizer to train or to ship. The model is an ordinary pre-norm transformer with
rotary positions; the switch in `CausalSelfAttention.forward` is all that differs between the two kinds. It can be
scripted (`torch.jit.script`) and exported (`torch.export`) as it stands.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adasplash

VOCABULARY = 256  # one token for each value of a byte


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a model. `alpha` is read only where `attention` is 'entmax'."""

    layers: int = 6
    heads: int = 4
    width: int = 128
    context: int = 256
    attention: str = "entmax"
    alpha: float = 1.5

    def __post_init__(self) -> None:
        if self.attention not in ("entmax", "softmax"):
            raise ValueError(f"attention must be 'entmax' or 'softmax', got {self.attention!r}")
        if not 1.01 <= self.alpha <= 2:
            raise ValueError(f"alpha must lie in [1.01, 2] (softmax is a model of its own here), got {self.alpha}")
        if min(self.layers, self.heads, self.width) < 1:
            raise ValueError(
                f"layers, heads and width must be above zero, got {self.layers}, {self.heads}, {self.width}"
            )
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of 2 × heads, got width {self.width} and heads {self.heads}")
        if self.context < 2:
            raise ValueError(f"context must be at least 2 bytes, got {self.context}")


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of features of x (…, D) by an angle, whose cosine and sine broadcast to (…, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Rotary(nn.Module):
    """Rotary position embedding: turns each pair of features by an angle that grows with the position."""

    def __init__(self, head_size: int, context: int) -> None:
        super().__init__()
        self.register_buffer("frequency", 10000.0 ** (-torch.arange(0, head_size, 2) / head_size), persistent=False)
        angle = torch.outer(torch.arange(context), self.frequency)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, N, D) with N ≤ context; returns the same shape."""
        return turn(x, self.cos[: x.size(2)], self.sin[: x.size(2)])


class CausalSelfAttention(nn.Module):
    """Multi-head attention of every position to itself and what came before it."""

    entmax: Final[bool]  # a constant to TorchScript, which then compiles one branch only
    alpha: Final[float]
    heads: Final[int]

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.entmax = config.attention == "entmax"
        self.alpha = config.alpha
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.output = nn.Linear(config.width, config.width, bias=False)
        self.rotary = Rotary(config.width // config.heads, config.context)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, N, width) -> query, key, value: (B, H, N, D) each."""
        query, key, value = self.query_key_value(x).unflatten(2, [3, self.heads, -1]).permute(2, 0, 3, 1, 4).unbind(0)
        return self.rotary(query), self.rotary(key), value

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x)
        if self.entmax:
            mixed = adasplash.entmax_attn(query, key, value, alpha=self.alpha, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward layer, each normalised before and added after."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = CausalSelfAttention(config)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(x)


class GPT(nn.Module):
    """Predicts each next byte: tokens (B, N) int64 -> logits (B, N, 256), for any 1 ≤ N ≤ context."""

    context: Final[int]

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.context = config.context
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self._initialise(config)

    def _initialise(self, config: GPTConfig) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # keeps the size of what goes through; norms stay at one
                nn.init.normal_(parameter, std=config.width**-0.5)
        for block in self.blocks:
            # What is added to the residual stream stays as large together as one of them.
            for last in (block.attention.output, block.feed_forward[-1]):
                nn.init.normal_(last.weight, std=(config.width * 2 * config.layers) ** -0.5)
            # Attention starts flat: a key that gets no weight gets no gradient either.
            query_key = block.attention.query_key_value.weight[: 2 * config.width]
            nn.init.normal_(query_key, std=0.4 * config.width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
