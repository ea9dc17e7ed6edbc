"""How much a call computes or holds: numbers that do not depend on what else the machine is busy with."""

import os

from common import run_python

COUNT = """
import sys, torch, adasplash
torch.set_num_threads(1)
torch.manual_seed(0)
def products(function):
    with torch.autograd.profiler.profile(record_shapes=True, with_flops=True) as profile:
        function()
    return sum(event.flops for event in profile.function_events if event.name == "aten::addmm")
"""

PEAK = """
import sys, warnings, torch, adasplash
warnings.simplefilter("ignore")
torch.manual_seed(0)
def mebibytes(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) / 1024
"""
MEASURE = """
step(500)
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = mebibytes("VmRSS")
step(length)
print(mebibytes("VmHWM") - before)
"""


def count_products(code: str, *arguments: object) -> list[float]:
    """What `code` prints, numbers, in a process where `products(function)` counts the operations of all matrix products
    of the CPU kernels. They go through torch there, whose profiler sees them."""
    printed = run_python(COUNT + code, *arguments, env={**os.environ, "ADASPLASH_BLAS": "aten"})
    return [float(number) for number in printed.split()]


def peak_mebibytes(code: str, length: int, *arguments: object) -> float:
    """By how much `step(length)`, which `code` defines, drives up the memory of a process that knows smaller steps."""
    return float(run_python(f"{PEAK}length = int(sys.argv[1])\n{code}{MEASURE}", length, *arguments))
