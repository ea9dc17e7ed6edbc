"""The kernels run by Triton's interpreter on CPU tensors, launched from Python. What the op does not offer yet, lengths
and windows, can be asked for here."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # Triton decides when it is imported

import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common import ROOT
from emulated.interpreter import patched_once

sys.path.append(str(ROOT))
from triton_src import common, variants

TILE = common.TILE.value


@dataclass(frozen=True)
class Tiles:
    """Keys that attend scans at a time, the side along which kernels walk tiles, and columns at a time (None: all)."""

    scan_n: int = 64
    walk: int = 64
    step: int | None = None


class Result(NamedTuple):
    out: Tensor
    row_state: Tensor
    tiles: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


def rows(*tensors):
    """A tensor and its strides, as the kernels take them; packed (tokens, heads, size) ones have no batch."""
    for x in tensors:
        yield x
        if x.dim() == 3:
            yield from (0, x.stride(1), x.stride(0))
        else:
            yield from x.stride()[:3]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float = 1.5,
    is_causal: bool = False,
    *,
    grad: Tensor | None = None,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    lengths: tuple[Tensor, Tensor] | None = None,
    offsets: tuple[Tensor, Tensor, int, int] | None = None,
    kind: str | None = None,
    tiles: Tiles | None = None,
    gather_below: int = 101,
) -> Result:
    """Forward, and with `grad` backward, over the keys that weigh where less than `gather_below` per cent of the probed
    ones do (0: nothing is probed), else over tiles. Padded tensors (B, H, M, D), with `lengths` of queries and keys; or
    packed ones (tokens, H, D) with `offsets` (cu_seqlens_q, cu_seqlens_k, longest query, longest key)."""
    tiles = tiles or Tiles()
    if scale is not None and scale < 0:
        query = -query  # as Call (csrc/cuda/call.cpp) does
    if offsets is None:
        batch, heads, limit_q, width = query.shape
        kv_heads, limit_k = key.shape[1:3]
        rows_q, rows_k, state_batch = limit_q, limit_k, heads * limit_q
    else:
        (rows_q, heads, width), (rows_k, kv_heads) = query.shape, key.shape[:2]
        batch, limit_q, limit_k, state_batch = len(offsets[0]) - 1, *offsets[2:], 0
    width_v = value.shape[-1]
    given = tuple(offsets[:2]) if offsets else tuple(lengths or (torch.zeros(1, dtype=torch.int32),) * 2)
    mode = (common.LENGTHS_PACKED if offsets else common.LENGTHS_PADDED if lengths else common.LENGTHS_NONE).value
    left, right = (common.UNLIMITED.value if bound < 0 else bound for bound in window)
    right = 0 if is_causal else right
    # As saved_sizes (csrc/attention.cpp) has them.
    counts = (rows_q // 64 + batch, rows_k // 64 + batch) if offsets else (-(-limit_q // 64), -(-limit_k // 64))
    tile_rows, key_tile_rows = (2 * -(-count // 2) for count in counts)
    tile_words = 2 * math.ceil(limit_k / 4096)
    shape = (heads, heads // kv_heads, rows_q, rows_k, limit_q, limit_k, tile_rows, key_tile_rows, tile_words)
    shape += (width, width_v, mode, mode, 0, 0, left, right, width**-0.5 if scale is None else scale, alpha)
    given += (torch.zeros(1),) * 2 + (0,)  # an alpha and an ALiBi slope for each head: none
    kind = kind or {1.5: "1_5", 2.0: "2"}.get(alpha, "any")
    pad = max(16, 1 << (max(width, width_v) - 1).bit_length())
    step = tiles.step or pad

    def launch(name, *arguments, block_m=TILE, block_n=tiles.walk, every=1, **others):
        length, block, count = (limit_k, block_n, kv_heads) if name == "grad_key_value" else (limit_q, block_m, heads)
        programs = math.ceil(math.ceil(length / block) / every) * count * batch
        constants = (block_m, block_n, pad, step, variants.ALPHAS[kind])
        with patched_once():
            variants.KERNELS[name][(programs,)](*arguments, *given, state_batch, *shape, *constants, **others)

    # Filled with what must not stay: everything is to be written.
    garbage = 12345.0
    out = query.new_full((*query.shape[:-1], width_v), garbage)
    if offsets is None:
        row_state = torch.full((batch, heads, limit_q, 2), garbage)
    else:
        row_state = torch.full((heads, rows_q, 2), garbage)
    key_tiles = math.ceil(limit_k / 64)
    many = () if offsets else (batch,)
    # The upper half of -inf: a tile that the scan forgets is lost.
    numbers = torch.full((*many, heads, 4 * tile_rows, key_tiles), -128, dtype=torch.int16)
    lists = torch.full((*many, heads, tile_rows, key_tiles), 1 << 30, dtype=torch.int32)
    bits = torch.full((*many, heads, tile_rows, tile_words), -1, dtype=torch.int32)
    if offsets or tile_rows != counts[0]:
        bits.zero_()  # as forward (csrc/cuda/forward.cpp) does: attend does not write all of it
    launch("attend", *rows(query, key, value, out), row_state, bits, numbers, lists, SCAN_N=tiles.scan_n)
    if grad is None:
        return Result(out, row_state, bits)

    dq, dk, dv = (torch.full_like(x, garbage) for x in (query, key, value))
    terms = torch.full((*row_state.shape[:-1], 4), garbage)
    tensors = (query, key, value, grad)
    lists.fill_(1 << 30)
    key_marks, row_marks = (torch.full((*lists.shape, n), -1, dtype=t) for n, t in ((2, torch.int32), (4, torch.int16)))
    shares = torch.zeros(batch * kv_heads, 2, dtype=torch.int32)
    for probe in (1, 0) if gather_below else ():
        scratch = row_state, bits, lists, key_marks, row_marks, shares, gather_below, probe
        walk = max(tiles.walk, common.WORD.value)
        every = common.PROBED.value if probe else 1
        launch("mark", *rows(query, key), *scratch, block_n=walk, every=every)
    chosen = torch.full((*many, heads, max(tile_rows, key_tile_rows), common.ROOM.value), -1, dtype=torch.int32)
    key_lists = torch.full((*many, kv_heads, key_tile_rows, math.ceil(limit_q / 64)), 1 << 30, dtype=torch.int32)
    for marked in (False, True) if gather_below else (False,):
        scratch = terms, torch.zeros(0), row_state, bits, lists, key_marks, chosen, shares, gather_below
        launch("grad_query", *rows(query, key, value, out, grad, dq), *scratch, MARKED=marked)
        scratch = terms, bits, key_lists, row_marks.view(torch.int32), chosen, shares, gather_below
        launch("grad_key_value", *rows(*tensors, dk, dv), *scratch, block_m=tiles.walk, block_n=TILE, MARKED=marked)
    return Result(out, row_state, bits, dq, dk, dv)
