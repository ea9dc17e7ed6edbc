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
from bench.peers import Peer


class Seconds(NamedTuple):
    """Time of one call, averaged over the calls of a sample. forward is inference; both is a training step."""

    forward: float
    backward: float
    both: float

    @property
    def spent(self) -> float:
        return self.forward + self.both


class Runner(Protocol):
    """A peer ready to run a case: here (`LocalRunner`) or in a process of its own (`bench.lib.remote`)."""

    peer: Peer

    def results(self, grad: Tensor) -> tuple[Tensor, ...]: ...

    def sample(self, calls: int) -> Seconds: ...

    def memory(self) -> float: ...

    def close(self) -> None: ...


class FunctionRunner:
    """Any differentiable function in this process.

    grad: a gradient of what it returns.
    within: makes the context that it is called in. It is entered outside of what is timed.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        grad: Tensor,
        within: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._function, self._within = function, within
        self._inputs = inputs
        self._leaves = tuple(x.detach().requires_grad_() for x in inputs)
        self._grad = grad
        self._clock = _CudaClock() if grad.is_cuda else _CpuClock()

    def results(self, grad: Tensor) -> tuple[Tensor, ...]:
        """The output, and the inputs' gradients for a gradient of it: for attention out, dq, dk, dv."""
        with self._within():
            out = self._function(*self._leaves)
            return out.detach(), *torch.autograd.grad(out, self._leaves, grad)

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
        super().__init__(peer.build(case), inputs, grad, peer.within)
        self.peer = peer

    def memory(self) -> float:
        """Peak of a training step in MiB, beyond inputs, output and gradients. Warm up first, as the worker does."""
        meter = memory.CudaMeter() if self._grad.is_cuda else memory.CpuMeter()
        results = self.results(self._grad)
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
