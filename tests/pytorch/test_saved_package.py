"""AOTInductor packages fit one torch and one machine: so an earlier commit is built here and saves one, which loads and
runs with the present library."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

import adasplash  # noqa: F401  (registers the ops)
from common import ROOT, build_once, run, run_python

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.builds, pytest.mark.slow]

EARLIER = "9f88dbc"

# One model with every option in both forms, a learned alpha, and the activation, for any number of tokens.
SAVE = """
import sys, torch, adasplash
assert adasplash.__file__.startswith(sys.argv[1])

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.tensor([1.2, 1.4, 1.5, 2.0]))

    def forward(self, query, key, value, lengths, ends, slopes):
        options = dict(is_causal=True, scale=0.3, window=(20, -1), alibi_slopes=slopes)
        fixed = adasplash.entmax_attn(query, key, value, 1.25, q_seqlens=lengths, kv_seqlens=lengths, **options)
        learned = adasplash.entmax_attn(query, key, value, self.alpha, q_seqlens=lengths, **options)
        tokens = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        packed = adasplash.entmax_attn_varlen(*tokens, ends, ends, 64, 64, self.alpha, **options)
        gates = adasplash.entmax(learned, 1.3) + adasplash.entmax(fixed, self.alpha.view(4, 1, 1))
        return fixed, learned, packed, gates + adasplash.sparsemax(fixed, 1)

def inputs(length):
    tensors = [torch.randn(2, heads, length, 16) for heads in (4, 2, 2)]
    lengths, ends = torch.tensor([length, length // 2]), torch.tensor([0, length // 3, 2 * length])
    return *tensors, lengths, ends, torch.linspace(0.1, 0.4, 8).reshape(2, 4)

torch.manual_seed(0)
model, values = Model().eval(), {}
length = torch.export.Dim("length", min=2, max=32)
shapes = ({2: length}, {2: length}, {2: length}, {}, {}, {})
with torch.no_grad():
    program = torch.export.export(model, inputs(30), dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path="model.pt2")
    values = [(given, model(*given)) for given in (inputs(30), inputs(7))]
torch.save(values, "values.pt")
"""


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A folder with the package, and what its model gave."""
    known = subprocess.run(["git", "cat-file", "-e", f"{EARLIER}^{{commit}}"], cwd=ROOT, capture_output=True)
    if known.returncode:
        pytest.skip(f"commit {EARLIER} is not in this clone: git fetch --unshallow")

    def build(folder):
        source = folder / "source"
        run("git", "archive", "--output", folder / "source.tar", EARLIER, cwd=ROOT)
        shutil.unpack_archive(folder / "source.tar", source)
        environment = {**os.environ, "ADASPLASH_ARCHS": "none", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
        run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, env=environment)
        run_python(SAVE, source, cwd=folder, env={**os.environ, "PYTHONPATH": str(source)})

    return build_once(tmp_path_factory, "earlier", build)


def test_a_package_of_an_earlier_commit(saved):
    model = torch._inductor.aoti_load_package(str(saved / "model.pt2"))
    for inputs, expected in torch.load(saved / "values.pt"):
        for found, before in zip(model(*inputs), expected, strict=True):
            torch.testing.assert_close(found, before, atol=1e-6, rtol=1e-6)
