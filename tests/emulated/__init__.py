"""The CUDA path on the CPU: a stand-in for libcuda runs each launch in Triton's interpreter.

`install()` registers the CUDA code for CPU tensors and points it at the stand-in; from then on every call of the op
runs the host code, the argument packing and the kernels of the GPU, over the manifest of the library that is installed.
"""

import os

# Triton decides when it is imported whether it compiles or interprets.
os.environ["TRITON_INTERPRET"] = "1"

from emulated.driver import EmulatedDriver, install

__all__ = ["EmulatedDriver", "install"]
