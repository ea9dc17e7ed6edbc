"""Query, key and value of a case, by the name of their kind:

    gaussian:σ        entries of query and key from N(0, σ²). No structure: few empty tiles, few keys a row.
    structured:share  keys in segments that queries find locally and by topic; `share` (0 … 0.95) of the 64×64 tiles,
                      among those the mask leaves visible, is to stay empty.
    flat              queries nearly zero, as at initialisation: most keys weigh, all about the same.
    trained           query, key and value of all heads of a GPT that `bench.capture` trained, 8 layers of 8 heads.
    captured:file     the same of another model, from a file of `bench.capture`.

Values are drawn from N(0, 1), but for captured ones. The same case gives the same numbers on every device, unless they
are drawn on another one than the CPU, which for large cases takes seconds less.
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
FLAT = 0.02  # σ of flat queries; keys are N(0, 1)
MATCH = 16.0  # score of a query with the keys of its topic …
SPREAD = 0.75  # … and its standard deviation over those keys; other topics' keys stay near zero or below


class Inputs(NamedTuple):
    """(B, H, N, D) of query, (B, H_kv, N, D) of key and value, in the case's type and on its device."""

    query: Tensor
    key: Tensor
    value: Tensor

    def numel(self) -> int:
        return sum(x.numel() for x in self)


def make_inputs(case: Case, drawn_on: str = "cpu") -> Inputs:
    kind, _, setting = case.input.partition(":")
    generator = torch.Generator(drawn_on).manual_seed(case.seed)
    shapes = [(case.batch, heads, case.length, case.head_dim) for heads in (case.heads, case.heads_of_key)]
    if kind in ("gaussian", "flat"):
        spreads = (FLAT, 1.0) if kind == "flat" else (float(setting),) * 2
        query, key = (_normal(shape, generator) * spread for shape, spread in zip(shapes, spreads, strict=True))
        value = _normal(shapes[1], generator)
    elif kind == "structured":
        query, key = _structured(case, float(setting), generator)
        value = _normal(shapes[1], generator)
    elif is_captured(case.input):
        if case.heads_of_key != case.heads:
            raise ValueError(f"{case.input} has as many heads of keys as of queries, but the case asks for fewer")
        query, key, value = captured(case.input, shapes[0])
    else:
        raise ValueError(
            f"input must be gaussian:σ, structured:share, flat, trained or captured:file, got {case.input!r}"
        )
    return Inputs(*(x.to(case.device, case.torch_dtype) for x in (query, key, value)))


def make_grad(case: Case, drawn_on: str = "cpu") -> Tensor:
    """A gradient of the output, (B, H, N, D), from N(0, 1)."""
    generator = torch.Generator(drawn_on).manual_seed(case.seed + 1)
    shape = (case.batch, case.heads, case.length, case.head_dim)
    return _normal(shape, generator).to(case.device, case.torch_dtype)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


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
    detail = math.sqrt(SPREAD * root / math.sqrt(detail_dim))
    codes = _codes(len(sizes), topic_dim, generator) * math.sqrt(MATCH * root)
    device, heads = generator.device, case.heads_of_key
    topic_of_segment = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
    order = torch.stack(
        [torch.randperm(segments, generator=generator, device=device) for _ in range(case.batch * heads)]
    ).view(case.batch, heads, segments)
    of_key = topic_of_segment[order].repeat_interleave(TILE, dim=2)[:, :, : case.length]
    of_query = of_key.repeat_interleave(case.heads // heads, dim=1)  # a group's queries look for its key head's topics
    # Turned at random, so that no entry is zero: arithmetic on zeros draws less power, and a GPU clocks higher.
    turn = torch.linalg.qr(_normal((case.head_dim, case.head_dim), generator)).Q
    query, key = (
        torch.cat((codes[topics], _normal((*topics.shape, detail_dim), generator) * detail), dim=-1) @ turn
        for topics in (of_query, of_key)
    )
    return query, key


def _codes(count: int, dim: int, generator: torch.Generator) -> Tensor:
    """Unit vectors (count, dim) without positive products where 2·dim are enough, otherwise random ones."""
    if count <= 2 * dim:
        return torch.cat((torch.eye(dim), -torch.eye(dim)))[:count].to(generator.device)
    return torch.nn.functional.normalize(_normal((count, dim), generator), dim=-1)


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
