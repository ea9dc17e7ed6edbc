"""Entmax attention the plain way: dense, in fp64, readable. The oracle of every other test.

`attention` holds the whole contract: types, grouped queries, causal and window masks aligned bottom right or by the
places of queries, lengths of right-padded batches, ALiBi slopes, dropout, alpha as a number, as one tensor, per head or
per row; `attention_varlen` is the packed form, a sequence at a time. Its gradients come from autograd, through
`entmax`, whose backward is the closed form. Run in another type (`dtype=`) it is the dense composition matmul, entmax,
matmul of that type, which is the yardstick for the accuracy of half types.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def _sparsemax_threshold(z: Tensor) -> Tensor:
    ordered = z.sort(dim=-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    total = ordered.cumsum(-1)
    count = (rank * ordered > total - 1).sum(-1, keepdim=True).clamp(min=1)
    return (total.gather(-1, count - 1) - 1) / count


def _entmax15_threshold(z: Tensor) -> Tensor:
    ordered = z.sort(dim=-1, descending=True).values
    rank = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype, device=z.device)
    mean = ordered.cumsum(-1) / rank
    spread = ordered.square().cumsum(-1) - rank * mean.square()
    candidate = mean - ((1 - spread) / rank).clamp(min=0).sqrt()
    count = (candidate <= ordered).sum(-1, keepdim=True).clamp(min=1)
    return candidate.gather(-1, count - 1)


def _bisected_threshold(z: Tensor, alpha: Tensor) -> Tensor:
    power = 1 / (alpha - 1)
    low, width = torch.full_like(z[..., :1], -1), 1.0
    for _ in range(60):
        width /= 2
        heavy = (z - low - width).clamp(min=0).pow(power).sum(-1, keepdim=True) >= 1
        low = torch.where(heavy, low + width, low)
    distance = (z - low).clamp(min=0)
    slope = power * torch.where(distance > 0, distance.pow(power - 1), 0).sum(-1, keepdim=True)
    newton = (distance.pow(power).sum(-1, keepdim=True) - 1) / slope
    return torch.where(slope > 0, low + newton, low)


class Threshold(NamedTuple):
    """What decides a row: its maximum and, relative to it, its threshold, both of z = (alpha - 1) * score."""

    maximum: Tensor
    gap: Tensor


def threshold(z: Tensor, alpha: Tensor, by_bisection: bool = False) -> Threshold:
    """Threshold of the rows (last dimension) of z, hidden keys at -inf. Shapes (..., 1); no visible key: (0, +inf)."""
    if z.shape[-1] == 0:
        empty = z.new_zeros(*z.shape[:-1], 1)
        return Threshold(empty, empty + torch.inf)
    maximum = z.amax(-1, keepdim=True)
    blind = maximum == -torch.inf
    maximum = torch.where(blind, 0, maximum)
    z = z - maximum
    if not by_bisection and bool((alpha == 2).all()):
        gap = _sparsemax_threshold(z)
    elif not by_bisection and bool((alpha == 1.5).all()):
        gap = _entmax15_threshold(z)
    else:
        gap = _bisected_threshold(z, alpha)
    return Threshold(maximum, torch.where(blind, torch.inf, gap))


class _Entmax(torch.autograd.Function):
    """Rows of fp64 scores, hidden keys at -inf, and alpha that broadcasts over rows -> weights. Rows with alpha = 1 are
    softmax, the limit."""

    @staticmethod
    def forward(ctx, scores: Tensor, alpha: Tensor) -> Tensor:
        is_softmax = alpha == 1
        if bool(is_softmax.all()):
            weights = _softmax(scores)
        else:
            power = torch.where(is_softmax, 1.5, alpha)  # any other, where it does not count
            z = (power - 1) * scores
            maximum, gap = threshold(z, power)
            weights = (z - maximum - gap).clamp(min=0).pow(1 / (power - 1))
            if bool(is_softmax.any()):
                weights = torch.where(is_softmax, _softmax(scores), weights)
        ctx.save_for_backward(weights, alpha)
        return weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        p, alpha = ctx.saved_tensors
        u = torch.where(p > 0, p.pow(2 - alpha), 0)
        share = u / u.sum(-1, keepdim=True).where(u.sum(-1, keepdim=True) != 0, 1)
        grad_scores = u * (grad - (share * grad).sum(-1, keepdim=True))
        grad_alpha = None
        if ctx.needs_input_grad[1]:
            log = torch.where(p > 0, p.log(), 0)
            surprise = -p * log
            rate = torch.where(alpha == 1, 1, alpha - 1)
            change = (p - share) / rate**2
            change = change + (surprise - share * surprise.sum(-1, keepdim=True)) / rate
            limit = -0.5 * p * (log**2 - (p * log**2).sum(-1, keepdim=True))
            change = torch.where(alpha == 1, limit, change)
            grad_alpha = (grad * change).sum(-1, keepdim=True).sum_to_size(alpha.shape)
        return grad_scores, grad_alpha


def _softmax(scores: Tensor) -> Tensor:
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)


def entmax(scores: Tensor, alpha: float | Tensor = 1.5) -> Tensor:
    """Weights over the last dimension, worked out in fp64, in the scores' type; zeros where nothing is visible."""
    alpha = torch.as_tensor(alpha, dtype=torch.float64, device=scores.device)
    return _Entmax.apply(scores.double(), alpha).to(scores.dtype)


def relative_position(
    m: int,
    n: int,
    q_seqlens: Tensor | None = None,
    kv_seqlens: Tensor | None = None,
    device="cpu",
    kv_starts: Tensor | None = None,
    q_positions: Tensor | None = None,
) -> Tensor:
    """j - (i + N - M), (B or 1, 1, M, N): 0 on the diagonal that ends bottom right, by a batch entry's own lengths,
    with keys counted from its start; or on that which begins at the place of the first query."""
    q_length = torch.as_tensor(m if q_seqlens is None else q_seqlens, device=device).reshape(-1, 1, 1, 1)
    end = torch.as_tensor(n if kv_seqlens is None else kv_seqlens, device=device).reshape(-1, 1, 1, 1)
    start = torch.as_tensor(0 if kv_starts is None else kv_starts, device=device).reshape(-1, 1, 1, 1)
    i = torch.arange(m, device=device).reshape(m, 1)
    first = (end - start).clamp(min=0) - q_length if q_positions is None else q_positions.long().reshape(-1, 1, 1, 1)
    return torch.arange(n, device=device) - start - (i + first)


def visible(
    m: int,
    n: int,
    is_causal: bool = False,
    q_seqlens: Tensor | None = None,
    kv_seqlens: Tensor | None = None,
    window: Sequence[int] = (-1, -1),
    device="cpu",
    kv_starts: Tensor | None = None,
    q_positions: Tensor | None = None,
) -> Tensor:
    """Which query sees which key, (B or 1, 1, M, N): the one place that knows."""
    position = relative_position(m, n, q_seqlens, kv_seqlens, device, kv_starts, q_positions)
    sees = torch.ones_like(position, dtype=torch.bool)
    left, right = window
    if left >= 0:
        sees = sees & (position >= -left)
    if right >= 0:
        sees = sees & (position <= right)
    if is_causal:
        sees = sees & (position <= 0)
    if q_seqlens is not None:
        sees = sees & (torch.arange(m, device=device).reshape(m, 1) < q_seqlens.reshape(-1, 1, 1, 1))
    if kv_seqlens is not None:
        sees = sees & (torch.arange(n, device=device) < kv_seqlens.reshape(-1, 1, 1, 1))
    if kv_starts is not None:
        sees = sees & (torch.arange(n, device=device) >= kv_starts.reshape(-1, 1, 1, 1))
    return sees


def _without_padding(x: Tensor, ends: Tensor | None, starts: Tensor | None = None) -> Tensor:
    """Padding may hold NaN, and 0 * NaN would carry it into the products of a dense computation."""
    row = torch.arange(x.shape[2], device=x.device)[:, None]
    if ends is not None:
        x = x.masked_fill(row >= ends.reshape(-1, 1, 1, 1), 0)
    if starts is not None:
        x = x.masked_fill(row < starts.reshape(-1, 1, 1, 1), 0)
    return x


def _philox(key: tuple[int, int], counter: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 of counters, four int64 tensors that hold 32 bits each (Salmon et al., 2011)."""
    words = 0xFFFFFFFF
    for number in range(10):
        round_key = [(k + number * step) & words for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        even, odd = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (odd >> 32 & words) ^ counter[1] ^ round_key[0],
            odd & words,
            (even >> 32 & words) ^ counter[3] ^ round_key[1],
            even & words,
        ]
    return counter


def _mix(x: Tensor) -> Tensor:
    """Ellis' lowbias32."""
    words = 0xFFFFFFFF
    x = x ^ x >> 16
    x = x * 0x7FEB352D & words
    x = x ^ x >> 15
    x = x * 0x846CA68B & words
    return x ^ x >> 16


def dropout_factors(
    seed: Tensor,
    p: float,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    kv_starts: Tensor | None = None,
    origin: Tensor | None = None,
) -> Tensor:
    """What weights are multiplied by, (B, H, M, N) in fp64: 0, or 1 / (1 - p)."""
    if origin is None:
        origin = torch.zeros(batch, 4, dtype=torch.int64)
        origin[:, 0] = torch.arange(batch)
    entries, first_head, first_query, first_key = (x.reshape(-1, 1, 1) for x in origin.cpu().long().unbind(1))
    head, query = torch.arange(heads).reshape(-1, 1), torch.arange(queries)
    number = int(seed) & (1 << 64) - 1
    counters = (first_query + query, first_head + head, entries, torch.tensor(0))
    place = [x & 0xFFFFFFFF for x in torch.broadcast_tensors(*counters)]
    first, second, _, _ = (word[..., None] for word in _philox((number & 0xFFFFFFFF, number >> 32), place))
    key = first_key[..., None] + torch.arange(keys)
    if kv_starts is not None:
        key = key - kv_starts.cpu().long().reshape(-1, 1, 1, 1)
    x = _mix(_mix((key & 0xFFFFFFFF) ^ first) + second & 0xFFFFFFFF)
    dropped = x < min(round(p * 2**32), 2**32 - 1)
    return ((~dropped).double() / (1 - p)).to(seed.device)


class Attention(NamedTuple):
    out: Tensor
    weights: Tensor
    scores: Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    q_seqlens: Tensor | None = None,
    kv_seqlens: Tensor | None = None,
    window: Sequence[int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    kv_starts: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    q_positions: Tensor | None = None,
    dropout_origin: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Attention:
    """The op's arguments -> out (B, H, M, D_v), weights (before dropout) and masked scores (B, H, M, N),
    differentiable, in `dtype`."""
    (batch, heads, m, size), (_, kv_heads, n, _) = query.shape, key.shape
    scale = size**-0.5 if scale is None else scale
    query = _without_padding(query.to(dtype), q_seqlens)
    key, value = (_without_padding(x.to(dtype), kv_seqlens, kv_starts) for x in (key, value))
    if heads != kv_heads:
        key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if alibi_slopes is not None:
        distance = relative_position(m, n, q_seqlens, kv_seqlens, query.device, kv_starts, q_positions).abs()
        scores = scores - alibi_slopes.to(dtype).reshape(-1, heads, 1, 1) * distance
    sees = visible(m, n, is_causal, q_seqlens, kv_seqlens, window, query.device, kv_starts, q_positions)
    scores = scores.masked_fill(~sees, -torch.inf)
    if isinstance(alpha, Tensor) and alpha.dim() < 4:
        alpha = alpha.reshape(-1, 1, 1)
    weights = kept = entmax(scores, alpha)
    if dropout_p > 0:
        factors = dropout_factors(dropout_seed, dropout_p, batch, heads, m, n, kv_starts, dropout_origin)
        kept = weights * factors.to(dtype)
    return Attention(kept @ value, weights, scores)


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    alpha: float | Tensor = 1.5,
    *options,
    alibi_slopes: Tensor | None = None,
    q_positions: Tensor | None = None,
    dropout_origin: Tensor | None = None,
    **keywords,
) -> Tensor:
    """The packed op's arguments -> out (T_q, H, D_v)."""

    if dropout_origin is None:
        dropout_origin = torch.zeros(len(cu_seqlens_q) - 1, 4, dtype=torch.int64)
        dropout_origin[:, 0] = torch.arange(len(dropout_origin))

    def of_sequence(q: slice, k: slice, slopes: Tensor | None, **of_it) -> Tensor:
        sequence = (x.transpose(0, 1)[None] for x in (query[q], key[k], value[k]))
        per_row = isinstance(alpha, Tensor) and alpha.dim() == 4
        own = alpha[:, :, q] if per_row else alpha
        result = attention(*sequence, own, *options, alibi_slopes=slopes, **of_it, **keywords)
        return result.out[0].transpose(0, 1)

    out = [of_sequence(slice(0), slice(0), None)]  # so that there is one, and a gradient, without any sequence
    for b in range(len(cu_seqlens_q) - 1):
        q, k = (slice(int(ends[b]), int(ends[b + 1])) for ends in (cu_seqlens_q, cu_seqlens_k))
        per_sequence = alibi_slopes is not None and alibi_slopes.dim() == 2
        of_it = dict(dropout_origin=dropout_origin[b, None])
        if q_positions is not None:
            of_it["q_positions"] = q_positions[b, None]
        out.append(of_sequence(q, k, alibi_slopes[b] if per_sequence else alibi_slopes, **of_it))
    return torch.cat(out)
