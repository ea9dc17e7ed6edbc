"""What a call attended to: ``attention_stats`` and ``attention_weights``.

Both run the op's forward, which says of each row what its maximum and threshold are, and of each 64×64 tile whether it
holds weight. Only those tiles are visited again, a bounded number at a time. Their scores are computed in float64, in
plain torch, so this works alike on every device.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_TILE = 64  # kTile of csrc/attention.h
_TILES_AT_ONCE = 128  # bounds the memory in between: a float64 for each of their scores is 4 MiB


class AttentionStats(NamedTuple):
    """Facts about the rows of an attention matrix that was never built; (B, H, M) unless said otherwise.

    ``tau``, ``maximum`` and ``gap`` are the kernel's own, in units of z = (α−1) · score: a key has weight if its z is
    above tau. They are float32, and float64 for float64 queries. The kernel works with ``maximum`` and ``gap``; where
    scores are large and close to each other, one float32 for ``tau`` says less than the two.
    """

    #: The threshold, maximum + gap. ∞ for a row that sees no key, NaN for a NaN row.
    tau: Tensor
    #: The row's largest z. 0 for a row that sees no key, NaN for a NaN row.
    maximum: Tensor
    #: tau − maximum, from −1 to 0. ∞ for a row that sees no key, NaN for a NaN row.
    gap: Tensor
    #: How many keys have weight, int64. 0 for a row that sees no key and for a NaN row.
    support_size: Tensor
    #: The largest weight, in tau's type. 0 for a row that sees no key, NaN for a NaN row.
    largest_weight: Tensor
    #: (B, H), float64: the share of tiles without any weight among the 64×64 tiles in which some query sees some key.
    #: 0 where no tile is visible. What a NaN row sees counts as having weight.
    empty_tiles: Tensor


@torch.no_grad()
def attention_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    q_seqlens: Tensor | None = None,
    kv_seqlens: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
) -> AttentionStats:
    """Threshold, support size and largest weight of every row of ``entmax_attn(query, key, value, ...)``.

    The M×N matrix is not built: beyond the result it takes a few numbers a row, one byte a 64×64 tile and a constant.
    Nothing is differentiable. It waits for the device.

    Args:
        query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes: as in ``entmax_attn``,
            except that alpha = 1 is refused: softmax gives weight to every key.

    Returns:
        :class:`AttentionStats`.

    Raises:
        RuntimeError: an argument does not fit; the message names it.
    """
    call = _Call(query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes)
    count = torch.zeros(call.rows, dtype=torch.int64, device=query.device)
    total = torch.zeros(call.rows, dtype=torch.float64, device=query.device)
    largest = torch.zeros_like(total)
    for row, _, weight in call.weights():
        count.index_add_(0, row, torch.ones_like(row))
        total.index_add_(0, row, weight)
        largest.scatter_reduce_(0, row, weight, "amax")
    largest = torch.where(count > 0, largest / total, 0).masked_fill(call.gap.isnan(), torch.nan)
    maximum, gap = call.row_state.unbind(-1)
    return AttentionStats(
        tau=maximum + gap,
        maximum=maximum.clone(),
        gap=gap.clone(),
        support_size=call.by_query(count),
        largest_weight=call.by_query(largest).to(gap.dtype),
        empty_tiles=call.empty_tiles(),
    )


@torch.no_grad()
def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    q_seqlens: Tensor | None = None,
    kv_seqlens: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The attention matrix of ``entmax_attn(query, key, value, ...)``, as one sparse tensor.

    The dense matrix is not built: beyond the result it takes about 100 bytes a weight, a few numbers a row, one byte a
    64×64 tile and a constant. Nothing is differentiable. It waits for the device.

    Weights are computed from float64 scores, the kernel's threshold and the row's own maximum, and divided by their
    sum. They differ from those that the kernel used by its rounding of the scores.

    Args:
        query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes: as in ``entmax_attn``,
            except that alpha = 1 is refused: softmax gives weight to every key.

    Returns:
        Sparse CSR tensor (B·H·M, N) with int64 indices and ascending columns. Row (b·H + h)·M + i belongs to query i of
        head h of batch entry b. Values are float32, and float64 for float64 queries: torch multiplies sparse matrices
        in these types everywhere. A row that sees no key has no entries. A NaN row has one, NaN, at the first key that
        it sees, so that it stays NaN in sums and products.

    Raises:
        RuntimeError: an argument does not fit; the message names it.
    """
    call = _Call(query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes)
    nan_row = call.gap.isnan().nonzero().squeeze(1)
    nan_entries = nan_row, call.begin[nan_row], torch.full_like(nan_row, torch.nan, dtype=torch.float64)
    row, column, weight = _joined(itertools.chain([nan_entries], call.weights()))
    row, order = row.sort(stable=True)
    column, weight = column[order], weight[order]
    total = torch.zeros(call.rows, dtype=torch.float64, device=query.device).index_add_(0, row, weight)
    count = call.by_query(torch.bincount(row, minlength=call.rows)).flatten()
    return torch.sparse_csr_tensor(
        torch.cat([count.new_zeros(1), count.cumsum(0)]),
        column,
        (weight / total[row]).to(call.row_state.dtype),
        size=(count.numel(), key.shape[2]),
    )


class _Call:
    """One call's arguments, what decides its rows, and which of its tiles hold weight.

    Rows here are those of all heads and batch entries, counted with M rounded up to whole tiles.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: float | Tensor,
        is_causal: bool,
        scale: float | None,
        q_seqlens: Tensor | None,
        kv_seqlens: Tensor | None,
        window: tuple[int, int],
        alibi_slopes: Tensor | None,
    ):
        number, tensor = (1.5, alpha) if isinstance(alpha, Tensor) else (alpha, None)
        _, self.row_state, _, tiles = torch.ops.adasplash._entmax_attn_forward(
            query, key, value, tensor, number, is_causal, scale, q_seqlens, kv_seqlens,
            None, None, 0, 0, window, alibi_slopes, 0,
        )  # fmt: skip
        device = query.device
        self.query, self.key = query, key
        self.batch, self.heads, self.queries, head_dim = query.shape
        self.scale = head_dim**-0.5 if scale is None else scale
        self.alpha = torch.as_tensor(alpha, dtype=torch.float64, device=device).expand(self.heads)
        self.slopes = None
        if alibi_slopes is not None:
            self.slopes = alibi_slopes.double().expand(self.batch, self.heads)

        tile_rows, tile_columns = _ceil_div(self.queries, _TILE), _ceil_div(key.shape[2], _TILE)
        bit = torch.arange(32, dtype=torch.int32, device=device)
        bits = (tiles[:, :, :tile_rows, :, None] >> bit & 1).bool()
        self.tile_has_weight = bits.flatten(3)[..., :tile_columns]  # (B, H, tile rows, tile columns)

        self.padded = tile_rows * _TILE
        self.rows = self.batch * self.heads * self.padded
        self.look_around(is_causal, q_seqlens, kv_seqlens, window)
        gap = self.row_state.new_full((self.batch, self.heads, self.padded), torch.inf, dtype=torch.float64)
        gap[:, :, : self.queries] = self.row_state[..., 1]
        self.gap = gap.flatten()

    def look_around(
        self, is_causal: bool, q_seqlens: Tensor | None, kv_seqlens: Tensor | None, window: tuple[int, int]
    ) -> None:
        """Which keys each row sees, as docs/contract.md says: `begin` to `end`, and `place`, the key beside it."""

        def lengths(given: Tensor | None, whole: int) -> Tensor:
            if given is None:
                return torch.full((self.batch, 1), whole, device=self.query.device)
            return given.long().clamp(0, whole)[:, None]

        queries, keys = lengths(q_seqlens, self.queries), lengths(kv_seqlens, self.key.shape[2])
        row = torch.arange(self.padded, device=self.query.device)
        place = row + keys - queries
        left, right = window[0], 0 if is_causal else window[1]
        begin = (place - left).clamp(min=0) if left >= 0 else torch.zeros_like(place)
        end = torch.minimum(place + right + 1, keys) if right >= 0 else keys.expand_as(place)
        sees = (row < queries) & (begin < end)
        of_all_heads = (self.batch, self.heads, self.padded)
        self.place, self.begin, self.end = (
            x[:, None].expand(of_all_heads).flatten() for x in (place, begin * sees, end * sees)
        )

    def by_query(self, of_rows: Tensor) -> Tensor:
        """A number for each row, in the shape (B, H, M)."""
        return of_rows.reshape(self.batch, self.heads, self.padded)[:, :, : self.queries]

    def empty_tiles(self) -> Tensor:
        """(B, H): the share of visible tiles that hold no weight."""
        tiles = (self.batch, self.heads, self.padded // _TILE, _TILE)
        begin, end = self.begin.reshape(tiles), self.end.reshape(tiles)
        # The rows of a tile stand side by side, so what they see together has no holes.
        sees = begin < end
        first = torch.where(sees, begin, self.key.shape[2]).amin(-1) // _TILE
        last = torch.where(sees, end - 1, -1).amax(-1).div(_TILE, rounding_mode="floor")
        visible = (last - first + 1).clamp(min=0).sum(-1).double()
        return torch.where(visible > 0, 1 - self.tile_has_weight.sum((2, 3)) / visible, 0)

    def scores(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Rows (T, 64), keys (T, 64) and z (T, 64, 64), hidden keys at −∞, of the tiles with weight, T at a time."""
        group = self.heads // max(self.key.shape[1], 1)
        within = torch.arange(_TILE, device=self.query.device)
        for tiles in self.tile_has_weight.nonzero().split(_TILES_AT_ONCE):
            b, h, i, j = (x[:, None] for x in tiles.unbind(1))
            i, j = i * _TILE + within, j * _TILE + within
            row = (b * self.heads + h) * self.padded + i
            query = self.query[b, h, i.clamp(max=self.queries - 1)].double()
            key = self.key[b, h // group, j.clamp(max=self.key.shape[2] - 1)].double()
            z = (query * ((self.alpha[h] - 1) * self.scale)[..., None]) @ key.transpose(1, 2)
            if self.slopes is not None:
                slope = (self.alpha[h] - 1) * self.slopes[b, h]
                z -= slope[..., None] * (self.place[row][..., None] - j[:, None]).abs()
            z.masked_fill_(j[:, None] < self.begin[row][..., None], -torch.inf)
            z.masked_fill_(j[:, None] >= self.end[row][..., None], -torch.inf)
            yield row, j, z

    def weights(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Row, key and weight of all that have any, not yet divided by the row's sum, in pieces; none of NaN rows.

        Keys of a row come in ascending order.
        """
        # The kernel rounds scores in its own way. Measured from the maximum of these ones, the threshold is never above
        # all of a row, however flat that is.
        maximum = torch.full_like(self.gap, -torch.inf)
        for row, _, z in self.scores():
            maximum.scatter_reduce_(0, row.flatten(), z.amax(-1).flatten(), "amax")
        tau = maximum + self.gap  # NaN for rows without a weight
        power = (1 / (self.alpha - 1)).expand(self.batch, -1).repeat_interleave(self.padded)
        smallest = torch.finfo(self.row_state.dtype).tiny
        for row, key, z in self.scores():
            tile, i, j = (z > tau[row][..., None]).nonzero(as_tuple=True)
            row, key = row[tile, i], key[tile, j]
            weight = (z[tile, i, j] - tau[row]).pow(power[row])
            held = weight >= smallest
            yield row[held], key[held], weight[held]


def _joined(parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """At least one part, each behind the other. A list for torch.cat would leave small tensors all over the heap."""
    joined, count = (), 0
    for part in parts:
        end = count + len(part[0])
        if not joined or end > len(joined[0]):
            larger = tuple(x.new_empty(2 * end) for x in part)
            for new, old in zip(larger, joined, strict=False):
                new[:count] = old[:count]
            joined = larger
        for whole, x in zip(joined, part, strict=True):
            whole[count:end] = x
        count = end
    return tuple(x[:count] for x in joined)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
