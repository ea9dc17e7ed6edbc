"""Builds the library by calling CMake; everything else about the package stands in pyproject.toml.

Of the environment: ADASPLASH_ARCHS (cmake/AdaSplashArchs.cmake), MAX_JOBS (how much is compiled at once), and
ADASPLASH_TORCH, the folders of several torches, separated by colons, for a wheel that serves each of their releases and
runs on older systems than this one (packaging/manylinux.cpp).
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"torch-adasplash: setuptools {setuptools.__version__} cannot read pyproject.toml: pip install "
        "'setuptools>=77', or build without --no-build-isolation"
    )

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r"VERSION (\d+\.\d+\.\d+)", (ROOT / "CMakeLists.txt").read_text()).group(1)

#: Of torch, whose C++ part changes with every minor release: those that the sources are known to build with.
SUPPORTED_TORCH = ">=2.11,<2.16"
NO_TORCH = "it builds against the torch that is installed, and none is: install torch first"


def stop(sentence: str) -> None:
    raise SystemExit(f"torch-adasplash: {sentence}")


def installed_packages() -> list[str]:
    """Where the environment has its packages that this is installed into, which pip hides from an isolated build."""
    return [*{sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}, site.getusersitepackages()]


def installed(name: str) -> importlib.metadata.Distribution | None:
    return next(importlib.metadata.distributions(name=name, path=[*sys.path, *installed_packages()]), None)


def minor_of(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def torch_folders() -> dict[Path, str]:
    """The torches to build against, and their versions: those of ADASPLASH_TORCH, or that of the environment."""
    given = [Path(folder) for folder in os.environ.get("ADASPLASH_TORCH", "").split(os.pathsep) if folder]
    if not given:
        found = installed("torch")
        return {} if found is None else {Path(found.locate_file("torch")): found.version}
    versions = {}
    for folder in given:
        try:
            versions[folder] = re.search(r"__version__ = '(.+?)'", (folder / "version.py").read_text()).group(1)
        except FileNotFoundError:
            stop(f"ADASPLASH_TORCH names {folder}, where torch is not: a folder that holds its version.py is meant")
    return versions


def torch_required() -> str:
    """What the package needs of torch: the minor releases that it is built with, or for an sdist what it can be built
    with."""
    minors = sorted({minor_of(version) for version in torch_folders().values()})
    if not minors and "dist_info" in sys.argv:  # pip is about to install what the package needs, and then to build
        stop(NO_TORCH)
    if not minors or "sdist" in sys.argv:
        return f"torch{SUPPORTED_TORCH}"
    (major, first), (_, last) = minors[0], minors[-1]
    if first == last:
        return f"torch=={major}.{first}.*"
    between = (f",!={major}.{minor}.*" for minor in range(first, last) if (major, minor) not in minors)
    return f"torch>={major}.{first},<{major}.{last + 1}{''.join(between)}"


def check_environment() -> None:
    """One sentence about what would end in a traceback further on, or in an installation that does not work."""
    if installed("adasplash") is not None:
        stop(
            "PyPI's package adasplash is installed in this environment and has the same import name, so that they "
            "overwrite each other: pip uninstall adasplash first (its functions are in adasplash.compat)"
        )
    torches = torch_folders()
    if not torches:
        stop(NO_TORCH)
    for folder, version in torches.items():
        if minor_of(version) < (2, 11):
            stop(f"torch {version} in {folder} is too old: install 2.11 or newer")
    if shutil.which("cmake") is None:
        stop("building needs CMake 3.22 or newer, and no cmake is on the path: pip install cmake")
    if shutil.which("ninja") is None:
        stop("building needs Ninja, and no ninja is on the path: pip install ninja")


def run(command: list[object], environment: dict[str, str], live: bool = False) -> None:
    """Runs CMake, and where it fails stops with one sentence: ours, if CMake or what it ran printed one. What it prints
    is shown at once with `live`, else if it fails without a sentence of ours."""
    printed = []
    with subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            printed.append(line)
            if live:
                print(line, end="", flush=True)
    if not process.returncode:
        return
    output = "".join(printed)
    if ours := re.search(r"^ *AdaSplash:.*\n(?:  \S.*\n)*", output, re.MULTILINE):
        stop(" ".join(ours.group().split()).removeprefix("AdaSplash: "))  # as CMake wraps it
    if not live:
        print(output)
    if re.search(r"Killed|out of memory|bad_alloc", output):
        stop("the compiler ran out of memory, of which one job takes up to 1 GB: set MAX_JOBS=1, or to as many as fit")
    stop(f"{' '.join(map(str, command[:2]))} failed, and what it printed above says why")


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake, into the package's folder."""

    @property
    def package_folder(self) -> Path:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        return ROOT / "adasplash" if in_place else Path(self.build_lib).resolve() / "adasplash"

    def run(self):
        check_environment()
        environment = os.environ.copy()
        if importlib.util.find_spec("torch") is None:  # the build is isolated; Triton is that of the environment too
            for name in ("PYTHONPATH", "PYTHONNOUSERSITE"):  # by which pip hides it from other processes
                environment.pop(name, None)
        torches = torch_folders()
        kernels = "inside" if len(torches) == 1 else "shared"
        builds = []
        for folder, version in torches.items():
            name = f"torch-{version}-{sys.implementation.cache_tag}"
            builds.append(ROOT / "build" / (name if len(torches) == 1 else f"{name}-shared"))
            self.build_against(folder, kernels, builds[-1], environment)
            if kernels == "shared":  # from now on as the first build made them
                kernels = builds[-1] / "libadasplash_kernels.so"
        for name in ("lib", "include"):  # of an earlier build, which may have been of another torch or other sources
            shutil.rmtree(self.package_folder / name, ignore_errors=True)
        for build in builds:
            run(["cmake", "--install", build, "--prefix", self.package_folder], environment)

    def build_against(self, torch: Path, kernels: object, build: Path, environment: dict[str, str]) -> None:
        configure = [
            *("cmake", "-S", ROOT, "-B", build, "-G", "Ninja"),
            f"-DCMAKE_PREFIX_PATH={torch / 'share/cmake'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DADASPLASH_PYTHON=ON",
            f"-DADASPLASH_KERNELS={kernels}",
            f"-DADASPLASH_MANYLINUX={'ON' if os.environ.get('ADASPLASH_TORCH') else 'OFF'}",
            "-DCMAKE_INSTALL_LIBDIR=lib",
            f"-DADASPLASH_ARCHS={os.environ.get('ADASPLASH_ARCHS') or 'auto'}",
        ]
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        try:
            run(configure, environment)
        except SystemExit:  # what CMake had found out by then, such as a compiler, it would not look for again
            for file in (*build.glob("CMakeCache.txt"), *build.glob("CMakeFiles/*/CMake*Compiler.cmake")):
                file.unlink()
            raise
        run(["cmake", "--build", build, *jobs], environment, live=True)

    def get_outputs(self):
        return [str(path) for path in self.package_folder.rglob("*") if path.is_file()]

    def get_output_mapping(self):
        return {}


class Wheel(bdist_wheel):
    """The library is of a platform; of Python it needs nothing that changes between releases."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


if not os.access(ROOT, os.W_OK):
    stop(f"{ROOT} cannot be written to, and a build writes there: copy the folder to where you may write")
setup(
    version=VERSION,
    install_requires=[torch_required()],
    ext_modules=[Extension("adasplash.lib", sources=[])],  # so that setuptools builds, and makes a wheel of a platform
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
