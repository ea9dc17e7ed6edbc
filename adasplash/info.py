"""What a bug report needs to say about this installation: ``python -m adasplash.info``, and with ``--check`` whether
attention and its gradients can be computed on each device."""

import argparse
import ctypes
import os
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor

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


def _devices() -> list[torch.device]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(count))]


def _attend(attention: Callable[..., Tensor], inputs: tuple[Tensor, ...], device: torch.device) -> list[Tensor]:
    """The output and the gradients of the inputs, on the CPU."""
    inputs = tuple(x.to(device).requires_grad_() for x in inputs)
    out = attention(*inputs)
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(-1))
    return [x.detach().cpu() for x in (out, *grads)]


def _composed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention at alpha 2 from torch's own ops, as sparsemax is by its definition."""
    length = query.shape[-2]
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(hidden, -1e4)
    ordered = scores.sort(dim=-1, descending=True).values
    counts = torch.arange(1, length + 1, device=query.device)
    support = (1 + counts * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
    threshold = (ordered.cumsum(-1).gather(-1, support - 1) - 1) / support
    return (scores - threshold).clamp(min=0) @ value


_TORCH_ALONE = "python -c \"import torch; print(torch.ones(9, 9, device='{0}').mm(torch.ones(9, 9, device='{0}')))\""


def check(device: torch.device) -> str | None:
    """Computes attention and its gradients on this device and compares them with those of torch's own ops in double
    precision.

    Returns:
        None, or what is wrong and what to do about it.
    """
    inputs = tuple(torch.randn(1, 2, 70, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    try:
        found = _attend(lambda *x: adasplash.entmax_attn(*x, alpha=2.0, is_causal=True), inputs, device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        advice = "" if "adasplash" in reason else "; does torch alone compute there? " + _TORCH_ALONE.format(device)
        return reason + advice
    expected = _attend(_composed, tuple(x.double() for x in inputs), torch.device("cpu"))
    for name, one, other in zip(("output", "dquery", "dkey", "dvalue"), found, expected, strict=True):
        error = (one - other).abs().max().item()
        if not error <= 2e-2 * other.abs().max().item():  # a GPU's matrix units round float32 to 11 bits; NaN is wrong
            return f"wrong numbers: {name} is off by {error:.1g}; please report it with the output of this command"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m adasplash.info", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compute on every device: OK, or what to do")
    args = parser.parse_args()
    for name, fact in collect().items():
        print(f"{name + ':':<20} {fact}")
    if not args.check:
        return 0
    wrong = {device: check(device) for device in _devices()}
    for device, what in wrong.items():
        print(f"{f'check on {device}:':<20} {what or 'OK'}")
    if len(wrong) == 1 and _cuda_driver().startswith("CUDA"):
        print(f"{'check on cuda:':<20} not done: there is a driver, but torch {torch.__version__} uses no GPU here")
    return any(wrong.values())


if __name__ == "__main__":
    sys.exit(main())
