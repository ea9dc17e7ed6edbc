"""The wheel for several releases of torch, in environments made from nothing: `make test-wheel`.

With no compiler, no CMake and no Ninja on the path where none is needed. Each environment was moved after it was made,
to a folder whose name has spaces.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from common import ROOT, build_once, run

WHEEL = os.environ.get("ADASPLASH_WHEEL")
RELEASES, TESTED, PYTHONS = (
    os.environ.get(f"ADASPLASH_WHEEL_{name}", "").split() for name in ("TORCH", "TESTED", "PYTHONS")
)
pytestmark = [
    pytest.mark.backends("cpu"),
    pytest.mark.builds,
    pytest.mark.skipif(not WHEEL, reason="make test-wheel says which wheel"),
]
PROGRAMS = Path(__file__).parent / "libtorch"
ALONE = {"PATH": "/nonexistent", "HOME": os.environ.get("HOME", "/")}
# What must hold of every torch and Python; `make test` has the rest with those of .venv.
CORE = (
    "attention/test_forward.py",
    "attention/test_backward.py",
    "attention/test_varlen.py",
    "activation/test_entmax_alpha.py",
    "cache/test_paged.py",
    "pytorch/test_export.py",
    "pytorch/test_schema.py",
    "pytorch/test_torchscript.py",
)

# An import without warnings; attention against scores, activation and product one by one; gradients; a model saved
# for TorchScript.
SMOKE = """
import sys, torch, warnings
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    import adasplash

query, key, value = (torch.randn(2, heads, 70, 24, requires_grad=True) for heads in (4, 2, 2))
out = adasplash.entmax_attn(query, key, value, alpha=1.5, is_causal=True)
scores = query @ key.repeat_interleave(2, 1).mT / 24**0.5
hidden = torch.ones(70, 70, dtype=torch.bool).triu(1)
weights = adasplash.entmax(scores.masked_fill(hidden, -torch.inf), 1.5)
torch.testing.assert_close(out, weights @ value.repeat_interleave(2, 1), atol=1e-5, rtol=1e-5)
out.square().sum().backward()
assert all(x.grad.isfinite().all() and x.grad.any() for x in (query, key, value))
assert (adasplash.entmax(torch.tensor([3.0, 0.0, 0.0])) == torch.tensor([1.0, 0.0, 0.0])).all()

class Attend(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.ops.adasplash.entmax_attn(query, key, value, 1.25, True, scale=0.3) * 2

torch.jit.script(Attend()).save(sys.argv[1] + "/model.pt")
inputs = query.detach(), key.detach(), value.detach()
torch.save(inputs, sys.argv[1] + "/inputs.pt")
torch.save(Attend()(*inputs), sys.argv[1] + "/expected.pt")
assert torch.equal(torch.jit.load(sys.argv[1] + "/model.pt")(*inputs), Attend()(*inputs))
assert not warned, warned
print(torch.__version__, adasplash.cmake_prefix_path)
"""


class Environment:
    """A virtual environment of this torch and the wheel."""

    def __init__(self, folder: Path, release: str):
        self.folder, self.release = folder, release
        self.site = next((folder / "lib").glob("python*/site-packages"))

    def python(self, *arguments: object, path: str = ALONE["PATH"]) -> str:
        """Runs its Python with nothing else on the path but this."""
        environment = {**ALONE, "PATH": path}
        return run(self.folder / "bin/python", *arguments, env=environment, cwd=self.folder).stdout


@pytest.fixture(scope="session", params=TESTED)
def environment(request, tmp_path_factory):
    python = PYTHONS[TESTED.index(request.param) % len(PYTHONS)]

    def build(folder):
        made = folder / "made"
        run(python, "-m", "venv", made)
        pip = [made / "bin/python", "-m", "pip", "install", "--quiet"]
        run(*pip, f"torch=={request.param}.*", "numpy", "pytest", "hypothesis")
        settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        run(*pip, "--no-index", WHEEL, env=ALONE | settings)
        made.rename(folder / "a moved environment")

    folder = build_once(tmp_path_factory, f"environment of torch {request.param}", build)
    return Environment(folder / "a moved environment", request.param)


@pytest.fixture(scope="session")
def smoke(environment):
    (environment.folder / "smoke.py").write_text(SMOKE)
    version, prefix = environment.python("smoke.py", environment.folder).split(maxsplit=1)
    assert version.startswith(f"{environment.release}.")
    assert Path(prefix.strip()) == environment.site / "adasplash"
    return environment


@pytest.fixture(scope="session")
def programs(smoke, tmp_path_factory):
    """Built through find_package, with torch found beside the package, from paths with spaces."""

    def build(folder):
        run(
            "cmake", "-G", "Ninja", "-S", PROGRAMS, "-B", folder / "a build", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_PREFIX_PATH={smoke.site / 'adasplash'}", "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--as-needed",
        )  # fmt: skip
        run("cmake", "--build", folder / "a build", "--target", "run_model", "-j", "2")

    return build_once(tmp_path_factory, f"programs of torch {smoke.release}", build) / "a build"


def test_there_are_two_pythons():
    """Of the environments: what is said of every Python was seen with more than one."""
    assert len({PYTHONS[index % len(PYTHONS)] for index in range(len(TESTED))}) > 1


def test_the_wheel_fits_every_python_and_has_every_release():
    name = Path(WHEEL).name
    assert "-py3-none-" in name and "manylinux_2_28_" in name
    with zipfile.ZipFile(WHEEL) as archive:
        names = archive.namelist()
        [metadata] = [archive.read(name).decode() for name in names if name.endswith("METADATA")]
    minors = [int(release.split(".")[1]) for release in RELEASES]
    [requirement] = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: torch")]
    assert f"<2.{max(minors) + 1}" in requirement and f">=2.{min(minors)}" in requirement
    libraries = {name for name in names if name.endswith(".so")}
    assert libraries == {
        "adasplash/lib/libadasplash_kernels.so",
        *(f"adasplash/lib/torch{release}/libadasplash.so" for release in RELEASES),
    }
    assert "adasplash/lib/adasplash/manifest.json" in names  # GPU kernels are inside
    assert Path(WHEEL).stat().st_size < 20e6


def test_another_build_takes_its_kernels(tmp_path):
    """And compiles none, as they are of the same sources."""
    with zipfile.ZipFile(WHEEL) as archive:
        manifest = json.loads(archive.read("adasplash/lib/adasplash/manifest.json"))
    count, folders = len(manifest["variants"]), ["--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    done = run(
        sys.executable, "-m", "triton_src.compile", "--arch", *manifest["archs"], *folders,
        cwd=ROOT, env={**os.environ, "ADASPLASH_CUBINS_FROM": WHEEL},
    )  # fmt: skip
    assert f"{count} variants taken from" in done.stdout and f"{count} variants, {count} from the cache" in done.stdout
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


def test_python_trains_and_saves_a_model(smoke):
    facts = smoke.python("-m", "adasplash.info")
    assert f"torch{smoke.release}/libadasplash.so" in facts
    for release in RELEASES:
        assert release in next(line for line in facts.splitlines() if line.startswith("built against:"))


def test_export_with_dynamic_lengths(smoke):
    program = """
import torch, adasplash
class Attend(torch.nn.Module):
    def forward(self, query, key, value):
        return adasplash.entmax_attn(query, key, value, is_causal=True)
inputs = tuple(torch.randn(1, 2, 20, 8) for _ in range(3))
program = torch.export.export(Attend(), inputs, dynamic_shapes=({2: torch.export.Dim("length")},) * 3)
longer = tuple(torch.randn(1, 2, 33, 8) for _ in range(3))
assert torch.equal(program.module()(*longer), Attend()(*longer))
"""
    smoke.python("-c", program)


def test_what_must_hold_everywhere(smoke):
    """Core tests of this project; of many cases some."""
    program = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"  # -m pytest would import adasplash from here
    options = ["-q", "-p", "no:cacheprovider", "--cases", "2", "-m", "not slow"]
    tests = [ROOT / "tests" / name for name in CORE]
    compiler = os.environ["PATH"]  # which torch looks for where it exports
    printed = smoke.python("-c", program, *options, *tests, path=compiler)
    assert " passed" in printed.splitlines()[-1]


@pytest.fixture(params=("torchscript", "aoti"))
def model(request, smoke, tmp_path):
    """Saved in Python; AOTInductor compiles, so it has a path, and as it cannot link torch from a folder whose name has
    spaces, it sees the environment by another name."""
    if request.param == "torchscript":
        return request.param, smoke.folder / "model.pt"
    program = """
import torch, adasplash
class Attend(torch.nn.Module):
    def forward(self, query, key, value):
        return torch.ops.adasplash.entmax_attn(query, key, value, 1.25, True, scale=0.3) * 2
program = torch.export.export(Attend(), torch.load("inputs.pt"))
torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")
"""
    (tmp_path / "environment").symlink_to(smoke.folder)
    Environment(tmp_path / "environment", smoke.release).python("-c", program, path=os.environ["PATH"])
    return request.param, smoke.folder / "model.pt2"


def test_a_program_in_cpp_that_loads_a_model(smoke, programs, model, tmp_path):
    """Run without Python and with nothing on the path."""
    inputs, outputs = smoke.folder / "inputs.pt", tmp_path / "outputs.pt"
    kind, saved = model
    done = run(programs / "run_model", kind, "inference", saved, inputs, outputs, env=ALONE)
    assert done.stdout.strip() == "no python"
    compared = "import sys, torch; torch.testing.assert_close(torch.load(sys.argv[1])[0], torch.load(sys.argv[2]))"
    smoke.python("-c", compared, outputs, smoke.folder / "expected.pt")


def test_another_release_of_torch_is_refused(smoke, tmp_path):
    """By the import, where pip, which is told the bounds, was not asked."""
    program = "import torch; torch.__version__ = '2.99.0'; import adasplash"
    command = [smoke.folder / "bin/python", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=ALONE, capture_output=True, text=True, check=False)
    assert f"was built against torch {', '.join(RELEASES)}, but torch 2.99.0" in done.stderr.splitlines()[-1]
