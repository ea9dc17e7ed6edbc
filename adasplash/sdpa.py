"""``scaled_dot_product_attention``: torch's function with α-entmax in the place of softmax.

``entmax_attn`` has no masks, so a mask is looked at here for what it says. What is found is remembered as long as the
mask lives, as the layers of a model are given the same one.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adasplash._arguments import BOOL, NUMBER, NUMBER_OR_TENSOR, OPTIONAL_TENSOR, TENSOR, check
from adasplash.functional import attend, entmax_attn
from adasplash.masked import MOST_CHANNELS, allow_dense, attend_by_keys, attend_densely, hides_by_channels, parts

_NAME = "scaled_dot_product_attention"


class _Interval(NamedTuple):
    """The keys that a mask leaves to every query of a batch entry: from the first to before the end, (B,) each."""

    starts: Tensor
    ends: Tensor


class _Triangle(NamedTuple):
    """A mask by which query i sees the keys up to i + diagonal."""

    diagonal: int


#: A mask that hides nothing.
_ALL = "all"

_Found = _Interval | _Triangle | str | None


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    alpha: float | Tensor = 1.5,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` with α-entmax in the place of softmax, and all else as
    there: any leading dimensions, which broadcast, dropout wherever dropout_p is given, a causal mask that is aligned
    **top left** (:func:`adasplash.entmax_attn` aligns it bottom right).

    What becomes of attn_mask:

    - hidden keys in front and behind, alike for all queries and heads: ``kv_starts`` and ``kv_seqlens`` of
      ``entmax_attn``. A triangle, the keys up to i + d for query i: its causal mask or window. Both are seen in a
      mask's values, which are read once for each mask, on the host; not in compiled, exported or captured code.
    - other masks of keys, (…, 1, N), with holes or biases, and all of these in compiled code: ``entmax_attn`` with
      heads that are two channels larger. No M×N tensor is built.
    - any other: dense scores and weights, M×N tensors, through :func:`adasplash.entmax`, with one warning; so are
      heads above 256 channels. Above 2²⁸ weights that is an error.

    Jagged nested tensors (B, H, ragged, D) are served as by ``entmax_attn``, without attn_mask.

    Args:
        query: (…, H, M, D), or of two or three dimensions; float32, float16, bfloat16, or float64 on the CPU.
        key: (…, H_kv, N, D).
        value: (…, H_kv, N, D_v).
        attn_mask: broadcasts to (…, H, M, N). Boolean, True where a key is seen, or floating point, added to the scaled
            scores; differentiable. A query that sees no key gives zeros; its type's least number hides as −∞ does.
            On a GPU what is written into it other than by torch's ops may not be seen.
        dropout_p: the share of weights that become zero, 0 or more and below 1.
        is_causal: query i sees the keys up to i. Goes without attn_mask.
        scale: factor of the scores, 1/√D unless given.
        enable_gqa: H is a multiple of H_kv, and neighbouring query heads share a head of key and value.
        alpha: as in ``entmax_attn``. Of shape (H,), heads are the dimension before the last two.

    Returns:
        (…, H, M, D_v), contiguous, in query's type.

    Raises:
        TypeError, ValueError, RuntimeError: an argument does not fit; the message names it.
        NotImplementedError: a mask is dense and too large for that.
    """
    for name, kind, given in (
        ("query", TENSOR, query), ("key", TENSOR, key), ("value", TENSOR, value),
        ("attn_mask", OPTIONAL_TENSOR, attn_mask), ("dropout_p", NUMBER, dropout_p), ("is_causal", BOOL, is_causal),
        ("enable_gqa", BOOL, enable_gqa), ("alpha", NUMBER_OR_TENSOR, alpha),
    ):  # fmt: skip
        check(_NAME, name, kind, given)
    if scale is not None:
        check(_NAME, "scale", NUMBER, scale)
    if attn_mask is not None and is_causal:
        raise ValueError(f"{_NAME}: attn_mask must be None where is_causal is True")
    if query.is_nested or key.is_nested or value.is_nested:
        return _attend_nested(query, key, value, attn_mask, dropout_p, is_causal, scale, alpha)

    query, key, value, attn_mask = _cast(query, key, value, attn_mask)
    lead, (query, key, value), attn_mask = _with_batch_and_heads(query, key, value, attn_mask, enable_gqa, alpha)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    given = query, key, value, alpha
    if attn_mask is None:
        out = _attend(*given, _Triangle(0) if is_causal else _ALL, scale, dropout_p)
    else:
        out = _attend_under(attn_mask, *given, scale, dropout_p)
    return out.reshape(*lead, *out.shape[-2:])


def _attend(query: Tensor, key: Tensor, value: Tensor, alpha, seen: _Found, scale: float, dropout_p: float) -> Tensor:
    """Of four dimensions and without a mask but what `seen` says."""
    if max(query.shape[-1], value.shape[-1]) > MOST_CHANNELS:
        masks = []
        if isinstance(seen, _Triangle):
            ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            masks.append(ones.tril(seen.diagonal))
        return _attend_densely(query, key, value, alpha, masks, scale, dropout_p, f"a head above {MOST_CHANNELS}")
    causal, window, starts, ends = False, (-1, -1), None, None
    if isinstance(seen, _Interval):
        starts, ends = seen
    elif isinstance(seen, _Triangle):
        # Without the keys that nobody sees the last query sees all of them, or there is room to its right.
        most = max(query.shape[2] + seen.diagonal, 0)
        if key.shape[2] > most:
            key, value = key[:, :, :most], value[:, :, :most]
        right = seen.diagonal - (key.shape[2] - query.shape[2])
        causal, window = right == 0, (-1, right if right > 0 else -1)
    return attend(
        _NAME, query, key, value, alpha, causal, scale, None, ends, window, None, starts, dropout_p=dropout_p
    )  # fmt: skip


def _attend_under(
    mask: Tensor, query: Tensor, key: Tensor, value: Tensor, alpha, scale: float, dropout_p: float
) -> Tensor:
    """Of four dimensions, the mask (B or 1, H or 1, M or 1, N) too."""
    by_key = mask.shape[1] == mask.shape[2] == 1
    if max(query.shape[-1], value.shape[-1]) > MOST_CHANNELS:
        return _attend_densely(query, key, value, alpha, [mask], scale, dropout_p, f"a head above {MOST_CHANNELS}")
    if _can_be_read(mask):
        seen = _look(mask)
        if isinstance(seen, _Interval) and seen.starts.shape[0] != query.shape[0]:
            seen = _Interval(*(x.expand(query.shape[0]) for x in seen))
        if seen is not None:
            return _attend(query, key, value, alpha, seen, scale, dropout_p)
    if by_key and hides_by_channels(query.dtype, scale) and query.shape[-1] <= MOST_CHANNELS - 2:
        return attend_by_keys(query, key, value, alpha, mask[:, 0, 0], False, scale, dropout_p)
    option = "an attn_mask other than of keys or a triangle"
    return _attend_densely(query, key, value, alpha, [mask], scale, dropout_p, option)


def _attend_densely(query, key, value, alpha, masks: list, scale: float, dropout_p: float, option: str) -> Tensor:
    allow_dense(_NAME, option, query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2], stacklevel=5)
    return attend_densely(query, key, value, alpha, scale, masks, dropout_p)[0]


def _attend_nested(query, key, value, attn_mask, dropout_p, is_causal, scale, alpha) -> Tensor:
    if attn_mask is not None:
        raise ValueError(f"{_NAME}: attn_mask must be None where query is a nested tensor")
    jagged = all(x.is_nested and x.layout == torch.jagged for x in (query, key, value))
    if is_causal and jagged and query.offsets() is not key.offsets():
        raise ValueError(f"{_NAME}: is_causal with nested tensors needs key to be ragged as query is")
    return entmax_attn(query, key, value, alpha, is_causal, scale, dropout_p=dropout_p)


def _cast(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple:
    """What autocast makes of them for torch's function."""
    device = query.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):  # others, as meta, it does not know
        return query, key, value, mask
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype)
        for x in (query, key, value, mask)
    )


def _with_batch_and_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, enable_gqa: bool, alpha
) -> tuple[tuple, list[Tensor], Tensor | None]:
    """All leading dimensions of the result, and the tensors with four dimensions. With three the first is the batch,
    so that a mask of keys may differ in it, unless heads mean something."""
    tensors = [query, key, value]
    rank = max(x.dim() for x in tensors)
    for name, x in zip(("query", "key", "value"), tensors, strict=True):
        if x.dim() < 2:
            raise ValueError(f"{_NAME}: {name} must have 2 dimensions or more, got {x.dim()}")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"{_NAME}: attn_mask must be Boolean or floating point, got {mask.dtype}")
        if mask.device != query.device:
            raise ValueError(f"{_NAME}: attn_mask must be on query's device {query.device}, got {mask.device}")
        if mask.dim() > rank:
            raise ValueError(f"{_NAME}: attn_mask must have at most {rank} dimensions, as query has, got {mask.dim()}")
        tensors.append(mask)
    tensors = [x[(None,) * (rank - x.dim())] for x in tensors]
    heads_are_meant = rank != 3 or enable_gqa or (isinstance(alpha, Tensor) and alpha.dim() == 1)
    if rank == 2:
        tensors = [x[None, None] for x in tensors]
    elif rank == 3:
        tensors = [x.unsqueeze(0 if heads_are_meant else 1) for x in tensors]

    query, key, value = tensors[:3]
    heads = _same_heads(query, key, value, enable_gqa)
    try:
        batch = torch.broadcast_shapes(*(x.shape[:-3] for x in tensors[:3]))
    except RuntimeError:
        sizes = ", ".join(str(list(x.shape[:-3])) for x in tensors[:3])
        raise ValueError(f"{_NAME}: the batches of query, key and value must broadcast, got {sizes}") from None
    whole = [x.expand(*batch, count, -1, -1).flatten(0, -4) for x, count in zip(tensors, heads, strict=False)]
    lead = (*batch, heads[0])
    if rank < 4:
        lead = () if rank == 2 else lead[1:] if heads_are_meant else lead[:1]
    if mask is not None:
        mask = _fitted(tensors[3], (*batch, heads[0], query.shape[-2], key.shape[-2]))
    return lead, whole, mask


def _same_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[int, int, int]:
    """How many heads each is expanded to. One head of key and value need not be, as all heads of query share it."""
    of_query, of_key, of_value = (x.shape[-3] for x in (query, key, value))
    if enable_gqa:
        if of_key != of_value or of_query % of_key != 0:
            raise ValueError(
                f"{_NAME}: query's heads must be a multiple of key's and value's, which are alike, got {of_query}, "
                f"{of_key} and {of_value}"
            )
        return of_query, of_key, of_value
    try:
        (heads,) = torch.broadcast_shapes((of_query,), (of_key,), (of_value,))
    except RuntimeError:
        raise ValueError(
            f"{_NAME}: the heads of query, key and value must broadcast where enable_gqa is False, got {of_query}, "
            f"{of_key} and {of_value}"
        ) from None
    shared = 1 if of_key == of_value == 1 else heads
    return heads, shared, shared


def _fitted(mask: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(B or 1, H or 1, M or 1, N), without the heads and queries over which it is expanded."""
    for size, wanted in zip(mask.shape, sizes, strict=True):
        if size not in (1, wanted):
            raise ValueError(f"{_NAME}: attn_mask must broadcast to {list(sizes)}, got {list(mask.shape)}")
    for dim in (-3, -2):
        if mask.stride(dim) == 0 and mask.shape[dim] > 0:
            mask = mask.narrow(dim, 0, 1)
    mask = mask.expand(*mask.shape[:-1], sizes[-1])
    if all(size == 1 for size in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*sizes[:-3], -1, -1, -1).flatten(0, -4)


def _can_be_read(mask: Tensor) -> bool:
    """Whether the values of a mask are there, and reading them costs no more than waiting."""
    if torch.compiler.is_compiling() or type(mask) not in (Tensor, nn.Parameter) or mask.is_meta:
        return False
    if mask.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(mask):
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


_looked_at: dict[int, tuple] = {}
_MOST_COPIED = 1 << 22  # elements of a mask on the CPU of which a copy is kept; larger ones are read in every call


def _look(mask: Tensor) -> _Found:
    """What a mask (B, H or 1, M or 1, N) says, None where that is neither an interval nor a triangle."""
    # Views of a mask are new tensors in every call; what lives on is that of which they are views.
    base = mask if mask._base is None else mask._base
    if base.is_inference():
        return _find(mask)
    place = mask.storage_offset(), mask.shape, mask.stride(), mask.dtype, base._version
    known = _looked_at.get(id(base))
    same = known is not None and known[0]() is base and known[1] == place
    if same and (known[2] is None or torch.equal(known[2], mask)):
        return known[3]
    with torch.inference_mode(False):  # a later call may save it for its backward
        found = _find(mask)
        # The version does not count what is written by way of numpy or .data; to compare costs little on the CPU.
        on_cpu = mask.device.type == "cpu"
        if on_cpu and mask.numel() > _MOST_COPIED:
            return found
        copy = mask.detach().clone() if on_cpu else None
    number = id(base)
    _looked_at[number] = weakref.ref(base, lambda _: _looked_at.pop(number, None)), place, copy, found
    return found


@torch.no_grad()
def _find(mask: Tensor) -> _Found:
    hidden, added = parts(mask)
    if added is not None and bool((added != 0).any()):
        return None
    seen = ~hidden
    if bool(seen.all()):
        return _ALL
    batch, heads, rows, keys = seen.shape
    if heads == rows == 1:
        seen = seen[:, 0, 0]
        places = torch.arange(keys, device=seen.device)
        ends = torch.where(seen, places + 1, 0).amax(1)
        starts = torch.minimum(torch.where(seen, places, keys).amin(1), ends)
        return _Interval(starts, ends) if bool((seen.sum(1) == ends - starts).all()) else None
    if batch == heads == 1:
        diagonal = int(seen[0, 0, 0].sum()) - 1
        if torch.equal(seen[0, 0], torch.ones_like(seen[0, 0]).tril(diagonal)):
            return _Triangle(diagonal)
    return None
