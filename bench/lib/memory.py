"""Peak memory of a piece of code. Meters start when they are made, and report MiB above what was in use then."""

import resource
import sys
from pathlib import Path

import torch


class CpuMeter:
    """Resident memory of this process, so it is meant for one that does nothing else (see `bench.lib.worker`).

    Linux can start the peak anew. Elsewhere it is that of the process's whole life.
    """

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")
        except OSError:
            self._before = None
            self._peak_before = _largest_resident()

    def peak(self) -> float:
        if self._before is None:
            return _largest_resident() - self._peak_before
        return _status("VmHWM") - self._before


def _status(name: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def _largest_resident() -> float:
    """macOS counts bytes, all others kibibytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


class CudaMeter:
    """What torch's allocator gave out."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()

    def peak(self) -> float:
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - self._before) / 2**20
