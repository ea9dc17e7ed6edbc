"""A key index as csrc/ops/key_index.h describes it, read and checked in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

ROOM = 2.0**-11  # of a key's norm: what an error leaves for roundings
ROUNDING = ROOM / 32  # of that, what turning a key in float32 may take
LARGEST_NORM, SMALLEST = 2.0**60, 2.0**-60


def turned_size(size: int) -> int:
    return 64 if size <= 64 else 128 if size <= 128 else 256


def turn(x: Tensor) -> Tensor:
    """H x / √R in float64, for x (..., D)."""
    x = torch.nn.functional.pad(x.double(), (0, turned_size(x.shape[-1]) - x.shape[-1]))
    n = x.shape[-1]
    matrix = torch.ones(1, 1, dtype=torch.float64, device=x.device)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device=x.device), matrix)
    return x @ matrix / n**0.5


class Parts(NamedTuple):
    """Views of an index's bytes: changing one changes the index."""

    header: Tensor  # (width / 4,) int32
    codes: Tensor  # (blocks, H_kv, page, R) int8
    scales: Tensor  # (blocks, H_kv, page) float32
    errors: Tensor

    @staticmethod
    def of(index: Tensor, key_cache: Tensor) -> "Parts":
        blocks, page, heads, size = key_cache.shape
        turned = turned_size(size)
        chunk = -(-page * (turned + 8) // 16) * 16
        assert index.shape == (1 + blocks, max(64, heads * chunk))
        chunks = index[1:, : heads * chunk].unflatten(1, (heads, chunk))
        codes, scales, errors = chunks[..., : page * (turned + 8)].split((page * turned, page * 4, page * 4), dim=2)
        return Parts(
            index[0].view(torch.int32),
            codes.unflatten(2, (page, turned)).view(torch.int8),
            scales.view(torch.float32),
            errors.view(torch.float32),
        )


def check_entries(index: Tensor, key_cache: Tensor, slots: Tensor, queries: int = 20) -> None:
    """Raises unless the entries of these slots bound all scores of their keys, and no looser than they may; and no
    other entry says anything."""
    parts = Parts.of(index, key_cache)
    page = key_cache.shape[1]

    def of_slots(x: Tensor) -> Tensor:  # (T, H_kv, ...)
        return x[slots // page, :, slots % page]

    keys = key_cache[slots // page, slots % page].double()
    norm = keys.square().sum(-1).sqrt()
    codes, scale, error = (of_slots(x).double() for x in (parts.codes + 0.5, parts.scales, parts.errors))
    silent = ~(norm < LARGEST_NORM)
    assert torch.equal(error == torch.inf, silent), "which keys have no code"
    assert (scale[silent] == 0).all()
    assert (error >= 0).all()

    keys, norm, codes, scale, error = (x[~silent] for x in (keys, norm, codes, scale, error))
    exact, coded = turn(keys), codes * scale[:, None]
    left = exact - coded  # a query along this one is furthest off
    allowed = error - norm * (ROOM - ROUNDING)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(queries, exact.shape[-1], generator=generator).double().to(exact.device)
    for query in (left, *drawn):
        length = query.square().sum(-1).sqrt()
        off = ((query * exact).sum(-1) - (query * coded).sum(-1)).abs()
        # Where there is nothing left to divide by, float64 has roundings of its own.
        assert (off <= length * allowed * (1 + 1e-12)).all(), "a score is beyond its bound"

    largest = exact.abs().amax(-1)
    small = largest < SMALLEST
    assert (scale[small] == 0).all() and (codes[small] == 0.5).all()
    scale, largest, left, norm, error = (x[~small] for x in (scale, largest, left, norm, error))
    torch.testing.assert_close(scale, largest / 128, rtol=2e-6, atol=0)
    assert (error <= left.square().sum(-1).sqrt() + norm * (ROOM + ROUNDING)).all(), (
        "an error is larger than it must be"
    )

    others = torch.ones(key_cache.shape[0] * page, dtype=torch.bool)
    others[slots.cpu()] = False
    unwritten = parts.errors.transpose(1, 2).flatten(0, 1)[others.to(index.device)]
    assert (unwritten == torch.inf).all(), "an entry that was never written"
