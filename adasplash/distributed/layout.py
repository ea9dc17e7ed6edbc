"""How a sequence lies over processes: `shard` and `unshard`, and which chunks a process has."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from adasplash._arguments import INTEGER, TENSOR, check
from adasplash.distributed.agreement import compare
from adasplash.distributed.collectives import all_gather, place_in, process_group


def shard(tensor: Tensor, dim: int, group: ProcessGroup | DeviceMesh | None = None) -> Tensor:
    """This process' part of a tensor that every process has whole: chunks r and 2W − 1 − r of 2W along `dim`.

    For whatever goes with the tokens of a batch: their ids, positions, labels. Nothing is sent in the forward.

    The gradient is the one of a single process, whole and the same everywhere: the backward gathers it, so it must be
    called on every process of the group.

    Args:
        tensor: (…, N, …) of any type, the same on every process.
        dim: the dimension of N, which must be a multiple of 2W; may be negative.
        group: the W processes, as in ``entmax_attn_context_parallel``.

    Returns:
        (…, N / W, …), contiguous.

    Raises:
        RuntimeError: N is no multiple of 2W, there is no process group, or this process is not in it.
    """
    check("shard", "tensor", TENSOR, tensor)
    dim = _dimension("shard", tensor, dim)
    rank, world, name = place_in("shard", process_group("shard", group))
    if tensor.shape[dim] % (2 * world):
        raise RuntimeError(
            f"shard: a dimension is cut into {2 * world} chunks, two for each of the {world} processes, so its length "
            f"must be a multiple of {2 * world}, got {tensor.shape[dim]} in dimension {dim}: pad it"
        )
    return _Shard.apply(tensor, dim, rank, world, name)


def unshard(tensor: Tensor, dim: int, group: ProcessGroup | DeviceMesh | None = None) -> Tensor:
    """The inverse of ``shard``: the whole tensor, on every process.

    Every process is taken to go on with it in the same way, as a single process would, and its gradient to be the same
    everywhere; the backward takes this process' part of it and sends nothing. (A loss that is summed over processes
    from different uses of the result wants a sum of gradients instead; compute such losses from shards.)

    Args:
        tensor: (…, N / W, …) of any type, laid out as ``shard`` does, of the same shape on every process.
        dim: the dimension that is sharded; may be negative.
        group: the W processes, as in ``entmax_attn_context_parallel``.

    Returns:
        (…, N, …), contiguous.

    Raises:
        RuntimeError: N / W is odd, there is no process group, or processes give tensors of different shape or type.
    """
    check("unshard", "tensor", TENSOR, tensor)
    dim = _dimension("unshard", tensor, dim)
    group = process_group("unshard", group)
    rank, world, name = place_in("unshard", group)
    compare("unshard", group, {"tensor": tensor, "dim": dim})
    if tensor.shape[dim] % 2:
        raise RuntimeError(
            f"unshard: a process has two chunks of one length, so the length of dimension {dim} must be even, got "
            f"{tensor.shape[dim]}"
        )
    return _Unshard.apply(tensor, dim, rank, world, name)


def chunks_of(process: int, world: int) -> tuple[int, int]:
    return process, 2 * world - 1 - process


def in_order(pairs):
    """The chunks of the whole sequence, given those of each process."""
    return [head for head, _ in pairs] + [tail for _, tail in reversed(pairs)]


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, rank, world, name):
        ctx.call = dim, rank, world, name
        chunks = tensor.chunk(2 * world, dim=dim) if tensor.shape[dim] else [tensor] * 2 * world
        return torch.cat([chunks[chunk] for chunk in chunks_of(rank, world)], dim=dim)

    @staticmethod
    def backward(ctx, grad):
        return _Unshard.apply(grad, *ctx.call), None, None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, rank, world, name):
        ctx.call = dim, rank, world, name
        rows = all_gather(tensor.reshape(-1), world, name).view(world, *tensor.shape)
        return torch.cat(in_order([row.tensor_split(2, dim=dim) for row in rows.unbind(0)]), dim=dim)

    @staticmethod
    def backward(ctx, grad):
        return _Shard.apply(grad, *ctx.call), None, None, None, None


def _dimension(function: str, tensor: Tensor, dim: int) -> int:
    check(function, "dim", INTEGER, dim)
    if not -tensor.dim() <= dim < tensor.dim():
        raise IndexError(f"{function}: dim must be a dimension of the tensor, which has {tensor.dim()}, got {dim}")
    return dim % tensor.dim()
