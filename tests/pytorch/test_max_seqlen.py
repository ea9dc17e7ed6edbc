"""max_seqlen as a tensor, the way `cu_seqlens.diff().max()` gives it: eager, compiled and exported."""

import pytest
import torch

import adasplash
from common import assert_same_bits

LENGTHS = [3, 6, 1], [4, 2, 9]


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def attend(query, key, cu_q, cu_k):
    longest = cu_q.diff().max(), cu_k.diff().max()
    return adasplash.entmax_attn_varlen(query, key, key, cu_q, cu_k, *longest, is_causal=True)


def arguments(q_lengths, k_lengths):
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(sum(lengths), 2, 8, generator=generator) for lengths in (q_lengths, k_lengths))
    return query, key, offsets_of(q_lengths), offsets_of(k_lengths)


def results(function, query, key, *offsets):
    query, key = query.clone().requires_grad_(), key.clone().requires_grad_()
    out = function(query, key, *offsets)
    out.square().sum().backward()
    return out.detach(), query.grad, key.grad


def expected(*lengths):
    def with_numbers(query, key, cu_q, cu_k):
        longest = max(lengths[0]), max(lengths[1])
        return adasplash.entmax_attn_varlen(query, key, key, cu_q, cu_k, *longest, is_causal=True)

    return results(with_numbers, *arguments(*lengths))


def test_eager():
    assert_same_bits(results(attend, *arguments(*LENGTHS)), expected(*LENGTHS))


@pytest.mark.slow
@pytest.mark.parametrize("captured", (False, True), ids=("graph break", "one graph"))
@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiled(captured, backend):
    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=captured):
        compiled = torch.compile(attend, fullgraph=captured, backend=backend, dynamic=captured)
        assert_same_bits(results(compiled, *arguments(*LENGTHS)), expected(*LENGTHS))
        out = expected(*LENGTHS)[0]
        with torch.no_grad():
            assert torch.equal(compiled(*arguments(*LENGTHS)), out)
        if captured:  # once for all lengths
            with torch.compiler.set_stance("fail_on_recompile"):
                for lengths in (([2, 90, 5], [70, 1, 8]), ([7, 7], [5, 20])):
                    assert_same_bits(results(compiled, *arguments(*lengths)), expected(*lengths))
    torch.compiler.reset()


@pytest.mark.slow
def test_exported():
    class Attend(torch.nn.Module):
        def forward(self, *tensors):
            return attend(*tensors)

    rows, keys, offsets = (torch.export.Dim(name, min=3) for name in ("rows", "keys", "offsets"))
    shapes = ({0: rows}, {0: keys}, {0: offsets}, {0: offsets})
    program = torch.export.export(Attend(), arguments(*LENGTHS), dynamic_shapes=(shapes,))
    for lengths in (LENGTHS, ([2, 90, 5], [70, 1, 8])):
        assert torch.equal(program.module()(*arguments(*lengths)), expected(*lengths)[0])
