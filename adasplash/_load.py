"""Loads libadasplash.so, which registers the ops, into this process."""

import os

import torch

try:
    from adasplash import _C
except ImportError as error:
    raise ImportError(
        "torch-adasplash is not built here: run pip install --no-build-isolation --no-deps --editable . in its source "
        f"folder ({error})"
    ) from error

version: str = _C.version
_FOLDER = os.path.dirname(os.path.abspath(__file__))

#: Add this to ``CMAKE_PREFIX_PATH`` and C++ projects find the library with ``find_package(AdaSplash)``.
cmake_prefix_path: str = _FOLDER


def _release(torch_version: str) -> str:
    """Major and minor number: within those, torch keeps its C++ symbols."""
    return ".".join(torch_version.split("+")[0].split(".")[:2])


def load_library() -> None:
    """Registers ``torch.ops.adasplash``.

    Raises:
        ImportError: torch is of another release than the one that this build was compiled against, or the library is
            missing or does not fit.
    """
    if _release(torch.__version__) != _release(_C.torch_version):
        raise ImportError(
            f"torch-adasplash {version} was built against torch {_C.torch_version}, but torch {torch.__version__} is "
            "installed: build it again from its source folder (pip install --no-build-isolation --no-deps .), or "
            "install that torch"
        )
    library = os.path.join(_FOLDER, "lib", "libadasplash.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(
            f"torch-adasplash {version}, built against torch {_C.torch_version}, cannot load {library} into torch "
            f"{torch.__version__}: {error}"
        ) from error
