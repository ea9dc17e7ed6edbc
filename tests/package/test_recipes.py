"""The recipes in packaging/, by which others install this: what they name is what this project has.

Whether an image or a package comes of them takes an engine and a registry, which tests cannot count on.
"""

import fnmatch
import json
import os
import re
import shutil
import sys

import pytest
import tomllib

from common import ROOT, run

pytestmark = pytest.mark.backends("cpu")

DOCKERFILE = (ROOT / "packaging/Dockerfile").read_text()
CONDA = (ROOT / "packaging/conda/meta.yaml").read_text()
CMAKE = (ROOT / "CMakeLists.txt").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VERSION = re.search(r"project\(\w+ VERSION (\S+)", CMAKE)[1]
WHEEL = f"{PYPROJECT['project']['name'].replace('-', '_')}-{VERSION}-py3-none-manylinux_2_28_x86_64.whl"


def instruction(name: str) -> str:
    [rest] = re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)
    return rest


def default(argument: str) -> str:
    return re.search(rf'^ARG {argument}="?([^"\n]+)', DOCKERFILE, re.MULTILINE)[1]


@pytest.mark.parametrize(
    "torch", [default("TORCH"), "torch==2.13.*", "torch>=2.12 --index-url https://some.where/whl/cpu"]
)
def test_the_image_takes_the_wheel_and_the_torch_that_was_asked_for(tmp_path, torch):
    """RUN is run, on what COPY would have copied, with a pip that says what it was called with."""
    source, target = instruction("COPY").split()
    assert fnmatch.fnmatchcase(WHEEL, source)
    image, programs = tmp_path / "image", tmp_path / "programs"
    image.mkdir()
    programs.mkdir()
    (image / WHEEL).touch()
    (programs / "pip").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (programs / "pip").chmod(0o755)
    (programs / "rm").symlink_to(shutil.which("rm"))
    command = instruction("RUN").replace(target, f"{image}/")
    done = run("/bin/sh", "-c", command, env={"PATH": str(programs), "TORCH": torch}, cwd=tmp_path)
    assert done.stdout.splitlines() == ["install", "--no-cache-dir", *torch.split(), str(image / WHEEL)]
    assert not os.listdir(image)


def test_the_image_has_a_python_that_serves_and_says_how_it_is(tmp_path):
    assert instruction("FROM") == "$BASE"
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=3.")
    assert int(re.match(r"python:3\.(\d+)", default("BASE"))[1]) >= int(oldest)
    program, *arguments = json.loads(instruction("CMD"))
    assert program == "python"
    assert re.search(r"^check on cpu: +OK$", run(sys.executable, *arguments, cwd=tmp_path).stdout, re.MULTILINE)


def test_the_conda_recipe_asks_for_what_a_build_asks_for():
    supported = re.search(r'SUPPORTED_TORCH = "(.+)"', (ROOT / "setup.py").read_text())[1]
    cmake = re.search(r"cmake_minimum_required\(VERSION (.+)\)", CMAKE)[1]
    cubins = (ROOT / "cmake/AdaSplashCubins.cmake").read_text()
    triton = re.search(r"_triton VERSION_LESS ([\d.]+)", cubins)[1]
    [setuptools] = PYPROJECT["build-system"]["requires"]
    needed = {
        f"pytorch {supported}",
        f"cmake >={cmake}",
        f"triton >={triton}",
        setuptools.replace(">", " >", 1),
    }
    assert needed <= set(re.findall(r"^ +- (.+)$", CONDA, re.MULTILINE))
    assert f"name: {PYPROJECT['project']['name']}\n" in CONDA
    assert f"license: {PYPROJECT['project']['license']}\n" in CONDA


def test_the_conda_recipe_finds_the_version():
    pattern = re.search(r'regex_pattern="(.+?)"', CONDA)[1]
    assert re.search(pattern, CMAKE)[1] == VERSION
