"""The code on the pages is run as it stands there: a page's Python in order, in one process, in an empty folder."""

import os
import re
import sys

import pytest
import tomllib
import torch
from torch.utils.cpp_extension import include_paths

import adasplash
import pages
from common import ROOT, run
from pages import PAGES, name_of

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.slow]

#: Pages whose Python other tests run, with what it needs: checkpoints, several processes.
ELSEWHERE = {
    "docs/transformers.md": "tests/integrations/test_transformers_page.py",
    "docs/distributed.md": "tests/distributed/test_plans.py",
}
REMARKS = {"", "not run", "heavy", "torchrun"}
BLOCKS = {page: pages.blocks(page) for page in PAGES}
MARK = "\x1e"  # between what blocks print
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def with_python(remarks: set[str]) -> list:
    """Pages with blocks of Python of which some have these remarks."""
    chosen = [
        page
        for page, blocks in BLOCKS.items()
        if any(block.language == "python" and block.remark in remarks for block in blocks)
        and name_of(page) not in ELSEWHERE
    ]
    assert chosen
    return [pytest.param(page, id=name_of(page)) for page in chosen]


def run_page(page, folder, remarks: set[str]) -> None:
    chosen = [block for block in BLOCKS[page] if block.language == "python" and block.remark in remarks]
    program = "".join(f"{block.code}\nprint({MARK!r}, end='', flush=True)\n" for block in chosen)
    (folder / "page.py").write_text(program)
    # One thread: sizes are small, and threads that wait for a busy core spin.
    printed = run(sys.executable, "page.py", cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout.split(MARK)
    for block, found in zip(chosen, printed, strict=False):
        if block.printed is not None:
            assert_alike(found, block.printed, f"{name_of(page)}:{block.line}")


def assert_alike(found: str, expected: str, where: str) -> None:
    """The same words. Numbers may differ in what another processor's rounding makes of a training: a tenth of them."""
    assert expected.strip(), f"{where}: the page does not say what the block prints:\n{found}"
    assert NUMBER.sub("#", found).split() == NUMBER.sub("#", expected).split(), f"{where} prints\n{found}"
    for one, other in zip(NUMBER.findall(found), NUMBER.findall(expected), strict=True):
        assert float(one) == pytest.approx(float(other), rel=0.1, abs=0.02), f"{where} prints\n{found}"


def test_every_remark_is_known_and_says_why():
    for page, blocks in BLOCKS.items():
        for block in blocks:
            assert block.remark in REMARKS, f"{name_of(page)}:{block.line}"
            assert bool(block.remark) == bool(block.about.strip()), f"{name_of(page)}:{block.line}"
    for name, test in ELSEWHERE.items():
        assert (ROOT / name).is_file() and (ROOT / test).is_file()


@pytest.mark.parametrize("page", with_python({""}))
def test_python(page, tmp_path):
    if "import transformers" in page.read_text():
        pytest.importorskip("transformers")
    run_page(page, tmp_path, {""})


@pytest.mark.builds
@pytest.mark.parametrize("page", with_python({"heavy"}))
def test_all_python(page, tmp_path):
    run_page(page, tmp_path, {"", "heavy"})


@pytest.mark.builds
def test_programs_of_several_processes(tmp_path):
    for page, blocks in BLOCKS.items():
        for block in blocks:
            if block.remark == "torchrun":
                (tmp_path / block.about).write_text(block.code)
                outputs = [
                    run(
                        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                        block.about, cwd=tmp_path,
                    ).stdout
                    for processes in (2, 1)
                ]  # fmt: skip
                for found in outputs:
                    assert_alike(found, block.printed, f"{name_of(page)}:{block.line}")


@pytest.mark.builds
def test_cpp_compiles(tmp_path):
    """All blocks as one source, for the sake of time: what they include, and then each in a namespace of its own."""
    code = [block.code for blocks in BLOCKS.values() for block in blocks if block.language == "cpp"]
    assert code
    includes = sorted({line for block in code for line in re.findall(r"^#include .*$", block, re.MULTILINE)})
    bodies = (re.sub(r"^#include .*$", "", block, flags=re.MULTILINE) for block in code)
    spaces = (f"namespace block_{number} {{\n{body}\n}}" for number, body in enumerate(bodies))
    (tmp_path / "blocks.cpp").write_text("\n".join((*includes, *spaces)))
    (tmp_path / "adasplash").symlink_to(ROOT / "csrc")
    folders = [f"-I{folder}" for folder in (tmp_path, *include_paths())]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    run("c++", "-std=c++20", "-fsyntax-only", abi, *folders, "blocks.cpp", cwd=tmp_path)


@pytest.mark.builds
def test_the_guide_to_cpp(tmp_path):
    """docs/guides/cpp.md from its export to what its programs print."""
    blocks = {}
    for block in BLOCKS[ROOT / "docs/guides/cpp.md"]:
        blocks.setdefault(block.language, []).append(block.code)
    (tmp_path / "export.py").write_text(blocks["python"][0])
    (tmp_path / "package.cpp").write_text(blocks["cpp"][0])
    (tmp_path / "app.cpp").write_text(blocks["cpp"][1])
    (tmp_path / "CMakeLists.txt").write_text(blocks["cmake"][0])
    run(sys.executable, "export.py", cwd=tmp_path)
    run("cmake", "-B", "build", f"-DCMAKE_PREFIX_PATH={adasplash.cmake_prefix_path}", cwd=tmp_path)
    run("cmake", "--build", "build", cwd=tmp_path)
    printed = "".join(run(tmp_path / "build" / name, cwd=tmp_path).stdout for name in ("package", "app"))
    assert printed == blocks["text"][0]

    inputs = [torch.randn(1, heads, 50, 64) for heads in (8, 2, 2)]
    expected = adasplash.entmax_attn(*inputs, is_causal=True)
    assert torch.equal(torch.jit.load(tmp_path / "attention.ts")(*inputs), expected)
    assert torch.equal(torch._inductor.aoti_load_package(tmp_path / "attention.pt2")(*inputs), expected)


def commands():
    """The lines of all shell blocks, with continued lines put together; and what stands in sentences and tables."""
    for page, blocks in BLOCKS.items():
        for command in re.findall(r"`((?:make|python|torchrun) [^`\n]+)`", pages.without_blocks(page)):
            yield name_of(page), command
        for block in blocks:
            if block.language == "sh":
                for line in block.code.replace("\\\n", " ").splitlines():
                    yield f"{name_of(page)}:{block.line}", line.partition(" #")[0].strip()


def test_shell_commands_name_what_there_is():
    """Targets of make, programs and modules of this repository with their options, extras of the package."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for where, line in commands():
        for target in re.findall(r"^make ([\w-]+)", line):
            assert target in targets, f"{where}: make {target}"
        for names in re.findall(r"\.\[([\w,-]+)\]", line):
            assert set(names.split(",")) <= set(extras), f"{where}: {line}"
        for program in re.findall(r"(?<!\S)((?:examples|bench|packaging|tests)/\S+\.py)", line):
            assert_takes(where, line, ROOT / program)
        for module in re.findall(r"-m ((?:bench|adasplash|triton_src)\.[\w.]+)", line):
            assert_takes(where, line, ROOT / f"{module.replace('.', '/')}.py")


def assert_takes(where: str, line: str, file) -> None:
    assert file.is_file(), f"{where}: {line}"
    folders = (file.parent, ROOT / "examples/shared")
    source = "".join(path.read_text() for folder in folders for path in folder.glob("*.py"))
    for option in re.findall(r"(?<= )--([a-z][\w-]*)", line.partition(file.name)[2]):
        # Some are added in a loop over names.
        named = re.search(rf'"(--)?{option}"|\b{option.replace("-", "_")}:', source)
        assert named, f"{where}: {file.name} has no --{option}"
