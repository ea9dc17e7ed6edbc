"""What test_context_parallel.py says of adasplash.distributed, run by several processes: `python parallel_ranks.py RANK
WORLD FOLDER [CASE …]` runs every case, or these, and writes what went wrong in each, "" if nothing did. With
RANKS_DEVICE=cuda in the environment each process has a GPU and NCCL, in float32 for float64."""

import datetime
import itertools
import os
import random
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import adasplash
from adasplash.distributed import entmax_attn_context_parallel, shard, unshard
from adasplash.distributed.attention import METHODS
from ranks import run_cases

DEVICE = os.environ.get("RANKS_DEVICE", "cpu")
CASES = {}
SINGLE, DOUBLE = torch.float32, torch.float64 if DEVICE == "cpu" else torch.float32
# On GPUs values of lengths are not looked at, and messages name another device; and torch 2.11 does not trace unflatten
# under a default device.
ON_CPUS = {"refusals", "other_arguments_elsewhere_are_one_error_everywhere", "compiled_by_exchange"}
CLOSE = {torch.float64: 1e-11, SINGLE: 2e-5 if DEVICE == "cpu" else 1e-4, torch.bfloat16: 3e-2}


def case(function):
    CASES[function.__name__] = function
    return function


def inputs(heads=4, kv_heads=4, batch=2, chunk=6, dim=8, value_dim=5, dtype=DOUBLE):
    """Query, key and value of 2W chunks, the same on every process."""
    tokens = 2 * WORLD * chunk
    shapes = (heads, tokens, dim), (kv_heads, tokens, dim), (kv_heads, tokens, value_dim)
    return [torch.randn(batch, *shape, dtype=dtype) for shape in shapes]


def packed_inputs(heads=4, kv_heads=4, chunk=6, dim=8, value_dim=5):
    """The same as tokens of a packed batch."""
    return [x[0].transpose(0, 1).contiguous() for x in inputs(heads, kv_heads, 1, chunk, dim, value_dim)]


def one_process(query, key, value, alpha=1.5, cu_seqlens=None, max_seqlen=None, **options):
    """What the call over shards is to give."""
    if cu_seqlens is None:
        return adasplash.entmax_attn(query, key, value, alpha, **options)
    longest = len(query) if max_seqlen is None else max_seqlen
    ends = (cu_seqlens, cu_seqlens, longest, longest)
    return adasplash.entmax_attn_varlen(query, key, value, *ends, alpha, **options)


def check(*tensors, method="gather", **options):
    """A call over shards against one process with everything: outputs and gradients, and without gradients."""
    for group in MESHES if method == "both" else [None]:
        check_over(group, *tensors, method=method, **options)


def check_over(group, *tensors, alpha=1.5, scale=None, method="gather", **options):
    over = dict(method=method, group=group)
    tokens = 2 if options.get("cu_seqlens") is None else 0
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            expected = one_process(*tensors, alpha, scale=scale, **options)
            shards = [shard(x, tokens) for x in tensors]
            found = entmax_attn_context_parallel(*shards, alpha, scale=scale, **over, **options)
            compare(unshard(found, tokens), expected)

    def leaves():
        return [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in (*tensors, alpha, scale)]

    def gradients(of):
        return [x.grad for x in of if isinstance(x, torch.Tensor)]

    *single, one_alpha, one_scale = leaves()
    expected = one_process(*single, one_alpha, scale=one_scale, **options)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    *whole, an_alpha, a_scale = leaves()
    shards = [shard(x, tokens) for x in whole]
    out = entmax_attn_context_parallel(*shards, an_alpha, scale=a_scale, **over, **options)
    assert out.dtype == tensors[0].dtype and out.shape[tokens] * WORLD == tensors[0].shape[tokens]
    out.backward(shard(grad, tokens))
    compare(unshard(out.detach(), tokens), expected.detach())
    found = gradients((*whole, an_alpha, a_scale))
    for x, y in zip(found, gradients((*single, one_alpha, one_scale)), strict=True):
        compare(x, y)


def compare(found, expected):
    close = CLOSE[expected.dtype]
    torch.testing.assert_close(found, expected, atol=close * max([1.0, *expected.abs().flatten().tolist()]), rtol=close)


def refused(error, words, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except error as raised:
        assert words in str(raised), raised
    else:
        raise AssertionError(f"{words!r} was not said")


def for_both_methods(function, methods=("gather", "exchange")):
    for method in methods:
        CASES[f"{function.__name__}_by_{method}"] = lambda method=method: function(method)
    return function


def for_all_methods(function):
    """And both at once."""
    return for_both_methods(function, METHODS)


@case
def layout():
    """Chunks r and 2W - 1 - r, of any type and in any dimension, there and back."""
    tokens = torch.arange(3 * 4 * WORLD).view(3, 4 * WORLD)
    mine = shard(tokens, 1)
    assert torch.equal(mine, tokens[:, [2 * RANK, 2 * RANK + 1, -2 * RANK - 2, -2 * RANK - 1]])
    assert torch.equal(unshard(mine, -1), tokens)
    assert torch.equal(unshard(shard(tokens.t(), 0), 0), tokens.t())
    assert shard(torch.zeros(2, 0), 1).shape == unshard(torch.zeros(2, 0), 1).shape == (2, 0)


@case
def layout_has_the_gradient_of_one_process():
    whole = torch.randn(2, 4 * WORLD, dtype=DOUBLE).requires_grad_()
    weights = torch.randn(2, 4 * WORLD, dtype=DOUBLE)
    out = unshard(shard(whole, 1).square(), 1)
    (out * weights).sum().backward()
    compare(whole.grad, 2 * whole.detach() * weights)


@case
def layout_refuses():
    refused(
        RuntimeError, f"must be a multiple of {2 * WORLD}, got {2 * WORLD + 1}", shard, torch.zeros(2 * WORLD + 1), 0
    )
    refused(RuntimeError, "must be even, got 3", unshard, torch.zeros(3), 0)
    refused(IndexError, "which has 1, got 1", shard, torch.zeros(4), 1)
    refused(TypeError, "tensor must be a tensor, got None", shard, None, 0)


@for_all_methods
def plain(method):
    for is_causal in (False, True):
        check(*inputs(), is_causal=is_causal, method=method)


@for_all_methods
def grouped_queries(method):
    for is_causal in (False, True):
        check(*inputs(heads=8, kv_heads=4, dtype=SINGLE), is_causal=is_causal, method=method)


@for_all_methods
def nothing_at_all(method):
    for batch, chunk in ((0, 6), (2, 0)):
        check(*inputs(batch=batch, chunk=chunk), is_causal=True, method=method)


@for_both_methods
def half(method):
    check(*inputs(dtype=torch.bfloat16), is_causal=True, method=method)


@for_both_methods
def windows(method):
    """Of no key before, of less than a chunk, of a chunk to the key, of several, of everything."""
    tensors = inputs(batch=1, heads=4, kv_heads=4, chunk=4, dim=4, value_dim=4)
    for left, right in itertools.product((-1, 0, 3, 4, 9, 1000), (-1, 0, 2, 4, 11, 1000)):
        check(*tensors, window=(left, right), method=method)
    for left in (0, 3, 4, 5, 9, 1000):
        check(*tensors, window=(left, 2), is_causal=True, method=method)


@for_all_methods
def alphas(method):
    tensors = inputs(heads=4, kv_heads=4)
    for alpha in (1.0, 1.3, 2.0, torch.tensor(1.4, dtype=DOUBLE), torch.tensor([1.2, 1.5, 1.7, 2.0])):
        check(*tensors, alpha=alpha, is_causal=True, scale=0.7, method=method)


@for_both_methods
def scale_with_a_gradient(method):
    check(*inputs(), scale=torch.tensor([0.6], dtype=DOUBLE), window=(5, 5), method=method)


@for_all_methods
def slopes(method):
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    for given in (slopes, torch.stack((slopes, slopes.flip(0)))):
        check(*inputs(), alibi_slopes=given, is_causal=True, method=method)
        check(*inputs(), alibi_slopes=given, window=(7, 0), method=method)
        check(*inputs(), alibi_slopes=given, window=(7, 3), method=method)
        check(*inputs(), alibi_slopes=given, method=method)


def lengths_of(tokens):
    """(q_seqlens, kv_seqlens, kv_starts) of two entries: of self-attention, of one side, with keys that start later."""
    full, short, none = (torch.tensor([tokens, x]) for x in (tokens, tokens // 3, 0))
    first = torch.tensor([tokens // 4, 1])
    some = torch.tensor([tokens // 2 + 1, tokens - 1])
    yield from ((full, full, None), (short, short, None), (some, some, None), (none, none, None))
    yield from ((some, None, None), (None, some, None), (short, some, None), (some, some, first), (None, None, first))


@for_both_methods
def lengths(method):
    """Of one process, whatever padding holds; for another reason each: the diagonal moves, or does not."""
    tensors = inputs(heads=4, kv_heads=4, chunk=4, dim=4, value_dim=4)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    for q_seqlens, kv_seqlens, kv_starts in lengths_of(tensors[0].shape[2]):
        given = dict(q_seqlens=q_seqlens, kv_seqlens=kv_seqlens, kv_starts=kv_starts, method=method)
        for options in (dict(is_causal=True), dict(window=(5, 3)), dict(window=(4, -1), alibi_slopes=slopes), dict()):
            check(*tensors, **given, **options)


@case
def padding_reaches_nothing():
    tensors = inputs(chunk=4)
    ends = torch.tensor([3 * WORLD, 8 * WORLD])
    given = dict(is_causal=True, q_seqlens=ends, kv_seqlens=ends)
    clean = unshard(entmax_attn_context_parallel(*(shard(x, 2) for x in tensors), **given), 2)
    for x in tensors:
        x[0, :, 3 * WORLD :] = torch.nan
    dirty = unshard(entmax_attn_context_parallel(*(shard(x, 2) for x in tensors), **given), 2)
    assert torch.equal(clean, dirty)


@for_both_methods
def packed_batches(method):
    """Sequences that cross chunks, end at their edges, lie in one, have no token, or fill several."""
    tensors = packed_inputs(kv_heads=4, chunk=4, dim=4, value_dim=4)
    tokens = len(tensors[0])
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    for ends in ([0, tokens], [0, 1, 3, tokens - 5, tokens], [0, 4, 4, 8, 9, tokens], [0, 0, tokens // 2 + 1, tokens]):
        given = dict(cu_seqlens=torch.tensor(ends, dtype=torch.int32), method=method)
        longest = int(given["cu_seqlens"].diff().max())
        for options in (
            dict(is_causal=True),
            dict(),
            dict(is_causal=True, window=(5, -1), max_seqlen=longest),
            dict(window=(3, 2), max_seqlen=longest),
            dict(alibi_slopes=slopes),
        ):
            check(*tensors, **given, **options)


SEED = 0x123456789ABCDEF


@case
def any_combination():
    """Options drawn alike on every process; more of them where there are more than two."""
    drawn = random.Random(1)
    for number in range(12 if WORLD == 2 else 60):
        chunk, batch = drawn.choice((1, 3, 4)), drawn.choice((1, 2))
        packed = drawn.random() < 0.4
        heads = dict(heads=2 * WORLD, kv_heads=drawn.choice((WORLD, 2 * WORLD)))
        tensors = packed_inputs(chunk=chunk, **heads) if packed else inputs(batch=batch, chunk=chunk, **heads)
        tokens = 2 * WORLD * chunk

        def rows(count, most=tokens):
            return torch.tensor([drawn.randint(0, most) for _ in range(count)], dtype=torch.int64)

        options = dict(
            method=drawn.choice(METHODS), is_causal=drawn.random() < 0.5,
            window=drawn.choice(((-1, -1), (drawn.randint(0, tokens), drawn.choice((-1, 0, 3))))),
            alpha=drawn.choice((1.0, 1.4, 1.5, torch.linspace(1.1, 2.0, 2 * WORLD, dtype=DOUBLE))),
        )  # fmt: skip
        if drawn.random() < 0.3:
            options["alibi_slopes"] = torch.linspace(0, 0.5, 2 * WORLD)
        if drawn.random() < 0.3:
            options.update(dropout_p=0.3, dropout_seed=torch.tensor(number))
        if packed:
            inner = rows(drawn.randint(0, 3)).sort().values
            options["cu_seqlens"] = torch.cat([torch.tensor([0]), inner, torch.tensor([tokens])])
        else:
            both = rows(batch)
            if drawn.random() < 0.3:
                options.update(q_seqlens=both, kv_seqlens=both)
            elif drawn.random() < 0.5:
                options.update(q_seqlens=rows(batch), kv_seqlens=rows(batch), kv_starts=rows(batch))
        check(*tensors, **options)


@for_all_methods
def dropout(method):
    """The weights that one process drops: whatever chunk, head, entry or sequence they are in."""
    drops = dict(dropout_p=0.4, dropout_seed=torch.tensor(SEED), method=method)
    tensors = inputs(heads=4, kv_heads=4, chunk=4)
    tokens = tensors[0].shape[2]
    ends, starts = torch.tensor([tokens, tokens // 3 + 4]), torch.tensor([tokens // 4, 1])
    for alpha in (1.0, 1.5):
        for options in (
            dict(is_causal=True),
            dict(),
            dict(window=(5, 3)),
            dict(is_causal=True, window=(3, -1)),
            dict(is_causal=True, q_seqlens=ends, kv_seqlens=ends),
            dict(q_seqlens=ends, kv_seqlens=ends, kv_starts=starts),
        ):
            check(*tensors, alpha=alpha, **drops, **options)
    tensors = packed_inputs(chunk=4)
    cu_seqlens = torch.tensor([0, 1, 7, tokens - 3, tokens])
    for options in (dict(is_causal=True), dict(window=(5, 2))):
        check(*tensors, cu_seqlens=cu_seqlens, **drops, **options)


@for_both_methods
def seeds_that_are_drawn(method):
    """By the first process, whatever the generators of the others."""
    tensors = inputs()
    torch.manual_seed(RANK)
    out = unshard(entmax_attn_context_parallel(*(shard(x, 2) for x in tensors), dropout_p=0.5, method=method), 2)
    torch.manual_seed(0)
    compare(out, adasplash.entmax_attn(*tensors, dropout_p=0.5))


@case
def nothing_is_said_of_places_where_they_do_not_count():
    """So softmax is computed by torch's attention where one process would have it do that."""
    tensors, called = inputs(value_dim=8), []
    shards = [shard(x, 2) for x in tensors]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            called.append(str(function))
            return function(*arguments, **(options or {}))

    for options in ({}, dict(window=(3, 3))):
        entmax_attn_context_parallel(*shards, 1.0, **options)  # compares arguments
        called.clear()
        with Watch():
            out = entmax_attn_context_parallel(*shards, 1.0, **options)
        compare(unshard(out, 2), adasplash.entmax_attn(*tensors, 1.0, **options))
        by_torch = [name for name in called if "scaled_dot_product" in name]
        assert len(by_torch) == (2 if not options else 0), (options, called)


@case
def second_half_of_the_keys_comes_while_the_first_is_computed():
    """What is called in which order, forward and backward: the second collective is waited for behind the first chunk's
    attention, and back the gradients of the second leave before the first chunk's are computed."""
    order = []
    names = {
        "all_gather_into_tensor": "send", "reduce_scatter_tensor": "send", "all_to_all_single": "send",
        "wait_tensor": "wait", "_entmax_attn_forward": "compute", "_entmax_attn_backward": "compute",
    }  # fmt: skip

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            order.extend(word for name, word in names.items() if name in str(function))
            return function(*arguments, **(options or {}))

    grad = shard(inputs()[0], 2)[..., :5]
    for window in ((-1, -1), (7, -1)):
        leaves = [shard(x, 2).requires_grad_() for x in inputs()]
        entmax_attn_context_parallel(*leaves, is_causal=True, window=window)  # compares arguments
        with Watch():
            out = entmax_attn_context_parallel(*leaves, is_causal=True, window=window)
            assert order == ["send", "send", "wait", "compute", "wait", "compute"], order
            order.clear()
            out.backward(grad)
            assert order == ["compute", "send", "compute", "send", "wait", "wait"], order
            order.clear()


@for_both_methods
def strides(method):
    """Tokens first, as projections leave them."""
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs())
    check(query, key, value, is_causal=True, method=method)


@for_both_methods
def parts_of_the_gradient_of_alpha(method):
    """With sum_gradients=False: processes' parts, whose sum is the gradient."""
    tensors, alpha = inputs(), torch.tensor([1.2, 1.5, 1.7, 2.0], dtype=DOUBLE)
    one, part = alpha.clone().requires_grad_(), alpha.clone().requires_grad_()
    adasplash.entmax_attn(*tensors, one).sum().backward()
    shards = [shard(x, 2) for x in tensors]
    entmax_attn_context_parallel(*shards, part, method=method, sum_gradients=False).sum().backward()
    assert not torch.allclose(part.grad, one.grad)
    dist.all_reduce(part.grad)
    compare(part.grad, one.grad)


@for_both_methods
def same_bits(method):
    def run():
        leaves = [shard(x, 2).requires_grad_() for x in tensors]
        out = entmax_attn_context_parallel(*leaves, is_causal=True, method=method)
        out.backward(grad)
        return [out.detach(), *(x.grad for x in leaves)]

    tensors = inputs(dtype=SINGLE)
    grad = shard(torch.randn(2, 4, tensors[0].shape[2], 5), 2)
    assert all(torch.equal(x, y) for x, y in zip(run(), run(), strict=True))


@for_both_methods
def compiled(method):
    whole, alpha = torch.randn(2, 4, 8 * WORLD, 8, dtype=DOUBLE), torch.tensor([1.2, 1.5, 1.7, 2.0], dtype=DOUBLE)
    grad = torch.randn_like(whole)

    def step(x, alpha, **options):
        mine = shard(x, 2)
        return unshard(entmax_attn_context_parallel(mine, mine.sin(), mine.cos(), alpha, method=method, **options), 2)

    def alone(x, alpha, **options):
        return adasplash.entmax_attn(x, x.sin(), x.cos(), alpha, **options)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for options in (dict(is_causal=True), dict(window=(3, 2))):
        results = []
        for function in (alone, step, compiled):
            leaves = whole.clone().requires_grad_(), alpha.clone().requires_grad_()
            out = function(*leaves, **options)
            out.backward(grad)
            results.append((out.detach(), *(x.grad for x in leaves)))
        for expected, *others in zip(*results, strict=True):
            for found in others:
                compare(found, expected)
    with torch.inference_mode():
        compare(compiled(whole, alpha, is_causal=True), alone(whole, alpha, is_causal=True))


@case
def window_fetches_neighbours_only():
    """Bytes received, as the collectives are called: a causal window of a chunk's length needs the chunk before each of
    a process' two, and its own."""
    query, key, value = (shard(x, 2) for x in inputs(chunk=8))
    sent = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if "_c10d_functional" in str(function) and "wait" not in str(function):
                sent.append((str(function), arguments))
            return function(*arguments, **(options or {}))

    def sent_by(window):
        sent.clear()
        with Count():
            entmax_attn_context_parallel(query, key, value, is_causal=True, window=window)
        (name,) = {name for name, _ in sent}
        return name, [arguments[1] for _, arguments in sent]  # one for each half of the sequence

    chunks = {RANK, 2 * WORLD - 1 - RANK}
    chunks |= {chunk - 1 for chunk in chunks if chunk}
    name, received = sent_by((8, 0))
    assert "all_to_all_single" in name
    assert sum(map(sum, received)) == len(chunks) * (key.numel() + value.numel()) // 2
    name, _ = sent_by((16 * WORLD, 0))
    assert "all_gather_into_tensor" in name


@case
def refusals():
    query, key, value = (shard(x, 2) for x in inputs())
    parallel = entmax_attn_context_parallel
    for name, given, words in (
        ("q_seqlens", torch.tensor([0, 99]), f"must be from 0 to the length {12 * WORLD} of all processes together"),
        ("kv_starts", torch.tensor([-1, 0]), "must be from 0 to the length"),
        ("kv_seqlens", torch.tensor([1]), "must be of shape (batch,) with 2 numbers, got 1"),
        (
            "kv_seqlens",
            torch.tensor([1.0, 2.0]),
            "must be of shape (batch,), int32 or int64, and on query's device cpu",
        ),
        ("dropout_p", 1.5, "must be 0 or more and less than 1, got 1.5"),
    ):
        refused(RuntimeError, f"{name} {words}", parallel, query, key, value, **{name: given})
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]
    for ends in ([0, 5], [1, 12 * WORLD], [0, 7, 5, 12 * WORLD], []):
        words = "cu_seqlens must start at 0" if ends else "cu_seqlens must be of shape"
        refused(RuntimeError, words, parallel, *tokens, cu_seqlens=torch.tensor(ends, dtype=torch.int64))
    ends = torch.tensor([0, 12 * WORLD])
    refused(RuntimeError, "query must have 3 dimensions (tokens", parallel, query, key, value, cu_seqlens=ends)
    refused(RuntimeError, "go with padded tensors", parallel, *tokens, cu_seqlens=ends, kv_starts=ends)
    refused(TypeError, "max_seqlen must be an integer, got 5.0", parallel, *tokens, cu_seqlens=ends, max_seqlen=5.0)
    refused(RuntimeError, 'must be "gather", "exchange" or "both"', parallel, query, key, value, method="ring")
    refused(RuntimeError, "or -1 for no limit, got (-2, 0)", parallel, query, key, value, window=(-2, 0))
    refused(TypeError, "is_causal must be True or False, got None", parallel, query, key, value, 1.5, None)
    refused(TypeError, "key must be a tensor, got 3", parallel, query, 3, value)
    refused(RuntimeError, "must be even in number, got 5", parallel, *(x[:, :, :5] for x in (query, key, value)))
    refused(RuntimeError, "as many tokens as query, 12, got 10", parallel, query, key[:, :, :10], value)
    refused(RuntimeError, "key must have 4 dimensions", parallel, query, key[0], value)
    refused(RuntimeError, "must have query's type", parallel, query, key.float(), value)
    heads = [x[:, : WORLD + 1] for x in (query, key, value)] if WORLD < 4 else [x[:, :3] for x in (query, key, value)]
    count = heads[0].shape[1]
    refused(RuntimeError, f"multiples of {WORLD}, got {count} and {count}", parallel, *heads, method="exchange")
    refused(RuntimeError, "entmax_attn_context_parallel: alpha", parallel, query, key, value, 3.0)
    for name in ("alpha", "alibi_slopes"):  # as many numbers as a process has heads in the exchange
        for method in ("gather", "exchange"):
            given = {name: torch.full((4 // WORLD,), 1.5)}
            words = f"entmax_attn_context_parallel: {name}"
            refused(RuntimeError, words, parallel, query, key, value, is_causal=True, method=method, **given)
    assert torch._C._distributed_c10d._get_work_registry_size() == 0  # nothing is on its way that nobody waits for


@case
def other_arguments_elsewhere_are_one_error_everywhere():
    odd = RANK == WORLD - 1
    batches = itertools.count(3)  # what has been compared is not compared again

    def message(change, function=entmax_attn_context_parallel):
        tensors = dict(zip(("query", "key", "value"), inputs(batch=next(batches), chunk=2), strict=True))
        try:
            function(**(tensors | change(tensors)))
        except RuntimeError as error:
            messages = [None] * WORLD
            dist.all_gather_object(messages, str(error))
            assert set(messages) == {str(error)}, messages
            return str(error).replace(f"rank {WORLD - 1}", "the last")
        raise AssertionError("nothing was raised")

    def shorter(tensors):
        return {name: x[:, :, : 4 if odd else 8] for name, x in tensors.items()}

    said = "entmax_attn_context_parallel: the processes of a group must be called with the same arguments: "
    sizes = "query is a float64 tensor of sizes [3, 4, 8, 8] (cpu) on rank 0 and a float64 tensor of sizes [3, 4, 4, 8]"
    assert message(shorter) == f"{said}{sizes} (cpu) on the last"
    for name, value, words in (
        ("is_causal", True, "False on rank 0 and True on the last"),
        ("alpha", 1.25, "1.5 on rank 0 and 1.25 on the last"),
        ("window", (3, 0), "tuple (-1, -1) on rank 0 and tuple (3, 0) on the last"),
        ("dropout_p", 0.5, "0.0 on rank 0 and 0.5 on the last"),
        ("method", "exchange", "'gather' on rank 0 and 'exchange' on the last"),
    ):
        assert (
            message(lambda tensors, name=name, value=value: {name: value} if odd else {}) == f"{said}{name} is {words}"
        )

    def lengths(tensors):
        """The same numbers, which are one tensor everywhere but on the last process."""
        both = torch.full((len(tensors["query"]),), 8)
        return dict(q_seqlens=both, kv_seqlens=both.clone() if odd else both)

    assert message(lengths) == f"{said}(q_seqlens is kv_seqlens) is True on rank 0 and False on the last"
    assert "and None on the last" in message(lambda tensors: {"key": None} if odd else {})
    assert "that requires a gradient on the last" in message(lambda x: {"query": x["query"].requires_grad_(odd)})
    said = message(lambda tensors: {}, lambda query, **_: unshard(query[:, :, : 4 if odd else 8], 2))
    assert said.startswith("unshard: the processes of a group must be called with the same arguments: tensor is")
    said = message(
        lambda tensors: {},
        lambda query, key, value: unshard(query, 1) if odd else entmax_attn_context_parallel(query, key, value),
    )
    assert "rank 0 called entmax_attn_context_parallel, the last unshard" in said


@case
def other_arguments_are_found_always_if_asked_for():
    """Where one process has had its call compared before, and the other one not."""
    query, key, value = (shard(x, 2) for x in inputs(chunk=3))
    entmax_attn_context_parallel(query, key, value)
    with mock.patch.dict(os.environ, ADASPLASH_COMPARE_RANKS="1"):
        window = (7, 0) if RANK else (-1, -1)
        words = "window is tuple (-1, -1) on rank 0 and tuple (7, 0) on rank 1"
        refused(RuntimeError, words, entmax_attn_context_parallel, query, key, value, window=window)


@case
def arguments_are_compared_once():
    """Again where they are new, or where the variable says always."""
    query, key, value = (shard(x, 2) for x in inputs(batch=1, chunk=3))
    with mock.patch.object(dist, "all_gather_object", wraps=dist.all_gather_object) as gathered:

        def times(*options, **others):
            before = gathered.call_count
            entmax_attn_context_parallel(query, key, value, *options, **others)
            return gathered.call_count - before

        assert [times(alpha) for alpha in (1.5, 1.5, 1.6)] == [1, 0, 0]
        assert [times(is_causal=True), times(is_causal=True)] == [1, 0]
        assert [times(group=PAIRS[RANK // 2]), times(group=PAIRS[RANK // 2])] == [1, 0]
        lengths = torch.tensor([3])
        assert [times(q_seqlens=x, kv_seqlens=x) for x in (lengths, lengths + 1)] == [1, 0]
        with mock.patch.dict(os.environ, ADASPLASH_COMPARE_RANKS="1"):
            assert times() == 1
        assert times() == 0


@case
def meshes():
    """A mesh of one dimension, and a dimension of one with two by its name, stand for their groups."""
    mesh = init_device_mesh(DEVICE, (WORLD // 2, 2), mesh_dim_names=("data", "context"))
    tensors = inputs()
    for group, lasts in (
        (init_device_mesh(DEVICE, (WORLD,)), WORLD),
        (mesh["context"], 2),
        (mesh["data", "context"], WORLD),
    ):
        mine = [x[:, :, : 12 * lasts] for x in tensors]
        for method in ("gather", "exchange"):
            out = entmax_attn_context_parallel(
                *(shard(x, 2, group) for x in mine), is_causal=True, method=method, group=group
            )
            compare(unshard(out, 2, group), adasplash.entmax_attn(*mine, is_causal=True))
    refused(TypeError, "group must be a process group, a mesh or None, got 'context'", shard, tensors[0], 2, "context")
    cube = init_device_mesh(DEVICE, (1, WORLD // 2, 2), mesh_dim_names=("a", "b", "c"))
    refused(RuntimeError, "must have one dimension, or two with names, got 3", shard, tensors[0], 2, cube)
    nameless = init_device_mesh(DEVICE, (WORLD // 2, 2))
    refused(RuntimeError, "got 2 without names", shard, tensors[0], 2, nameless)
    words = 'method="both" needs a mesh of two dimensions'
    refused(RuntimeError, words, entmax_attn_context_parallel, *(shard(x, 2) for x in tensors), method="both")
    if WORLD == 4:
        turned = DeviceMesh(DEVICE, [[0, 2], [1, 3]], mesh_dim_names=("turned", "around"))
        refused(RuntimeError, "must be in order, got [0, 2, 1, 3]", shard, tensors[0], 2, turned)


@case
def other_group():
    """Two processes of more: the ranks of the group count."""
    group = PAIRS[RANK // 2]
    tensors = [x[:, :, :16] for x in inputs()]
    for method in ("gather", "exchange"):
        out = entmax_attn_context_parallel(*(shard(x, 2, group) for x in tensors), method=method, group=group)
        compare(unshard(out, 2, group), adasplash.entmax_attn(*tensors))
    others = PAIRS[1 - RANK // 2] if WORLD == 4 else None
    if others is not None:
        refused(RuntimeError, "not in the group", shard, tensors[0], 2, others)


if __name__ == "__main__":
    RANK, WORLD, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    # What goes wrong in one process alone leaves the others waiting.
    wait = datetime.timedelta(minutes=30)
    store = f"file://{FOLDER / 'store'}"
    if DEVICE == "cuda":
        torch.cuda.set_device(RANK)
        torch.set_default_device(f"cuda:{RANK}")
    backend = {"cpu": "gloo", "cuda": "nccl"}[DEVICE]
    dist.init_process_group(backend, init_method=store, rank=RANK, world_size=WORLD, timeout=wait)
    PAIRS = [dist.new_group([first, first + 1]) for first in range(0, WORLD, 2)]
    # Of two processes, each dimension has all of them once.
    MESHES = [
        init_device_mesh(DEVICE, shape, mesh_dim_names=("hosts", "gpus"))
        for shape in {(WORLD // 2, 2): None, (2, WORLD // 2): None}
    ]
    if sys.argv[4:]:
        CASES = {name: CASES[name] for name in sys.argv[4:]}
    if DEVICE == "cuda":
        CASES = {name: function for name, function in CASES.items() if name not in ON_CPUS}
    run_cases(CASES, FOLDER / f"{RANK}.json")
    dist.destroy_process_group()
