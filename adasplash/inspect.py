"""What a call attended to: ``attention_stats`` and ``attention_weights``.

The first is made of the op that returns a summary. The second runs the op's forward, which says of each row what its
maximum and threshold are, on the CPU also which keys have weight if they are few, and of each 64×64 tile whether it
holds weight. Scores of those keys, and for rows without a list those of the tiles, are computed again, in float64 and
plain torch, a bounded number at a time.
"""

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from adasplash._arguments import (
    BOOL,
    NUMBER_OR_TENSOR,
    OPTIONAL_TENSOR,
    SCALE,
    TENSOR,
    WINDOW,
    check,
    explain,
)
from adasplash.functional import attend, scaled
from adasplash.nested import any_is_nested
from adasplash.summary import AttentionStats, stats_of

_TILE = 64  # kTile of csrc/ops/attention.h
_FARTHEST = 2**29 - 1  # kFarthestPosition there
# support_capacity on the CPU; the CUDA kernels make no lists. It is less than autograd's 128, which is in
# csrc/ops/attention_autograd.cpp: lists take memory for every row, and a row without one only costs the scores of its
# tiles here.
_LIST_LENGTH = 64

# What is computed at a time, at a float64 for each score 4 MiB; the keys of the lists take 32 MiB at the most.
_TILES_AT_ONCE = 128
_LISTS_AT_ONCE = 256


@torch.no_grad()
def attention_stats(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    q_seqlens: Tensor | None = None,
    kv_seqlens: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    kv_starts: Tensor | None = None,
    q_positions: Tensor | None = None,
) -> AttentionStats:
    """Threshold, support size and largest weight of every row of ``entmax_attn(query, key, value, ...)``.

    :func:`adasplash.entmax_attn_summary` without its output, which is computed all the same: where that is wanted too,
    call that.

    Args:
        query, key, value, alpha, is_causal, scale: as in ``entmax_attn``, under autocast too.
        q_seqlens, kv_seqlens, window, alibi_slopes, kv_starts, q_positions: likewise.

    Returns:
        :class:`AttentionStats`.

    Raises:
        TypeError, RuntimeError: an argument does not fit; the message names it.
    """
    _, *facts = attend(
        "attention_stats", query, key, value, alpha, is_causal, scale, q_seqlens, kv_seqlens, window, alibi_slopes,
        kv_starts, op=torch.ops.adasplash.entmax_attn_summary, q_positions=q_positions,
    )  # fmt: skip
    return stats_of(alpha, *facts)


@torch.no_grad()
def attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
    q_seqlens: Tensor | None = None,
    kv_seqlens: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    kv_starts: Tensor | None = None,
    q_positions: Tensor | None = None,
) -> Tensor:
    """The attention matrix of ``entmax_attn(query, key, value, ...)``, as one sparse tensor.

    The dense matrix is not built: beyond the result it takes about 100 bytes a weight, some numbers a row, one byte a
    64×64 tile and a constant. Nothing is differentiable. It waits for the device.

    Weights are computed from float64 scores, the kernel's threshold and the row's own maximum, and divided by their
    sum. They differ from those that the kernel used by its rounding of the scores.

    Args:
        query, key, value, is_causal, scale: as in ``entmax_attn``, under autocast too.
        alpha: likewise. For α = 1 the result holds every weight that its type can hold.
        q_seqlens, kv_seqlens, window, alibi_slopes, kv_starts, q_positions: likewise.

    Returns:
        Sparse CSR tensor (B·H·M, N) with int64 indices and ascending columns. Row (b·H + h)·M + i belongs to query i of
        head h of batch entry b. Values are float32, and float64 for float64 queries: torch multiplies sparse matrices
        in these types everywhere. A row that sees no key has no entries. A NaN row has one, NaN, at the first key that
        it sees, so that it stays NaN in sums and products.

    Raises:
        TypeError, RuntimeError: an argument does not fit; the message names it.
    """
    call = _Call(
        "attention_weights", query, key, value, alpha, is_causal=is_causal, scale=scale, q_seqlens=q_seqlens,
        kv_seqlens=kv_seqlens, window=window, alibi_slopes=alibi_slopes, kv_starts=kv_starts, q_positions=q_positions,
    )  # fmt: skip
    nan_row = call.gap.isnan().nonzero().squeeze(1)
    nan_entries = nan_row, call.begin[nan_row], torch.full_like(nan_row, torch.nan, dtype=torch.float64)
    row, column, weight = _joined(itertools.chain([nan_entries], call.weights()))
    row, order = row.sort(stable=True)
    column, weight = call.column(row, column[order]), weight[order]
    total = torch.zeros(call.rows, dtype=torch.float64, device=query.device).index_add_(0, row, weight)
    count = call.by_query(torch.bincount(row, minlength=call.rows)).flatten()
    return torch.sparse_csr_tensor(
        torch.cat([count.new_zeros(1), count.cumsum(0)]),
        column,
        (weight / total[row]).to(call.row_state.dtype),
        size=(count.numel(), key.shape[2]),
        # As set, said aloud: where nothing is said torch warns of crashes that these indices cannot lead to.
        check_invariants=torch.sparse.check_sparse_tensor_invariants.is_enabled(),
    )


def saved_by_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor,
    is_causal: bool,
    *,
    support_capacity: int,
    scale: float | None = None,
    q_seqlens: Tensor | None = None,
    kv_seqlens: Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    kv_starts: Tensor | None = None,
    q_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """row_state, support and tiles of the op's forward, which docs/contract.md describes. Options of the packed form
    are absent here, and dropout, which is no part of the weights."""
    _, row_state, support, tiles = torch.ops.adasplash._entmax_attn_forward(
        query,
        key,
        value,
        head_alpha=alpha if isinstance(alpha, Tensor) else None,
        alpha=1.5 if isinstance(alpha, Tensor) else alpha,
        is_causal=is_causal,
        scale=scale,
        q_seqlens=q_seqlens,
        kv_seqlens=kv_seqlens,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=0,
        max_seqlen_k=0,
        window=window,
        alibi_slopes=alibi_slopes,
        support_capacity=support_capacity,
        kv_starts=kv_starts,
        q_positions=q_positions,
    )
    return row_state, support, tiles


class _Call:
    """One call's arguments, what decides its rows, and which of its tiles hold weight.

    Rows here are those of all heads and batch entries, counted with M rounded up to whole tiles.
    """

    def __init__(
        self,
        function: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        alpha: float | Tensor,
        *,
        is_causal: bool,
        scale: float | Tensor | None,
        q_seqlens: Tensor | None,
        kv_seqlens: Tensor | None,
        window: tuple[int, int],
        alibi_slopes: Tensor | None,
        kv_starts: Tensor | None,
        q_positions: Tensor | None,
    ):
        tensors = {"query": query, "key": key, "value": value}
        options = {
            "q_seqlens": q_seqlens, "kv_seqlens": kv_seqlens, "alibi_slopes": alibi_slopes, "kv_starts": kv_starts,
            "q_positions": q_positions,
        }  # fmt: skip
        for name, kind, given in (
            ("alpha", NUMBER_OR_TENSOR, alpha), ("is_causal", BOOL, is_causal), ("scale", SCALE, scale),
            ("window", WINDOW, window), *((name, TENSOR, given) for name, given in tensors.items()),
            *((name, OPTIONAL_TENSOR, given) for name, given in options.items()),
        ):  # fmt: skip
            check(function, name, kind, given)
        if any_is_nested(query, key, value):
            raise RuntimeError(f"{function}: query, key and value must not be nested tensors; pad them first")
        if isinstance(scale, Tensor):
            query, scale = scaled(query, scale), 1.0
        query, key, value = _autocast(query, key, value)
        try:
            self.row_state, self.support, tiles = saved_by_forward(
                query,
                key,
                value,
                alpha,
                is_causal,
                scale=scale,
                window=window,
                support_capacity=_LIST_LENGTH if query.device.type == "cpu" else 0,
                **options,
            )
        except RuntimeError as error:
            explain(function, error, {}, "entmax_attn")
        device = query.device
        self.query, self.key = query, key
        self.batch, self.heads, self.queries, head_dim = query.shape
        self.scale = head_dim**-0.5 if scale is None else scale
        self.alpha = torch.as_tensor(alpha, dtype=torch.float64, device=device).expand(self.heads)
        self.rate = torch.where(self.alpha == 1, 1, self.alpha - 1)  # of softmax z is the score
        self.slopes = None
        if alibi_slopes is not None:
            self.slopes = alibi_slopes.double().expand(self.batch, self.heads)

        tile_rows, tile_columns = _ceil_div(self.queries, _TILE), _ceil_div(key.shape[2], _TILE)
        bit = torch.arange(32, dtype=torch.int32, device=device)
        bits = (tiles[:, :, :tile_rows, :, None] >> bit & 1).bool()
        self.tile_has_weight = bits.flatten(3)[..., :tile_columns]  # (B, H, tile rows, tile columns)

        self.padded = tile_rows * _TILE
        self.rows = self.batch * self.heads * self.padded
        self.look_around(is_causal, q_seqlens, kv_seqlens, window, kv_starts, q_positions)
        gap = self.row_state.new_full((self.batch, self.heads, self.padded), torch.inf, dtype=torch.float64)
        gap[:, :, : self.queries] = self.row_state[..., 1]
        self.gap = gap.flatten()

    def look_around(
        self,
        is_causal: bool,
        q_seqlens: Tensor | None,
        kv_seqlens: Tensor | None,
        window: tuple[int, int],
        kv_starts: Tensor | None,
        q_positions: Tensor | None,
    ) -> None:
        """Which keys each row sees, as docs/contract.md says: `begin` to `end`, and `place`, the key on its diagonal.
        They are counted from `first_key`, the entry's own."""

        def rows(given: Tensor | None, length: int, otherwise: int) -> Tensor:
            if given is None:
                return torch.full((self.batch, 1), otherwise, device=self.query.device)
            return given.long().clamp(0, length)[:, None]

        length = self.key.shape[2]
        self.first_key = rows(kv_starts, length, 0)
        queries = rows(q_seqlens, self.queries, self.queries)
        keys = (rows(kv_seqlens, length, length) - self.first_key).clamp(min=0)
        row = torch.arange(self.padded, device=self.query.device)
        place = row + (
            keys - queries if q_positions is None else q_positions.long().clamp(-_FARTHEST, _FARTHEST)[:, None]
        )
        # No further than there are rows: sums must not overflow.
        most = self.padded + length + _FARTHEST
        left, right = min(window[0], most), 0 if is_causal else min(window[1], most)
        begin = (place - left).clamp(min=0) if left >= 0 else torch.zeros_like(place)
        end = torch.minimum(place + right + 1, keys) if right >= 0 else keys.expand_as(place)
        sees = (row < queries) & (begin < end)
        of_all_heads = (self.batch, self.heads, self.padded)
        self.place, self.begin, self.end = (
            x[:, None].expand(of_all_heads).flatten() for x in (place, begin * sees, end * sees)
        )

    def column(self, row: Tensor, key: Tensor) -> Tensor:
        """Where a row's key is among all keys of its entry."""
        return key + self.first_key[row // self.padded // self.heads, 0]

    def by_query(self, numbers: Tensor) -> Tensor:
        """A number for each row, in the shape (B, H, M)."""
        return numbers.reshape(self.batch, self.heads, self.padded)[:, :, : self.queries]

    def scores(self, row: Tensor, key: Tensor) -> Tensor:
        """z (T, I, J) of rows (T, I) and keys (T, J), each of T within one head; −∞ where a row does not see a key."""
        b, h = row[:, :1] // self.padded // self.heads, row[:, :1] // self.padded % self.heads
        kv_head = h // (self.heads // self.key.shape[1])
        queries = self.query[b, h, (row % self.padded).clamp(max=self.queries - 1)].double()
        column = (key + self.first_key[b, 0]).clamp(0, self.key.shape[2] - 1)
        keys = self.key[b, kv_head, column].double()
        z = (queries * (self.rate[h] * self.scale)[..., None]) @ keys.transpose(1, 2)
        if self.slopes is not None:
            slope = self.rate[h] * self.slopes[b, h]
            z -= slope[..., None] * (self.place[row][..., None] - key[:, None]).abs()
        z.masked_fill_(key[:, None] < self.begin[row][..., None], -torch.inf)
        return z.masked_fill_(key[:, None] >= self.end[row][..., None], -torch.inf)

    def weights(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Row, key and weight of all that have any, not yet divided by the row's sum, in pieces; none of NaN rows.

        Keys of a row come in ascending order.
        """
        # The kernel rounds scores in its own way. Measured from the maximum of these ones, the threshold is never above
        # all of a row, however flat that is.
        listed = torch.zeros(self.rows, dtype=torch.bool, device=self.query.device)
        for row, key in self.lists():
            listed[row] = True
            z = self.scores(row, key)
            yield self.above(row, key, z, z.amax(-1) + self.gap[row])

        maximum = torch.full_like(self.gap, -torch.inf)
        for row, key in self.tiles(~listed):
            maximum.scatter_reduce_(0, row.flatten(), self.scores(row, key).amax(-1).flatten(), "amax")
        tau = (maximum + self.gap).masked_fill(listed, torch.inf)  # NaN for rows without a weight
        for row, key in self.tiles(~listed):
            yield self.above(row, key, self.scores(row, key), tau[row])

    def lists(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows (T, 1) and their keys (T, J), −1 after the last, of rows that the kernel listed, T at a time."""
        if self.support.shape[3] == 0:
            return
        for chosen in _pieces((self.support[..., 0] >= 0).nonzero(), _LISTS_AT_ONCE):
            b, h, i = chosen.unbind(1)
            key = self.support[b, h, i].long()
            longest = int((key >= 0).sum(-1).amax())
            yield ((b * self.heads + h) * self.padded + i)[:, None], key[:, :longest]

    def tiles(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows (T, 64) and keys (T, 64) of tiles that hold weight and one of these rows (a mask), T at a time."""
        wanted = rows.reshape(*self.tile_has_weight.shape[:3], _TILE).any(-1)
        within = torch.arange(_TILE, device=rows.device)
        for chosen in _pieces((self.tile_has_weight & wanted[..., None]).nonzero(), _TILES_AT_ONCE):
            b, h, i, j = (x[:, None] for x in chosen.unbind(1))
            yield (b * self.heads + h) * self.padded + i * _TILE + within, j * _TILE + within

    def above(self, row: Tensor, key: Tensor, z: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, key and weight of what is above its row's tau (T, I), for α = 1 of all that is seen, and can be held in
        the result's type."""
        softmax = self.alpha[row // self.padded % self.heads] == 1
        least = torch.where(softmax & ~tau.isnan(), -torch.inf, tau)
        piece, i, j = (z > least[..., None]).nonzero(as_tuple=True)
        row, key, above = row[piece, i], key[piece, j], z[piece, i, j] - tau[piece, i]
        power = above.clamp(min=0).pow(1 / self.rate[row // self.padded % self.heads])
        weight = torch.where(softmax[piece, i], above.exp(), power)
        held = weight >= torch.finfo(self.row_state.dtype).tiny
        return row[held], key[held], weight[held]


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """In the types that entmax_attn gives them under autocast (csrc: autocast.cpp)."""
    device = query.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:  # torch leaves float64 and what is elsewhere as it is
        eligible = x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device
        return x.to(dtype) if eligible else x

    return cast(query), cast(key), cast(value)


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


def _pieces(index: Tensor, length: int) -> tuple[Tensor, ...]:
    """Split into lengths of at most `length`, none of zero."""
    return index.split(length) if len(index) > 0 else ()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
