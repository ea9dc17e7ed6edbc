"""What transformers is told when this is imported: the word, and a look at every model that is built with it.

transformers has registries for attention and mask functions, and none for what else a model needs: parameters before
its weights are loaded, an error where the word would change nothing, and config.json that keeps the word. For these,
six methods of its base classes are extended. Continuous batching asks no registry either, but compares words with those
that it knows; what is extended there, is in serving.py.
"""

import functools
from typing import Any

import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.generation import continuous_batching

from adasplash.integrations.transformers.attention import attention
from adasplash.integrations.transformers.configuration import WORD, hand_down, set_defaults, sub_configs, word_to_save
from adasplash.integrations.transformers.layers import can_switch, cannot_switch, prepare
from adasplash.integrations.transformers.masks import mask
from adasplash.integrations.transformers.normaliser import EntmaxNormaliser
from adasplash.integrations.transformers.serving import can_serve, keep_the_word, leave_in_pages, take_block_tables


def register() -> None:
    """Once in a process."""
    if WORD in AttentionInterface._global_mapping:
        return
    AttentionInterface.register(WORD, attention)
    AttentionMaskInterface.register(WORD, mask)
    set_defaults()
    _extend(PreTrainedModel, "__init__", _init)
    _extend(PreTrainedModel, "post_init", _post_init)
    _extend(PreTrainedModel, "set_attn_implementation", _set_attn_implementation)
    _extend(PreTrainedModel, "_initialize_weights", _initialize_weights)
    _extend(PreTrainedConfig, "to_dict", _to_dict)
    _extend_from_dict()
    if can_serve():
        _extend(continuous_batching.ContinuousBatchingManager, "switch_to_cb_friendly_attn", keep_the_word)
        _extend(continuous_batching.PagedAttentionCache, "update", leave_in_pages)
        _extend(continuous_batching.initialization, "ensure_decode_fast_path_is_available", take_block_tables)


def _extend(owner: Any, name: str, extension) -> None:
    theirs = getattr(owner, name)

    @functools.wraps(theirs)
    def extended(self, *args, **kwargs):
        return extension(theirs, self, *args, **kwargs)

    setattr(owner, name, extended)


def _has_the_word(config: PreTrainedConfig) -> bool:
    return config._attn_implementation == WORD or any(_has_the_word(inner) for _, inner in sub_configs(config))


def _init(theirs, model: PreTrainedModel, config, *args, **kwargs) -> None:
    """Models inside of this one are built next, and with them their layers."""
    if isinstance(config, PreTrainedConfig):
        hand_down(config)
        if config._attn_implementation == WORD and not can_switch(type(model)):
            raise cannot_switch(type(model).__name__)
    theirs(model, config, *args, **kwargs)


def _post_init(theirs, model: PreTrainedModel) -> None:
    """α that are learned are there before weights are loaded, and stay float32."""
    if _has_the_word(model.config):
        prepare(model)
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "alpha_logit"}
        missing = {*(model._keys_to_ignore_on_load_missing or ()), r"entmax_norm\.alpha_logit$"}
        model._keys_to_ignore_on_load_missing = missing
    theirs(model)


def _set_attn_implementation(theirs, model: PreTrainedModel, attn_implementation, *args, **kwargs) -> None:
    if attn_implementation == f"paged|{WORD}":  # continuous batching of older versions says so by itself
        if not can_serve():
            raise NotImplementedError(
                "adasplash: continuous batching must be that of a newer transformers (5.24 is tried), got "
                f"{transformers.__version__}"
            )
        attn_implementation = WORD
    if attn_implementation == WORD and not can_switch(type(model)):
        raise cannot_switch(type(model).__name__)  # theirs warns and goes on
    theirs(model, attn_implementation, *args, **kwargs)
    if attn_implementation == WORD:
        model.config._attn_implementation_internal = WORD  # theirs leaves some away that can be switched
    if _has_the_word(model.config):
        prepare(model)


def _initialize_weights(theirs, model: PreTrainedModel, module, *args, **kwargs) -> None:
    if isinstance(module, EntmaxNormaliser):
        logit = module.alpha_logit
        if logit is None or not getattr(logit, "_is_hf_initialized", False):
            module.reset_parameters()
        module._is_hf_initialized = True
        return
    theirs(model, module, *args, **kwargs)


def _extend_from_dict() -> None:
    theirs = PreTrainedConfig.__dict__["from_dict"].__func__

    @functools.wraps(theirs)
    def from_dict(cls, config_dict, **kwargs):
        """Before 5.4 the word of a config.json is lost here."""
        word = config_dict.get("attn_implementation")
        if word == WORD or (isinstance(word, dict) and WORD in word.values()):
            kwargs.setdefault("attn_implementation", word)
        return theirs(cls, config_dict, **kwargs)

    PreTrainedConfig.from_dict = classmethod(from_dict)


def _to_dict(theirs, config: PreTrainedConfig) -> dict:
    written = theirs(config)
    word = word_to_save(config)
    if word is not None:
        written["attn_implementation"] = word
    return written
