"""Models that an earlier commit saved (saved/make.py) load, and give what they gave then: results and gradients."""

import functools
from pathlib import Path

import pytest
import torch

import adasplash  # noqa: F401  (registers the ops)

pytestmark = pytest.mark.backends("cpu")

SAVED = Path(__file__).parent / "saved"
OPS = {
    "padded": {"entmax_attn.default"},
    "padded_per_head": {"entmax_attn.per_head"},
    "packed": {"entmax_attn_varlen.default"},
    "packed_per_head": {"entmax_attn_varlen.per_head"},
    "activation": {"entmax.default", "entmax.tensor_alpha"},
}


@functools.cache
def values():
    return torch.load(SAVED / "values.pt")


def assert_close(actual, expected):
    """Fp32 by another set of instructions and another BLAS: up to 2e-6 of the largest number apart."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6 * expected.abs().max().item())


def check(model, case):
    """Results and gradients of a model; more than once, as TorchScript rewrites its graph after the first runs."""
    expected = values()[case]
    names, parameters = zip(*model.named_parameters(), strict=True)
    assert set(names) == expected["gradients"].keys()
    for _ in range(3):
        out = model(*expected["inputs"])
        assert_close(out.detach(), expected["out"])
        gradients = torch.autograd.grad(out.square().sum(), parameters)
        for name, gradient in zip(names, gradients, strict=True):
            assert_close(gradient, expected["gradients"][name])


def called(program):
    """The names of our ops in the graph of an exported program."""
    targets = (str(node.target) for node in program.graph.nodes)
    return {target.removeprefix("adasplash.") for target in targets if target.startswith("adasplash.")}


@pytest.mark.parametrize("case", OPS)
def test_torchscript(case):
    check(torch.jit.load(SAVED / f"{case}.torchscript.pt"), case)


@pytest.mark.parametrize("case", OPS)
def test_exported_program(case):
    program = torch.export.load(SAVED / f"{case}.pt2")
    assert called(program) == OPS[case]
    check(program.module(), case)


@pytest.mark.parametrize("case", OPS)
def test_decomposed_program(case):
    program = torch.export.load(SAVED / f"{case}.decomposed.pt2")
    assert called(program) == {"_entmax_forward.default" if case == "activation" else "_entmax_attn_forward.default"}
    expected = values()[case]
    with torch.no_grad():
        assert_close(program.module()(*expected["inputs"]), expected["out"])


@pytest.mark.parametrize("case", OPS)
def test_training_graph(case):
    """Forward and backward in one graph, of the private ops."""
    program = torch.export.load(SAVED / f"{case}.training.pt2")
    part = "" if case == "activation" else "attn_"
    assert called(program) == {f"_entmax_{part}forward.default", f"_entmax_{part}backward.default"}
    expected, signature = values()[case], program.graph_signature
    parameters = [program.state_dict[name] for name in signature.parameters]
    with torch.no_grad():
        loss, *gradients = program.graph_module(*parameters, *expected["inputs"])
    assert_close(loss, expected["out"].square().sum())
    of_parameters = signature.backward_signature.gradients_to_parameters.values()
    assert {name.removeprefix("model.") for name in of_parameters} == expected["gradients"].keys()
    for name, gradient in zip(of_parameters, gradients, strict=True):
        assert_close(gradient, expected["gradients"][name.removeprefix("model.")])


def test_every_file_is_tested():
    kinds = ("torchscript.pt", "pt2", "decomposed.pt2", "training.pt2")
    found = {path.name for path in SAVED.iterdir() if path.suffix in (".pt", ".pt2")}
    assert found == {"values.pt", *(f"{case}.{kind}" for case in OPS for kind in kinds)}
