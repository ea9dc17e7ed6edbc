"""The mask function that transformers calls once for all layers, and the tensors by which it tells them what to do.

A mask is None or one tensor of four dimensions: transformers hands such a tensor on as it is, while one of two would be
taken for attention_mask and be built into a mask again. Its type and shape say what it is, and its values are on the
device, so that nothing need be read there:

=================================  =====================================================================================
None                               whatever the layer says of itself: causal or not, a window or none
int32 (B, 1, 1, 2)                 first key, end of keys: every query sees these
int32 (B, 1, W, 3)                 first key, end of keys, end of queries: causal
int32 (B, 1, W, 4)                 the same and a number without meaning: a window both ways
int64 (1, 1, W, S + 1)             where packed sequences begin, and their end: causal
bool or float (B or 1, ·, M, N)    anything else: weights are computed densely
=================================  =====================================================================================

W is 1 for no window, else 2 more than the keys that it reaches to the left. Rows beyond the first say nothing and take
no memory.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from adasplash.integrations.transformers.patterns import read

#: In the place of a length that is none.
NOT_SERVED = -1

_NAMES_OF_SDPA_MASK = frozenset(inspect.signature(masking_utils.sdpa_mask).parameters) - {"kwargs"}


class Lengths(NamedTuple):
    """An int32 mask, taken apart."""

    starts: Tensor
    ends: Tensor
    query_ends: Tensor | None
    causal: bool
    window: int | None


class Offsets(NamedTuple):
    """An int64 mask, taken apart."""

    cu_seqlens: Tensor
    window: int | None


def mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """A mask as this module's first lines describe it.

    Args:
        batch_size, kv_length, q_length, q_offset, kv_offset, mask_function, attention_mask: as transformers has them
            since 5.4; before, `others` has cache_position in the place of q_length and q_offset.
        others: what else transformers gives to its own mask functions.
    """
    positions = others.get("cache_position")
    if positions is not None:
        q_length = positions.shape[0]
        q_offset = kv_offset if q_length == kv_length else positions[0]
    given = {
        "batch_size": batch_size,
        "kv_length": kv_length,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **others,
    }
    if positions is None:
        given |= {"q_length": q_length, "q_offset": q_offset}

    pattern = read(mask_function, kv_length + kv_offset, others)
    if pattern is None:
        return _dense(given)
    skipped = "allow_is_causal_skip" if pattern.causal else "allow_is_bidirectional_skip"
    wanted = others.get(skipped, True) or (pattern.causal and q_length == 1)
    compiling = torch.compiler.is_compiling()
    if pattern.packed is not None and compiling and (attention_mask is not None or q_length != kv_length):
        # Positions tell sequences apart only where there is neither a mask nor a cache.
        pattern = pattern.__class__(pattern.causal, pattern.window)
    if pattern.packed is not None and isinstance(q_offset, int) and q_offset == 0 and attention_mask is None:
        return _packed(pattern.packed, pattern.window, batch_size, q_length, others)
    if pattern.packed is not None or not wanted:  # not wanted: the model computes with the mask itself
        return _dense(given)

    held = q_offset - kv_offset
    known = not isinstance(held, Tensor)
    if not pattern.causal and pattern.window is not None and not (known and held == 0 and q_length == kv_length):
        return _dense(given)
    window = pattern.window
    if window is not None and isinstance(kv_length, int) and kv_length <= window + 1:
        window = None
    aligned = known and (not pattern.causal or held == kv_length - q_length)
    # A decoder that its config makes an encoder has layers that still call themselves causal.
    says_itself = pattern.causal or getattr(others.get("config"), "is_causal", True)
    bare = aligned and window is None and says_itself
    if attention_mask is None:
        if bare:
            return None
        device = others.get("device") if positions is None else positions.device
        starts = torch.zeros(batch_size, dtype=torch.int64, device=device)
        ends = torch.full((batch_size,), kv_length, dtype=torch.int64, device=device)
    else:
        seen = _seen_keys(attention_mask, kv_length, kv_offset)
        starts, ends, full, whole = _ends_of(seen)
        if compiling or seen.is_meta:
            ends = _or_an_error(whole, ends)
        else:
            full, whole = torch.stack([full, whole]).tolist()
            if full and bare:
                return None
            if not whole:
                return _dense(given)
    return _lengths(starts, ends, held, q_length, pattern.causal, window)


def _dense(given: dict[str, Any]) -> Tensor | None:
    """transformers' own mask, which hides each key by itself."""
    given = given | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(**{name: value for name, value in given.items() if name in _NAMES_OF_SDPA_MASK})


def _lengths(
    starts: Tensor, ends: Tensor, held: int | Tensor, q_length: int, causal: bool, window: int | None
) -> Tensor:
    """Keys from starts on and before ends, of which queries see some, the first query beside the `held`-th."""
    if causal:  # where the ends are none, they stay so
        last = held + q_length  # a symbol in exported code, which as_tensor would make a constant of
        ends = torch.minimum(ends, last.to(ends.device)) if isinstance(last, Tensor) else ends.clamp(max=last)
    if q_length == 1 and (causal or window is not None):
        if window is not None:
            starts = torch.maximum(starts, torch.as_tensor(held - window, device=starts.device))
        return _encode([starts, ends], None)
    if not causal and window is None:
        return _encode([starts, ends], None)
    query_ends = (ends - held).clamp(0, q_length)
    values = [starts, ends, query_ends] if causal else [starts, ends, query_ends, query_ends]
    return _encode(values, window)


def _seen_keys(attention_mask: Tensor, kv_length: int, kv_offset: int) -> Tensor:
    """(B, kv_length), the part of attention_mask that is about the keys that are held."""
    seen = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return seen[:, kv_offset : kv_offset + kv_length].to(torch.bool)


def _ends_of(seen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First key and end of keys, and as Boolean tensors whether all keys are seen, and all of those in between."""
    length = seen.shape[1]
    places = torch.arange(length, device=seen.device)
    ends = torch.where(seen, places + 1, 0).amax(1)
    starts = torch.minimum(torch.where(seen, places, length).amin(1), ends)
    count = seen.sum(1)
    return starts, ends, (count == length).all(), (count == ends - starts).all()


def _or_an_error(fits: Tensor, values: Tensor) -> Tensor:
    """`values`, lengths or offsets for the op, unless compiled code finds that they do not say what the mask does, as
    there are holes in attention_mask for instance. −1 is an error of the op's on the CPU. A GPU's kernels look at no
    lengths, so there it is an assertion."""
    if values.device.type == "cuda":
        torch._assert_async(fits, "adasplash: attention_mask must not hide keys in between in compiled code")
        return values
    return torch.where(fits, values, NOT_SERVED)


def _encode(values: list[Tensor], window: int | None) -> Tensor:
    encoded = torch.stack(values, -1).to(torch.int32)[:, None, None, :]
    return encoded if window is None else encoded.expand(-1, -1, window + 2, -1)


def _packed(packed: Tensor | Callable, window: int | None, batch: int, length: int, others: dict) -> Tensor:
    if isinstance(packed, Tensor):
        begins = torch.ones_like(packed, dtype=torch.bool)
        begins[:, 1:] = packed[:, 1:] != packed[:, :-1]
        offsets = offsets_of(begins.expand(batch, -1))
    else:
        device = others.get("device")
        if device is None:
            device = others["cache_position"].device
        row = torch.arange(batch, device=device)[:, None, None, None]
        place = torch.arange(1, length, device=device)[None, None, :, None]
        apart = ~packed(row, torch.zeros_like(row), place, place - 1)
        ahead = packed(row, torch.zeros_like(row), place - 1, place)
        apart = apart.expand(batch, 1, length - 1, 1).reshape(batch, length - 1)
        begins = torch.nn.functional.pad(apart, (1, 0), value=True)
        offsets = _or_an_error(~ahead.any(), offsets_of(begins))
    encoded = offsets[None, None, None]
    return encoded if window is None else encoded.expand(-1, -1, window + 2, -1)


def offsets_of(begins: Tensor) -> Tensor:
    """Offsets of the sequences that begin where `begins`, (B, M), is True, over all B · M tokens. Compiled code has as
    many as there are tokens, of sequences without any behind the others."""
    begins = begins.reshape(-1)
    total = begins.shape[0]
    if torch.compiler.is_compiling() or begins.is_meta:
        places = torch.arange(total, device=begins.device)
        offsets = torch.where(begins, places, total).sort().values
    else:
        offsets = begins.nonzero().squeeze(1)
    return torch.nn.functional.pad(offsets, (0, 1), value=total)


def decode(mask: Tensor | None) -> Lengths | Offsets | Tensor | None:
    """What a mask that a layer was given says; a Boolean or floating point one comes back as it is."""
    if mask is None or mask.dtype == torch.bool or mask.is_floating_point():
        return mask
    window = mask.shape[2] - 2 if mask.dim() == 4 and mask.shape[2] > 1 else None
    if mask.dim() == 4 and mask.dtype == torch.int64 and mask.shape[:2] == (1, 1):
        return Offsets(mask[0, 0, 0], window)
    if mask.dim() != 4 or mask.dtype != torch.int32 or mask.shape[1] != 1 or mask.shape[3] not in (2, 3, 4):
        raise ValueError(
            "adasplash: attention_mask must be what the mask function made, Boolean or floating point, got "
            f"{str(mask.dtype).removeprefix('torch.')} of sizes {list(mask.shape)}"
        )
    starts, ends, *query_ends = mask[:, 0, 0].unbind(-1)
    return Lengths(starts, ends, query_ends[0] if query_ends else None, len(query_ends) == 1, window)


def to_boolean(mask: Lengths | Offsets, batch: int, queries: int, keys: int) -> Tensor:
    """(B, 1, M, N), True where a key is seen."""
    device = mask[0].device
    query, key = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)
    if isinstance(mask, Offsets):
        token = torch.arange(batch * queries, device=device)
        number = torch.searchsorted(mask.cu_seqlens[1:].contiguous(), token, right=True).view(batch, 1, -1)
        seen = (number.unsqueeze(-1) == number.unsqueeze(-2)) & (key <= query)
        return seen if mask.window is None else seen & (key >= query - mask.window)
    starts, ends = (x.view(-1, 1, 1, 1) for x in mask[:2])
    seen = ((key >= starts) & (key < ends)).expand(-1, -1, queries, -1)
    if mask.query_ends is None:
        return seen
    query_ends = mask.query_ends.view(-1, 1, 1, 1)
    place = query + ends - query_ends
    seen = seen & (query < query_ends)
    if mask.causal:
        seen = seen & (key <= place)
    elif mask.window is not None:
        seen = seen & (key <= place + mask.window)
    return seen if mask.window is None else seen & (key >= place - mask.window)
