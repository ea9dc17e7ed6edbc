"""Greedy continuation of a text, byte by byte, by a model that is a function of tokens alone, eager or exported."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Tokens (1, N) int64 -> logits (1, N, 256).
Predict = Callable[[Tensor], Tensor]


def export_program(model: nn.Module) -> torch.export.ExportedProgram:
    """The model as a graph that takes tokens (1, N) of any length N from 2 up to the model's context."""
    tokens = torch.zeros(1, model.context // 2 + 1, dtype=torch.long, device=next(model.parameters()).device)
    length = torch.export.Dim("length", min=2, max=model.context)
    return torch.export.export(model.eval(), (tokens,), dynamic_shapes=({1: length},))


@torch.inference_mode()
def continue_greedily(
    predict: Predict, prompt: bytes, count: int, context: int, device: torch.device | str = "cpu"
) -> bytes:
    """The `count` bytes that follow the prompt, each the likeliest after the last `context` bytes before it."""
    text = bytearray(prompt)
    for _ in range(count):
        text.append(int(next_logits(predict, text, context, device).argmax()))
    return bytes(text[len(prompt) :])


@torch.inference_mode()
def next_logits(predict: Predict, text: bytes, context: int, device: torch.device | str = "cpu") -> Tensor:
    """Logits (256,) of the byte that comes after the text."""
    return predict(torch.tensor([list(text[-context:])], device=device))[0, -1]


def gaps_to_likeliest(
    predict: Predict, prompt: bytes, chosen: bytes, context: int, device: torch.device | str = "cpu"
) -> list[float]:
    """For each chosen byte, how far its logit lies below the highest one, given the bytes chosen before it.

    All zeros means: these are the bytes that a greedy continuation gives. A tiny number among them means that two bytes
    were as good as equally likely there, and that the choice hangs on the last bits of the arithmetic.
    """
    gaps = []
    for i, byte in enumerate(chosen):
        logits = next_logits(predict, prompt + chosen[:i], context, device)
        gaps.append((logits.max() - logits[byte]).item())
    return gaps
