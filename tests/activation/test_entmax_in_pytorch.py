"""What PyTorch puts around the activation: modes, autocast, opcheck, compile, export, TorchScript."""

import pytest
import torch
from torch import Tensor

import adasplash
from activations import draw
from common import HALF, assert_same_bits, normal_like, run_python
from saving import reloaded_program, reloaded_script

OPS = torch.ops.adasplash


def test_inference_mode(backend, dtype):
    x = draw(4, 30, 5, dtype=dtype, device=backend.device)
    alpha = torch.full((4, 1, 5), 1.3, device=backend.device)
    for arguments in ((x, 1.5, 1), (x, alpha, 1), (x, 1.0, 1)):
        expected = adasplash.entmax(*arguments)
        with torch.inference_mode():
            out = adasplash.entmax(*arguments)
            assert out.is_inference() and torch.equal(out, expected)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_as_softmax(backend, dtype):
    x = draw(4, 30, dtype=dtype, device=backend.device)
    alpha = torch.full((4, 1), 1.5, device=backend.device)
    with torch.autocast(backend.device, dtype=dtype):
        for rate in (1.5, alpha):
            assert adasplash.entmax(x, rate).dtype == torch.softmax(x, -1).dtype


@pytest.mark.parametrize("dim", (0, 1, -1))
@pytest.mark.parametrize("alpha", (1.5, 1.3, "tensor"))
def test_opcheck(backend, alpha, dim):
    x = draw(3, 4, 5, device=backend.device).requires_grad_()
    op, shape = OPS.entmax.default, [1 if d == dim % 3 else size for d, size in enumerate(x.shape)]
    if alpha == "tensor":
        op, alpha = OPS.entmax.tensor_alpha, torch.full(shape, 1.3, device=backend.device).requires_grad_()
    torch.library.opcheck(op, (x, alpha, dim))
    torch.library.opcheck(op, (x.detach().transpose(0, 1), 1.5 if isinstance(alpha, float) else alpha.mean(), dim))


def test_opcheck_of_the_private_ops(backend):
    x, alpha = draw(3, 4, 5, device=backend.device), torch.full((3, 4), 1.3, device=backend.device)
    for row_alpha in (None, alpha):
        torch.library.opcheck(OPS._entmax_forward.default, (x, row_alpha, 1.5))
        weights = OPS._entmax_forward(x, row_alpha, 1.5)
        torch.library.opcheck(OPS._entmax_backward.default, (normal_like(x), weights, row_alpha, 1.5))


class Gate(torch.nn.Module):
    """A learned alpha for each column, and fixed ones, along several dimensions."""

    def __init__(self):
        super().__init__()
        self.alpha = torch.nn.Parameter(torch.tensor([[1.2, 1.5, 1.8]]))
        self.weight = torch.nn.Parameter(draw(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = adasplash.entmax(x @ self.weight, self.alpha, 0)
        return adasplash.sparsemax(y * 3.0, 1) + adasplash.entmax(y, 1.3) + adasplash.entmax15(y, 0)


def train(gate: torch.nn.Module, x: Tensor) -> list[Tensor]:
    out = gate(x)
    return [out, *torch.autograd.grad((out * normal_like(out)).sum(), list(gate.parameters()))]


@pytest.mark.slow
def test_compiled_in_one_graph_for_all_lengths(backend):
    torch.compiler.reset()
    gate = Gate().to(backend.device)
    compiled = torch.compile(gate, fullgraph=True, dynamic=True)
    train(compiled, draw(20, 8, device=backend.device))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (20, 33, 7):
            x = draw(rows, 8, device=backend.device)
            torch.testing.assert_close(train(compiled, x), train(gate, x), atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.backends("cpu", "cuda")
def test_exported(backend):
    gate = Gate().to(backend.device)
    x = draw(20, 8, device=backend.device)
    program = torch.export.export(gate, (x,), dynamic_shapes=({0: torch.export.Dim("rows", max=4096)},))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("adasplash.entmax.tensor_alpha") == 1 and names.count("adasplash.entmax.default") == 3
    names = [str(node.target) for node in program.run_decompositions().graph.nodes]
    assert names.count("adasplash._entmax_forward.default") == 4
    module = reloaded_program(program)
    for rows in (20, 50):
        x = draw(rows, 8, device=backend.device)
        assert torch.equal(module(x), gate(x))


def test_scripted_saved_and_loaded(backend):
    gate = Gate().to(backend.device)
    loaded = reloaded_script(gate)
    for rows in (20, 7, 33, 20):  # the profiling executor rewrites the graph after its first runs
        x = draw(rows, 8, device=backend.device)
        assert_same_bits(train(loaded, x), train(gate, x))


@pytest.mark.backends("cpu")
def test_scripted_in_another_process(tmp_path):
    torch.jit.script(Gate()).save(tmp_path / "gate.pt")
    torch.save(draw(20, 8), tmp_path / "x.pt")
    run_python(
        "import torch, adasplash; x = torch.load('x.pt'); torch.save(torch.jit.load('gate.pt')(x), 'out.pt')",
        cwd=tmp_path,
    )
    assert torch.equal(torch.load(tmp_path / "out.pt"), Gate()(draw(20, 8)))


def test_only_the_weights_are_saved(backend):
    saved = []
    x = draw(6, 50, device=backend.device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        weights = adasplash.entmax(x, 1.5)
    assert [t.data_ptr() for t in saved if t.numel()] == [weights.data_ptr()]
