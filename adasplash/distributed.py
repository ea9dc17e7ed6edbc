"""Attention over sequences that are sharded over the processes of a group: context parallelism.

This module is not imported by ``import adasplash``, as torch may be built without ``torch.distributed``::

    import adasplash.distributed

    tokens, labels = (adasplash.distributed.shard(x, dim=1) for x in (tokens, labels))
    ...
    out = adasplash.distributed.entmax_attn_context_parallel(query, key, value, is_causal=True)

A sequence of N tokens over W processes is cut into 2W chunks of N / 2W, and process r has chunks r and 2W − 1 − r: one
from the head and one from the tail. Under a causal mask the first sees few keys and the second many, so that every
process has the same work (Llama Team, "The Llama 3 Herd of Models", 2024, section 3.3.2; the imbalance of plain shards
is described by Brandon et al., "Striped Attention", 2023). docs/distributed.md says which method to choose.

Collectives are called as ops of ``torch.ops._c10d_functional``, which torch.compile traces.
"""

import os
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from adasplash._arguments import (
    BOOL,
    INTEGER,
    NUMBER,
    NUMBER_OR_TENSOR,
    OPTIONAL_TENSOR,
    SCALE,
    TENSOR,
    WINDOW,
    check,
    describe,
)
from adasplash.functional import attend

__all__ = ["entmax_attn_context_parallel", "shard", "unshard"]

_METHODS = ("gather", "exchange")


def shard(tensor: Tensor, dim: int, group: ProcessGroup | None = None) -> Tensor:
    """This process' part of a tensor that every process has whole: chunks r and 2W − 1 − r of 2W along `dim`.

    For whatever goes with the tokens of a batch: their ids, positions, labels. Nothing is sent in the forward.

    The gradient is the one of a single process, whole and the same everywhere: the backward gathers it, so it must be
    called on every process of the group.

    Args:
        tensor: (…, N, …) of any type, the same on every process.
        dim: the dimension of N, which must be a multiple of 2W; may be negative.
        group: the W processes; the default group unless given.

    Returns:
        (…, N / W, …), contiguous.

    Raises:
        RuntimeError: N is no multiple of 2W, there is no process group, or this process is not in it.
    """
    check("shard", "tensor", TENSOR, tensor)
    dim = _dimension("shard", tensor, dim)
    rank, world, name = _group("shard", group)
    if tensor.shape[dim] % (2 * world):
        raise RuntimeError(
            f"shard: a dimension is cut into {2 * world} chunks, two for each of the {world} processes, so its length "
            f"must be a multiple of {2 * world}, got {tensor.shape[dim]} in dimension {dim}: pad it"
        )
    return _Shard.apply(tensor, dim, rank, world, name)


def unshard(tensor: Tensor, dim: int, group: ProcessGroup | None = None) -> Tensor:
    """The inverse of ``shard``: the whole tensor, on every process.

    Every process is taken to go on with it in the same way, as a single process would, and its gradient to be the same
    everywhere; the backward takes this process' part of it and sends nothing. (A loss that is summed over processes
    from different uses of the result wants a sum of gradients instead; compute such losses from shards.)

    Args:
        tensor: (…, N / W, …) of any type, laid out as ``shard`` does, of the same shape on every process.
        dim: the dimension that is sharded; may be negative.
        group: the W processes; the default group unless given.

    Returns:
        (…, N, …), contiguous.

    Raises:
        RuntimeError: N / W is odd, there is no process group, or processes give tensors of different shape or type.
    """
    check("unshard", "tensor", TENSOR, tensor)
    dim = _dimension("unshard", tensor, dim)
    rank, world, name = _group("unshard", group)
    _compare("unshard", group, {"tensor": tensor, "dim": dim})
    if tensor.shape[dim] % 2:
        raise RuntimeError(
            f"unshard: a process has two chunks of one length, so the length of dimension {dim} must be even, got "
            f"{tensor.shape[dim]}"
        )
    return _Unshard.apply(tensor, dim, rank, world, name)


def entmax_attn_context_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alpha: float | Tensor = 1.5,
    is_causal: bool = False,
    *,
    scale: float | Tensor | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    method: str = "gather",
    sum_gradients: bool = True,
    group: ProcessGroup | None = None,
) -> Tensor:
    """``entmax_attn`` of a sequence that is sharded over the processes of a group, as ``shard`` lays it out.

    The result and all gradients are those of one process with the whole sequence, to rounding. Every process of the
    group makes the same call, forward and backward, with tensors of the same shapes.

    Args:
        query: (B, H, N / W, D): this process' tokens of N, over W processes; types as in ``entmax_attn``.
        key: (B, H_kv, N / W, D).
        value: (B, H_kv, N / W, D_v).
        alpha: as in ``entmax_attn``. As a tensor, the same on every process.
        is_causal: query i of the whole sequence sees keys up to i.
        scale: as in ``entmax_attn``. As a tensor, the same on every process.
        window: (left, right), inclusive, −1 for no limit: query i of the whole sequence sees keys i − left to
            i + right.
        alibi_slopes: (H,) or (B, H), as in ``entmax_attn``; of all H heads.
        dropout_p: must be 0: the op counts queries, keys and heads from 0 in every call, so that its mask would not be
            the one of a single process.
        method: "gather": keys and values are gathered on every process, and their gradients summed by a
            reduce-scatter. Where the window leaves keys that no process needs all of, each gets the chunks that its
            windows reach, and no others. "exchange": an all-to-all gives every process the whole sequence of H / W
            heads, and another one takes the result back (Jacobs et al., "DeepSpeed Ulysses", 2023, arXiv 2309.14509).
        sum_gradients: the gradients of alpha and of scale, where they are tensors, are summed over the group, so that
            every process has the whole gradient. Say False where something else sums them as it does for all other
            parameters of a model (DistributedDataParallel or FSDP over this group, or an all-reduce of your own): each
            process then has the gradient of what it computed, a part of the sum.
        group: the W processes; the default group unless given.

    Returns:
        (B, H, N / W, D_v), in query's type, laid out as query is. Differentiable once in query, key, value and, where
        they are tensors, alpha and scale. For the same number of processes the same bits every time, wherever the
        backend's reduce-scatter adds in a fixed order.

    Raises:
        TypeError: an argument is of another kind than said here. RuntimeError: an argument does not fit; there is no
            process group; or processes were called with different arguments, which is one error on all of them. That is
            compared at the first call of each set of shapes, types and options; in every call if the environment
            variable ADASPLASH_COMPARE_RANKS is 1; and never inside compiled graphs. NotImplementedError, a
            RuntimeError too: dropout, and slopes with method="gather" for queries that see keys behind them.
    """
    function = "entmax_attn_context_parallel"
    rank, world, name = _group(function, group)
    # Compared before anything is refused: a process that raised alone would leave the others waiting for it.
    _compare(
        function,
        group,
        {
            "query": query, "key": key, "value": value, "alpha": alpha, "is_causal": is_causal, "scale": scale,
            "window": window, "alibi_slopes": alibi_slopes, "dropout_p": dropout_p, "method": method,
            "sum_gradients": sum_gradients,
        },
    )  # fmt: skip
    _check_call(function, query, key, value, alpha, is_causal, scale, window, alibi_slopes, dropout_p, sum_gradients)
    if method not in _METHODS:
        raise RuntimeError(f'{function}: method must be "gather" or "exchange", got {describe(method)}')
    if query.numel() == 0 or key.numel() == 0:  # nothing to send, and the op has the errors
        return attend(function, query, key, value, alpha, is_causal, scale, None, None, window, alibi_slopes)
    if sum_gradients:
        alpha, scale = (
            _SumOfGradients.apply(x, world, name) if isinstance(x, Tensor) and x.requires_grad else x
            for x in (alpha, scale)
        )
    attention = _gather if method == "gather" else _exchange
    return attention(function, query, key, value, alpha, is_causal, scale, window, alibi_slopes, rank, world, name)


def _check_call(
    function, query, key, value, alpha, is_causal, scale, window, alibi_slopes, dropout_p, sum_gradients
):  # fmt: skip
    """What this module relies on before it calls the op, which has all other errors."""
    for name, kind, given in (
        ("query", TENSOR, query), ("key", TENSOR, key), ("value", TENSOR, value), ("alpha", NUMBER_OR_TENSOR, alpha),
        ("is_causal", BOOL, is_causal), ("scale", SCALE, scale), ("window", WINDOW, window),
        ("alibi_slopes", OPTIONAL_TENSOR, alibi_slopes), ("dropout_p", NUMBER, dropout_p),
        ("sum_gradients", BOOL, sum_gradients),
    ):  # fmt: skip
        check(function, name, kind, given)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.is_nested or tensor.dim() != 4:
            raise RuntimeError(
                f"{function}: {name} must have 4 dimensions (batch, heads, tokens, channels), got "
                f"{'a nested tensor' if tensor.is_nested else list(tensor.shape)}"
            )
        if tensor.dtype != query.dtype or tensor.shape[0] != query.shape[0]:
            raise RuntimeError(
                f"{function}: {name} must have query's type and batch, {query.dtype} and {query.shape[0]}, got "
                f"{tensor.dtype} and {tensor.shape[0]}"
            )
        if tensor.shape[2] != query.shape[2]:
            raise RuntimeError(
                f"{function}: {name} must have as many tokens as query, {query.shape[2]}, got {tensor.shape[2]}"
            )
    if value.shape[1] != key.shape[1]:
        raise RuntimeError(f"{function}: value must have as many heads as key, {key.shape[1]}, got {value.shape[1]}")
    if query.shape[2] % 2:
        raise RuntimeError(
            f"{function}: a process has two chunks of one length, so the tokens of query must be even in number, got "
            f"{query.shape[2]}"
        )
    if window[0] < -1 or window[1] < -1:
        raise RuntimeError(
            f"{function}: window (left, right) must be 0 or more each, or -1 for no limit, got {tuple(window)}"
        )
    if dropout_p != 0:
        raise NotImplementedError(
            f"{function}: dropout_p must be 0, got {dropout_p}: the op counts queries, keys and heads from 0 in every "
            "call, and its mask would not be the one of a single process"
        )


def _gather(function, query, key, value, alpha, is_causal, scale, window, alibi_slopes, rank, world, name):
    left, right = window
    if alibi_slopes is not None and not is_causal and right != 0:
        raise NotImplementedError(
            f'{function}: alibi_slopes with method="gather" need is_causal or a window that ends at the query, as the '
            'op takes the last key it is given for the last query\'s own: use method="exchange"'
        )
    length = query.shape[2] // 2
    total = 2 * world * length
    seen = [_seen(chunk, length, total, is_causal, left, right) for chunk in range(2 * world)]
    needed = []
    for process in range(world):
        chunks: set[int] = set()
        for chunk in _chunks_of(process, world):
            start, end = seen[chunk]
            chunks.update(range(start // length, (end - 1) // length + 1))
        needed.append(sorted(chunks))
    # Where one process needs every chunk, the others wait for it whatever they fetch themselves, and all gather.
    fetch = _fetch_all if max(map(len, needed)) == 2 * world else _fetch_needed
    parts = fetch(key, value, needed, rank, world, name)
    keys = torch.cat([parts[chunk][0] for chunk in needed[rank]], dim=2)
    values = torch.cat([parts[chunk][1] for chunk in needed[rank]], dim=2)
    outputs = []
    for chunk, queries in zip(_chunks_of(rank, world), query.chunk(2, dim=2), strict=True):
        start, end = seen[chunk]
        first = needed[rank].index(start // length) * length + start % length
        # The op takes the last key for the last query's own; where it is so many keys behind it, the window moves.
        behind = end - (chunk + 1) * length
        sides = (left + behind if left >= 0 else -1, right - behind if right >= 0 else -1)
        outputs.append(
            attend(
                function, queries, keys.narrow(2, first, end - start), values.narrow(2, first, end - start), alpha,
                is_causal, scale, None, None, sides, alibi_slopes,
            )
        )  # fmt: skip
    return torch.cat(outputs, dim=2)


def _exchange(function, query, key, value, alpha, is_causal, scale, window, alibi_slopes, rank, world, name):
    heads, key_heads = query.shape[1], key.shape[1]
    if heads % world or key_heads % world:
        raise RuntimeError(
            f'{function}: method="exchange" gives each of the {world} processes as many heads, so those of query and '
            f'of key must be multiples of {world}, got {heads} and {key_heads}: use method="gather"'
        )
    mine = heads // world
    # Checked here, as the op sees a part of the heads and would take a tensor of as many numbers as that.
    if isinstance(alpha, Tensor) and alpha.dim() > 0:
        if alpha.shape != (heads,):
            raise RuntimeError(
                f"{function}: alpha must be of shape () or (heads,) with {heads} heads, got {list(alpha.shape)}"
            )
        alpha = alpha.narrow(0, rank * mine, mine)
    if alibi_slopes is not None:
        if alibi_slopes.dim() not in (1, 2) or alibi_slopes.shape[-1] != heads:
            raise RuntimeError(
                f"{function}: alibi_slopes must be of shape (heads,) or (batch, heads) with {heads} heads, got "
                f"{list(alibi_slopes.shape)}"
            )
        alibi_slopes = alibi_slopes.narrow(-1, rank * mine, mine)
    # (W, …): what goes to each process, in one collective for all three.
    tensors = [x.unflatten(1, (world, -1)).transpose(0, 1) for x in (query, key, value)]
    flat = torch.cat([x.flatten(1) for x in tensors], dim=1).flatten()
    received = _AllToAll.apply(flat, *_evenly(flat, world), name)
    rows = received.view(world, -1).split([x[0].numel() for x in tensors], dim=1)
    whole = [
        torch.cat(_in_order([row.view(x.shape[1:]).chunk(2, dim=2) for row in rows_of_x]), dim=2)
        for x, rows_of_x in zip(tensors, (x.unbind(0) for x in rows), strict=True)
    ]
    out = attend(function, *whole, alpha, is_causal, scale, None, None, window, alibi_slopes)
    chunks = out.chunk(2 * world, dim=2)
    sent = [torch.cat([chunks[c] for c in _chunks_of(process, world)], dim=2) for process in range(world)]
    flat = torch.stack(sent).flatten()
    back = _AllToAll.apply(flat, *_evenly(flat, world), name)
    return torch.cat([x.view_as(sent[0]) for x in back.view(world, -1).unbind(0)], dim=1)


def _evenly(flat, world):
    """The lengths that an all-to-all of equal pieces receives and sends."""
    return [flat.shape[0] // world] * world, [flat.shape[0] // world] * world


def _chunks_of(process: int, world: int) -> tuple[int, int]:
    return process, 2 * world - 1 - process


def _in_order(pairs):
    """The chunks of the whole sequence, given those of each process."""
    return [head for head, _ in pairs] + [tail for _, tail in reversed(pairs)]


def _seen(chunk, length, total, is_causal, left, right):
    """From which key to before which one the queries of a chunk see."""
    start = max(0, chunk * length - left) if left >= 0 else 0
    if is_causal:
        return start, (chunk + 1) * length
    return start, min(total, (chunk + 1) * length + right) if right >= 0 else total


def _fetch_all(key, value, needed, rank, world, name):
    """Key and value of all chunks, by their number."""
    gathered = _AllGather.apply(torch.cat((key.reshape(-1), value.reshape(-1))), world, name)
    pairs = []
    for row in gathered.view(world, -1).unbind(0):
        keys, values = row.split([key.numel(), value.numel()])
        k, v = keys.view(key.shape).chunk(2, dim=2), values.view(value.shape).chunk(2, dim=2)
        pairs.append(tuple(zip(k, v, strict=True)))
    return dict(enumerate(_in_order(pairs)))


def _fetch_needed(key, value, needed, rank, world, name):
    """Key and value of the chunks that this process needs, by their number."""
    chunks = dict(
        zip(
            _chunks_of(rank, world),
            zip(key.chunk(2, dim=2), value.chunk(2, dim=2), strict=True),
            strict=True,
        )
    )
    sent = [[chunk for chunk in _chunks_of(rank, world) if chunk in needed[process]] for process in range(world)]
    received = [[chunk for chunk in _chunks_of(process, world) if chunk in needed[rank]] for process in range(world)]
    sizes = [x.numel() // 2 for x in (key, value)]
    flat = torch.cat([x.reshape(-1) for to in sent for chunk in to for x in chunks[chunk]])
    rows = _AllToAll.apply(
        flat, [len(chunks) * sum(sizes) for chunks in received], [len(chunks) * sum(sizes) for chunks in sent], name
    ).split(sum(sizes))
    shapes = [(*x.shape[:2], x.shape[2] // 2, x.shape[3]) for x in (key, value)]
    parts = {}
    for chunk, row in zip((chunk for chunks in received for chunk in chunks), rows, strict=True):
        parts[chunk] = [x.view(shape) for x, shape in zip(row.split(sizes), shapes, strict=True)]
    return parts


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, rank, world, name):
        ctx.call = dim, rank, world, name
        chunks = tensor.chunk(2 * world, dim=dim) if tensor.shape[dim] else [tensor] * 2 * world
        return torch.cat([chunks[chunk] for chunk in _chunks_of(rank, world)], dim=dim)

    @staticmethod
    def backward(ctx, grad):
        return _Unshard.apply(grad, *ctx.call), None, None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, rank, world, name):
        ctx.call = dim, rank, world, name
        rows = _all_gather(tensor.reshape(-1), world, name).view(world, *tensor.shape)
        return torch.cat(_in_order([row.tensor_split(2, dim=dim) for row in rows.unbind(0)]), dim=dim)

    @staticmethod
    def backward(ctx, grad):
        return _Shard.apply(grad, *ctx.call), None, None, None, None


class _AllGather(torch.autograd.Function):
    """(n,) to (W · n,), all processes' in order; each has its own use of it, so gradients are summed."""

    @staticmethod
    def forward(ctx, flat, world, name):
        ctx.call = world, name
        return _all_gather(flat, world, name)

    @staticmethod
    def backward(ctx, grad):
        op = torch.ops._c10d_functional
        return op.wait_tensor(op.reduce_scatter_tensor(grad.contiguous(), "sum", *ctx.call)), None, None


class _AllToAll(torch.autograd.Function):
    """Pieces of (n,) for each process, of lengths `sent`, to those from each process, of lengths `received`."""

    @staticmethod
    def forward(ctx, flat, received, sent, name):
        ctx.call = received, sent, name
        return _all_to_all(flat, received, sent, name)

    @staticmethod
    def backward(ctx, grad):
        received, sent, name = ctx.call
        return _all_to_all(grad, sent, received, name), None, None, None


class _SumOfGradients(torch.autograd.Function):
    """The tensor itself, which every process has, and whose gradient is the sum of theirs, in one order everywhere."""

    @staticmethod
    def forward(ctx, tensor, world, name):
        ctx.call = world, name
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        world, name = ctx.call
        return _all_gather(grad.reshape(-1), world, name).view(world, *grad.shape).sum(0), None, None


def _all_gather(flat, world, name):
    op = torch.ops._c10d_functional
    return op.wait_tensor(op.all_gather_into_tensor(flat.contiguous(), world, name))


def _all_to_all(flat, received, sent, name):
    op = torch.ops._c10d_functional
    return op.wait_tensor(op.all_to_all_single(flat.contiguous(), received, sent, name))


def _dimension(function: str, tensor: Tensor, dim: int) -> int:
    check(function, "dim", INTEGER, dim)
    if not -tensor.dim() <= dim < tensor.dim():
        raise IndexError(f"{function}: dim must be a dimension of the tensor, which has {tensor.dim()}, got {dim}")
    return dim % tensor.dim()


def _group(function: str, group: ProcessGroup | None) -> tuple[int, int, str]:
    """This process' rank in the group, the group's size and its name."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{function}: torch.distributed has no process group yet: call torch.distributed.init_process_group first"
        )
    if group is None:
        group = dist.group.WORLD
    rank = dist.get_rank(group)
    if rank < 0:
        raise RuntimeError(f"{function}: this process is not in the group that it was called with")
    return rank, dist.get_world_size(group), group.group_name


# What has been compared in each group. A group that is gone takes it along, as a later one may have its name.
_compared: WeakKeyDictionary[ProcessGroup, set] = WeakKeyDictionary()


def _compare(function: str, group: ProcessGroup | None, arguments: dict[str, object]) -> None:
    """An error on every process of the group if their arguments differ: in shape, type, whether they want a gradient,
    and where they are no tensors, in value."""
    if torch.compiler.is_compiling():
        return
    group = dist.group.WORLD if group is None else group
    facts = {name: _fact(value) for name, value in arguments.items()}
    # An alpha that is another number in every step is compared where something else is new too.
    numbers = [name for name in ("alpha", "scale") if isinstance(arguments.get(name), float)]
    signature = (function, *((name, None if name in numbers else fact) for name, fact in facts.items()))
    known = _compared.setdefault(group, set())
    if signature in known and os.environ.get("ADASPLASH_COMPARE_RANKS") != "1":
        return
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (function, facts), group=group)
    first, expected = everyone[0]
    for rank, (other, theirs) in enumerate(everyone):
        if other != first:
            raise RuntimeError(
                f"adasplash.distributed: the processes of a group must make the same calls: rank 0 called {first}, "
                f"rank {rank} {other}"
            )
        for name in expected:
            if theirs[name] != expected[name]:
                raise RuntimeError(
                    f"{first}: the processes of a group must be called with the same arguments: {name} is "
                    f"{expected[name]} on rank 0 and {theirs[name]} on rank {rank}"
                )
    known.add(signature)


def _fact(value: object) -> str:
    if not isinstance(value, Tensor):
        return describe(value)
    needs = " that requires a gradient" if value.requires_grad and torch.is_grad_enabled() else ""
    return f"{describe(value)} ({value.device.type}){needs}"
