"""The README's examples are run as they stand there."""

import re
import sys

import pytest
import torch

import adasplash
from common import ROOT, build_once, run

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.slow]
README = (ROOT / "README.md").read_text()


def blocks(language):
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert found, f"the README has no example in {language}"
    return "\n".join(found)


@pytest.fixture(scope="session")
def python_example(tmp_path_factory):
    def build(folder):
        (folder / "example.py").write_text(blocks("python"))
        run(sys.executable, "example.py", cwd=folder)

    return build_once(tmp_path_factory, "readme", build)


def test_python(python_example):
    inputs = [torch.randn(1, heads, 50, 64) for heads in (8, 2, 2)]
    expected = adasplash.entmax_attn(*inputs, is_causal=True)
    assert torch.equal(torch.jit.load(python_example / "attention.ts")(*inputs), expected)
    assert torch.equal(torch._inductor.aoti_load_package(python_example / "attention.pt2")(*inputs), expected)


def test_cpp(python_example, tmp_path):
    (tmp_path / "app.cpp").write_text(blocks("cpp"))
    find, link = blocks("cmake").strip().splitlines()
    lines = ("cmake_minimum_required(VERSION 3.18)", "project(app CXX)", find, "add_executable(app app.cpp)", link)
    (tmp_path / "CMakeLists.txt").write_text("\n".join(lines))
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={adasplash.cmake_prefix_path}")
    run("cmake", "--build", tmp_path / "build")
    run(tmp_path / "build/app", cwd=python_example)
