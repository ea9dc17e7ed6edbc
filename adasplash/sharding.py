"""How the ops split over a device mesh: their sharding rules for DTensor (``torch.distributed.tensor``).

Attention splits over the batch and over the heads; the packed form, whose sequences stand behind each other in one
dimension, over the heads only. Everything else is gathered first, as DTensor does for its own ops.

- Heads: neighbouring query heads share a head of key and value, so a device gets whole groups. That takes a number of
  key heads that is divisible by the number of devices; otherwise the heads are gathered. Slopes, and alpha of shape
  (H,), split with the heads.
- Batch: lengths and slopes of shape (B, H) split with it.
- Alpha that every device has: each device sums the gradient over what it computed, so the gradient is ``Partial``.
- A key index does not split, and is refused.
- With dropout nothing splits: the mask is of places in the whole call, and a device would count its own from 0.

The activation splits over every dimension but the one along which the weights sum to one.

Nothing here imports ``torch.distributed.tensor``: the rules are registered when that is loaded, before or after this.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from adasplash._when_imported import when_imported

if TYPE_CHECKING:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSchema, OpStrategy
    from torch.distributed.tensor.placement_types import Placement

    #: One way to split a call over one dimension of a mesh: the placement of an argument or a result, by its name.
    Split = Callable[[str], Placement]

# Arguments and results of the private pair that have a batch, or heads, in their first two dimensions. In the packed
# form the ones on the second line start with the heads.
_ROWS = {"query", "key", "value", "out", "grad_out", "dq", "dk", "dv"}
_SAVED = {"row_state", "support", "tiles", "support_size", "largest_weight"}
_LENGTHS = {"q_seqlens", "kv_seqlens", "kv_starts", "q_positions", "dropout_origin"}


def register() -> None:
    """Registers the rules once ``torch.distributed.tensor`` is loaded."""
    when_imported("torch.distributed.tensor", _register)


def _register() -> None:
    try:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
        from torch.distributed.tensor._ops.utils import register_op_strategy

        ops = torch.ops.adasplash
        # The public ops are made of the private ones. DTensor gets to see them only where autograd does not take them
        # apart, in inference mode.
        for op in (
            ops.entmax_attn.default,
            ops.entmax_attn.per_head,
            ops.entmax_attn_varlen.default,
            ops.entmax_attn_varlen.per_head,
            ops.entmax_attn_summary.default,
            ops.entmax_attn_summary.per_head,
            ops.entmax_attn_varlen_summary.default,
            ops.entmax_attn_varlen_summary.per_head,
            ops.entmax.default,
            ops.entmax.tensor_alpha,
            ops._with_gradient.default,
        ):
            torch.library.register_torch_dispatch(op, DTensor, _take_apart)
        torch.library.register_torch_dispatch(ops._entmax_attn_indexed.default, DTensor, _refuse_index)
        private = ops._entmax_attn_forward.default, ops._entmax_attn_backward.default, ops._entmax_attn_summary.default
        for op in private:
            names = [argument.name for argument in op._schema.arguments]
            # DTensor remembers what a rule said for the arguments from here on (and for the tensors): which options
            # there are, and the numbers that decide what the saved tensors are like.
            info = RuntimeSchemaInfo(static_argnum=names.index("q_seqlens"), needs_pytree=True)
            register_op_strategy(op, info)(_attention_strategy)
        register_op_strategy([ops._entmax_forward.default, ops._entmax_backward.default])(_activation_strategy)
    except (ImportError, AttributeError, TypeError) as error:  # these parts of torch are not all public
        warnings.warn(f"torch-adasplash has no sharding rules for torch {torch.__version__}: {error}", stacklevel=2)


def _take_apart(_mode: None, op: torch._ops.OpOverload, _types: Any, args: tuple = (), kwargs: dict | None = None):
    """Calls an op as the ones that it is made of."""
    return op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **(kwargs or {}))


def _refuse_index(*_call: Any) -> NoReturn:
    raise RuntimeError(
        "entmax_attn: key_index is not split over devices, got one with a DTensor; give local tensors, or no index"
    )


def _named(schema: "OpSchema") -> dict[str, Any]:
    """The call's arguments by name. A tensor is there as something that has its shape."""
    return dict(zip((argument.name for argument in schema.op._schema.arguments), schema.args_schema, strict=False))


def _attention_strategy(schema: "OpSchema") -> "OpStrategy":
    arguments = _named(schema)
    key_heads = arguments["key"].shape[1]

    def whole_groups(placements: dict[str, tuple["Placement", ...]]) -> bool:
        sizes = zip(placements["key"], schema.get_mesh_from_args().shape, strict=True)
        return key_heads % math.prod(size for placement, size in sizes if placement.is_shard(1)) == 0

    return _strategy(schema, list(_attention_splits(arguments)), whole_groups)


def _attention_splits(arguments: dict[str, Any]) -> Iterator["Split"]:
    from torch.distributed.tensor.placement_types import Partial, Replicate, Shard

    if arguments.get("dropout_p", 0) > 0:
        return
    packed = arguments["cu_seqlens_q"] is not None
    inference = arguments.get("support_capacity", 0) < 0  # nothing is saved
    alpha, slopes = arguments["head_alpha"], arguments["alibi_slopes"]

    def batch(name: str) -> "Placement":
        if name in _ROWS | _LENGTHS or (name in _SAVED and not inference):
            return Shard(0)
        if name == "tile_counts" or (name == "alibi_slopes" and len(slopes.shape) == 2):
            return Shard(0)
        if name == "dalpha" and alpha is not None:
            return Partial()
        return Replicate()

    def heads(name: str) -> "Placement":
        if name in _ROWS or name == "tile_counts":
            return Shard(1)
        if name in _SAVED and not inference:
            return Shard(0 if packed else 1)
        if name == "alibi_slopes":
            return Shard(len(slopes.shape) - 1)
        if name in ("head_alpha", "dalpha") and alpha is not None:
            if len(alpha.shape) == 1:
                return Shard(0)
            return Partial() if name == "dalpha" else Replicate()
        return Replicate()

    yield heads
    if not packed:
        yield batch


def _activation_strategy(schema: "OpSchema") -> "OpStrategy":
    from torch.distributed.tensor.placement_types import Replicate, Shard

    arguments = _named(schema)
    tensor = arguments["input" if "input" in arguments else "output"]

    def rows(dim: int) -> "Split":
        absent = () if arguments["row_alpha"] is not None else ("grad_alpha",)
        return lambda name: Replicate() if name in absent else Shard(dim)

    return _strategy(schema, [rows(dim) for dim in range(len(tensor.shape) - 1)])


def _strategy(
    schema: "OpSchema",
    splits: list["Split"],
    allowed: Callable[[dict[str, tuple["Placement", ...]]], bool] = lambda placements: True,
) -> "OpStrategy":
    """Every way to use one of `splits`, or none, for each dimension of the mesh, as far as it is `allowed`."""
    from torch.distributed.tensor._op_schema import OpStrategy
    from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy
    from torch.distributed.tensor.placement_types import Replicate

    results = [result.name for result in schema.op._schema.returns]
    tensors = [name for name, value in _named(schema).items() if isinstance(value, OpStrategy)]
    strategy = expand_to_full_mesh_op_strategy(
        schema.get_mesh_from_args(),
        schema,
        [[split(name) for name in results + tensors] for split in (lambda name: Replicate(), *splits)],
        input_index=len(results),
    )

    def placements(inputs: Iterable["DTensorSpec"]) -> dict[str, tuple["Placement", ...]]:
        return {name: spec.placements for name, spec in zip(tensors, inputs, strict=True)}

    return OpStrategy([each for each in strategy.strategies if allowed(placements(each.input_specs))])
