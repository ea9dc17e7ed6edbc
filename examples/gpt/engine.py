"""Sequences of unequal lengths that are continued together, over one paged cache: what a server does, in small.

A step takes a token of every sequence that is being continued, and beside them a chunk of the prompts that are still to
be read. ../libtorch/server.h does the same, in the same steps, so that both compute the same bits.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import adasplash

# What CachedGPT.forward takes and gives, in any form.
Step = Callable[..., Tensor]

PAGE = 16  # keys of a page
CHUNK = 64  # tokens of a prompt that are read in one step
SEQUENCES = 8  # that are on their way at once


@dataclass(frozen=True)
class Shape:
    """What an engine needs to know of a model."""

    layers: int
    heads: int
    head_size: int
    indexed: bool  # whether keys have an index

    def caches(self, pages: int, page: int, device: torch.device | str) -> tuple[list[Tensor], ...]:
        """Of keys and of values, and the keys' indexes if they have them; one for each layer."""
        size = (pages, page, self.heads, self.head_size)
        keys, values = ([torch.zeros(size, device=device) for _ in range(self.layers)] for _ in range(2))
        return keys, values, [adasplash.make_key_index(each) for each in keys] if self.indexed else []


@dataclass
class Sequence:
    """A request on its way: of `text`, the prompt and what came so far, `held` bytes are in the cache."""

    number: int
    text: list[int]
    left: int  # bytes that are still to be written
    held: int = 0
    pages: list[int] = field(default_factory=list)


class Engine:
    """Continues requests greedily."""

    def __init__(
        self, step: Step, shape: Shape, pages: int, sequences: int, device: torch.device | str = "cpu"
    ) -> None:
        """
        Args:
            pages: of the cache. A request waits until there are enough for all of it.
            sequences: that are on their way at once, at most.
        """
        if pages < 1 or sequences < 1:
            raise ValueError(f"an engine needs pages and sequences, got {pages} and {sequences}")
        self.step, self.device, self.most = step, torch.device(device), sequences
        self.caches = shape.caches(pages, PAGE, self.device)
        self.free, self.width = list(range(pages)), pages
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, number: int, prompt: bytes, count: int) -> None:
        """A request: `count` bytes after the prompt. Raises ValueError where the cache could never hold it."""
        if not prompt or count < 1:
            raise ValueError("a request needs a prompt and a count above zero")
        if _pages_for(len(prompt) + count) > self.width:
            raise ValueError(f"request {number} needs more pages than the cache has, {self.width}")
        self.waiting.append(Sequence(number, list(prompt), count))

    def run(self) -> Iterator[tuple[int, int]]:
        """(number of a request, its next byte), as they come."""
        while self.waiting or self.running:
            yield from self._advance()

    def _admit(self) -> None:
        """Starts the requests that there is room for, in their order."""
        while self.waiting and len(self.running) < self.most:
            needed = _pages_for(len(self.waiting[0].text) + self.waiting[0].left)
            if needed > len(self.free):
                return
            sequence = self.waiting.popleft()
            sequence.pages = [self.free.pop() for _ in range(needed)]
            self.running.append(sequence)

    @torch.inference_mode()
    def _advance(self) -> Iterator[tuple[int, int]]:
        self._admit()
        # Exported code takes two sequences or more, and two tokens: an empty sequence with one token, kept nowhere.
        tokens, positions, slots, ends, lengths = [0], [0], [-1], [0, 1], [0]
        table = torch.zeros(len(self.running) + 1, self.width, dtype=torch.int32)
        for row, sequence in enumerate(self.running, start=1):
            new = range(sequence.held, min(len(sequence.text), sequence.held + CHUNK))
            tokens += [sequence.text[place] for place in new]
            positions += new
            slots += [sequence.pages[place // PAGE] * PAGE + place % PAGE for place in new]
            sequence.held = new.stop
            ends.append(len(tokens))
            lengths.append(sequence.held)
            table[row, : len(sequence.pages)] = torch.tensor(sequence.pages, dtype=torch.int32)
        integers = dict(dtype=torch.int32, device=self.device)
        logits = self.step(
            torch.tensor(tokens, device=self.device),
            torch.tensor(positions, device=self.device),
            torch.tensor(slots, device=self.device),
            torch.tensor(ends, **integers),
            table.to(self.device),
            torch.tensor(lengths, **integers),
            *self.caches,
        )
        likeliest = logits[torch.tensor(ends[2:], device=self.device) - 1].argmax(-1).tolist()
        events = []
        for sequence, byte in zip(self.running, likeliest, strict=True):
            if sequence.held < len(sequence.text):
                continue  # more of the prompt is to come
            sequence.text.append(byte)
            sequence.left -= 1
            events.append((sequence.number, byte))
        for sequence in self.running:
            if sequence.left == 0:
                self.free += sequence.pages
        self.running = [sequence for sequence in self.running if sequence.left > 0]
        yield from events


def continue_all(step: Step, shape: Shape, prompts: list[bytes], count: int, device: torch.device | str) -> list[bytes]:
    """The `count` bytes that follow each prompt, each the likeliest one, over a cache that has room for all."""
    pages = 2 + sum(_pages_for(len(prompt) + count) for prompt in prompts)  # exported code takes no fewer than two
    engine = Engine(step, shape, pages, SEQUENCES, device)
    for number, prompt in enumerate(prompts):
        engine.add(number, prompt, count)
    written = [bytearray() for _ in prompts]
    for number, byte in engine.run():
        written[number].append(byte)
    return [bytes(each) for each in written]


@torch.inference_mode()
def gaps_to_likeliest(
    step: Step, shape: Shape, prompt: bytes, chosen: bytes, device: torch.device | str
) -> list[float]:
    """For each chosen byte, how far its logit lies below the highest one, given the bytes before it.

    All zeros means: these are the bytes that a greedy continuation gives. A tiny number among them means that two bytes
    were as good as equally likely there, and that the choice hangs on the last bits of the arithmetic.
    """
    text = torch.tensor(list(prompt + chosen), device=device)
    places = torch.arange(len(text), device=device)
    integers = dict(dtype=torch.int32, device=device)
    ends, lengths = torch.tensor([0, len(text)], **integers), torch.tensor([len(text)], **integers)
    table = torch.zeros(1, 1, **integers)
    caches = shape.caches(1, len(text), device)
    logits = step(text, places, places, ends, table, lengths, *caches)[len(prompt) - 1 : -1]
    gaps = logits.max(-1).values - logits.gather(1, text[len(prompt) :, None])[:, 0]
    return gaps.tolist()


def _pages_for(tokens: int) -> int:
    return -(-tokens // PAGE)
