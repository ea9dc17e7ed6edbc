"""The Python half of the stand-in driver (standin.c is the other)."""

import ctypes
import functools
import hashlib
import json
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from emulated.interpreter import patched_once

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

INVALID_VALUE, NO_BINARY_FOR_GPU, NOT_FOUND, LAUNCH_FAILED = 1, 209, 500, 719
CUDA_12_3, CUDA_12_4 = 12030, 12040
# Two of a kind, one that runs code of a lower minor, one that only PTX serves, and one that nothing serves.
DEVICES = (90, 90, 80, 86, 120, 75)
SCALARS = {"i32": "i", "i64": "q", "fp32": "f"}

Load = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
Find = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p)
Launch = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_uint64,
)


class Handlers(ctypes.Structure):
    _fields_ = [("load", Load), ("find", Find), ("launch", Launch)]


class Place(ctypes.Structure):
    _fields_ = [("device", ctypes.c_int), ("stream", ctypes.c_void_p)]


PlaceOf = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(Place))


@dataclass(frozen=True)
class LaunchRecord:
    """One launch, as the driver saw it."""

    variant: dict
    device: int
    stream: int
    programs: int
    arguments: dict[str, int | float]


@functools.cache
def build_standin() -> Path:
    library = Path(tempfile.mkdtemp(prefix="adasplash-standin-")) / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    subprocess.run([*command, HERE / "standin.c", "-o", library, "-pthread"], check=True)
    return library


def installed_library() -> Path:
    from adasplash._load import library_path

    return Path(library_path())


def read_manifest(library: Path) -> dict:
    return json.loads((library.parents[1] / "adasplash" / "manifest.json").read_text())


def code_arch(code: int) -> tuple[int, bool]:
    """(architecture, is PTX) of the code at an address: cubins say it in their ELF flags, PTX in a line."""
    if ctypes.string_at(code, 4) == b"\x7fELF":
        (flags,) = struct.unpack("<I", ctypes.string_at(code + 48, 4))
        return flags & 0xFF, False
    return int(ctypes.string_at(code).split(b".target sm_")[1][:2]), True


def is_as_built(code: int, ptx: bool, variant: dict) -> bool:
    """Whether what is at an address is what was compiled: PTX up to a zero, machine code for as long as it was."""
    built = variant["ptx" if ptx else "cubin"]
    found = ctypes.string_at(code) if ptx else ctypes.string_at(code, built["length"])
    return hashlib.sha256(found).hexdigest() == built["sha256"]


class EmulatedDriver:
    """The stand-in, its devices, and a record of what it was asked to do."""

    def __init__(self):
        self.path = build_standin()
        self.library = ctypes.CDLL(str(self.path))
        self.lock = threading.RLock()  # the interpreter patches triton.language while it runs
        self.current = threading.local()  # device and stream of a thread, as torch would keep them
        self._handlers = Handlers(Load(self._load), Find(self._find), Launch(self._launch))
        self.place_of = PlaceOf(self._place_of)
        self.manifest = {"variants": []}
        self.run_kernels = True
        self.sets_context = True
        self.codes: list[int] = []  # addresses, by library handle - 1
        self.kernels: list[dict] = []  # variants, by kernel handle - 1
        self.reset()

    def reset(self, version=CUDA_12_4) -> None:
        """No failures to come, counters at zero. Code that was loaded stays."""
        from triton_src.variants import SHARED_KIB

        self.version = version
        self.library.standin_reset(self._handlers, version, len(DEVICES))
        for device, capability in enumerate(DEVICES):
            self.library.standin_device(device, capability, SHARED_KIB.get(capability, 64) * 1024)
        self.launches: list[LaunchRecord] = []
        self.failure: str | None = None

    def fail(self, call: str, result: int = INVALID_VALUE, times: int = 1) -> None:
        self.library.standin_fail(call.encode(), result, times)

    def calls(self, call: str) -> int:
        return self.library.standin_calls(call.encode())

    def limit_scratch(self, size: int) -> int:
        """Sets what the scratch of a launch may take, in bytes; returns what it was."""
        return self.adasplash.adasplash_limit_scratch(ctypes.c_int64(size))

    def set_place(self, device: int = 0, stream: int = 0) -> None:
        """What torch.cuda.device and torch.cuda.stream would do in this thread."""
        self.current.device, self.current.stream = device, stream

    def _place_of(self, index, place):
        device = getattr(self.current, "device", 0)
        place.contents.device, place.contents.stream = device, getattr(self.current, "stream", 0)
        if self.sets_context:
            self.library.standin_set_context(device + 1)  # as torch's device guard did by then

    def _say(self, error: int, text: str) -> int:
        self.failure = text
        self.library.standin_set_error_text(text.encode())
        return -error

    def _load(self, code, device):
        with self.lock:
            self.codes.append(code)
            return len(self.codes)

    def _find(self, library, name):
        with self.lock:
            arch, ptx = code_arch(self.codes[library - 1])
            for variant in self.manifest["variants"]:
                if variant["symbol"] == name.decode() and variant["arch"] == arch:
                    if not is_as_built(self.codes[library - 1], ptx, variant):
                        return self._say(NO_BINARY_FOR_GPU, f"{variant['name']}: this is not the code that was built")
                    self.kernels.append({**variant, "ptx": ptx})
                    return len(self.kernels)
            return self._say(NOT_FOUND, f"the manifest has no {name.decode()} for sm_{arch}")

    def _launch(self, kernel, device, stream, programs, threads, shared, early, buffer, size):
        with self.lock:
            variant = self.kernels[kernel - 1]
            try:
                arguments = unpack(variant, buffer, size)
                if (threads, shared) != (variant["warps"] * 32, variant["shared"]):
                    raise ValueError(f"{threads} threads and {shared} bytes of shared memory are not the manifest's")
                if bool(early) != (variant["follows"] and self.version >= CUDA_12_3):
                    raise ValueError(f"may begin early: {bool(early)}, but it waits: {variant['follows']}")
                values = {name: value for name, (_, value) in arguments.items()}
                self.launches.append(LaunchRecord(variant, device, stream, programs, values))
                if self.run_kernels:
                    interpret(variant, arguments, programs)
            except (ValueError, struct.error) as error:
                return self._say(INVALID_VALUE, str(error))
            except Exception:
                return self._say(LAUNCH_FAILED, traceback.format_exc()[-3000:])
            return 0


def unpack(variant: dict, buffer: int, size: int) -> dict[str, tuple[str, int | float]]:
    """{name: (type, value)} of packed arguments, by the types that the manifest declares; a part of a named tuple is
    called by its path, as call.queries.rows."""
    arguments = variant["arguments"]
    layout = "@" + "".join("P" if kind.startswith("*") else SCALARS[kind] for _, kind in arguments)
    if struct.calcsize(layout) != size:
        raise ValueError(f"{variant['name']} takes {struct.calcsize(layout)} bytes of arguments, got {size}")
    values = struct.unpack(layout, ctypes.string_at(buffer, size))
    found = {}
    for (name, kind), value in zip(arguments, values, strict=True):
        divisor = variant["divisibility"].get(name)
        if divisor and value % divisor:  # machine code that relies on it would read elsewhere
            raise ValueError(f"{variant['name']}: {name} = {value} is not a multiple of {divisor}")
        found[name] = (kind, value)
    return found


def interpret(variant: dict, arguments: dict[str, tuple[str, int | float]], programs: int) -> None:
    """Runs the kernel's Triton function on these arguments, all of exactly the declared type."""
    from triton_src.spec import APPENDED
    from triton_src.variants import KERNELS

    spec = KERNELS[variant["kernel"]]
    for name, _ in APPENDED:
        if arguments[name][1]:
            raise ValueError(f"{name} must be null")
    given = {name: value for name, value in arguments.items() if name not in dict(APPENDED)}
    if list(given) != [leaf.name for leaf in spec.leaves()] or list(variant["constants"]) != list(spec.constants):
        raise ValueError(f"the manifest's arguments are not those of {variant['kernel']}: is it stale?")
    with patched_once():
        groups = spec.build({name: typed(*value) for name, value in given.items()})
        spec.kernel[(programs,)](**groups, **variant["constants"])


def typed(kind: str, value: int | float):
    """A scalar of the interpreter of this type."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    names = {
        "i8": tl.int8,
        "u8": tl.uint8,
        "i16": tl.int16,
        "i32": tl.int32,
        "i64": tl.int64,
        "fp32": tl.float32,
        "fp16": tl.float16,
        "bf16": tl.bfloat16,
    }
    if kind.startswith("*"):
        dtype, array = tl.pointer_type(names[kind[1:]]), np.array([value], dtype=np.uint64)
    else:
        numpy_type = {"i32": np.int32, "i64": np.int64, "fp32": np.float32}[kind]
        dtype, array = names[kind], np.array([value], dtype=numpy_type)
    return tl.tensor(TensorHandle(array, dtype), dtype)


@functools.cache
def install() -> EmulatedDriver:
    """Switches emulation on for this process; returns the driver."""
    import os

    sys.path.append(str(ROOT))  # triton_src
    from triton_src.lib.matrices import INTERPRETED

    if not INTERPRETED.value:
        raise RuntimeError("Triton was imported before TRITON_INTERPRET=1 was set")
    emulated = EmulatedDriver()
    os.environ["ADASPLASH_LIBCUDA"] = str(emulated.path)
    library = installed_library()
    emulated.manifest = read_manifest(library)
    # ctypes.PyDLL would hold the interpreter's lock, which launches from other threads need.
    emulated.adasplash = ctypes.CDLL(str(library))
    emulated.adasplash.adasplash_limit_scratch.restype = ctypes.c_int64
    emulated.adasplash.adasplash_emulate_cuda(emulated.place_of)
    return emulated
