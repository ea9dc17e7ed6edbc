"""Context parallelism in the plans of torch's engine: a style for ``parallelize_module``, and a context that shards
buffers."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from adasplash.distributed.attention import METHODS
from adasplash.distributed.layout import shard
from adasplash.modules import EntmaxAttention


class ContextParallel(ParallelStyle):
    """Has ``EntmaxAttention`` attend over tokens that ``shard`` has laid out over a dimension of a mesh::

        parallelize_module(model, mesh["cp"], {"layers.*.attention": ContextParallel()})

    It may stand beside a tensor-parallel plan of the layer's projections over another dimension, whichever is applied
    first, and under FSDP. Gradients of all parameters, α's included, are then those of this process' tokens, and what
    shards or replicates parameters over this dimension too sums them: ``fully_shard`` over the flattened dimensions of
    data and context, or DistributedDataParallel.

    Args:
        method: "gather", "exchange" or "both", as in ``entmax_attn_context_parallel``; the last one over two dimensions
            of a mesh.
    """

    def __init__(self, method: str = "gather"):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f'ContextParallel: method must be "gather", "exchange" or "both", got {method!r}')
        self.method = method

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, EntmaxAttention):
            raise TypeError(f"ContextParallel: a module must be EntmaxAttention, got {type(module).__name__}")
        wanted = 2 if self.method == "both" else 1
        if device_mesh.ndim != wanted:
            dimensions = f"{wanted} dimension{'s' if wanted > 1 else ''}"
            raise ValueError(f"ContextParallel: the mesh must have {dimensions}, got {device_mesh.ndim}")
        module.attend_over(device_mesh, self.method)
        return module


@contextlib.contextmanager
def context_parallel(
    mesh: DeviceMesh,
    *,
    buffers: Sequence[Tensor] = (),
    buffer_seq_dims: Sequence[int] = (),
    no_restore_buffers: Sequence[Tensor] = (),
) -> Iterator[None]:
    """A context in which tensors are this process' shards of what they were, in place: for those who use the context of
    ``torch.distributed.tensor.experimental``, with its arguments. Attention over them is the layer's own affair, see
    ``ContextParallel``.

    Args:
        mesh: the dimension of a mesh over which sequences are sharded, or two of them.
        buffers: what goes with tokens, the same on every process: ids, labels, positions, buffers of a model. None may
            require a gradient or be a part of another tensor.
        buffer_seq_dims: the dimension of tokens of each.
        no_restore_buffers: those of buffers that stay shards behind the context. The others are what they were before,
            of which a copy is kept.

    Raises:
        ValueError: there are not as many dimensions as buffers, one of no_restore_buffers is not among these, or one
            requires a gradient.
        RuntimeError: as in ``shard``.
    """
    if len(buffers) != len(buffer_seq_dims):
        raise ValueError(
            f"context_parallel: buffer_seq_dims must have a dimension for each of {len(buffers)} buffers, got "
            f"{len(buffer_seq_dims)}"
        )
    if any(all(x is not buffer for buffer in buffers) for x in no_restore_buffers):
        raise ValueError("context_parallel: no_restore_buffers must be among buffers, got one that is not")
    if any(buffer.requires_grad for buffer in buffers):
        raise ValueError("context_parallel: buffers must not require a gradient, got one that does")
    # Kept, and not gathered behind the context: a process that fails would leave the others waiting for it.
    kept = [(buffer, buffer.clone()) for buffer in buffers if all(x is not buffer for x in no_restore_buffers)]
    try:
        with torch.no_grad():
            shards = [shard(buffer, dim, mesh) for buffer, dim in zip(buffers, buffer_seq_dims, strict=True)]
            for buffer, own in zip(buffers, shards, strict=True):
                _become(buffer, own)
        yield
    finally:
        with torch.no_grad():
            for buffer, whole in kept:
                _become(buffer, whole)


def _become(buffer: Tensor, other: Tensor) -> None:
    buffer.resize_(other.shape)
    buffer.copy_(other)
