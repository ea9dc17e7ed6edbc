"""Builds the library by calling CMake; everything else about the package stands in pyproject.toml."""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text()).group(1)


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake, into the package's folder."""

    @property
    def package_folder(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return ROOT / "adasplash" if in_place else Path(self.build_lib).resolve() / "adasplash"

    def run(self):
        try:
            import torch
        except ModuleNotFoundError:
            raise SystemExit(
                "torch-adasplash builds against the torch that is installed, and none is: install torch first, then "
                "run pip with --no-build-isolation"
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
        )
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", self.package_folder], check=True)

    def get_outputs(self):
        return [str(path) for path in self.package_folder.rglob("*") if path.is_file()]

    def get_output_mapping(self):
        return {}


setup(version=VERSION, ext_modules=[Extension("adasplash._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
