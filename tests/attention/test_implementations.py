"""The ways to compute attention on the GPU: they understand each other, and the environment chooses one."""

import itertools
import os

import pytest
import torch

from adasplash import entmax_attn, entmax_attn_varlen
from common import ROOT, check_gradients, force_cuda_implementation, run_python
from packing import check_packed, packed

pytestmark = pytest.mark.backends("emulated", "cuda")

OPTIONS = {
    "full": dict(),
    "causal": dict(is_causal=True),
    "window": dict(window=(50, 20)),
    "ALiBi": dict(is_causal=True, alibi_slopes=[0.3, 0.1, 0.02, 0.0]),
    "lengths": dict(is_causal=True, q_seqlens=[130, 70], kv_seqlens=[67, 140]),
}
CODES = ("alpha", (1.25, 1.5, 2.0, "per head"))


@pytest.fixture
def pairs(implementations):
    if len(implementations) == 1:
        pytest.skip("one implementation is built")
    return list(itertools.permutations(implementations, 2))


def alpha_of(alpha, device):
    return torch.tensor([1.1, 1.4, 1.5, 1.9], device=device) if alpha == "per head" else alpha


def crosswise(op, forward, backward):
    """The op, whose forward one of them computes, and whose backward the other."""

    def attend(*arguments, **keywords):
        force_cuda_implementation(forward)
        out = op(*arguments, **keywords)
        force_cuda_implementation(backward)
        return out

    return attend


@pytest.mark.parametrize(*CODES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_backward_of_one_takes_what_the_forward_of_another_left(pairs, make_inputs, backend, options, alpha, dtype):
    inputs = make_inputs(2, 4, 130, 140, size=64, kv_heads=2, dtype=dtype)
    options = {
        name: torch.tensor(x, device=backend.device) if isinstance(x, list) else x
        for name, x in OPTIONS[options].items()
    }
    for pair in pairs:
        check_gradients(crosswise(entmax_attn, *pair), inputs, alpha=alpha_of(alpha, backend.device), **options)


@pytest.mark.parametrize(*CODES)
def test_the_same_of_packed_sequences(pairs, backend, alpha, dtype):
    shape = dict(heads=4, kv_heads=2, size=64, dtype=dtype)
    inputs, lengths = packed([70, 3, 64], [60, 70, 10], backend.device, **shape)
    for pair in pairs:
        op = crosswise(entmax_attn_varlen, *pair)
        check_packed(inputs, lengths, op=op, alpha=alpha_of(alpha, backend.device), is_causal=True)


PROGRAM = """
import sys, torch
if sys.argv[1] == "emulated":
    from emulated import install
    install()
import adasplash
x = torch.ones(1, 1, 3, 16, device="cuda" if sys.argv[1] == "cuda" else "cpu").requires_grad_()
adasplash.entmax_attn(x, x, x).sum().backward()
assert x.grad.isfinite().all()
"""


def attend(backend, name, **options):
    """What a process with this choice in its environment prints."""
    environment = {**os.environ, "ADASPLASH_CUDA_IMPL": name, "PYTHONPATH": str(ROOT / "tests")}
    return run_python(PROGRAM, backend.name, env=environment, **options)


def test_the_environment_chooses(backend, implementations):
    for name in ("", implementations[-1]):
        attend(backend, name)


def test_an_implementation_that_does_not_exist_is_refused(backend, implementations):
    line = attend(backend, "abacus", fails=True)
    assert line.startswith("RuntimeError: ")
    for word in ("ADASPLASH_CUDA_IMPL", "abacus", *implementations):
        assert word in line


def test_unknown_names_cannot_be_forced(implementations):
    with pytest.raises(AssertionError, match="abacus"):
        force_cuda_implementation("abacus")
