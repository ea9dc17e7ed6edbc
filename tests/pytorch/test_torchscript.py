"""TorchScript: script, save, load, run and train, for both ways to write the call."""

import pytest
import torch

import adasplash
from common import assert_same_bits, make_inputs, run_python
from options import FORMS, run
from saving import reloaded_script

pytestmark = pytest.mark.backends("cpu", "emulated", "cuda")


class CallsOp(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.ops.adasplash.entmax_attn(query, key, value, 1.25, True, scale=0.3)


class CallsFunction(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return adasplash.entmax_attn(query, key, value, alpha=1.25, is_causal=True, scale=0.3)


class CallsFunctionByPosition(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return adasplash.entmax_attn(query, key, value, 1.25, True, 0.3)


class CallsWithAttributes(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha, self.is_causal, self.scale = 1.25, True, 0.3

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return adasplash.entmax_attn(query, key, value, self.alpha, self.is_causal, self.scale)


class Defaults(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return adasplash.entmax_attn(query, key, value) + torch.ops.adasplash.entmax_attn(query, key, value)


class Trained(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(8, 8) for _ in range(3))
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unsqueeze(1)
        return self.call(self.query(x), self.key(x), self.value(x)).squeeze(1)


CALLS = (CallsOp, CallsFunction, CallsFunctionByPosition, CallsWithAttributes, Defaults)


def expected(call, inputs):
    if call is Defaults:
        return 2 * adasplash.entmax_attn(*inputs)
    return adasplash.entmax_attn(*inputs, alpha=1.25, is_causal=True, scale=0.3)


@pytest.mark.parametrize("call", CALLS)
def test_scripted_saved_and_loaded(backend, call):
    module = reloaded_script(call())
    for m, n in ((20, 30), (65, 65), (30, 20)):
        inputs = make_inputs(m=m, n=n, device=backend.device)
        assert torch.equal(module(*inputs), expected(call, inputs))
        with torch.inference_mode():
            assert torch.equal(module(*inputs), expected(call, inputs))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.slow
def test_trains_as_eager_does(backend, call):
    losses = []
    for script in (lambda module: module, torch.jit.script, reloaded_script):
        torch.manual_seed(0)
        module = script(Trained(call())).to(backend.device)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        x, y = torch.randn(2, 4, 20, 8).to(backend.device)
        for _ in range(5):
            optimizer.zero_grad()
            loss = (module(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
        assert all(p.grad.any() for p in module.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) == pytest.approx(losses[2], rel=1e-5)
    assert losses[0] < (y - y.mean()).square().mean().item() * 1.2


def test_traced(backend):
    inputs = make_inputs(m=20, n=30, device=backend.device)
    traced = torch.jit.trace(CallsFunction(), tuple(inputs))
    other = make_inputs(m=70, n=65, device=backend.device)
    assert torch.equal(traced(*other), CallsFunction()(*other))


def test_frozen(backend):
    inputs = make_inputs(m=20, n=20, device=backend.device)
    frozen = torch.jit.freeze(torch.jit.script(CallsFunction().eval()))
    for _ in range(3):  # the profiling executor rewrites the graph after its first runs
        assert torch.equal(frozen(*inputs), CallsFunction()(*inputs))


def test_repeated_training_runs_survive_the_profiling_executor(backend):
    """From the third run on TorchScript differentiates by its own rules where it has them."""
    inputs = make_inputs(m=20, n=30, device=backend.device, requires_grad=True)
    module = torch.jit.script(CallsFunction())
    results = [torch.autograd.grad(module(*inputs).sum(), inputs) for _ in range(4)]
    eager = torch.autograd.grad(CallsFunction()(*inputs).sum(), inputs)
    for result in results:
        assert_same_bits(result, eager)


@pytest.mark.parametrize("form", FORMS)
def test_every_option_after_saving_and_loading(backend, form):
    module, arguments = FORMS[form]
    given = arguments([20, 0, 33], [40, 7, 25], backend.device)
    eager, scripted = run(module(), given), reloaded_script(module())
    for _ in range(3):
        assert_same_bits(run(scripted, given), eager)
    assert all(x.any() for x in eager)


def test_errors_inside_a_script_name_the_argument(backend):
    @torch.jit.script
    def bad(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.adasplash.entmax_attn(x, x, x, 0.5)

    with pytest.raises(RuntimeError, match=r"entmax_attn: alpha must be 1 or from 1.01 to 2, got 0.5"):
        bad(make_inputs(m=5, n=5, device=backend.device).query)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("call", (CallsOp, CallsFunction))
def test_loaded_in_another_process(tmp_path, call):
    """The file refers to the op and not to our Python sources."""
    inputs = make_inputs(3, 4, 20, 70, kv_heads=2)
    torch.jit.script(call()).save(tmp_path / "model.pt")
    torch.save(tuple(inputs), tmp_path / "inputs.pt")
    run_python(
        "import torch, adasplash; x = torch.load('inputs.pt'); torch.save(torch.jit.load('model.pt')(*x), 'out.pt')",
        cwd=tmp_path,
    )
    assert torch.equal(torch.load(tmp_path / "out.pt"), call()(*inputs))
