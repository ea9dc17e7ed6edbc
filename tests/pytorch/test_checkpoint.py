"""Selective checkpointing with adasplash.ops_to_save keeps what attention's forward gave, and does not run it again."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import adasplash

FORWARD = torch.ops.adasplash._entmax_attn_forward.default
OFFSETS = torch.tensor([0, 3, 9])
SAVES = functools.partial(create_selective_checkpoint_contexts, adasplash.ops_to_save)


class Calls(TorchDispatchMode):
    """Counts the calls of the op that runs attention forward."""

    def __init__(self):
        super().__init__()
        self.forward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is FORWARD
        return func(*args, **(kwargs or {}))


def padded(x, alpha):
    return adasplash.entmax_attn(x.sin(), x.cos(), x, alpha, is_causal=True).sin()


def packed(x, alpha):
    x = x[0].transpose(0, 1)
    return adasplash.entmax_attn_varlen(x.sin(), x.cos(), x, OFFSETS, OFFSETS, 6, 6, alpha).sin()


def whole(function, alpha, **options):
    """The gradient, and how often the forward ran."""
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with Calls() as calls:
        out = checkpoint(function, x, alpha, use_reentrant=False, **options) if options else function(x, alpha)
        out.sum().backward()
    return x.grad, calls.forward


@pytest.mark.parametrize("alpha", (1.5, torch.tensor([1.3, 1.7])), ids=("number", "per head"))
@pytest.mark.parametrize("function", (padded, packed))
def test_forward_runs_once(function, alpha):
    expected, _ = whole(function, alpha)
    saved, once = whole(function, alpha, context_fn=SAVES)
    computed_again, twice = whole(function, alpha, preserve_rng_state=False)
    assert (once, twice) == (1, 2)
    assert torch.equal(saved, expected) and torch.equal(computed_again, expected)


def test_a_policy_can_ask_for_them():
    def policy(context, op, *args, **kwargs):
        kept = op in (*adasplash.ops_to_save, torch.ops.aten.sin.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    assert whole(padded, 1.5, context_fn=contexts)[1] == 1


def test_a_layer():
    layer = adasplash.EntmaxAttention(16, 2)
    x = torch.randn(2, 9, 16, requires_grad=True)
    with Calls() as calls:
        checkpoint(layer, x, x, x, use_reentrant=False, context_fn=SAVES).sum().backward()
    assert calls.forward == 1


@pytest.mark.slow
@pytest.mark.parametrize("saves", (True, False), ids=("saved", "computed again"))
@pytest.mark.parametrize("function", (padded, packed))
def test_compiled(function, saves):
    """The compiler puts the forward into the graph of the backward, or does not."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def spy(graph, _):
        graphs.append([node.target for node in graph.graph.nodes].count(FORWARD))
        return graph

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=spy, bw_compiler=spy, partition_fn=min_cut_rematerialization_partition)
    options = {"context_fn": SAVES} if saves else {"preserve_rng_state": False}
    compiled = torch.compile(
        lambda x: checkpoint(function, x, 1.5, use_reentrant=False, **options), backend=backend, fullgraph=True
    )
    x = torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    compiled(x).sum().backward()
    assert graphs == [1, 0 if saves else 1]
    torch.testing.assert_close(x.grad, whole(function, 1.5)[0])


def test_every_op_is_one_that_policies_see():
    assert all(isinstance(op, torch._ops.OpOverload) for op in adasplash.ops_to_save)
    assert "ops_to_save" in adasplash.__all__
