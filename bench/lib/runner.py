"""Runs one peer on one case, in this process: results, times and peak memory."""

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bench.lib import memory
from bench.lib.case import Case
from bench.lib.inputs import Inputs
from bench.lib.results import INFERENCE_MEMORY
from bench.peers import Peer


class Seconds(NamedTuple):
    """Time of one call, averaged over the calls of a sample. forward is inference; both is a training step.

    None is what was not timed: a peer may have no backward.
    """

    forward: float | None
    backward: float | None
    both: float | None

    @property
    def spent(self) -> float:
        return (self.forward or 0) + (self.both or 0)


class Runner(Protocol):
    """A peer ready to run a case: here (`LocalRunner`) or in a process of its own (`bench.lib.remote`)."""

    peer: Peer

    def results(self, grad: Tensor) -> tuple[Tensor, ...]: ...

    def sample(self, calls: int) -> Seconds: ...

    def memory(self, what: str) -> float: ...

    def close(self) -> None: ...


class FunctionRunner:
    """Any function in this process.

    grad: a gradient of what it returns.
    within: makes the context that it is called in. It is entered outside of what is timed.
    trains: whether it is differentiable. Of one that is not there is the forward pass alone.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        grad: Tensor,
        within: Callable[[], AbstractContextManager] = nullcontext,
        trains: bool = True,
    ) -> None:
        self._function, self._within, self._trains = function, within, trains
        self._inputs = inputs
        self._leaves = tuple(x.detach().requires_grad_() for x in inputs)
        self._grad = grad
        self._clock = _CudaClock() if grad.is_cuda else _CpuClock()

    def results(self, grad: Tensor) -> tuple[Tensor, ...]:
        """The output, and the inputs' gradients for a gradient of it: for attention out, dq, dk, dv."""
        if not self._trains:
            return (self.output(),)
        with self._within():
            out = self._function(*self._leaves)
            return out.detach(), *torch.autograd.grad(out, self._leaves, grad)

    @torch.no_grad()
    def output(self) -> Tensor:
        with self._within():
            return self._function(*self._inputs)

    def sample(self, calls: int) -> Seconds:
        """Times `calls` forward calls, then as many training steps, whose two halves are timed separately."""
        with self._within():
            return self._sample(calls)

    def _sample(self, calls: int) -> Seconds:
        forward = backward = both = 0.0
        clock = self._clock
        enabled = gc.isenabled()
        gc.disable()
        try:
            with torch.no_grad():
                start = clock.now()
                for _ in range(calls):
                    self._function(*self._inputs)
                forward = clock.between(start, clock.now())
            if not self._trains:
                return Seconds(forward / calls, None, None)
            marks = []
            for _ in range(calls):
                start = clock.now()
                out = self._function(*self._leaves)
                middle = clock.now()
                torch.autograd.grad(out, self._leaves, self._grad)
                marks.append((start, middle, clock.now()))
                del out
            for start, middle, end in marks:
                backward += clock.between(middle, end)
                both += clock.between(start, end)
        finally:
            if enabled:
                gc.enable()
        return Seconds(forward / calls, backward / calls, both / calls)


class LocalRunner(FunctionRunner):
    """A peer in this process. The tensors are shared by the runners of a case."""

    def __init__(self, peer: Peer, case: Case, inputs: Inputs, grad: Tensor) -> None:
        super().__init__(peer.build(case), inputs, grad, peer.within, peer.trains)
        self.peer = peer

    def memory(self, what: str) -> float:
        """Peak in MiB: PEAK_MEMORY, beyond inputs, output and gradients, or INFERENCE_MEMORY, beyond inputs and output.
        Warm up first, as the worker does."""
        meter = memory.CudaMeter() if self._grad.is_cuda else memory.CpuMeter()
        results = (self.output(),) if what == INFERENCE_MEMORY else self.results(self._grad)
        return meter.peak() - sum(x.numel() * x.element_size() for x in results) / 2**20

    def close(self) -> None:
        self._leaves = self._inputs = None


class _CpuClock:
    now = staticmethod(time.perf_counter)

    @staticmethod
    def between(start: float, end: float) -> float:
        return end - start


class _CudaClock:
    """Events on the stream; asking for the time between two waits for the second."""

    @staticmethod
    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def between(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000
