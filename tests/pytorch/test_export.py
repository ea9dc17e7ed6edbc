"""torch.export: one node, dynamic lengths, and files."""

import pytest
import torch
from torch._functorch.aot_autograd import aot_export_joint_simple

import adasplash
from common import assert_same_bits, gradients, make_inputs, normal_like, run_python
from options import FORMS
from saving import reloaded_program

pytestmark = pytest.mark.backends("cpu", "cuda")
Dim = torch.export.Dim


class Attend(torch.nn.Module):
    def forward(self, query, key, value):
        return adasplash.entmax_attn(query, key, value, alpha=1.25, is_causal=True, scale=0.3)


class AttendThroughOp(torch.nn.Module):
    def forward(self, query, key, value):
        return torch.ops.adasplash.entmax_attn(query, key, value, 1.25, True, scale=0.3)


def exported(module, device="cpu"):
    batch, m, n = Dim("batch", max=64), Dim("m", max=4096), Dim("n", max=4096)
    shapes = dict(query={0: batch, 2: m}, key={0: batch, 2: n}, value={0: batch, 2: n})
    inputs = make_inputs(2, 4, 33, 50, kv_heads=2, device=device)
    return torch.export.export(module, tuple(inputs), dynamic_shapes=shapes)


def calls(program):
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("module", (Attend, AttendThroughOp))
def test_one_node_and_its_decomposition(backend, module):
    program = exported(module(), backend.device)
    assert calls(program) == [torch.ops.adasplash.entmax_attn.default]
    names = [str(target) for target in calls(program.run_decompositions())]
    assert names.count("adasplash._entmax_attn_forward.default") == 1
    assert not any("adasplash.entmax_attn" in name for name in names)


@pytest.mark.parametrize("decomposed", (False, True), ids=("one node", "decomposed"))
def test_saved_and_loaded_for_any_length(backend, decomposed):
    program = exported(Attend(), backend.device)
    if decomposed:
        program = program.run_decompositions()
    module = reloaded_program(program)
    for batch, m, n in ((2, 33, 50), (3, 64, 64), (5, 100, 20), (1, 2, 129)):
        inputs = make_inputs(batch, 4, m, n, kv_heads=2, device=backend.device)
        assert torch.equal(module(*inputs), Attend()(*inputs))


OPTION_SHAPES = {
    "padded": lambda: [{0: "b", 2: "m"}, {0: "b", 2: "n"}, {0: "b", 2: "n"}, {}, {0: "b"}, {0: "b"}, {0: "b"}],
    "packed": lambda: [{0: "m"}, {0: "n"}, {0: "n"}, {}, {0: "b1"}, {0: "b1"}, {0: "b"}, Dim.DYNAMIC, Dim.DYNAMIC],
}


@pytest.mark.parametrize("decomposed", (False, True), ids=("one node", "decomposed"))
@pytest.mark.parametrize("form", FORMS)
def test_every_option_for_any_length(backend, form, decomposed):
    module, arguments = FORMS[form]
    shapes = [s if s is Dim.DYNAMIC else dict.fromkeys(s, Dim.AUTO) for s in OPTION_SHAPES[form]()]
    given = arguments([20, 33], [40, 25], backend.device)
    program = torch.export.export(module(), given, dynamic_shapes=tuple(shapes))
    assert sum("adasplash" in str(call) for call in calls(program)) == 1
    program = program.run_decompositions() if decomposed else program
    loaded = reloaded_program(program)
    for q_lengths, k_lengths in (([20, 33], [40, 25]), ([7, 30, 2], [9, 64, 65]), ([60] * 5, [20, 1, 3, 4, 130])):
        other = arguments(q_lengths, k_lengths, backend.device)
        assert torch.equal(loaded(*other), module()(*other))


@pytest.mark.backends("cpu")
def test_loaded_in_another_process(tmp_path):
    inputs = make_inputs(3, 4, 20, 70, kv_heads=2)
    torch.export.save(exported(Attend()), tmp_path / "model.pt2")
    torch.save(tuple(inputs), tmp_path / "inputs.pt")
    run_python(
        "import torch, adasplash; x = torch.load('inputs.pt');"
        "torch.save(torch.export.load('model.pt2').module()(*x), 'out.pt')",
        cwd=tmp_path,
    )
    assert torch.equal(torch.load(tmp_path / "out.pt"), Attend()(*inputs))


def test_training_graph(backend):
    """The joint graph of forward and backward holds the two private ops, and the gradients are right."""
    inputs = make_inputs(2, 4, 33, 50, kv_heads=2, device=backend.device, requires_grad=True)
    graph = aot_export_joint_simple(lambda *x: (Attend()(*x),), list(inputs), trace_joint=True)
    names = [str(node.target) for node in graph.graph.nodes]
    assert names.count("adasplash._entmax_attn_forward.default") == 1
    assert names.count("adasplash._entmax_attn_backward.default") == 1
    grad = normal_like(inputs.query)
    (out,), grads = graph(list(inputs), [grad])
    assert_same_bits((out, *grads), gradients(inputs, grad, Attend()))
