"""How a launch overlaps the one before it, on architectures that can.

A kernel that calls `follow` is launched while the kernel before it still runs (csrc/cuda/embedded.cpp sees the wait in
its code), so that its programs are on the GPU when that one ends. All programs of a kernel of a chain wait until the
one before has ended whole, before they return or touch any memory: so its own end means that all before have ended,
nothing is read before it was written, and nothing written before it was read.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .matrices import INTERPRETED

OVERLAPS_FROM = tl.constexpr(90)  # the first architecture that can


@triton.jit
def lead(ARCH: tl.constexpr):
    """The next launch may begin once all programs of this one have come here or have ended, if its kernel follows."""
    if not INTERPRETED and ARCH >= OVERLAPS_FROM:
        gdc_launch_dependents()


@triton.jit
def follow(ARCH: tl.constexpr):
    """Waits until the launch before has ended."""
    if not INTERPRETED and ARCH >= OVERLAPS_FROM:
        gdc_wait()
