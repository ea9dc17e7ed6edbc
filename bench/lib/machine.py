"""Where and with what a result came about: the fields that every row of a result file begins with."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def facts(device: str) -> dict[str, Any]:
    """date, device name, versions and commit, JSON-ready."""
    import adasplash

    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "processor": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "cores": available_cores(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # before: 0 on a quiet machine
        "adasplash": adasplash.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    if device == "cuda":
        found |= {"driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"}
        found |= {"cuda": torch.version.cuda, "triton": _version("triton")}
    else:
        found |= {"instructions": torch.backends.cpu.get_cpu_capability()}
    return found


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def cpu_name() -> str:
    """The processor's own name, with family and model numbers where a virtual machine hides which one it is."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()

    def entry(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return found[1].strip() if found else ""

    name = entry("model name") or platform.machine()
    if re.search(r"\d", name) or not entry("model"):
        return name
    return f"{name}, family {entry('cpu family')} model {entry('model')}"


def commit() -> str:
    """The commit's first characters, with a + if files of the library or the benchmark differ from it."""
    revision = _output("git", "rev-parse", "--short=10", "HEAD")
    if not revision:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--", "csrc", "adasplash", "triton_src", "bench/*.py", "cmake")
    return revision + "+" * bool(changed)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError:
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
