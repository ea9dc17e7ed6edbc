"""The attention function that transformers' layers call."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import output_capturing

from adasplash.functional import entmax_attn, entmax_attn_varlen
from adasplash.integrations.transformers.indexed_cache import index_of
from adasplash.integrations.transformers.layers import alpha_of
from adasplash.integrations.transformers.masks import NOT_SERVED, Lengths, Offsets, decode, offsets_of, to_boolean
from adasplash.integrations.transformers.serving import attend_to_cache, is_served, window_of_cache
from adasplash.masked import MOST_CHANNELS, allow_dense, attend_densely
from adasplash.summary import entmax_attn_summary, entmax_attn_varlen_summary

#: Arguments of layers that choose keys themselves.
_NOT_SERVED = ("indices", "block_indices")


class _Call(NamedTuple):
    """What a layer asks for, whichever way it is served."""

    layer: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    alpha: float | Tensor
    scale: float
    dropout_p: float
    causal: bool
    #: How far a query sees, to the left if causal, else both ways.
    window: int | None


class _ScoreChanges(NamedTuple):
    """What changes scores and only dense attention has, None where it is not asked for."""

    softcap: float | None
    position_bias: Tensor | None
    sinks: Tensor | None


class _Packed(NamedTuple):
    """Sequences that lie behind each other: where those of queries and of keys begin, and how long the longest are
    where that is known."""

    cu_seqlens: tuple[Tensor, Tensor]
    longest: tuple[Any, Any] = (None, None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """α-entmax attention as transformers' AttentionInterface has it.

    Args:
        module: the attention layer, with its config.
        query, key, value: (B, H, M, D), (B, H_kv, N, D) and (B, H_kv, N, D_v).
        attention_mask: what the mask function (masks.py) made, or a Boolean or floating point mask of the user's.
        s_aux: (H,), attention sinks.
        kwargs: cu_seq_lens_q and cu_seq_lens_k with max_length_q and max_length_k where sequences are packed,
            position_ids, output_attentions, and what continuous batching adds (serving.py); others are not looked at.

    Returns:
        (B, M, H, D_v), and the weights (B, H, M, N) where they are asked for.
    """
    name = type(module).__name__
    for option in _NOT_SERVED:
        if kwargs.get(option) is not None:
            raise NotImplementedError(f"adasplash: {name} chooses keys by {option}, and that is not served")
    batch = max(query.shape[0], key.shape[0])  # learned queries may be there once for all of the batch
    query, key, value = (x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (query, key, value))
    scale = _scale_of(module, query) if scaling is None else scaling
    scale = scale * module.config.adasplash_scale
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    served = is_served(kwargs)
    if served and sliding_window is None:
        sliding_window = window_of_cache(module)
    call = _Call(
        module, query, key, value, alpha_of(module, query), scale, dropout if module.training else 0.0, is_causal,
        sliding_window - 1 if sliding_window is not None and sliding_window > 0 else None,
    )  # fmt: skip
    wanted = bool(kwargs.get("output_attentions")) or _weights_are_captured()
    changes = _ScoreChanges(softcap, position_bias, s_aux)
    if served:
        return _attend_served(call, changes, wanted, kwargs), None

    call, mask, packed = _form_of(call, decode(attention_mask), kwargs)
    option = _option_beyond(call, mask, changes)
    if option is not None:
        allow_dense(f"adasplash: {name}", option, batch * query.shape[1] * query.shape[2] * key.shape[2])
    if option is not None or wanted:
        out, weights = _attend_densely(call, mask, packed, changes)
        return out.transpose(1, 2).contiguous(), weights if wanted else None
    if packed is not None:
        return _attend_packed(call, packed), None
    return _attend(call, mask).transpose(1, 2).contiguous(), None


def _form_of(
    call: _Call, mask: Tensor | Lengths | Offsets | None, kwargs: dict[str, Any]
) -> tuple[_Call, Tensor | Lengths | None, _Packed | None]:
    """The call as its mask has it; the mask, unless others say what it does; and where packed sequences begin, by the
    layer's own arguments, the mask, or positions."""
    packed = None
    if kwargs.get("cu_seq_lens_q") is not None:
        packed = _Packed(
            (kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k")),
            (kwargs.get("max_length_q"), kwargs.get("max_length_k")),
        )
    if isinstance(mask, Offsets):
        call = call._replace(causal=True, window=mask.window)
        return call, None, packed or _Packed((mask.cu_seqlens, mask.cu_seqlens))
    if isinstance(mask, Lengths):
        call = call._replace(causal=mask.causal, window=mask.window)
    if packed is None and (mask is None or (isinstance(mask, Lengths) and _is_window_alone(mask, call.key.shape[2]))):
        offsets = _offsets_of_positions(call.layer, call.query, call.key, kwargs.get("position_ids"))
        packed = None if offsets is None else _Packed((offsets, offsets))
    if packed is not None and isinstance(mask, Lengths):
        mask = None  # a window; offsets say the rest
    return call, mask, packed


def _option_beyond(call: _Call, mask: Tensor | Lengths | None, changes: _ScoreChanges) -> str | None:
    """What the operator has not of what a layer asks for; dense attention has it."""
    if changes.softcap is not None:
        return "softcap"
    if changes.position_bias is not None:
        return "position_bias"
    if changes.sinks is not None:
        return "s_aux (attention sinks)"
    if isinstance(mask, Tensor):
        return "an attention_mask that hides more than keys in front and behind"
    if max(call.query.shape[-1], call.value.shape[-1]) > MOST_CHANNELS:
        return f"a head size above {MOST_CHANNELS}"
    return None


def _attend_served(call: _Call, changes: _ScoreChanges, wanted: bool, kwargs: dict[str, Any]) -> Tensor:
    """Continuous batching, where the cache says which keys there are."""
    option = "output_attentions" if wanted else "record" if _is_recorded(call.layer) else None
    option = option or _option_beyond(call, None, changes)
    if option is not None:
        raise NotImplementedError(
            f"adasplash: {type(call.layer).__name__}: {option} is not served in continuous batching"
        )
    return attend_to_cache(call.query, call.key, call.value, call.alpha, call.scale, call.window, kwargs)


def _attend_densely(
    call: _Call, mask: Tensor | Lengths | None, packed: _Packed | None, changes: _ScoreChanges
) -> tuple[Tensor, Tensor]:
    """(B, H, M, D_v) and the weights, (B, H, M, N)."""
    if isinstance(mask, Tensor):
        seen = mask
    elif packed is not None:
        seen = _seen_packed(call, *packed.cu_seqlens)
    else:
        seen = _seen(call, mask)
    softcap, position_bias, sinks = changes
    out, weights = attend_densely(
        call.query, call.key, call.value, call.alpha, call.scale, (position_bias, seen), call.dropout_p, softcap, sinks
    )
    if isinstance(mask, Lengths) and torch.compiler.is_compiling():
        out = out.masked_fill((mask.ends == NOT_SERVED).view(-1, 1, 1, 1), torch.nan)
    _recorder(call.layer, "add_weights", call.alpha, weights, seen)
    return out, weights


def _attend(call: _Call, mask: Lengths | None) -> Tensor:
    """The padded form, (B, H, M, D_v)."""
    options: dict[str, Any] = {"is_causal": call.causal, "scale": call.scale, "dropout_p": call.dropout_p}
    if call.window is not None:
        options["window"] = (call.window, 0 if call.causal else call.window)
    if mask is not None:
        options |= {"kv_starts": mask.starts, "kv_seqlens": mask.ends}
        if mask.query_ends is not None:
            options["q_seqlens"] = mask.query_ends
    given = call.query, call.key, call.value, call.alpha
    if _is_recorded(call.layer):
        out, stats = entmax_attn_summary(*given, **options)
        _recorder(call.layer, "add", call.alpha, stats)
        return out
    return entmax_attn(*given, **options, key_index=index_of(call.key))


def _attend_packed(call: _Call, packed: _Packed) -> Tensor:
    """The packed form, (B, M, H, D_v): all tokens of the batch lie behind each other."""
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (call.query, call.key, call.value))
    # The longest sequence where it is known, else a bound: nothing is read from the device.
    longest = [
        length if isinstance(length, int) else x.shape[0]
        for length, x in zip(packed.longest, (query, key), strict=True)
    ]
    options: dict[str, Any] = {"is_causal": call.causal, "scale": call.scale, "dropout_p": call.dropout_p}
    if call.window is not None:
        options["window"] = (call.window, 0 if call.causal else call.window)
    given = query, key, value, *packed.cu_seqlens, *longest, call.alpha
    if _is_recorded(call.layer):
        out, stats = entmax_attn_varlen_summary(*given, **options)
        _recorder(call.layer, "add", call.alpha, stats)
    else:
        out = entmax_attn_varlen(*given, **options)
    return out.unflatten(0, call.query.shape[:1] + call.query.shape[2:3])


def _seen(call: _Call, mask: Lengths | None) -> Tensor | None:
    """Which keys are seen, (B or 1, 1, M, N), None for all."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    if mask is not None:
        return to_boolean(mask, call.query.shape[0], queries, keys)
    if not call.causal and call.window is None:
        return None
    ends = torch.full((1,), keys, device=call.query.device)
    whole = Lengths(torch.zeros_like(ends), ends, torch.full_like(ends, queries), call.causal, call.window)
    return to_boolean(whole, 1, queries, keys)


def _seen_packed(call: _Call, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    if cu_seqlens_q is not cu_seqlens_k and call.query.shape[2] != call.key.shape[2]:
        raise NotImplementedError(
            f"adasplash: {type(call.layer).__name__}: cu_seq_lens_q must be cu_seq_lens_k where weights are dense"
        )
    shape = call.query.shape[0], call.query.shape[2], call.key.shape[2]
    seen = to_boolean(Offsets(cu_seqlens_q, call.window), *shape)
    return seen if call.causal else seen | seen.transpose(-2, -1)


def _scale_of(layer: nn.Module, query: Tensor) -> float:
    """The scale of a layer that gives none: 1/√D, but for GPT-2, which has options and before 5.4 tells nobody."""
    scale = query.shape[-1] ** -0.5 if getattr(layer, "scale_attn_weights", True) else 1.0
    return scale / (layer.layer_idx + 1) if getattr(layer, "scale_attn_by_inverse_layer_idx", False) else scale


def _weights_are_captured() -> bool:
    """Whether output_attentions was given to the model: not all of them tell their layers."""
    collector = output_capturing._active_collector
    collected = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return collected is not None and any(key.endswith("attentions") for key in collected)


def _is_recorded(layer: nn.Module) -> bool:
    norm = getattr(layer, "entmax_norm", None)
    return norm is not None and len(norm.recorders) > 0


def _recorder(layer: nn.Module, method: str, *facts: Any) -> None:
    if _is_recorded(layer):
        for recorder in layer.entmax_norm.recorders:
            getattr(recorder, method)(*facts)


def _is_window_alone(mask: Lengths, keys: int) -> bool:
    """Whether there is a window and no padding, as far as that can be read."""
    if mask.window is None or torch.compiler.is_compiling() or mask.starts.is_meta:
        return False
    return bool(((mask.starts == 0) & (mask.ends == keys)).all())


_last_positions: tuple[Any, int, int, Tensor | None] | None = None


def _offsets_of_positions(module: nn.Module, query: Tensor, key: Tensor, position_ids: Any) -> Tensor | None:
    """Where positions fall, a packed sequence begins. Some models show positions to their layers and not to the mask
    function, and it does not look at them where there is a cache."""
    batch, length = query.shape[0], query.shape[2]
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or length == 1 or key.shape[2] != length:
        return None
    crossed = getattr(module, "is_cross_attention", False) or "cross" in type(module).__name__.lower()
    if crossed or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != length:
        return None
    compiling = torch.compiler.is_compiling() or position_ids.is_meta
    global _last_positions
    keep = not compiling and not position_ids.is_inference()
    if keep and _last_positions is not None:  # all layers of a model are given the same
        positions, version, rows, offsets = _last_positions
        if positions() is position_ids and version == position_ids._version and rows == batch:
            return offsets
    begins = torch.nn.functional.pad(position_ids[:, 1:] <= position_ids[:, :-1], (1, 0), value=True)
    offsets = offsets_of(begins.expand(batch, -1))
    if not compiling and offsets.shape[0] == batch + 1:
        offsets = None  # a sequence in each row: nothing is packed
    if keep:
        _last_positions = weakref.ref(position_ids), position_ids._version, batch, offsets
    return offsets
