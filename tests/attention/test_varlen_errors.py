"""Packed lengths that contradict each other or the tensors: an error on the CPU, no stray access on the GPU."""

import pytest
import torch

from adasplash import entmax_attn_varlen
from packing import packed

GOOD = dict(cu_seqlens_q=[0, 3, 5], cu_seqlens_k=[0, 4, 7], max_seqlen_q=3, max_seqlen_k=4)
CONTRADICTIONS = {
    "start of queries": (dict(cu_seqlens_q=[1, 3, 5]), "cu_seqlens_q must start at 0, got 1"),
    "start of keys": (dict(cu_seqlens_k=[-1, 3, 7]), "cu_seqlens_k must start at 0, got -1"),
    "decreasing": (
        dict(cu_seqlens_q=[0, 6, 5], max_seqlen_q=9),
        "cu_seqlens_q must not decrease, got 5 after 6 at [2]",
    ),
    "end of queries": (dict(cu_seqlens_q=[0, 3, 4]), "cu_seqlens_q must end at query's number of tokens 5, got 4"),
    "end of keys": (
        dict(cu_seqlens_k=[0, 4, 2**31 - 1], max_seqlen_k=2**31),
        "cu_seqlens_k must end at key's number of tokens 7, got 2147483647",
    ),
    "no query": (
        dict(max_seqlen_q=0),
        "max_seqlen_q must be the longest sequence's length or more, got 0 for a sequence of 3 at [0]",
    ),
    "no key": (
        dict(max_seqlen_k=0),
        "max_seqlen_k must be the longest sequence's length or more, got 0 for a sequence of 4 at [0]",
    ),
    "longest query": (
        dict(max_seqlen_q=2),
        "max_seqlen_q must be the longest sequence's length or more, got 2 for a sequence of 3 at [0]",
    ),
    "longest key": (
        dict(max_seqlen_k=3),
        "max_seqlen_k must be the longest sequence's length or more, got 3 for a sequence of 4 at [0]",
    ),
}


def arguments(device="cpu", **changes):
    inputs = packed([3, 2], [4, 3], device, heads=4, kv_heads=2, size=8)[0]
    lengths = [torch.tensor(x, device=device) if isinstance(x, list) else x for x in {**GOOD, **changes}.values()]
    return (*inputs, *lengths)


@pytest.mark.backends("cpu")
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_an_error(case):
    changes, words = CONTRADICTIONS[case]
    with pytest.raises(RuntimeError) as error:
        entmax_attn_varlen(*arguments(**changes))
    assert str(error.value) == f"entmax_attn_varlen: {words}"


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_no_stray_access(backend, case):
    """Wrong rows, but every element is written and the process lives."""
    given = arguments(backend.device, **CONTRADICTIONS[case][0])
    tensors = [x.requires_grad_() for x in given[:3]]
    out = entmax_attn_varlen(*tensors, *given[3:])
    grads = torch.autograd.grad(out.sum(), tensors)
    again = entmax_attn_varlen(*given)
    assert torch.equal(out, again) and all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.backends("emulated", "cuda")
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64), ids=str)
@pytest.mark.parametrize("which", ("both", "queries", "keys"))
@pytest.mark.parametrize(
    "given, meant",
    (([0, 100, -5, 25, 150], [0, 100, 100, 100, 150]), ([0, 45, 10**9, 10, 150], [0, 45, 150, 150, 150])),
    ids=("fall", "beyond"),
)
def test_offsets_that_fall_count_as_the_largest_before_them(backend, given, meant, which, dtype):
    """Else two sequences would have scratch and tile bits in common."""
    tensors = [torch.randn(150, 2, 16, device=backend.device).requires_grad_() for _ in range(3)]

    def run(offsets):
        fine = [0, 50, 75, 100, 150]
        ends = offsets if which != "keys" else fine, offsets if which != "queries" else fine
        ends = (torch.tensor(x, dtype=dtype, device=backend.device) for x in ends)
        out = entmax_attn_varlen(*tensors, *ends, 150, 150)
        return out, *torch.autograd.grad(out.sum(), tensors)

    for mine, expected in zip(run(given), run(meant), strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.backends("emulated", "cuda")
def test_tokens_too_far_apart_for_a_gpu(backend):
    inputs = [torch.zeros(2, heads, 256, dtype=torch.float16, device=backend.device) for heads in (2**15 + 1,) * 3]
    ends = torch.tensor([0, 2], dtype=torch.int32, device=backend.device)
    with pytest.raises(RuntimeError, match="rows may be at most 8388608 elements apart on the GPU, got 8388864"):
        entmax_attn_varlen(*inputs, ends, ends, 2, 2)


SIZES = {
    "padded query": (dict(query=lambda x: x[None]), "query 3 4"),
    "key of another size": (dict(key=lambda x: x[..., :7]), "key head_dim 8 7"),
    "value of other tokens": (dict(value=lambda x: x[:6]), "value keys 7 6"),
    "heads not divisible": (dict(query=lambda x: x[:, :3]), "query heads multiple 3 2"),
    "cu_seqlens of floats": (dict(cu_seqlens_q=lambda x: x.float()), "cu_seqlens_q int32 int64 Float"),
    "cu_seqlens of int16": (dict(cu_seqlens_k=lambda x: x.short()), "cu_seqlens_k int32 int64 Short"),
    "cu_seqlens of 2 dimensions": (dict(cu_seqlens_q=lambda x: x[None]), "cu_seqlens_q 1 2"),
    "empty cu_seqlens": (dict(cu_seqlens_q=lambda x: x[:0]), "cu_seqlens_q one entry"),
    "other numbers of sequences": (dict(cu_seqlens_k=lambda x: x[:2]), "cu_seqlens_k cu_seqlens_q 3 2"),
    "cu_seqlens elsewhere": (dict(cu_seqlens_k=lambda x: x.to("meta")), "cu_seqlens_k cpu meta"),
    "negative max_seqlen_q": (dict(max_seqlen_q=lambda x: -1), "max_seqlen_q 0 -1"),
    "negative max_seqlen_k": (dict(max_seqlen_k=lambda x: -5), "max_seqlen_k 0 -5"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_and_types(case):
    changes, words = SIZES[case]
    names = ("query", "key", "value", *GOOD)
    given = {name: changes.get(name, lambda x: x)(x) for name, x in zip(names, arguments(), strict=True)}
    with pytest.raises(RuntimeError) as error:
        entmax_attn_varlen(**given)
    message = str(error.value)
    assert message.startswith("entmax_attn_varlen: ") and "\n" not in message
    assert all(word in message for word in words.split()), message


def test_the_forms_do_not_mix():
    """Lengths of both forms, or half of one, given to the op beneath."""
    query, key, value, *lengths = arguments()
    forward = torch.ops.adasplash._entmax_attn_forward

    def given(q_seqlens, kv_seqlens, cu_seqlens_q, cu_seqlens_k):
        tensors = (q_seqlens, kv_seqlens, cu_seqlens_q, cu_seqlens_k)
        return forward(query, key, value, None, 1.5, False, None, *tensors, *lengths[2:], [-1, -1], None, 0)

    given(None, None, *lengths[:2])
    with pytest.raises(RuntimeError, match="_entmax_attn_forward: cu_seqlens_q and cu_seqlens_k go together"):
        given(None, None, lengths[0], None)
    with pytest.raises(RuntimeError, match="_entmax_attn_forward: q_seqlens and kv_seqlens are of the padded form"):
        given(lengths[0], None, *lengths[:2])
