"""The keys that a model's config has for this attention: what they may be, and what they say about one layer."""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from adasplash.masked import LEAST_ALPHA
from adasplash.modules import EntmaxAttention

#: What a user writes as attn_implementation.
WORD = "adasplash"

#: Keys of a config with their defaults, which are not written into config.json.
KEYS: dict[str, Any] = {
    "adasplash_alpha": 1.5,
    "adasplash_local_alpha": None,
    "adasplash_scale": 1.0,
    "adasplash_learn_alpha": False,
}


def set_defaults() -> None:
    """As class attributes they can be given to ``from_pretrained`` and to every config's constructor."""
    for key, default in KEYS.items():
        setattr(PreTrainedConfig, key, default)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_keys(config: PreTrainedConfig) -> None:
    """Raises unless the keys of this config are of a kind and in a range that is served."""
    check_alpha("adasplash_alpha", config.adasplash_alpha)
    if config.adasplash_local_alpha is not None:
        check_alpha("adasplash_local_alpha", config.adasplash_local_alpha)
    if not is_number(config.adasplash_scale):
        raise TypeError(f"adasplash: adasplash_scale must be a number, got {config.adasplash_scale!r}")
    if not isinstance(config.adasplash_learn_alpha, bool):
        raise TypeError(f"adasplash: adasplash_learn_alpha must be True or False, got {config.adasplash_learn_alpha!r}")


def check_alpha(key: str, alpha: Any) -> None:
    """Raises unless `alpha` is a number, a list of a number for each layer, or such a list with lists of a number for
    each head."""
    for each in alpha if isinstance(alpha, (list, tuple)) else (alpha,):
        for number in each if isinstance(each, (list, tuple)) else (each,):
            if not is_number(number):
                raise TypeError(
                    f"adasplash: {key} must be a number, a list of numbers by layer or a list of lists of numbers by "
                    f"layer and head, got {alpha!r}"
                )
            if number != 1 and not LEAST_ALPHA <= number <= 2:
                raise ValueError(f"adasplash: {key} must be 1 or from {LEAST_ALPHA} to 2, got {number}")


def check_learned(numbers: list[float]) -> None:
    """Raises unless α that start here can be learned."""
    low, high = EntmaxAttention.lowest_alpha, EntmaxAttention.highest_alpha
    for number in numbers:
        if not low < number < high:
            raise ValueError(
                f"adasplash: adasplash_alpha must be above {low} and below {high} where adasplash_learn_alpha is True, "
                f"got {number}"
            )


def layer_alpha(config: PreTrainedConfig, layer: int, local: bool) -> float | list[float]:
    """α of one layer: a number, or one for each head."""
    key = "adasplash_local_alpha" if local and config.adasplash_local_alpha is not None else "adasplash_alpha"
    return of_layer(key, getattr(config, key), layer)


def of_layer(key: str, alpha: Any, layer: int) -> float | list[float]:
    """What `alpha`, as :func:`check_alpha` takes it, says about one layer."""
    if not isinstance(alpha, (list, tuple)):
        return float(alpha)
    if layer >= len(alpha):
        raise ValueError(f"adasplash: {key} must have a value for each layer, got {len(alpha)} and a layer {layer}")
    mine = alpha[layer]
    return [float(number) for number in mine] if isinstance(mine, (list, tuple)) else float(mine)


def layer_of(module: nn.Module) -> int:
    """Which layer an attention module belongs to: its own number, or its place among the model's."""
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        layer = getattr(module, "_adasplash_place", 0)
    return layer


def is_local(module: nn.Module) -> bool:
    """Whether a layer sees a window only."""
    kinds = getattr(module.config, "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    if kinds is not None and layer is not None and layer < len(kinds):
        return kinds[layer] == "sliding_attention"
    return getattr(module, "sliding_window", None) is not None


def sub_configs(config: PreTrainedConfig) -> Iterator[tuple[str, PreTrainedConfig]]:
    """The configs inside of a composite model's, by name."""
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield name, inner


def hand_down(config: PreTrainedConfig) -> None:
    """Gives a composite config's keys to the configs inside that do not have their own."""
    for _, inner in sub_configs(config):
        for key in KEYS:
            if key in config.__dict__ and key not in inner.__dict__:
                setattr(inner, key, getattr(config, key))
        hand_down(inner)


def word_to_save(config: PreTrainedConfig) -> Any:
    """What config.json must say as attn_implementation so that a reload gives the same layers to this attention: the
    word, a dictionary where only some of the configs inside have it, None where none has."""
    own = getattr(config, "_attn_implementation", None)
    inner = {name: word_to_save(each) for name, each in sub_configs(config)}
    if own != WORD and not any(inner.values()):
        return None
    if own == WORD and all(word == WORD for word in inner.values()):
        return WORD
    words = {name: word or getattr(config, name)._attn_implementation for name, word in inner.items()}
    return {"": own, **words}
