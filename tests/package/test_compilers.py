"""The library as other compilers and linkers make it: `make test-compilers`, which says which."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from test_wheel import CORE

from common import ROOT, build_once, run

COMPILERS = os.environ.get("ADASPLASH_COMPILERS", "").split()
pytestmark = [
    pytest.mark.backends("cpu"),
    pytest.mark.builds,
    pytest.mark.skipif(not COMPILERS, reason="make test-compilers says with which"),
]

# Loops over several threads, then what runtimes of OpenMP there are in the process.
THREADS = r"""
import os, re, sys, torch, adasplash
torch.set_num_threads(4)
query, key, value = (torch.randn(2, 4, 300, 32, requires_grad=True) for _ in range(3))
adasplash.entmax_attn(query, key, value).sum().backward()
print(adasplash.__file__, len(os.listdir("/proc/self/task")))
loaded = open("/proc/self/maps").read()
print(*{os.path.realpath(path) for path in re.findall(r"/\S*/lib(?:gomp|i?omp\d*)\b\S*", loaded)})
"""


class Built:
    """The package with the library that was made by a compiler, or compiler/linker."""

    def __init__(self, site: Path, compiler: str):
        self.site, self.compiler = site, compiler

    def python(self, *arguments: object) -> str:
        environment = {**os.environ, "PYTHONPATH": str(self.site)}
        return run(sys.executable, *arguments, env=environment, cwd=self.site).stdout


@pytest.fixture(scope="session", params=COMPILERS)
def built(request, tmp_path_factory):
    """Objects are kept, so that another linker, or the same compiler again, compiles what changed."""
    compiler, _, linker = request.param.partition("/")
    objects = ROOT / "build/compilers" / compiler

    def build(folder):
        run(
            "cmake", "-G", "Ninja", "-S", ROOT, "-B", objects, f"-DCMAKE_CXX_COMPILER={compiler}",
            # A warning would be lost among 48 compiled files.
            "-DCMAKE_CXX_FLAGS=-Werror",
            "-DCMAKE_SHARED_LINKER_FLAGS=-Wl,--fatal-warnings" + (f" -fuse-ld={linker}" if linker else ""),
            # By one family of compilers each file alone, which shows whether it includes all that it uses.
            f"-DCMAKE_DISABLE_PRECOMPILE_HEADERS={'OFF' if 'clang' in compiler else 'ON'}",
            f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}", "-DADASPLASH_PYTHON=ON", "-DADASPLASH_ARCHS=none",
            "-DCMAKE_INSTALL_LIBDIR=lib",
        )  # fmt: skip
        run("cmake", "--build", objects, "-j", os.environ.get("MAX_JOBS", "2"))
        own = shutil.ignore_patterns("lib", "include", "_build.py", "__pycache__")
        shutil.copytree(ROOT / "adasplash", folder / "adasplash", ignore=own)
        run("cmake", "--install", objects, "--prefix", folder / "adasplash")

    return Built(build_once(tmp_path_factory, request.param.replace("/", "-"), build), compiler)


def test_it_was_made_by_that_compiler_and_linker(built, request):
    """Both leave their names in the library."""
    [library] = built.site.rglob("libadasplash.so")
    comments = run("readelf", "-p", ".comment", library).stdout
    compiler, _, linker = request.node.callspec.params["built"].partition("/")
    version = run(compiler, "-dumpfullversion", "-dumpversion").stdout.split()[0]
    assert re.search(rf"{'clang' if 'clang' in compiler else 'GCC'}\b.* {re.escape(version)}", comments)
    assert not linker or {"lld": "LLD", "mold": "mold"}[linker] in comments


def test_there_is_one_runtime_of_threads(built):
    """torch's, also where the compiler has an OpenMP of its own."""
    (file, threads), runtimes = (line.split() for line in built.python("-c", THREADS).splitlines())
    assert Path(file).is_relative_to(built.site)
    assert int(threads) >= 4
    assert [Path(path).name.startswith("libgomp") for path in runtimes] == [True]


def run_tests(built, *arguments: object) -> str:
    """Runs tests of this project beside it; the last line says how they went."""
    program = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # -m pytest would import adasplash from here
    printed = built.python("-c", program, "-q", "-p", "no:cacheprovider", *arguments)
    return printed.splitlines()[-1]


def test_what_must_hold_everywhere(built):
    """Of many cases some, and every set of instructions that this machine has."""
    files = [ROOT / "tests" / name for name in (*CORE, "package/test_instruction_sets.py")]
    assert " passed" in run_tests(built, "--cases", "2", "-m", "not slow", *files)


def test_programs_of_that_compiler_find_it(built, monkeypatch):
    """Through find_package."""
    monkeypatch.setenv("CXX", built.compiler)
    chosen = "linker_keeps or gradients or activation or exceptions"
    assert " passed" in run_tests(built, "-m", "not builds", "-k", chosen, ROOT / "tests/package/test_libtorch.py")
