"""What the attention layers of a model do in a forward: how many keys have weight, and how large the weights are."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from adasplash.integrations.transformers.layers import attention_layers
from adasplash.summary import AttentionStats

_TILE = 64


class LayerRecord(NamedTuple):
    """Facts about one layer, by head, (H,) float32, in the mean over the queries that see a key."""

    #: Keys with weight.
    support: Tensor
    #: The largest weight.
    largest_weight: Tensor
    #: The share of 64×64 tiles without any weight, of those in which some query sees some key.
    empty_tiles: Tensor
    #: α, of the last forward.
    alpha: Tensor


class Recording:
    """What :func:`record` gives. It can be read once a forward has run, inside of the context or behind it."""

    def __init__(self) -> None:
        self._sums: dict[str, _Sums] = {}

    @property
    def layers(self) -> Mapping[str, LayerRecord]:
        """By the name of the attention module, for those that ran."""
        return {name: sums.record() for name, sums in self._sums.items() if sums.calls}

    def numbers(self, prefix: str = "adasplash") -> dict[str, float]:
        """Means over heads, for a logger: of each layer, and of all."""
        facts: dict[str, float] = {}
        records = [dict(each._asdict()) for each in self.layers.values()]
        for name in LayerRecord._fields if records else ():
            means = torch.stack([each[name].mean() for each in records])
            facts[f"{prefix}/{name}"] = means.mean().item()
            facts |= {f"{prefix}/layer_{place}/{name}": mean for place, mean in enumerate(means.tolist())}
        return facts


class _Sums:
    """Sums of one layer, which stay on its device until they are read."""

    def __init__(self) -> None:
        self.calls = 0
        self.rows: Any = 0
        self.support: Any = 0
        self.largest: Any = 0
        self.empty: Any = 0
        self.alpha: Any = None

    def add(self, alpha: float | Tensor, stats: AttentionStats) -> None:
        self._add(alpha, stats.support_size, stats.largest_weight, stats.empty_tiles)

    @torch.no_grad()
    def add_weights(self, alpha: float | Tensor, weights: Tensor, seen: Tensor | None) -> None:
        if seen is not None and seen.dtype != torch.bool:
            seen = seen > torch.finfo(seen.dtype).min / 2
        seen = torch.ones_like(weights[:1, :1], dtype=torch.bool) if seen is None else seen
        held, visible = _tiles(weights > 0), _tiles(seen)
        visible_tiles = visible.expand_as(held).sum((-2, -1))
        empty = 1 - held.sum((-2, -1)) / visible_tiles.clamp(min=1)
        largest = weights.amax(-1) if weights.shape[-1] else weights.new_zeros(weights.shape[:-1])
        self._add(alpha, (weights > 0).sum(-1), largest, torch.where(visible_tiles > 0, empty, 0))

    @torch.no_grad()
    def _add(self, alpha: float | Tensor, support: Tensor, largest: Tensor, empty: Tensor) -> None:
        heads = (0, 2) if support.dim() == 3 else (1,)
        sees = support > 0
        self.calls += 1
        self.rows = self.rows + sees.sum(heads)
        self.support = self.support + support.sum(heads)
        self.largest = self.largest + torch.where(sees, largest.float(), 0).sum(heads)
        self.empty = self.empty + empty.float().mean(0)
        self.alpha = torch.as_tensor(alpha, device=sees.device).detach().float().clone()

    def record(self) -> LayerRecord:
        rows = self.rows.clamp(min=1)
        facts = self.support / rows, self.largest / rows, self.empty / self.calls, self.alpha.expand(rows.shape)
        return LayerRecord(*(fact.float().cpu() for fact in facts))


def _tiles(mask: Tensor) -> Tensor:
    """Which tiles hold anything, (B, H, ⌈M/64⌉, ⌈N/64⌉)."""
    return nn.functional.max_pool2d(mask.float(), _TILE, ceil_mode=True) > 0


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Records what the attention layers of `model` do in the forwards that run in this context::

        with record(model) as seen:
            model(**batch)
        seen.layers["model.layers.0.self_attn"].support

    A layer's forward takes little longer (``entmax_attn_summary``) and results are the same, so that it can be done now
    and then in training. Compiled code runs eagerly meanwhile. A backward in the context that computes a forward again
    (gradient checkpointing) counts twice, which changes no mean.

    Recordings of one model may overlap: each has all forwards in its context.

    Raises:
        ValueError: no layer of `model` runs this attention.
    """
    recording = Recording()
    layers = dict(attention_layers(model))
    if not layers:
        raise ValueError('adasplash: record needs a model with attn_implementation="adasplash"')
    recording._sums = {name: _Sums() for name in layers}
    try:
        for name, layer in layers.items():
            layer.entmax_norm.recorders.append(recording._sums[name])
        with torch.compiler.set_stance("force_eager"):
            yield recording
    finally:
        for name, layer in layers.items():
            recorders = layer.entmax_norm.recorders
            if recording._sums[name] in recorders:
                recorders.remove(recording._sums[name])


class _RecordedForward:
    """The next forward of a model runs in ``record``, once; nothing else of the process changes until then.

    ``model.forward`` is shadowed, as Trainer shows a step's beginning and end to callbacks, and neither its forward nor
    an exception in it. What compiled the model meets a function that is not to be compiled, and goes on behind it
    with the code that it has.
    """

    def __init__(self, model: nn.Module):
        self.recording: Recording | None = None
        self._model, self._theirs, self._own = model, model.forward, "forward" in vars(model)

        @torch.compiler.disable
        @functools.wraps(self._theirs)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.give_back()
            with record(model) as self.recording:
                return self._theirs(*args, **kwargs)

        self._forward = model.forward = forward

    def give_back(self) -> None:
        """Takes the shadow away, if it is still there."""
        if vars(self._model).get("forward") is self._forward:
            if self._own:
                self._model.forward = self._theirs
            else:
                del self._model.forward


class LogAttention(TrainerCallback):
    """Logs what attention layers do in training, to TensorBoard or wherever else Trainer logs::

        trainer.add_callback(LogAttention(trainer.log))

    Of a logged step it is the first forward that is recorded, and that alone runs eagerly where the model is compiled.
    Whatever ends a step, Ctrl-C included, leaves nothing behind.

    Args:
        log: is called with a dictionary of numbers, for instance ``adasplash/support`` of all layers and
            ``adasplash/layer_0/support``.
        every: in how many steps once; Trainer's logging_steps unless given.
    """

    def __init__(self, log: Callable[[dict[str, float]], Any], every: int | None = None):
        if every is not None and every < 1:
            raise ValueError(f"adasplash: every must be 1 or more, got {every}")
        self.log, self.every = log, every
        self._recorded: _RecordedForward | None = None

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        self._end()  # of a training that an exception has ended before the forward
        every = self.every or max(1, int(args.logging_steps))
        if state.global_step % every == 0:
            self._recorded = _RecordedForward(model)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        recording = self._end()
        if recording is not None:
            self.log(recording.numbers())

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._end()

    def _end(self) -> Recording | None:
        recorded, self._recorded = self._recorded, None
        if recorded is None:
            return None
        recorded.give_back()
        return recorded.recording
