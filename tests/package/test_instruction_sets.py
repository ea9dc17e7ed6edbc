"""Every set of CPU kernels that this machine can run, and the way without torch's BLAS, give the same results."""

import os
import subprocess
import sys

import pytest
import torch

import adasplash
from adasplash import _build, info

HAVE = _build.cpu_capabilities[: _build.cpu_capabilities.index(info.collect()["cpu kernels in use"]) + 1]

# Lists and dense rows, odd sizes, all types, α with code of its own and any other.
PROGRAM = """
import sys, torch, adasplash
results = []
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for alpha in (1.25, 1.5, 2.0):
        torch.manual_seed(0)
        sizes = ((2, 4, 150, 33), (2, 2, 700, 33), (2, 2, 700, 17))
        query, key, value = (torch.randn(size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes)
        with torch.no_grad():
            query[:, :, ::3] *= 0.01
        out = adasplash.entmax_attn(query, key, value, alpha, is_causal=True)
        results += [out, *torch.autograd.grad(out.square().sum(), (query, key, value))]
        x = torch.randn(5, 700, dtype=torch.float64).to(dtype)
        x[::2] *= 0.01
        x, rates = x.requires_grad_(), torch.full((5, 1), alpha).requires_grad_()
        out = adasplash.entmax(x, rates)
        results += [out, *torch.autograd.grad((out * out.detach().sqrt()).sum(), (x, rates))]
torch.save([result.detach() for result in results], sys.argv[1])
"""


def results(path, **environment):
    subprocess.run([sys.executable, "-c", PROGRAM, str(path)], env={**os.environ, **environment}, check=True)
    return torch.load(path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return results(tmp_path_factory.mktemp("kernels") / "expected.pt")


@pytest.mark.parametrize(
    "environment",
    [*({"ADASPLASH_CPU_CAPABILITY": name} for name in HAVE), {"ADASPLASH_BLAS": "aten"}],
    ids=lambda environment: "-".join(environment.values()),
)
def test_agree(tmp_path, expected, environment):
    found = results(tmp_path / "found.pt", **environment)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
    for one, other in zip(found, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error <= tolerance[other.dtype]


def test_info_names_the_set_in_use():
    environment = {**os.environ, "ADASPLASH_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-m", "adasplash.info"]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert "cpu kernels in use:  default" in printed


def test_a_set_that_does_not_exist_is_refused():
    program = "import torch, adasplash; x = torch.ones(1, 1, 2, 2); adasplash.entmax_attn(x, x, x)"
    environment = {**os.environ, "ADASPLASH_CPU_CAPABILITY": "mmx"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "ADASPLASH_CPU_CAPABILITY is 'mmx'; this machine runs default" in run.stderr


def test_version():
    assert adasplash.__version__ == _build.version
