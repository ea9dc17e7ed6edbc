"""The Python package: what gets installed, what import says, what a bug report needs."""

import importlib.metadata
import inspect
import os
import re
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import adasplash
import pages
from adasplash import _load, entmax_attn, info
from common import ROOT, build_once, run, run_python

pytestmark = pytest.mark.backends("cpu")


def copy_repository(folder: Path) -> None:
    """The files that git would hand out."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())


def make_sdist(folder: Path) -> Path:
    copy_repository(folder / "source")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=folder / "source")
    [file] = folder.glob("*.tar.gz")
    return file


def test_the_source_distribution_has_what_a_build_needs(tmp_path):
    with tarfile.open(make_sdist(tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        [metadata] = [name for name in archive.getnames() if name.count("/") == 1 and name.endswith("PKG-INFO")]
        assert b"Requires-Dist: torch<2.16,>=2.11" in archive.extractfile(metadata).read()
    folders = ("cmake", "csrc", "packaging", "triton_src", "adasplash")
    needed = run("git", "ls-files", "CMakeLists.txt", *folders, cwd=ROOT).stdout
    assert set(needed.split()) | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


#: The newest versions of symbols that a system of the kind manylinux_2_28 has.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def test_a_wheel_would_run_on_older_systems(tmp_path):
    """What the library asks of a newer one is in packaging/manylinux.cpp, or `make wheel` would not end."""
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-fno-builtin", "-fPIC", "-c"]
    run(*command, ROOT / "packaging/manylinux.cpp", "-o", tmp_path / "own.o")
    own = {line.split()[-1] for line in run("nm", "--defined-only", tmp_path / "own.o").stdout.splitlines()}
    symbols = run("readelf", "--dyn-syms", "--wide", _load.library_path()).stdout
    wanted = re.findall(r" UND (\w+)@+(\w+?)_([\d.]+)", symbols)
    assert wanted
    for name, kind, version in wanted:
        newer = tuple(map(int, version.split("."))) > NEWEST.get(kind, (99,))
        assert not newer or name in own, f"{name}, {kind}_{version}"


@pytest.mark.parametrize(
    ("versions", "required"),
    [
        (["2.13.1+cpu"], "torch==2.13.*"),
        (["2.14.0", "2.11.2+cu130", "2.12.0", "2.13.0"], "torch<2.15,>=2.11"),
        (["2.11.0", "2.14.0", "2.13.0"], "torch!=2.12.*,<2.15,>=2.11"),
    ],
    ids=("one", "all", "with a gap"),
)
def test_a_build_says_which_releases_of_torch_it_is_for(source, tmp_path, versions, required):
    for version in versions:
        (tmp_path / version).mkdir()
        (tmp_path / version / "version.py").write_text(f"__version__ = '{version}'\n")
    folders = os.pathsep.join(str(tmp_path / version) for version in versions)
    environment = {**os.environ, "ADASPLASH_TORCH": folders}
    run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, cwd=source, env=environment)
    [requires] = tmp_path.glob("*.egg-info/requires.txt")
    assert requires.read_text().splitlines()[0] == required


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """`pip install` of the source distribution as users type it, in an isolated build, into a folder of its own."""

    def build(folder):
        run(
            sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", folder / "site",
            make_sdist(folder), env={**os.environ, "ADASPLASH_ARCHS": "none"},
        )  # fmt: skip

    return build_once(tmp_path_factory, "installed", build) / "site"


@pytest.mark.builds
def test_the_wheel_needs_the_torch_that_it_was_built_with(installed):
    [metadata] = installed.glob("torch_adasplash-*.dist-info/METADATA")
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"Requires-Dist: torch=={minor}.*" in metadata.read_text()


@pytest.mark.builds
def test_the_start_page_from_its_first_command(tmp_path):
    """As it stands there, in an environment that has torch and nothing of ours."""
    copy_repository(tmp_path / "torch-adasplash")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    [site] = (tmp_path / "venv/lib").glob("python*/site-packages")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not (site / entry.name).exists() and "adasplash" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    commands = next(block for block in pages.blocks(ROOT / "docs/start.md") if block.language == "sh").code
    path = os.pathsep.join([str(tmp_path / "venv/bin"), os.environ["PATH"]])
    said = run("bash", "-ec", commands, cwd=tmp_path / "torch-adasplash", env={**os.environ, "PATH": path}).stdout
    assert re.search(r"^check on cpu: +OK$", said, re.MULTILINE)
    assert str(site / "adasplash") in said


@pytest.mark.builds
def test_pip_install_brings_everything(installed, tmp_path):
    program = (
        "import adasplash, torch; x = torch.randn(1, 2, 5, 4); print(adasplash.__file__);"
        "print(adasplash.cmake_prefix_path); adasplash.entmax_attn(x, x, x); print(adasplash.__version__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    file, prefix, version = run_python(program, env=environment, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed) and Path(prefix).is_relative_to(installed)
    assert version == adasplash.__version__
    shipped = {path.name for path in installed.rglob("*") if path.is_file()}
    assert {"libadasplash.so", "adasplash.h", "AdaSplashConfig.cmake", "LICENSE"} <= shipped
    assert (installed / "adasplash").is_dir()
    assert not [name for name in shipped if name.startswith("test_") or name == "setup.py"]
    strays = {path.name for path in installed.iterdir()} - {"adasplash", "bin"}
    assert all(re.fullmatch(r"torch_adasplash-.*\.dist-info", name) for name in strays)


def test_versions_agree():
    assert importlib.metadata.version("torch-adasplash") == adasplash.__version__


def test_another_torch_version_is_refused_in_one_sentence():
    line = run_python("import torch; torch.__version__ = '2.1.0'; import adasplash", fails=True)
    assert line.startswith("ImportError: ")
    for word in ("adasplash", "torch", "2.1.0", *_load.releases()):
        assert word in line


def test_a_patch_release_or_build_tag_is_judged_sensibly():
    """The same torch under another local build tag (+cpu, +cu130) has the same ABI."""
    base = torch.__version__.split("+")[0]
    run_python(f"import torch; torch.__version__ = '{base}+cu130'; import adasplash")


def test_info_says_what_a_bug_report_needs():
    out = run(sys.executable, "-m", "adasplash.info").stdout
    facts = (
        adasplash.__version__,
        torch.__version__,
        sys.version.split()[0],
        *adasplash._build.cpu_capabilities,
        str(torch.get_num_threads()),
    )
    for fact in facts:
        assert fact in out
    named = (
        "built against",
        "cpu kernels in use",
        "threads",
        "cuda kernels built",
        "cuda implementation",
        "driver",
        "gpu",
    )
    for word in named:
        assert f"{word}:" in out


def test_check_says_ok():
    done = run(sys.executable, "-m", "adasplash.info", "--check")
    assert "check on cpu:        OK" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("computed", "said"),
    [
        (lambda *x, **_: sum(x), "wrong numbers: output is off by"),
        (lambda *x, **_: sum(x) * torch.nan, "wrong numbers: output is off by nan"),
        (lambda *x, **options: entmax_attn(*(y.detach() for y in x), **options) + 0 * sum(x), "wrong numbers: dquery"),
        (lambda *x, **_: torch.ops.aten.mm(*x[:2]), "self must be a matrix; does torch alone compute there? python"),
    ],
    ids=("wrong", "not a number", "no gradient", "an error"),
)
def test_check_says_what_is_wrong(monkeypatch, computed, said):
    monkeypatch.setattr(adasplash, "entmax_attn", computed)
    assert said in info.check(torch.device("cpu"))


def test_import_needs_no_triton():
    program = (
        "import sys; sys.modules['triton'] = None; import torch, adasplash; x = torch.ones(1, 1, 3, 4);"
        "torch.testing.assert_close(adasplash.entmax_attn(x, x, x, is_causal=True), x)"
    )
    run_python(program)


def test_import_is_light():
    """Neither the compiler stack nor Triton comes in with the import."""
    program = "import torch, sys; before = set(sys.modules); import adasplash;print(*sorted(set(sys.modules) - before))"
    added = run_python(program).split()
    assert "adasplash._build" in added
    assert not [name for name in added if name.split(".")[0] in ("triton", "sympy") or "_inductor" in name]


def test_entmax_attn_is_typed_and_documented():
    signature = inspect.signature(adasplash.entmax_attn)
    assert list(signature.parameters) == [
        "query", "key", "value", "alpha", "is_causal", "scale", "q_seqlens", "kv_seqlens", "window", "alibi_slopes",
        "kv_starts", "dropout_p", "dropout_seed", "key_index", "q_positions", "dropout_origin",
    ]  # fmt: skip
    for name, parameter in signature.parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty and not isinstance(parameter.annotation, str)
        assert name in adasplash.entmax_attn.__doc__
    assert signature.return_annotation is torch.Tensor
    assert (Path(adasplash.__file__).parent / "py.typed").exists()
