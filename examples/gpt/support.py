"""Which keys attention really uses: the support of every query, as the entmax operator itself reports it.

`adasplash::_entmax_attn_forward` is what `adasplash.entmax_attn` runs inside. For training it returns beside the output
    row_state (B, H, M, 2): the row's maximum score and its threshold relative to it, in units of (α−1)·scale·q·k;
    support (B, H, M, capacity): the keys with weight, ascending, then −1 (a row that does not fit starts with −2).
The weights follow from the first, the support is read from the second. Where the operator writes no lists of keys (on
CUDA), the support is the keys whose weight, computed so, is above zero.
"""

import math

import torch
from torch import Tensor

import adasplash  # noqa: F401  (registers the operator)
from model import GPT


def attention_weights(query: Tensor, key: Tensor, value: Tensor, alpha: float) -> Tensor:
    """Weights of causal α-entmax attention, exactly zero outside the support.

    query, key, value: (B, H, N, D); returns (B, H, N, N) float32. It builds the whole matrix: meant for looking at a
    few sequences, not for training.
    """
    length = query.size(2)
    listed = query.device.type == "cpu"
    capacity = length if listed else 0
    _, row_state, support, _ = torch.ops.adasplash._entmax_attn_forward(
        query, key, value, None, alpha, True, None, None, None, None, None, 0, 0, [-1, -1], None, capacity
    )
    scores = (alpha - 1) / math.sqrt(query.size(3)) * (query @ key.transpose(2, 3)).float()
    maximum, threshold = row_state.float().unbind(-1)
    weights = ((scores - maximum[..., None]) - threshold[..., None]).clamp(min=0) ** (1 / (alpha - 1))
    if listed:
        # One column more than there are keys takes the −1 that end the lists.
        used = torch.zeros(*support.shape[:3], length + 1, dtype=torch.bool)
        used.scatter_(3, torch.where(support < 0, length, support).long(), True)
        # The scores above may differ from the operator's in the last bit: no weight that it gave may vanish by that.
        return torch.where(used[..., :length], weights.clamp(min=torch.finfo(weights.dtype).tiny), 0.0)
    return weights.tril()


def softmax_weights(query: Tensor, key: Tensor) -> Tensor:
    """Weights of causal softmax attention; shapes as in `attention_weights`."""
    scores = query @ key.transpose(2, 3) / math.sqrt(query.size(3))
    future = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.float().masked_fill(future, -torch.inf).softmax(-1)


@torch.no_grad()
def model_attention(model: GPT, tokens: Tensor) -> list[Tensor]:
    """Runs a model on tokens (B, N) and returns every layer's attention weights, (B, H, N, N) each."""
    weights = []

    def look(module, inputs) -> None:
        query, key, value = module.project(*inputs)
        weights.append(
            attention_weights(query, key, value, module.alpha) if module.entmax else softmax_weights(query, key)
        )

    hooks = [block.attention.register_forward_pre_hook(look) for block in model.blocks]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return weights


def mean_support(model: GPT, tokens: Tensor, above: float = 0.0) -> Tensor:
    """Average number of keys whose weight is above a number, for each layer and head: (layers, heads) float32 on the
    CPU. All keys that softmax sees are above 0."""
    return torch.stack([(w > above).sum(-1).float().mean((0, 2)) for w in model_attention(model, tokens)]).cpu()


def sparsity(support: Tensor, length: int) -> float:
    """Share of the visible keys that got no weight, given average supports over sequences of this length."""
    return 1 - support.mean().item() / ((length + 1) / 2)
