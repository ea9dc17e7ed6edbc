"""Query, key and value of a case, by the name of their kind:

    gaussian:σ        entries of query and key from N(0, σ²). No structure: few empty tiles, few keys a row.
    structured:share  keys in segments that queries find locally and by topic; `share` (0 … 0.95) of the 64×64 tiles,
                      among those the mask leaves visible, is to stay empty.
    trained           query, key and value of all heads of a GPT that `bench.capture` trained, 8 layers of 8 heads.
    captured:file     the same of another model, from a file of `bench.capture`.

Values are drawn from N(0, 1), but for captured ones. The same case gives the same numbers on every device.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.lib.case import Case

#: Where `bench.capture` puts what "trained" is.
TRAINED = Path(__file__).resolve().parents[2] / "build" / "bench" / "trained.pt"
TILE = 64
MATCH = 16.0  # score of a query with the keys of its topic …
SPREAD = 0.75  # … and its standard deviation over those keys; other topics' keys stay near zero or below


class Inputs(NamedTuple):
    """(B, H, N, D) each, in the case's type and on its device."""

    query: Tensor
    key: Tensor
    value: Tensor

    def numel(self) -> int:
        return sum(x.numel() for x in self)


def make_inputs(case: Case) -> Inputs:
    kind, _, setting = case.input.partition(":")
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.heads, case.length, case.head_dim)
    if kind == "gaussian":
        sigma = float(setting)
        query, key = (torch.randn(shape, generator=generator) * sigma for _ in range(2))
        value = torch.randn(shape, generator=generator)
    elif kind == "structured":
        query, key = _structured(case, float(setting), generator)
        value = torch.randn(shape, generator=generator)
    elif is_captured(case.input):
        query, key, value = captured(case.input, shape)
    else:
        raise ValueError(f"input must be gaussian:σ, structured:share, trained or captured:file, got {case.input!r}")
    return Inputs(*(x.to(case.device, case.torch_dtype) for x in (query, key, value)))


def make_grad(case: Case) -> Tensor:
    """A gradient of the output, (B, H, N, D), from N(0, 1)."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.batch, case.heads, case.length, case.head_dim)
    return torch.randn(shape, generator=generator).to(case.device, case.torch_dtype)


def topic_sizes(segments: int, empty: float, causal: bool) -> list[int]:
    """Numbers of segments per topic so that the share `empty` of the visible tiles joins different topics.

    A tile holds weight just where its queries' topic is its keys', so the order of the segments does not matter.
    """

    def full(sizes: list[int]) -> int:
        return sum(n * (n + 1) // 2 if causal else n * n for n in sizes)

    wanted = (1 - empty) * full([segments])
    topics = 1
    while topics < segments and full(_even(segments, topics)) > wanted:
        topics += 1
    best = sizes = _even(segments, topics)
    # Segments move from the last topic to the others: the full tiles grow towards those of one topic less.
    while sizes[-1] > 0 and len(sizes) > 1:
        sizes = [n + (i == min(range(len(sizes) - 1), key=sizes.__getitem__)) for i, n in enumerate(sizes)]
        sizes[-1] -= 1
        if abs(full(sizes) - wanted) < abs(full(best) - wanted):
            best = sizes
    return [n for n in best if n > 0]


def _even(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


def _structured(case: Case, empty: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if not 0 <= empty <= 0.95:
        raise ValueError(f"the share of empty tiles must be from 0 to 0.95, got {empty}")
    segments = -(-case.length // TILE)
    sizes = topic_sizes(segments, empty, case.causal)
    # Half of the features say the topic, the others which keys within it: so topics do not make single keys popular.
    topic_dim = case.head_dim // 2
    detail_dim = case.head_dim - topic_dim
    root = math.sqrt(case.head_dim)  # the default scale is 1 / root
    shape = (case.batch, case.heads, case.length, detail_dim)
    detail = math.sqrt(SPREAD * root / math.sqrt(detail_dim))
    codes = _codes(len(sizes), topic_dim, generator) * math.sqrt(MATCH * root)
    topic_of_segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.stack([torch.randperm(segments, generator=generator) for _ in range(case.batch * case.heads)]).view(
        case.batch, case.heads, segments
    )
    topics = topic_of_segment[order].repeat_interleave(TILE, dim=2)[:, :, : case.length]
    # Turned at random, so that no entry is zero: arithmetic on zeros draws less power, and a GPU clocks higher.
    turn = torch.linalg.qr(torch.randn(case.head_dim, case.head_dim, generator=generator)).Q
    query, key = (
        torch.cat((codes[topics], torch.randn(shape, generator=generator) * detail), dim=-1) @ turn for _ in range(2)
    )
    return query, key


def _codes(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Unit vectors (count, dim) without positive products where 2·dim are enough, otherwise random ones."""
    if count <= 2 * dim:
        return torch.cat((torch.eye(dim), -torch.eye(dim)))[:count]
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def is_captured(name: str) -> bool:
    """Whether an input lies in a file, which says its sizes."""
    return name == "trained" or name.startswith("captured:")


def _load(name: str) -> dict:
    return torch.load(name.partition(":")[2] or TRAINED, map_location="cpu", weights_only=True)


def captured(name: str, shape: tuple[int, ...]) -> list[Tensor]:
    """Query, key and value (batch, heads, length, head_dim) of such an input, float32 on the CPU: the first of what it
    holds."""
    saved = _load(name)
    tensors = [saved[name] for name in ("query", "key", "value")]
    held = tuple(tensors[0].shape)
    if any(x < y for x, y in zip(held, shape, strict=True)) or held[3] != shape[3]:
        raise ValueError(f"{name} holds (batch, heads, length, head_dim) = {held}, but the case asks for {shape}")
    return [x[: shape[0], : shape[1], : shape[2]].float() for x in tensors]


def captured_sizes(name: str) -> dict[str, int | float]:
    """batch, heads, length, head_dim and alpha of a captured input, as fields of a case."""
    saved = _load(name)
    sizes = dict(zip(("batch", "heads", "length", "head_dim"), saved["query"].shape, strict=True))
    return {**sizes, "alpha": saved["alpha"]}
