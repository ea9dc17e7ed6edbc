"""What keeps a build or an installation from working is said in one sentence, by the build and by the import."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adasplash
from adasplash._load import library_path
from common import ROOT, run, run_python

pytestmark = pytest.mark.backends("cpu")
RELEASE = "torch" + ".".join(torch.__version__.split(".")[:2])
# What pip leaves of PyPI's package of the same import name.
NAMESAKE = {"adasplash-0.2.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: adasplash\nVersion: 0.2.2\n"}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


# ---- Builds -------------------------------------------------------------------------------------------------------


@pytest.fixture
def refusal(source, tmp_path):
    """How a build with this environment fails, in one line and quickly; or another command of setup.py."""

    def build(*command, **environment):
        command = command or ("build_ext", "--build-lib", tmp_path / "built")
        command = [sys.executable, "setup.py", "-q", *command]
        environment = {
            **os.environ,
            "ADASPLASH_ARCHS": "none",
            **{key: str(value) for key, value in environment.items()},
        }
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and done.stdout == "", done.stdout + done.stderr
        [line] = done.stderr.strip().splitlines()
        assert line.startswith("torch-adasplash: ")
        return line

    return build


def path_of(folder: Path, *programs: str) -> Path:
    """A PATH with these programs and no others."""
    folder.mkdir()
    for program in programs:
        (folder / program).symlink_to(shutil.which(program))
    return folder


def test_no_cmake(refusal, tmp_path):
    assert "no cmake is on the path: pip install cmake" in refusal(PATH=path_of(tmp_path / "bin"))


def test_no_ninja(refusal, tmp_path):
    assert "no ninja is on the path: pip install ninja" in refusal(PATH=path_of(tmp_path / "bin", "cmake"))


def test_no_compiler(refusal, tmp_path):
    assert "no C++ compiler found" in refusal(CXX=tmp_path / "missing")


@pytest.mark.parametrize(
    ("says_that_it_is", "named"),
    [
        ("-U__GNUC__ -D__GNUC__=9", "is GNU 9."),
        ("-D__clang__ -D__clang_major__=13 -D__clang_minor__=0 -D__clang_patchlevel__=1", "is Clang 13.0.1"),
    ],
    ids=("GCC", "clang"),
)
def test_a_compiler_that_is_too_old(refusal, tmp_path, says_that_it_is, named):
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec g++ -w {says_that_it_is} "$@"\n')
    compiler.chmod(0o755)
    line = refusal(CXX=compiler)
    assert named in line and "too old for its C++20: install g++ 11 or clang 14, or newer" in line


@pytest.mark.parametrize(
    ("triton", "said"),
    [
        ("raise ModuleNotFoundError('triton')", "has no Triton, which compiles the GPU kernels: install it"),
        ("__version__ = '3.4.0'", "has Triton 3.4.0, which is too old"),
    ],
    ids=("none", "old"),
)
def test_no_triton_where_kernels_are_asked_for(refusal, tmp_path, triton, said):
    modules = write(tmp_path / "modules", {"triton.py": triton})
    line = refusal(ADASPLASH_ARCHS="90", PYTHONPATH=modules)
    assert said in line and "ADASPLASH_ARCHS=none" in line


@pytest.mark.parametrize("command", [(), ("dist_info",)], ids=("build", "metadata"))
def test_no_torch(refusal, tmp_path, command):
    """pip asks for metadata first, by which it would install torch, gigabytes, before it builds."""
    hidden = (
        "from importlib import metadata\nfound = metadata.distributions\n"
        "metadata.distributions = lambda **names: iter(()) if names.get('name') == 'torch' else found(**names)\n"
    )
    line = refusal(*command, PYTHONPATH=write(tmp_path / "modules", {"sitecustomize.py": hidden}), ADASPLASH_TORCH="")
    assert line.endswith("none is: install torch first")


def test_a_compiler_that_runs_out_of_memory(source, tmp_path):
    compiler = tmp_path / "c++"
    killed = "c++: fatal error: Killed signal terminated program cc1plus"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *csrc/*) echo "{killed}" >&2; exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "built"],
        cwd=source, env={**os.environ, "ADASPLASH_ARCHS": "none", "CXX": str(compiler)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and killed in done.stdout
    [line] = done.stderr.strip().splitlines()
    assert "the compiler ran out of memory" in line and "MAX_JOBS=1" in line


def test_a_torch_that_is_too_old(refusal, tmp_path):
    write(tmp_path / "torch", {"version.py": "__version__ = '2.10.0+cpu'\n"})
    assert "torch 2.10.0+cpu" in (line := refusal(ADASPLASH_TORCH=tmp_path / "torch"))
    assert line.endswith("is too old: install 2.11 or newer")


def test_a_libtorch_that_is_too_old(source, tmp_path):
    config = "share/cmake/Torch/TorchConfig"
    libraries = {f"lib/lib{name}.so": "" for name in ("torch", "torch_cpu", "c10")}
    version = 'set(PACKAGE_VERSION "2.10.0")\n'
    write(tmp_path / "libtorch", {f"{config}.cmake": "", f"{config}Version.cmake": version, **libraries})
    command = ["cmake", "-S", source, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path}/libtorch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode and "is too old: install 2.11 or newer" in " ".join(done.stderr.split())


def test_a_torch_folder_that_is_none(refusal, tmp_path):
    assert f"ADASPLASH_TORCH names {tmp_path}, where torch is not" in refusal(ADASPLASH_TORCH=tmp_path)


def test_setuptools_that_are_too_old(refusal, tmp_path):
    modules = write(tmp_path / "modules", {"setuptools.py": "__version__ = '76.1.0'"})
    assert "setuptools 76.1.0 cannot read pyproject.toml" in refusal(PYTHONPATH=modules)


def test_a_tree_that_is_read_only(source, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SystemExit, match=f"torch-adasplash: {source} cannot be written to"):
        runpy.run_path(str(source / "setup.py"), run_name="__main__")


def test_a_cache_that_is_read_only(source, tmp_path):
    pytest.importorskip("triton")
    write(tmp_path, {"cache": "a file, where a folder is needed"})
    done = subprocess.run(
        [sys.executable, "-m", "triton_src.compile", "--arch", "90", "--out", tmp_path / "out"],
        cwd=source, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    [line] = done.stderr.strip().splitlines()
    assert "cannot be written to: set XDG_CACHE_HOME" in line


def test_a_build_beside_the_package_of_the_same_name(refusal, tmp_path):
    line = refusal(PYTHONPATH=write(tmp_path / "site", NAMESAKE))
    assert "PyPI's package adasplash is installed" in line and "pip uninstall adasplash" in line


@pytest.mark.parametrize(
    ("given", "built"),
    {
        "90": "90", "sm_90": "90", "9.0": "90", "90a": "90", "9.0a": "90", "sm_100a": "100", "10.0": "100",
        "80 90": "80;90", "8.0;9.0": "80;90", "80,sm_80, 89": "80;89", "none": "none", "NONE": "none",
        "all": "80;86;89;90;100;103;120",
    }.items(),
)  # fmt: skip
def test_architectures_as_people_write_them(tmp_path, given, built):
    assert architectures(tmp_path, given) == f"-- {built}\n"


@pytest.mark.parametrize("given", ("70", "hopper", "9", "none 90", "9.0+PTX"))
def test_architectures_that_there_are_none_of(tmp_path, given):
    message = " ".join(architectures(tmp_path, given).split())
    assert f"ADASPLASH_ARCHS is '{given}'" in message and "give some of 80 86 89 90 100 103 120" in message


def architectures(folder, given):
    """What CMake makes of ADASPLASH_ARCHS, or says of it."""
    script = f'include("{ROOT}/cmake/AdaSplashArchs.cmake")\nmessage(STATUS "${{ADASPLASH_BUILT_ARCHS}}")\n'
    write(folder, {"archs.cmake": script})
    command = ["cmake", f"-DADASPLASH_ARCHS={given}", "-P", folder / "archs.cmake"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else done.stdout


# ---- The import -----------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path):
    """A folder like site-packages with this package in it."""
    package = Path(adasplash.__file__).parent
    shutil.copytree(package, tmp_path / "site/adasplash", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    (tmp_path / "site/adasplash/lib").symlink_to(package / "lib")
    return tmp_path / "site"


# An editable installation finds the modules that a folder lacks.
NOT_EDITABLE = "import sys; sys.meta_path = [x for x in sys.meta_path if 'editable' not in str(x).lower()]\n"


def import_fails(site, program="import adasplash"):
    line = run_python(NOT_EDITABLE + program, fails=True, cwd=site.parent, env={**os.environ, "PYTHONPATH": str(site)})
    assert line.startswith("ImportError: ")
    return line


def own_library(site, release=RELEASE):
    """Where the package of this folder has its library."""
    (site / "adasplash/lib").unlink()
    (site / "adasplash/lib" / release).mkdir(parents=True)
    return site / "adasplash/lib" / release / "libadasplash.so"


def test_a_good_installation(site):
    """The control: nothing about the folder itself is refused."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    assert str(site) in run_python("import adasplash; print(adasplash.__file__)", cwd=site.parent, env=environment)


def test_builds_for_other_releases_of_torch(site):
    own_library(site, "torch2.9").touch()
    own_library_of_a_later = site / "adasplash/lib/torch2.10/libadasplash.so"
    own_library_of_a_later.parent.mkdir()
    own_library_of_a_later.touch()
    line = import_fails(site)
    assert f"was built against torch 2.9, 2.10, but torch {torch.__version__} is installed" in line
    assert "--no-cache-dir --force-reinstall" in line


def test_an_undefined_symbol_is_named(site, tmp_path):
    library = own_library(site)
    (tmp_path / "library.c").write_text("void _ZN2at7missingEv(void);\nvoid call(void) { _ZN2at7missingEv(); }\n")
    run("cc", "-shared", "-fPIC", "-Wl,-z,now", tmp_path / "library.c", "-o", library)
    line = import_fails(site)
    assert "torch has no symbol _ZN2at7missingEv" in line and torch.__version__ in line and str(library) in line


def test_a_second_copy_of_the_library(site, tmp_path):
    shutil.copytree(Path(library_path()).parents[1], tmp_path / "lib")
    copy = tmp_path / "lib" / RELEASE / "libadasplash.so"
    line = import_fails(site, f"import torch; torch.ops.load_library('{copy}'); import adasplash")
    assert f"{copy} is loaded in this process already" in line


def test_a_second_copy_after_the_import(tmp_path):
    """As C++ programs load it too; torch itself would end the process with a page about macros."""
    shutil.copytree(Path(library_path()).parents[1], tmp_path / "lib")
    copy = tmp_path / "lib" / RELEASE / "libadasplash.so"
    done = subprocess.run(
        [sys.executable, "-c", f"import adasplash, torch; torch.ops.load_library('{copy}')"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode
    [line] = done.stderr.strip().splitlines()
    assert f"{copy} cannot be loaded into a process that has another copy of this library" in line


def test_the_same_library_loaded_before(site):
    program = f"import torch; torch.ops.load_library({library_path()!r}); import adasplash"
    run_python(program, cwd=site.parent, env={**os.environ, "PYTHONPATH": str(site)})


def test_an_installation_that_is_incomplete(site):
    (site / "adasplash/_build.py").unlink()
    assert "is incomplete: install it again" in import_fails(site)


def test_an_installation_without_a_library(site):
    own_library(site)
    assert "is incomplete: install it again" in import_fails(site)


def test_the_source_folder_hides_an_installation(site, source):
    program = f"import sys; sys.path.insert(0, {str(source)!r}); import adasplash"
    line = import_fails(site, program)
    assert f"{source}, which hides the one that is installed in {site}: start Python in another folder" in line


def test_the_source_folder_not_built(site, source):
    program = f"import importlib.metadata, sys, torch; sys.path = [{str(source)!r}]; import adasplash"
    line = import_fails(site, program)
    assert f"not built in its source folder, {source}" in line and "--editable ." in line


def test_the_package_of_the_same_name_beside_this(site):
    write(site, NAMESAKE)
    line = import_fails(site)
    assert "PyPI's package adasplash and torch-adasplash are both installed" in line
    assert "pip uninstall --yes adasplash torch-adasplash" in line


def test_the_package_of_the_same_name_over_this(site):
    """Its __init__.py in place of ours: nothing here runs at import then, but `python -m adasplash.info` does."""
    write(site, {**NAMESAKE, "adasplash/__init__.py": "__version__ = '0.2.2'\n"})
    command = [sys.executable, "-m", "adasplash.info"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=site.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("PyPI's package adasplash and torch-adasplash are both installed")
    assert len(done.stderr.splitlines()) == 1
