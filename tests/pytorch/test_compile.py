"""torch.compile: whole graphs, training, and one compilation for all lengths."""

import pytest
import torch

from adasplash import entmax_attn
from common import assert_same_bits, gradients, normal_like
from options import FORMS, run

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Layer(torch.nn.Module):
    """Projections around the op, so that the compiler has something of its own to do."""

    def __init__(self, dim=32, heads=4, kv_heads=2, alpha=1.5):
        super().__init__()
        torch.manual_seed(0)
        self.sizes = (heads, kv_heads, kv_heads)
        self.alpha = alpha
        self.project = torch.nn.Linear(dim, dim // heads * sum(self.sizes))
        self.out = torch.nn.Linear(dim, dim)

    def forward(self, x):
        joint = self.project(x).unflatten(-1, (sum(self.sizes), -1)).transpose(1, 2)
        y = entmax_attn(*joint.split(self.sizes, dim=1), alpha=self.alpha, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


def tokens(batch, length, device):
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(length)).to(device)


@pytest.mark.parametrize("alpha", (1.25, 1.5, 2.0))
def test_forward_and_training_in_one_graph(backend, alpha):
    layer = Layer(alpha=alpha).to(backend.device)
    compiled = torch.compile(layer, fullgraph=True)
    x = tokens(2, 45, backend.device)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x), atol=1e-5, rtol=1e-5)
    results = []
    for module in (layer, compiled):
        layer.zero_grad()
        module(x).square().sum().backward()
        results.append([p.grad.clone() for p in layer.parameters()])
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)
    assert all(grad.any() for grad in results[0])


def test_the_op_alone_changes_no_bit(make_inputs, dtype):
    inputs = make_inputs(m=40, n=50, kv_heads=1, value_size=7, dtype=dtype)
    grad = normal_like(inputs.query[..., :7])
    eager = gradients(inputs, grad, entmax_attn, is_causal=True)
    compiled = gradients(inputs, grad, torch.compile(entmax_attn, fullgraph=True), is_causal=True)
    assert_same_bits(eager, compiled)


def test_the_private_ops_are_what_the_compiler_sees(make_inputs):
    graphs = []

    def spy(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    from torch._dynamo.backends.common import aot_autograd

    compiled = torch.compile(entmax_attn, fullgraph=True, backend=aot_autograd(fw_compiler=spy, bw_compiler=spy))
    compiled(*make_inputs(requires_grad=True)).sum().backward()
    forward, backward = graphs
    assert forward.count("adasplash._entmax_attn_forward.default") == 1
    assert backward.count("adasplash._entmax_attn_backward.default") == 1
    assert not any("adasplash.entmax_attn" in name for name in forward + backward)


@pytest.mark.parametrize("training", (False, True), ids=("inference", "training"))
def test_dynamic_lengths_compile_once(backend, training):
    layer = Layer().to(backend.device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)

    def run(module, batch, length):
        with torch.set_grad_enabled(training):
            out = module(tokens(batch, length, backend.device))
            if training:
                layer.zero_grad()
                out.square().sum().backward()
        return [out, *(p.grad.clone() for p in layer.parameters() if training)]

    run(compiled, 2, 33)
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, length in ((2, 64), (3, 65), (5, 130), (2, 7)):
            torch.testing.assert_close(run(compiled, batch, length), run(layer, batch, length), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("training", (False, True), ids=("inference", "training"))
def test_dynamic_queries_and_keys_compile_once(backend, make_inputs, training):
    compiled = torch.compile(entmax_attn, fullgraph=True, dynamic=True)

    def run(function, m, n):
        inputs = make_inputs(m=m, n=n)
        if training:
            return gradients(inputs, normal_like(inputs.query), function, is_causal=True)
        return function(*inputs, is_causal=True)

    run(compiled, 33, 50)
    with torch.compiler.set_stance("fail_on_recompile"):
        for m, n in ((34, 51), (100, 20), (64, 64), (2, 130), (70, 2100)):
            if n <= backend.max_length:
                assert_same_bits(run(compiled, m, n), run(entmax_attn, m, n))


@pytest.mark.parametrize("training", (False, True), ids=("inference", "training"))
@pytest.mark.parametrize("form", FORMS)
def test_every_option_compiles_once_for_all_lengths(backend, form, training):
    """The number of sequences, tokens and max_seqlen included."""
    module, arguments = FORMS[form]
    compiled = torch.compile(module(), fullgraph=True, dynamic=True)
    first = [20, 33, 8, 9, 10], [40, 25, 17, 5, 11]  # five: torch takes sizes that are equal at first for one size
    run(compiled, arguments(*first, backend.device), training)
    with torch.compiler.set_stance("fail_on_recompile"):
        for q_lengths, k_lengths in (
            ([7, 30], [9, 64]),
            ([64, 66, 2, 1], [5, 60, 9, 9]),
            ([50] * 5, [20, 1, 3, 4, 130]),
        ):
            given = arguments(q_lengths, k_lengths, backend.device)
            eager, once = run(module(), given, training), run(compiled, given, training)
            torch.testing.assert_close(once, eager, atol=1e-5, rtol=1e-5)
            assert torch.equal(once[0], eager[0])


def test_alpha_one_compiles(make_inputs):
    inputs = make_inputs(m=40, n=40)
    compiled = torch.compile(entmax_attn, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs, 1.0, True), entmax_attn(*inputs, 1.0, True))


def test_bad_input_is_refused_while_compiling(make_inputs):
    inputs = make_inputs()
    with pytest.raises(Exception, match=r"alpha must be 1 or from 1\.01 to 2"):
        torch.compile(entmax_attn, fullgraph=True)(*inputs, alpha=3.0)
    with pytest.raises(Exception, match="head_dim"):
        torch.compile(entmax_attn, fullgraph=True)(inputs.query[..., :5], inputs.key, inputs.value)
