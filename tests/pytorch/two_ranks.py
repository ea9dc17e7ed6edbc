"""What test_sharding.py says of DTensor, run by two processes: `python two_ranks.py RANK STORE RESULTS` runs every case
and writes what went wrong in each, "" if nothing did."""

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import adasplash
from ranks import run_cases

CASES = {}
LENGTHS = torch.tensor([5, 0, 9, 7]), torch.tensor([7, 8, 0, 3])
OFFSETS = torch.tensor([0, 5, 5, 20], dtype=torch.int32), torch.tensor([0, 7, 12, 21], dtype=torch.int32)


def case(function):
    CASES[function.__name__] = function
    return function


def split(tensor, *placements, of=None):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, of or MESH, placements)


def check(op, tensors, placements, out, gradients, of=None, **options):
    """`op` of tensors split as `placements` say against one process, forward and backward, and where nothing is saved.
    `out`, `gradients`: how the results are to be split. Options may be pairs (tensor, placement)."""
    from torch.distributed.tensor import DTensor

    def given(sharded):
        pairs = {name: value for name, value in options.items() if isinstance(value, tuple) and len(value) == 2}
        pairs = {name: value for name, value in pairs.items() if isinstance(value[0], torch.Tensor)}
        return options | {name: split(*pair, of=of) if sharded else pair[0] for name, pair in pairs.items()}

    single = [x.clone().requires_grad_(x.is_floating_point()) for x in tensors]
    expected = op(*single, **given(False))
    grad = torch.randn_like(expected)
    expected.backward(grad)
    as_lists = [p if isinstance(p, list) else [p] for p in placements]
    leaves = [split(x, *p, of=of).requires_grad_(x.is_floating_point()) for x, p in zip(tensors, as_lists, strict=True)]
    result = op(*leaves, **given(True))
    assert isinstance(result, DTensor)
    assert result.placements == tuple(out if isinstance(out, list) else [out]), result.placements
    assert torch.equal(result.full_tensor(), expected)
    result.backward(split(grad, *result.placements, of=of))
    differentiable = [(x, y) for x, y in zip(leaves, single, strict=True) if y.requires_grad]
    for (leaf, one), placement in zip(differentiable, gradients, strict=True):
        wanted = tuple(placement if isinstance(placement, list) else [placement])
        assert leaf.grad.placements == wanted, (leaf.grad.placements, wanted)
        torch.testing.assert_close(leaf.grad.full_tensor(), one.grad, atol=1e-5, rtol=1e-5)
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            again = op(*(split(x, *p, of=of) for x, p in zip(tensors, as_lists, strict=True)), **given(True))
            assert torch.equal(again.full_tensor(), expected), without
            assert again.placements == result.placements, (without, again.placements)


def inputs(heads=4, kv_heads=2, batch=4, queries=9, keys=11, dim=8, value_dim=5):
    shapes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)
    return [torch.randn(batch, *shape) for shape in shapes]


def packed(heads=4, kv_heads=2):
    return [torch.randn(tokens, h, d) for tokens, h, d in ((20, heads, 8), (21, kv_heads, 8), (21, kv_heads, 5))]


def per_head(query, key, value, alpha, **options):
    return adasplash.entmax_attn(query, key, value, alpha, **options)


def varlen(query, key, value, *alpha, **options):
    from torch.distributed.tensor import DTensor

    offsets = [split(x, R()) for x in OFFSETS] if isinstance(query, DTensor) else OFFSETS
    return adasplash.entmax_attn_varlen(query, key, value, *offsets, 15, 9, *alpha, window=(4, 2), **options)


@case
def heads():
    check(adasplash.entmax_attn, inputs(), [S(1)] * 3, S(1), [S(1)] * 3, is_causal=True)


@case
def batch():
    check(adasplash.entmax_attn, inputs(), [S(0)] * 3, S(0), [S(0)] * 3, is_causal=True)


@case
def batch_that_does_not_divide():
    check(adasplash.entmax_attn, inputs(batch=3), [S(0)] * 3, S(0), [S(0)] * 3)


@case
def replicated():
    check(adasplash.entmax_attn, inputs(), [R()] * 3, R(), [R()] * 3)


@case
def rows_are_gathered():
    check(adasplash.entmax_attn, inputs(), [S(2)] * 3, R(), [R()] * 3)


@case
def key_heads_that_do_not_divide_are_gathered():
    check(adasplash.entmax_attn, inputs(6, 3), [S(1)] * 3, R(), [R()] * 3)
    check(adasplash.entmax_attn, inputs(4, 1), [S(1), R(), R()], R(), [R()] * 3)
    check(varlen, packed(6, 3), [S(1)] * 3, R(), [R()] * 3)


@case
def lengths_follow_the_batch():
    for p in (S(0), R()):
        lengths = {"q_seqlens": (LENGTHS[0], p), "kv_seqlens": (LENGTHS[1], p)}
        check(adasplash.entmax_attn, inputs(), [S(0)] * 3, S(0), [S(0)] * 3, is_causal=True, **lengths)
    lengths = {"q_seqlens": (LENGTHS[0], R()), "kv_seqlens": (LENGTHS[1], R())}
    check(adasplash.entmax_attn, inputs(), [S(1)] * 3, S(1), [S(1)] * 3, is_causal=True, **lengths)


@case
def slopes():
    for shape, of_batch, of_heads in (((4,), R(), S(0)), ((4, 4), S(0), S(1))):
        given = torch.rand(shape)
        for p in (of_batch, R()):
            check(adasplash.entmax_attn, inputs(), [S(0)] * 3, S(0), [S(0)] * 3, alibi_slopes=(given, p))
        for p in (of_heads, R()):
            check(adasplash.entmax_attn, inputs(), [S(1)] * 3, S(1), [S(1)] * 3, alibi_slopes=(given, p))


@case
def alpha_per_head():
    alpha = torch.tensor([1.2, 1.5, 1.7, 2.0])
    for p in (S(0), R()):
        check(per_head, [*inputs(), alpha], [S(1), S(1), S(1), p], S(1), [S(1), S(1), S(1), S(0)])
    check(per_head, [*inputs(), alpha], [S(0), S(0), S(0), R()], S(0), [S(0), S(0), S(0), P()])


@case
def one_alpha():
    for p in (S(1), S(0)):
        check(per_head, [*inputs(), torch.tensor(1.4)], [p, p, p, R()], p, [p, p, p, P()])


@case
def packed_heads():
    check(varlen, packed(), [S(1)] * 3, S(1), [S(1)] * 3, is_causal=True)
    alpha = torch.tensor([1.2, 1.5, 1.7, 2.0])
    for p in (S(0), R()):
        check(varlen, [*packed(), alpha], [S(1), S(1), S(1), p], S(1), [S(1), S(1), S(1), S(0)])
    check(varlen, [*packed(), torch.tensor(1.4)], [S(1), S(1), S(1), R()], S(1), [S(1), S(1), S(1), P()])
    check(varlen, packed(), [S(1)] * 3, S(1), [S(1)] * 3, alibi_slopes=(torch.rand(3, 4), R()))


@case
def packed_tokens_are_gathered():
    check(varlen, packed(), [S(0)] * 3, R(), [R()] * 3)


@case
def max_seqlen_is_not_that_of_the_call_before():
    """The saved tensors' shapes depend on it."""
    query = split(packed()[0], S(1))
    offsets = [split(x, R()) for x in OFFSETS]
    arguments = [None, 1.5, False, None, None, None, *offsets, 15]
    words = []
    for keys in (20, 5000):
        k, v = (split(torch.randn(keys, 2, 8), S(1)) for _ in range(2))
        arguments[7] = split(torch.tensor([0, 9, 9, keys], dtype=torch.int32), R())
        saved = torch.ops.adasplash._entmax_attn_forward(query, k, v, *arguments, keys, [-1, -1], None, 128)
        words.append([x.shape for x in saved[1:]])
        assert all(x.full_tensor().shape == x.shape for x in saved)
    assert words[0][2] != words[1][2]


@case
def saved_tensors_go_with_the_call():
    """The private pair, called as compiled graphs do, forward and backward."""
    from torch.distributed.tensor import Partial

    query, key, value = tensors = inputs()
    alpha = torch.tensor([1.2, 1.5, 1.7, 2.0])
    ops = torch.ops.adasplash
    rest = [1.5, True, None, None, None, None, None, 0, 0, [-1, -1], None]
    expected = ops._entmax_attn_forward(query, key, value, alpha, *rest, 128)
    grad = torch.randn_like(expected[0])
    gradients = ops._entmax_attn_backward(grad, query, key, value, *expected[1:], alpha, *rest, expected[0])
    for p, of_alpha, of_dalpha in ((S(1), S(0), S(0)), (S(0), R(), Partial())):
        given = [*(split(x, p) for x in tensors), split(alpha, of_alpha)]
        results = ops._entmax_attn_forward(*given, *rest, 128)
        for one, sharded in zip(expected, results, strict=True):
            assert sharded.placements == (p,)
            if one.dtype == torch.float32:
                assert torch.equal(sharded.full_tensor(), one)
        back = ops._entmax_attn_backward(split(grad, p), *given[:3], *results[1:], given[3], *rest, results[0])
        assert [x.placements[0] for x in back] == [p, p, p, of_dalpha]
        for one, sharded in zip(gradients, back, strict=True):
            torch.testing.assert_close(sharded.full_tensor(), one, atol=1e-5, rtol=1e-5)
        nothing = ops._entmax_attn_forward(*given, *rest, -1)
        assert nothing[0].placements == (p,) and all(x.shape == (0,) for x in nothing[1:])


@case
def two_dimensions():
    """Batch and heads over a mesh of 1 x 2 and of 2 x 1."""
    from torch.distributed.tensor import init_device_mesh

    alpha = torch.tensor([1.2, 1.5, 1.7, 2.0])
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape)
        p = [S(0), S(1)]
        check(per_head, [*inputs(), alpha], [p, p, p, [R(), S(0)]], p, [p, p, p, [P(), S(0)]], of=mesh)


@case
def compiled():
    def loss(query, key, value):
        return adasplash.entmax_attn(query, key, value, is_causal=True) * 2

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    tensors = inputs()
    for p in (S(1), S(0)):
        results = []
        for function in (loss, compiled):
            leaves = [split(x, p).requires_grad_() for x in tensors]
            out = function(*leaves)
            assert out.placements == (p,)
            out.backward(torch.ones_like(out))
            results.append([out.full_tensor(), *(x.grad.full_tensor() for x in leaves)])
        torch.testing.assert_close(*results)


@case
def activation():
    scores = torch.randn(4, 6, 10)
    check(adasplash.entmax, [scores], [S(0)], S(0), [S(0)])
    check(adasplash.entmax, [scores], [S(1)], S(1), [S(1)], alpha=1.3)
    check(adasplash.entmax, [scores], [S(2)], R(), [R()])
    check(adasplash.entmax, [scores], [S(2)], S(2), [S(2)], dim=0)
    check(adasplash.sparsemax, [scores], [S(0)], S(0), [S(0)])


@case
def activation_with_alpha_per_row():
    scores, alpha = torch.randn(4, 6, 10), 1.05 + torch.rand(4, 6, 1)
    check(adasplash.entmax, [scores, alpha], [S(0), S(0)], S(0), [S(0), S(0)])
    check(adasplash.entmax, [scores, alpha], [S(1), R()], S(1), [S(1), S(1)])


@case
def losses():
    scores, target = torch.randn(6, 10), torch.randint(10, (6,))
    single = scores.clone().requires_grad_()
    expected = adasplash.entmax15_loss(single, target)
    expected.sum().backward()
    leaf = split(scores, S(0)).requires_grad_()
    loss = adasplash.entmax15_loss(leaf, split(target, S(0)))
    assert torch.equal(loss.full_tensor(), expected)
    loss.sum().backward()
    assert leaf.grad.placements == (S(0),)
    torch.testing.assert_close(leaf.grad.full_tensor(), single.grad)
    with torch.inference_mode():
        loss = adasplash.entmax15_loss(split(scores, S(0)), split(target, S(0)))
        assert torch.equal(loss.full_tensor(), expected)


if __name__ == "__main__":
    rank, store, results = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    from torch.distributed.tensor import Partial as P
    from torch.distributed.tensor import Replicate as R
    from torch.distributed.tensor import Shard as S
    from torch.distributed.tensor import init_device_mesh

    wait = datetime.timedelta(minutes=30)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    MESH = init_device_mesh("cpu", (2,))
    run_cases(CASES, results)
    dist.destroy_process_group()
