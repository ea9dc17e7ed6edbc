"""How programs wait for others: for those of the launch before, and for those beside them, on architectures that can.

A kernel that begins with `follow` is launched while the kernel before it still runs (csrc/cuda/embedded.cpp sees the wait
in its code), so that its programs are on the GPU when that one ends. Kernels of a chain each wait for the one before to
have ended whole, so nothing is read before it was written, or written before it was read.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .matrices import INTERPRETED

WAITS_FROM = tl.constexpr(90)  # the first architecture that has such waits, and clusters


@triton.jit
def lead(ARCH: tl.constexpr):
    """Lets the next launch begin once all programs of this one have, if its kernel begins with `follow`."""
    if not INTERPRETED:
        if ARCH >= WAITS_FROM:
            gdc_launch_dependents()


@triton.jit
def follow(ARCH: tl.constexpr):
    """Waits until the launch before has ended, and lets the next one begin to wait for this one."""
    lead(ARCH)
    if not INTERPRETED:
        if ARCH >= WAITS_FROM:
            gdc_wait()


@triton.jit
def meet(programs, ARCH: tl.constexpr):
    """Waits for so many programs beside each other, launched as a cluster; what each has written is read after it."""
    tl.debug_barrier()
    if not INTERPRETED:
        if ARCH >= WAITS_FROM:
            if programs > 1:
                tl.inline_asm_elementwise(
                    "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;",
                    "=r,~{memory}",
                    [],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
    tl.debug_barrier()
