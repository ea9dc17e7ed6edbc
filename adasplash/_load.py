"""Loads libadasplash.so, which registers the ops, into this process.

There is one for each minor release of torch that was built for, as torch's C++ symbols are stable within those only:
lib/torch2.N/libadasplash.so. Whatever keeps it from loading is said in one sentence.
"""

import glob
import importlib.metadata
import os
import re
import sys

import torch

_FOLDER = os.path.dirname(os.path.abspath(__file__))
_SITE = os.path.dirname(_FOLDER)
# Without --no-cache-dir pip would take the wheel that it built before.
_AGAIN = "pip install --no-cache-dir --force-reinstall --no-deps, with its wheel, or with . in its source folder"

#: Add this to ``CMAKE_PREFIX_PATH`` and C++ projects find the library with ``find_package(AdaSplash)``.
cmake_prefix_path: str = _FOLDER


def _not_built() -> str:
    if not os.path.exists(os.path.join(_SITE, "setup.py")):
        return f"torch-adasplash in {_FOLDER} is incomplete: install it again ({_AGAIN})"
    for folder in sys.path:
        other = os.path.join(folder, "adasplash")
        if os.path.exists(os.path.join(other, "_build.py")) and not os.path.samefile(other, _FOLDER):
            return (
                f"this is the source folder of torch-adasplash, {_SITE}, which hides the one that is installed in "
                f"{folder}: start Python in another folder"
            )
    return (
        f"torch-adasplash is not built in its source folder, {_SITE}: there, run pip install --no-build-isolation "
        "--no-deps --editable ."
    )


try:
    from adasplash import _build
except ImportError:
    raise ImportError(_not_built()) from None

version: str = _build.version


def releases() -> list[str]:
    """The minor releases of torch that there is a library for, as ``"2.13"``, in order."""
    libraries = glob.glob("torch*/libadasplash.so", root_dir=os.path.join(_FOLDER, "lib"))
    found = (os.path.dirname(library).removeprefix("torch") for library in libraries)
    return sorted(found, key=lambda release: [int(number) for number in release.split(".")])


def library_path() -> str:
    """The library for the torch of this process."""
    release = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return os.path.join(_FOLDER, "lib", f"torch{release}", "libadasplash.so")


def _loaded_from_elsewhere(library: str) -> str | None:
    """Another copy of the library in this process."""
    try:
        with open("/proc/self/maps") as maps:
            mapped = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/libadasplash.so" in line}
    except OSError:
        return None
    return next(
        (path for path in sorted(mapped) if not os.path.exists(path) or not os.path.samefile(path, library)), None
    )


def refuse_namesake() -> None:
    """PyPI's package ``adasplash`` has the same import name.

    Raises:
        ImportError: it is installed into the same folder as this package.
    """
    if any(importlib.metadata.distributions(name="adasplash", path=[_SITE])):
        raise ImportError(
            f"PyPI's package adasplash and torch-adasplash are both installed in {_SITE}, overwrite each other, and "
            "removing one breaks the other: pip uninstall --yes adasplash torch-adasplash, then install "
            "torch-adasplash again (it has the functions of the other, by the same names)"
        )


def load_library() -> None:
    """Registers ``torch.ops.adasplash``.

    Raises:
        ImportError: there is no library for this release of torch, or it is missing, does not fit, or is in the process
            already, as another copy; or PyPI's package ``adasplash`` is installed over this one.
    """
    refuse_namesake()
    library = library_path()
    if not os.path.exists(library):
        built = ", ".join(releases())
        raise ImportError(
            f"torch-adasplash {version} was built against torch {built}, but torch {torch.__version__} is installed: "
            f"install it again with the torch that you have ({_AGAIN}), or install that torch"
            if built
            else _not_built()
        )
    other = _loaded_from_elsewhere(library)
    if other is not None:
        raise ImportError(
            f"{other} is loaded in this process already, and its ops can be registered only once: load one copy, that "
            f"or {library}"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        linker = str(error.__cause__ or error)  # torch's own message leaves out why
        symbol = re.search(r"undefined symbol: (\w+)", linker)
        reason = f"torch has no symbol {symbol[1]}, which it needs" if symbol else linker
        raise ImportError(
            f"torch-adasplash {version} cannot load {library} into torch {torch.__version__}: {reason}; install it "
            f"again with the torch that you have ({_AGAIN})"
        ) from error
