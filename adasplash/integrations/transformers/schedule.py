"""``AlphaSchedule``, which takes a model from softmax to entmax while it is trained."""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from adasplash.integrations.transformers.configuration import (
    check_alpha,
    is_local,
    is_number,
    layer_of,
    of_layer,
)
from adasplash.integrations.transformers.layers import attention_layers, hold_alpha_in_tensors
from adasplash.masked import LEAST_ALPHA

#: From 0 to 1 in the share of the schedule that is over.
SHAPES: dict[str, Callable[[float, float], float]] = {
    "linear": lambda share, power: share,
    "cosine": lambda share, power: (1 - math.cos(math.pi * share)) / 2,
    "exponential": lambda share, power: (1 - math.exp(-5 * share)) / (1 - math.exp(-5)),
    "polynomial": lambda share, power: share**power,
}


class AlphaSchedule(TrainerCallback):
    """Moves α from one value to another in the course of a training::

        Trainer(model, ..., callbacks=[AlphaSchedule(end=1.5, over=0.8)])

    The model has ``attn_implementation="adasplash"`` and a fixed α. It lies in a tensor of each layer from then on, so
    that compiled code serves all of the schedule. From 1, softmax, it goes to 1.01, the least value above that is
    served, in one step. The model's config always has the value of the step, so that checkpoints are saved with it; a
    training that is resumed goes on where it was. Without Trainer, call ``begin`` once and ``set`` before every step.

    Args:
        end: α at the end: a number, or a list as adasplash_alpha of a config may be.
        start: α at the beginning, a number; 1 is softmax.
        shape: "linear", "cosine" (slow at both ends), "exponential" (fast at first, 5 times the time constant),
            "polynomial" (slow at first, to the power of `power`) or "stepwise" (in `levels` equal jumps).
        over: how long it takes, as a share of the training.
        after: after which share of the training it begins.
        power: of "polynomial".
        levels: of "stepwise"; the last jump is where the schedule ends.
        local: also for layers that see a window only. Without it these stay at adasplash_local_alpha if that is set.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        end: float | list = 1.5,
        start: float = 1.0,
        shape: str = "linear",
        over: float = 1.0,
        after: float = 0.0,
        power: float = 2.0,
        levels: int = 4,
        local: bool = False,
    ):
        check_alpha("end", end)
        if not is_number(start):
            raise TypeError(f"adasplash: start must be a number, got {start!r}")
        check_alpha("start", start)
        if shape not in (*SHAPES, "stepwise"):
            raise ValueError(f"adasplash: shape must be one of {[*SHAPES, 'stepwise']}, got {shape!r}")
        if not 0 < over <= 1 or not 0 <= after < 1 or after + over > 1:
            raise ValueError(f"adasplash: after and over must be shares of the training, got {after} and {over}")
        if power <= 0 or levels < 1:
            raise ValueError(f"adasplash: power must be above 0 and levels 1 or more, got {power} and {levels}")
        self.end, self.start, self.shape = end, float(start), shape
        self.over, self.after, self.power, self.levels, self.local = over, after, power, levels, local
        self._layers: list[tuple[nn.Module, float | list[float]]] = []

    def progress(self, done: float) -> float:
        """How far α is, from 0 to 1, when the share `done` of the training is over."""
        share = min(max((done - self.after) / self.over, 0.0), 1.0)
        if self.shape == "stepwise":
            return math.floor(share * self.levels + 1e-9) / self.levels
        return SHAPES[self.shape](share, self.power)

    def _between(self, progress: float, end: float) -> float:
        alpha = self.start + progress * (end - self.start)
        return max(alpha, LEAST_ALPHA) if alpha > 1 else 1.0

    def _value(self, progress: float, end: float | list) -> float | list:
        if isinstance(end, (list, tuple)):
            return [self._value(progress, each) for each in end]
        return self._between(progress, float(end))

    def begin(self, model: PreTrainedModel) -> None:
        """Puts α of `model` into tensors, where ``set`` changes it."""
        layers = [module for _, module in attention_layers(model)]
        if not layers:
            raise ValueError('adasplash: AlphaSchedule needs a model with attn_implementation="adasplash"')
        layers = [module for module in layers if not self._stays(module)]
        self._layers = [(module, of_layer("end", self.end, layer_of(module))) for module in layers]
        for module, end in self._layers:
            if isinstance(end, list):
                module.entmax_norm.start = [self.start] * len(end)
                module.entmax_norm.alpha = None
        hold_alpha_in_tensors(model)

    def _stays(self, module: nn.Module) -> bool:
        return not self.local and module.config.adasplash_local_alpha is not None and is_local(module)

    @torch.no_grad()
    def set(self, done: float) -> None:
        """α of the moment when the share `done` of the training is over."""
        progress = self.progress(done)
        for module, end in self._layers:
            alpha, held = self._value(progress, end), module.entmax_norm.alpha
            if isinstance(alpha, list):
                held.copy_(torch.tensor(alpha, dtype=held.dtype))
            else:
                held.fill_(alpha)
        written = self._value(progress, self.end)
        for config in {id(module.config): module.config for module, _ in self._layers}.values():
            config.adasplash_alpha = written
            if self.local and config.adasplash_local_alpha is not None:
                config.adasplash_local_alpha = written

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.begin(model)
        self.set(state.global_step / max(1, state.max_steps))

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.set(state.global_step / max(1, state.max_steps))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        # A checkpoint of this step is evaluated and saved with its α.
        self.set(state.global_step / max(1, state.max_steps))
