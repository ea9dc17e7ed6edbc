"""What a bug report needs to say about this installation: ``python -m adasplash.info``."""

import ctypes
import os
import platform
import sys

import torch

import adasplash
from adasplash import _build, _load

try:  # PyPI's package of the same name may lie over this one, and then nothing else of ours runs
    _load.refuse_namesake()
except ImportError as error:
    sys.exit(str(error))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(_load.library_path())


def _cpu_capability() -> str:
    """The instruction set that the kernels run with here."""
    library = _library()
    library.adasplash_cpu_capability.restype = ctypes.c_char_p
    capability = library.adasplash_cpu_capability()
    if capability is None:
        return f"none, as ADASPLASH_CPU_CAPABILITY={os.environ['ADASPLASH_CPU_CAPABILITY']} is not among them"
    return capability.decode()


def _cuda_implementations() -> str:
    """What attention can be computed by on a GPU, in order of preference."""
    library = _library()
    library.adasplash_cuda_implementations.restype = ctypes.c_char_p
    names = library.adasplash_cuda_implementations().decode().replace(",", ", ")
    forced = os.environ.get("ADASPLASH_CUDA_IMPL")
    return f"{names} (ADASPLASH_CUDA_IMPL={forced})" if forced else names


def _cuda_driver() -> str:
    """The driver's CUDA version, asked of libcuda itself, as a CPU build of torch cannot."""
    try:
        libcuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "none"
    version = ctypes.c_int()
    if libcuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "present, but does not answer"
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in devices)


def collect() -> dict[str, str]:
    """Facts by name, in the order in which they are printed."""
    return {
        "torch-adasplash": adasplash.__version__,
        "built against": f"torch {', '.join(_load.releases())}, by {_build.compiler}",
        "torch": torch.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.platform()} {platform.machine()}",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "cpu kernels built": ", ".join(_build.cpu_capabilities),
        "cpu kernels in use": _cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "cuda kernels built": ", ".join(f"sm_{arch}" for arch in _build.cuda_architectures) or "none",
        "cuda implementation": _cuda_implementations(),
        "cuda driver": _cuda_driver(),
        "gpu": _gpus(),
        "library": _load.library_path(),
    }


if __name__ == "__main__":
    for name, fact in collect().items():
        print(f"{name + ':':<20} {fact}")
