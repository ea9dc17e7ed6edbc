"""Whether the processes of a group were called with the same arguments: one error on all of them if not."""

import os
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from adasplash._arguments import describe

# What has been compared in each group. A group that is gone takes it along, as a later one may have its name.
_compared: WeakKeyDictionary[ProcessGroup, set] = WeakKeyDictionary()


def compare(function: str, group: ProcessGroup, arguments: dict[str, object]) -> None:
    """An error on every process of the group if their arguments differ: in shape, type, whether they want a gradient,
    and where they are no tensors, in value."""
    if torch.compiler.is_compiling():
        return
    facts = {name: _fact(value) for name, value in arguments.items()}
    # What is another number in every step is compared where something else is new too.
    numbers = [name for name in ("alpha", "scale", "max_seqlen") if isinstance(arguments.get(name), (int, float))]
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
