"""Three tasks whose answers stand in the sequence itself, at any distance, and which can be had at any length.

A task makes sequences (…, N) of tokens, and for each position the answer that the model is to give there, or NONE. What
has to be found is as easy to tell apart in a long sequence as in a short one, but there is more that it is not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -100  # where no answer is asked for: what cross_entropy ignores

VALUES = 10  # of the items of `maximum`
SYMBOLS = 64  # that `copying` copies, and values that `recall` recalls
KEYS = 2048  # of `recall`: no sequence has one twice, which limits lengths
QUERIES = 8  # in each sequence of `recall`


@dataclass(frozen=True)
class Batch:
    """Sequences and their answers, (…, N) each."""

    tokens: Tensor  # int64, from 0 to the task's inputs − 1
    sizes: Tensor | None  # float32, a number that comes with each token, where the task has one
    answers: Tensor  # int64, from 0 to the task's outputs − 1, or NONE


@dataclass(frozen=True)
class Task:
    """What a model is trained for. `make` takes a shape whose last number is the length, and a generator."""

    make: Callable[[tuple[int, ...], torch.Generator], Batch]
    inputs: int
    outputs: int
    trained_length: int
    steps: int  # until all kinds of attention have learnt it at that length


def maximum(shape: tuple[int, ...], generator: torch.Generator) -> Batch:
    """Maximum retrieval: every token is an item with a value and a size; at each, the value of the largest so far."""
    device = generator.device
    tokens = torch.randint(VALUES, shape, generator=generator, device=device)
    sizes = torch.rand(shape, generator=generator, device=device)
    return Batch(tokens, sizes, tokens.gather(-1, sizes.cummax(-1).indices))


def recall(shape: tuple[int, ...], generator: torch.Generator) -> Batch:
    """Associative recall: pairs of a key and a value in turn, then keys again, at each of which its value is asked
    for. Then that follows."""
    *many, length = shape
    device = generator.device
    pairs = length // 2 - QUERIES
    if not 0 < pairs <= KEYS:
        raise ValueError(f"recall needs lengths from {2 * QUERIES + 2} to {2 * (KEYS + QUERIES)}, got {length}")
    keys = torch.rand((*many, KEYS), generator=generator, device=device).topk(pairs, sorted=False).indices
    values = torch.randint(SYMBOLS, (*many, pairs), generator=generator, device=device)
    asked = torch.randint(pairs, (*many, QUERIES), generator=generator, device=device)
    keys = torch.cat((keys, keys.gather(-1, asked)), -1)
    values = torch.cat((values, values.gather(-1, asked)), -1)
    answers = torch.full((*many, 2 * keys.shape[-1]), NONE, device=device)
    answers[..., 2 * pairs :: 2] = values[..., pairs:]
    return Batch(torch.stack((keys, KEYS + values), -1).flatten(-2), None, answers)


def copying(shape: tuple[int, ...], generator: torch.Generator) -> Batch:
    """Copying: symbols, a mark, and the symbols again, each of which is asked for one position before it stands."""
    *many, length = shape
    symbols = torch.randint(SYMBOLS, (*many, length // 2), generator=generator, device=generator.device)
    mark = torch.full((*many, 1), SYMBOLS, device=generator.device)
    answers = torch.cat((torch.full_like(symbols, NONE), symbols), -1)
    return Batch(torch.cat((symbols, mark, symbols[..., :-1]), -1), None, answers)


TASKS = {
    "maximum": Task(maximum, inputs=VALUES, outputs=VALUES, trained_length=16, steps=1500),
    "recall": Task(recall, inputs=KEYS + SYMBOLS, outputs=SYMBOLS, trained_length=64, steps=3000),
    "copying": Task(copying, inputs=SYMBOLS + 1, outputs=SYMBOLS, trained_length=64, steps=2000),
}
