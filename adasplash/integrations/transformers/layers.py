"""Which modules of a model attend through transformers' interface, and what each of them is given."""

import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from adasplash.integrations.transformers.configuration import (
    WORD,
    check_keys,
    check_learned,
    is_local,
    layer_alpha,
    layer_of,
    sub_configs,
)
from adasplash.integrations.transformers.normaliser import EntmaxNormaliser


@functools.cache
def _source(kind: type) -> str:
    """The source of a class and of what it derives from, as far as these are parts of a model."""
    text = ""
    for each in kind.__mro__:
        if not each.__module__.startswith("torch.") and each is not object:
            try:
                text += inspect.getsource(each)
            except (OSError, TypeError):
                continue
    return text


def _asks_the_interface(module: nn.Module) -> bool:
    return not isinstance(module, PreTrainedModel) and "ALL_ATTENTION_FUNCTIONS" in _source(type(module))


def _has_its_own_softmax(module: nn.Module) -> bool:
    kind = type(module)
    if "Attention" not in kind.__name__ or isinstance(module, PreTrainedModel):
        return False
    return "softmax(" in _source(kind) and not _asks_the_interface(module)


def attention_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model`, by name, that attend by this library: they ask the interface, with a config that has the
    word."""
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == WORD and _asks_the_interface(module):
            yield name, module


def refuse_what_cannot_be_switched(model: PreTrainedModel) -> None:
    """Raises where a part of the model would go on with softmax, whatever its config says."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation == WORD:
            if not can_switch(type(module)):
                raise cannot_switch(type(module).__name__)
            for inner in module.modules():
                config = getattr(inner, "config", module.config)
                if getattr(config, "_attn_implementation", WORD) == WORD and _has_its_own_softmax(inner):
                    raise cannot_switch(f"{type(module).__name__} (its {type(inner).__name__})")


def can_switch(kind: type[PreTrainedModel]) -> bool:
    """Whether a model class asks the interface, as transformers knows, or as its source shows in a form that some had
    before 5.4."""
    if kind._can_set_attn_implementation():
        return True
    try:
        return "ALL_ATTENTION_FUNCTIONS[" in inspect.getsource(sys.modules[kind.__module__])
    except (OSError, TypeError, KeyError):
        return False


def cannot_switch(name: str) -> ValueError:
    """The error for a model class that goes on with softmax."""
    return ValueError(
        f'adasplash: {name} must ask transformers\' AttentionInterface to take attn_implementation="{WORD}"; it '
        "computes softmax itself, whatever attn_implementation is"
    )


def _heads(module: nn.Module) -> int:
    for source in (module, module.config):
        for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
            heads = getattr(source, name, None)
            if isinstance(heads, int):
                return heads
    raise ValueError(f"adasplash: {type(module).__name__} must say how many heads it has, as num_heads")


def prepare(model: PreTrainedModel, again: bool = False) -> None:
    """Gives every attention layer its ``entmax_norm``, after a look at whether all of them can be switched.

    Args:
        again: also to layers that have one.
    """
    refuse_what_cannot_be_switched(model)
    unnumbered = 0
    made = []  # and given at last, so that an error changes no layer
    for _, module in attention_layers(model):
        if getattr(module, "layer_idx", None) is None:
            module._adasplash_place = unnumbered
            unnumbered += 1
        if again or not isinstance(getattr(module, "entmax_norm", None), EntmaxNormaliser):
            made.append((module, _make(module, layer_alpha(module.config, layer_of(module), is_local(module)))))
    for module, norm in made:
        module.entmax_norm = norm


def _make(module: nn.Module, alpha: float | list[float], scheduled: bool = False) -> EntmaxNormaliser:
    config = module.config
    check_keys(config)
    learn = config.adasplash_learn_alpha and not scheduled
    if learn:
        check_learned(alpha if isinstance(alpha, list) else [alpha])
    made = EntmaxNormaliser(_heads(module), alpha, learn, scheduled)
    anchor = next(module.parameters(), None)
    if anchor is not None:
        made = made.to(anchor.device)
    return made.train(module.training)


def hold_alpha_in_tensors(model: nn.Module) -> None:
    """So that α can be changed in place, without compiling again."""
    for _, module in attention_layers(model):
        norm = module.entmax_norm
        if norm.alpha_logit is not None:
            raise ValueError("adasplash: adasplash_learn_alpha must be False where α is scheduled")
        if norm.alpha is None:
            module.entmax_norm = _make(module, norm.start, scheduled=True)


def alpha_of(module: nn.Module, query: Tensor) -> float | Tensor:
    """α of a layer, for the heads of `query`."""
    norm = getattr(module, "entmax_norm", None)
    if norm is None:  # the model was not seen at construction
        if module.config.adasplash_learn_alpha:
            raise RuntimeError(
                f"adasplash: {type(module).__name__} has no α to learn; call "
                "adasplash.integrations.transformers.configure(model) once it is built"
            )
        alpha = layer_alpha(module.config, layer_of(module), is_local(module))
        return alpha if isinstance(alpha, float) else query.new_tensor(alpha)
    alpha = norm()
    if isinstance(alpha, Tensor) and alpha.dim() == 1 and alpha.shape[0] != query.shape[1]:
        raise RuntimeError(
            f"adasplash: {type(module).__name__} has α of {alpha.shape[0]} heads and a query of {query.shape[1]}; "
            "a tensor-parallel plan goes with one α for all heads of a layer"
        )
    return alpha


def configure(
    model: PreTrainedModel,
    *,
    alpha: float | list | None = None,
    local_alpha: float | list | None = None,
    scale: float | None = None,
    learn_alpha: bool | None = None,
) -> PreTrainedModel:
    """Switches a model in hand to this attention, or one that has it to other values. What is not given stays.

    Where α is learned and any of them but scale is given, α start anew from the config's, in new parameters: make the
    optimiser afterwards.

    Args:
        model: any model of transformers whose layers ask its AttentionInterface.
        alpha: adasplash_alpha of its config: a number, 1 or from 1.01 to 2; a list of one for each layer; or of a list
            with one for each head.
        local_alpha: adasplash_local_alpha, the same for layers that see a window only.
        scale: adasplash_scale, a factor of the scores on top of the model's own.
        learn_alpha: adasplash_learn_alpha: α of each head is a parameter that starts as said by alpha.

    Returns:
        `model`.

    Raises:
        ValueError, TypeError: the model cannot be switched, or a value does not fit; the message names it. Nothing has
            changed then.
    """
    given = {
        "adasplash_alpha": alpha,
        "adasplash_local_alpha": local_alpha,
        "adasplash_scale": scale,
        "adasplash_learn_alpha": learn_alpha,
    }
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    with _unchanged_by_errors(configs.values()):
        for config in configs.values():
            for key, value in changes.items():
                setattr(config, key, value)
            check_keys(config)
        if not any(True for _ in attention_layers(model)):
            model.set_attn_implementation(WORD)
        starts_anew = changes.keys() - {"adasplash_scale"}
        prepare(model, again=bool(starts_anew))
        if not any(True for _ in attention_layers(model)):
            raise cannot_switch(type(model).__name__)
    return model


@contextmanager
def _unchanged_by_errors(configs: Iterable[PreTrainedConfig]) -> Iterator[None]:
    """These configs, and those inside of them, are what they were where the context ends by an exception."""
    everything = [each for config in configs for each in (config, *_all_inside(config))]
    before = [(config, dict(vars(config))) for config in everything]
    try:
        yield
    except BaseException:
        for config, values in before:
            vars(config).clear()
            vars(config).update(values)
        raise


def _all_inside(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    for _, inner in sub_configs(config):
        yield inner
        yield from _all_inside(inner)


def shard_alpha(model: nn.Module, **options: Any) -> nn.Module:
    """Shards every α that is learned by FSDP2's ``fully_shard`` alone, in float32::

        shard_alpha(model, mesh=mesh)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)

    As part of a layer it would be computed with in the type that ``MixedPrecisionPolicy`` gives to the layer's weights,
    and FSDP2 takes no layer whose other parameters have another type. With Trainer, call it before ``train``.

    Args:
        model: it is sharded no further yet.
        options: of ``fully_shard``, the mesh for instance; its policy casts nothing unless given.

    Returns:
        `model`.
    """
    from torch.distributed.fsdp import fully_shard

    for _, module in attention_layers(model):
        if module.entmax_norm.alpha_logit is not None:
            fully_shard(module.entmax_norm, **options)
    return model
