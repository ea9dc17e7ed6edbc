"""How long a training's steps take."""

import time
from statistics import median

import torch
from transformers import TrainerCallback


class StepTimes(TrainerCallback):
    """Takes the time of every step of a Trainer, forward, backward and optimiser, once the device is done with it."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    @property
    def median(self) -> float:
        """Of all steps but the first few, in which things are set up."""
        return median(self.seconds[3:] or self.seconds)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._started = self._now()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.seconds.append(self._now() - self._started)
