"""Builds the library by calling CMake; everything else about the package stands in pyproject.toml."""

import importlib.metadata
import importlib.util
import os
import re
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text()).group(1)

#: Of torch, whose C++ part changes with every minor release: those that the sources are known to build with.
SUPPORTED_TORCH = ">=2.11,<2.15"


def installed_packages() -> list[str]:
    """Where the environment has its packages that this is installed into, which pip hides from an isolated build."""
    return [*{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}, site.getusersitepackages()]


def torch_required() -> str:
    """What the package needs of torch: the minor release that it is built with, or for an sdist what it can be built
    with."""
    found = next(importlib.metadata.distributions(name="torch", path=[*sys.path, *installed_packages()]), None)
    if found is None or "sdist" in sys.argv:
        return f"torch{SUPPORTED_TORCH}"
    return "torch=={}.{}.*".format(*found.version.split(".")[:2])


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake, into the package's folder."""

    @property
    def package_folder(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return ROOT / "adasplash" if in_place else Path(self.build_lib).resolve() / "adasplash"

    def run(self):
        # Torch is that of the environment, also where the build is isolated: another release would not do.
        environment = os.environ.copy()
        if importlib.util.find_spec("torch") is None:
            sys.path += installed_packages()
            for name in ("PYTHONPATH", "PYTHONNOUSERSITE"):  # by which pip hides it, and Triton, from other processes
                environment.pop(name, None)
        try:
            import torch
        except ModuleNotFoundError:
            raise SystemExit(
                "torch-adasplash builds against the torch that is installed, and none is: install torch first"
            ) from None
        build = ROOT / "build" / f"torch-{torch.__version__}-{sys.implementation.cache_tag}"
        subprocess.run(
            [
                *("cmake", "-S", ROOT, "-B", build, "-G", "Ninja"),
                f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
                f"-DPython_EXECUTABLE={sys.executable}",
                "-DADASPLASH_PYTHON=ON",
                "-DCMAKE_INSTALL_LIBDIR=lib",
                f"-DADASPLASH_ARCHS={os.environ.get('ADASPLASH_ARCHS') or 'auto'}",
            ],
            check=True,
            env=environment,
        )
        subprocess.run(["cmake", "--build", build], check=True, env=environment)
        subprocess.run(["cmake", "--install", build, "--prefix", self.package_folder], check=True)

    def get_outputs(self):
        return [str(path) for path in self.package_folder.rglob("*") if path.is_file()]

    def get_output_mapping(self):
        return {}


setup(
    version=VERSION,
    install_requires=[torch_required()],
    ext_modules=[Extension("adasplash._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
