"""Several small transformers of one shape, one for each seed, which run and train as one: `Stack`.

What such models cost is the starting of operations and not the arithmetic, so that three take little longer than one.
Every parameter has the models as its first dimension, and attention takes the heads of all models as its heads.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adasplash

LEAST_ALPHA, GREATEST_ALPHA = 1.05, 2.0  # which a learned α stays between


@dataclass(frozen=True)
class Attention:
    """A kind of attention. Softmax is α = 1 of the same operator, so that nothing else differs."""

    alpha: float
    learned: bool = False  # α of each head is a parameter, which starts there
    scaled: bool = False  # scores are multiplied by `length_factor`

    @property
    def name(self) -> str:
        """As it is called in files of results."""
        name = "softmax" if self.alpha == 1 else "learned" if self.learned else f"entmax {self.alpha:g}"
        return name + ", scaled" * self.scaled


@dataclass(frozen=True)
class Sizes:
    """Of one model."""

    layers: int = 2
    heads: int = 4  # an even number
    width: int = 64


def length_factor(beta: Tensor, gamma: Tensor, keys: Tensor) -> Tensor:
    """What scores of a query that sees so many keys are multiplied by, 1 + softplus(β) · log(1 + keys)^(2 tanh γ), with
    β and γ from the query's token: adaptively scaled entmax (Vasylenko and others, "Long-Context Generalization with
    Sparse Attention", 2025)."""
    return 1 + F.softplus(beta) * torch.log1p(keys) ** (2 * torch.tanh(gamma))


class Linear(nn.Module):
    """A linear map of each model: (S, T, inputs) -> (S, T, outputs)."""

    def __init__(self, models: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(models, inputs, outputs))

    def initialise(self, model: int, generator: torch.Generator, factor: float = 1.0) -> None:
        self.weight[model].normal_(0, factor * self.weight.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class SelfAttention(nn.Module):
    """Causal attention. The first half of the heads knows no positions; the other half has ALiBi with slopes 1, 1/2,
    1/3, …, which knows near positions by their distance. Neither has to learn anything about a position for itself, so
    that both can be used at any length (the paper calls it NAPE). Scores are scaled in the first half only."""

    def __init__(self, models: int, sizes: Sizes, attention: Attention) -> None:
        super().__init__()
        self.heads, self.free = sizes.heads, sizes.heads // 2
        self.attention = attention
        self.query_key_value = Linear(models, sizes.width, 3 * sizes.width)
        self.output = Linear(models, sizes.width, sizes.width)
        if attention.scaled:
            self.beta_gamma = Linear(models, sizes.width, 2 * self.free)
            self.beta = nn.Parameter(torch.full((models, self.free, 1, 1), -3.0))  # the factor starts near 1
        if attention.learned:
            share = (attention.alpha - LEAST_ALPHA) / (GREATEST_ALPHA - LEAST_ALPHA)
            self.alpha_logit = nn.Parameter(torch.full((models * sizes.heads,), math.log(share / (1 - share))))
        slopes = torch.cat((torch.zeros(self.free), 1 / torch.arange(1, sizes.heads - self.free + 1)))
        self.register_buffer("slopes", slopes.repeat(models))

    def alpha(self) -> float | Tensor:
        """One for all, or that of each head."""
        if not self.attention.learned:
            return self.attention.alpha
        return LEAST_ALPHA + (GREATEST_ALPHA - LEAST_ALPHA) * torch.sigmoid(self.alpha_logit)

    def forward(self, x: Tensor, length: int) -> Tensor:
        """x: (S, B · length, width) -> the same shape."""
        models, tokens, width = x.shape
        query, key, value = self._by_head(self.query_key_value(x), 3, self.heads, length)
        if self.attention.scaled:
            beta, gamma = self._by_head(self.beta_gamma(x), 2, self.free, length)
            keys = torch.arange(1, length + 1, device=x.device).view(-1, 1)  # that each query sees
            factor = length_factor(self.beta + beta, gamma, keys)
            query = torch.cat((query[:, :, : self.free] * factor, query[:, :, self.free :]), 2)
        mixed = adasplash.entmax_attn(
            *(each.flatten(1, 2) for each in (query, key, value)),
            alpha=self.alpha(),
            is_causal=True,
            alibi_slopes=self.slopes,
        )  # (B, S · heads, N, D)
        mixed = mixed.unflatten(1, (models, self.heads)).permute(1, 0, 3, 2, 4).reshape(models, tokens, width)
        return self.output(mixed)

    @staticmethod
    def _by_head(x: Tensor, parts: int, heads: int, length: int) -> tuple[Tensor, ...]:
        """x: (S, B · length, parts · heads · D) -> (B, S, heads, length, D) for each of the parts."""
        models, tokens, _ = x.shape
        return x.view(models, tokens // length, length, parts, heads, -1).permute(3, 1, 0, 4, 2, 5).unbind(0)

    @staticmethod
    def _by_head(x: Tensor, parts: int, heads: int, length: int) -> tuple[Tensor, ...]:
        """x: (S, B · length, parts · heads · D) -> (B, S, heads, length, D) for each of the parts."""
        models, tokens, _ = x.shape
        return x.view(models, tokens // length, length, parts, heads, -1).permute(3, 1, 0, 4, 2, 5).unbind(0)


class Stack(nn.Module):
    """One transformer for each seed: tokens (S, B, N) -> logits (S, B, N, outputs).

    inputs: how many tokens there are. outputs: of how many answers one is given. seeds: from each come the weights of
    its model, whatever the others are.
    """

    def __init__(self, inputs: int, outputs: int, sizes: Sizes, attention: Attention, seeds: list[int]) -> None:
        super().__init__()
        models, width = len(seeds), sizes.width
        self.embedding = nn.Parameter(torch.empty(models, inputs, width))
        self.size = nn.Parameter(torch.empty(models, 1, width))  # what is added for a number that comes with a token
        self.attentions = nn.ModuleList(SelfAttention(models, sizes, attention) for _ in range(sizes.layers))
        self.widen = nn.ModuleList(Linear(models, width, 4 * width) for _ in range(sizes.layers))
        self.narrow = nn.ModuleList(Linear(models, 4 * width, width) for _ in range(sizes.layers))
        self.head = Linear(models, width, outputs)
        for model, seed in enumerate(seeds):
            self._initialise(model, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, model: int, generator: torch.Generator) -> None:
        self.embedding[model].normal_(generator=generator)
        self.size[model].normal_(generator=generator)
        for linear in self.modules():
            if isinstance(linear, Linear):
                linear.initialise(model, generator)
        width = self.embedding.shape[2]
        for attention in self.attentions:
            # Attention starts flat: a key that gets no weight gets no gradient either.
            attention.query_key_value.weight[model, :, : 2 * width] *= 0.5
            if attention.attention.scaled:
                attention.beta_gamma.weight[model] = 0  # the same factor for all lengths

    def alphas(self) -> Tensor:
        """Of learned ones, of each model, layer and head: (S, layers, heads) on the CPU."""
        alphas = [attention.alpha().detach().view(len(self.embedding), -1) for attention in self.attentions]
        return torch.stack(alphas, 1).cpu()

    def forward(self, tokens: Tensor, sizes: Tensor | None = None) -> Tensor:
        models, _, length = tokens.shape
        first = torch.arange(models, device=tokens.device).view(-1, 1) * self.embedding.shape[1]
        x = F.embedding(tokens.flatten(1) + first, self.embedding.flatten(0, 1))
        if sizes is not None:
            x = x + sizes.flatten(1).unsqueeze(2) * self.size
        for attention, widen, narrow in zip(self.attentions, self.widen, self.narrow, strict=True):
            x = x + attention(normalised(x), length)
            x = x + narrow(F.gelu(widen(normalised(x))))
        return self.head(normalised(x)).view(*tokens.shape, -1)


def normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])
