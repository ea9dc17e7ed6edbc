"""Functional collectives, with gradients. Those that attention waits for are started first and waited for later,
forward and backward, so that what is computed between is not held up."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from adasplash._arguments import describe


class Place(NamedTuple):
    """A process' place in a group."""

    rank: int
    world: int
    name: str  # of the group


def process_group(function: str, group: ProcessGroup | DeviceMesh | None) -> ProcessGroup:
    """That of all the processes that a public function was given."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{function}: torch.distributed has no process group yet: call torch.distributed.init_process_group first"
        )
    if group is None:
        return dist.group.WORLD
    if isinstance(group, DeviceMesh):
        return group.get_group() if group.ndim == 1 else _flat(function, group).get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group gives to the others
        raise _not_in_it(function)
    if not isinstance(group, ProcessGroup):
        raise TypeError(f"{function}: group must be a process group, a mesh or None, got {describe(group)}")
    return group


def _flat(function: str, mesh: DeviceMesh) -> DeviceMesh:
    """A mesh of two dimensions as one, where a process' number is by rows, as torch numbers those of a group."""
    if mesh.ndim != 2 or mesh.mesh_dim_names is None:
        raise RuntimeError(
            f"{function}: a mesh must have one dimension, or two with names, got {mesh.ndim}"
            f"{' without names' if mesh.mesh_dim_names is None else ''}"
        )
    numbers = mesh.mesh.flatten().tolist()
    if numbers != sorted(numbers):
        raise RuntimeError(f"{function}: processes of a mesh of two dimensions must be in order, got {numbers}")
    return mesh._flatten()


def place_in(function: str, group: ProcessGroup) -> Place:
    rank = dist.get_rank(group)
    if rank < 0:
        raise _not_in_it(function)
    return Place(rank, dist.get_world_size(group), group.group_name)


def _not_in_it(function: str) -> RuntimeError:
    return RuntimeError(f"{function}: this process is not in the group that it was called with")


def all_gather(flat: Tensor, world: int, name: str) -> Tensor:
    """(n,) of each process to (W · n,), in their order."""
    return _wait(_start_all_gather(flat, world, name))


def from_rank_0(tensor: Tensor, name: str) -> Tensor:
    op = torch.ops._c10d_functional
    return _wait(op.broadcast(tensor, 0, name))


def gathered(flat: Tensor, world: int, name: str):
    """A function that waits for (n,) of each process as (W · n,), which are on their way from now on. Each process has
    its own use of them, so gradients are summed."""
    sent, coming = _StartAllGather.apply(flat, world, name)
    return lambda: _FinishAllGather.apply(sent, coming, world, name)


def exchanged(flat: Tensor, received: list[int], sent: list[int], name: str):
    """Likewise for pieces of (n,), one for each process, of lengths `sent`: those from each, of lengths `received`."""
    flat, coming = _StartAllToAll.apply(flat, received, sent, name)
    return lambda: _FinishAllToAll.apply(flat, coming, received, sent, name)


class SumOfGradients(torch.autograd.Function):
    """The tensor itself, which every process has, and whose gradient is the sum of theirs, in one order everywhere."""

    @staticmethod
    def forward(ctx, tensor, world, name):
        ctx.call = world, name
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        world, name = ctx.call
        return all_gather(grad.reshape(-1), world, name).view(world, *grad.shape).sum(0), None, None


# The finish of the forward is the start of the backward, and the other way round. Autograd goes back over what was
# called last first, so between the two it does what was done between them. What leads it from one to the other, and has
# the gradient that is on its way, is what was sent, as that has its shape.


class _StartAllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat, world, name):
        coming = _start_all_gather(flat, world, name)
        ctx.mark_non_differentiable(coming)
        return flat.view_as(flat), coming

    @staticmethod
    def backward(ctx, coming, _):
        return _wait(coming), None, None


class _FinishAllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sent, coming, world, name):
        ctx.call = world, name
        return _wait(coming)

    @staticmethod
    def backward(ctx, grad):
        op = torch.ops._c10d_functional
        return op.reduce_scatter_tensor(grad.contiguous(), "sum", *ctx.call), None, None, None


class _StartAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat, received, sent, name):
        coming = _start_all_to_all(flat, received, sent, name)
        ctx.mark_non_differentiable(coming)
        return flat.view_as(flat), coming

    @staticmethod
    def backward(ctx, coming, _):
        return _wait(coming), None, None, None


class _FinishAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat, coming, received, sent, name):
        ctx.call = received, sent, name
        return _wait(coming)

    @staticmethod
    def backward(ctx, grad):
        received, sent, name = ctx.call
        return _start_all_to_all(grad, sent, received, name), None, None, None, None


def _start_all_gather(flat, world, name):
    return torch.ops._c10d_functional.all_gather_into_tensor(flat.contiguous(), world, name)


def _start_all_to_all(flat, received, sent, name):
    return torch.ops._c10d_functional.all_to_all_single(flat.contiguous(), received, sent, name)


def _wait(coming):
    return torch.ops._c10d_functional.wait_tensor(coming)
