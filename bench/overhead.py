"""What a call takes beside its kernels on a GPU: its first call, the host's time for a small one, memory of inference.

    python -m bench.overhead

Printed; docs/notes/2026-11-27-h100-times.md says what was seen. First calls are those of a process that has used the
GPU before.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench.lib.case import Case
from bench.lib.inputs import Inputs, make_grad, make_inputs
from bench.lib.memory import CudaMeter
from bench.peers import OURS, PEERS

BESIDE = (OURS, "sdpa-flash", "sdpa-cudnn")
FIRST = Case(device="cuda", dtype="bf16", heads=16, length=4096)
SMALL = Case(device="cuda", dtype="bf16", heads=4, length=256)
LONG = tuple(2**k for k in range(14, 19))
CALLS = 500


@contextmanager
def _function(name: str, case: Case) -> Iterator[Callable]:
    with PEERS[name].within():
        yield PEERS[name].build(case)


def _leaves(case: Case) -> Inputs:
    return Inputs(*(x.requires_grad_() for x in make_inputs(case)))


def _timed(function: Callable) -> tuple[Any, float]:
    """What it returns, and milliseconds until the GPU is done."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    torch.cuda.synchronize()
    return result, 1e3 * (time.perf_counter() - start)


def first_calls(case: Case = FIRST) -> list[tuple[float, float]]:
    """Milliseconds of our forward and backward, the first time and two times more."""
    leaves, grad = _leaves(case), make_grad(case)
    found = []
    with _function(OURS, case) as attention:
        for _ in range(3):
            out, forward = _timed(lambda: attention(*leaves))
            _, backward = _timed(lambda out=out: torch.autograd.grad(out, leaves, grad))
            found.append((forward, backward))
    return found


def host_times(name: str, case: Case = SMALL, calls: int = CALLS) -> tuple[float, float, float]:
    """Microseconds a call, one after the other: without gradients, a forward with them, a training step."""
    leaves, grad = _leaves(case), make_grad(case)
    with _function(name, case) as attention:

        def inference() -> None:
            with torch.no_grad():
                attention(*leaves)

        def repeated(function: Callable) -> float:
            for _ in range(calls // 10):
                function()
            _, milliseconds = _timed(lambda: [function() for _ in range(calls)])
            return 1e3 * milliseconds / calls

        def step() -> None:
            torch.autograd.grad(attention(*leaves), leaves, grad)

        return repeated(inference), repeated(lambda: attention(*leaves)), repeated(step)


def inference_memory(name: str, case: Case) -> float:
    """Peak MiB beyond inputs and output."""
    inputs = make_inputs(case)
    with _function(name, case) as attention, torch.no_grad():
        attention(*inputs)
        meter = CudaMeter()
        out = attention(*inputs)
        return meter.peak() - out.numel() * out.element_size() / 2**20


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device here")
    torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{FIRST.title}, ms of forward and backward")
    for times in first_calls():
        print("  {:.2f} {:.2f}".format(*times))
    print(f"\n{SMALL.title}, µs of inference, forward, forward + backward")
    for name in BESIDE:
        print("  {:12} {:6.1f} {:6.1f} {:6.1f}".format(name, *host_times(name)))
    print(f"\nMiB of inference beyond inputs and output: {', '.join(BESIDE)}")
    for head_dim in (64, 128):
        for length in LONG:
            case = Case(device="cuda", dtype="bf16", heads=16, length=length, head_dim=head_dim)
            found = " ".join(f"{inference_memory(name, case):7.1f}" for name in BESIDE)
            print(f"  N={length:<7} D={head_dim:<4} {found}")


if __name__ == "__main__":
    main()
