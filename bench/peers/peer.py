"""The interface of whatever is timed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from bench.lib.case import FORWARD, PASSES, Case

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def grouped(case: Case) -> str | None:
    """The reason of those that know no heads of keys that several heads of queries share."""
    return "as many heads of keys as of queries only" if case.heads_of_key != case.heads else None


def _always(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Peer:
    """An implementation of attention.

    weights: "entmax" or "softmax": what its results are checked against.
    build: makes the function (query, key, value) -> out for a case, (B, H, N, D) each; of key and value H may be fewer.
    refuses: says why it cannot do a case, None if it can.
    package_path: environment variable that names the folder to import it from, for a peer that cannot share a process
        with this project; None for all others.
    within: makes the context that it is called in. It is entered outside of what is timed.
    trains: whether it has a backward. Of one without only the forward pass is checked and timed.
    """

    name: str
    label: str
    weights: str
    build: Callable[[Case], Attention]
    refuses: Callable[[Case], str | None] = _always
    package_path: str | None = None
    within: Callable[[], AbstractContextManager] = nullcontext
    trains: bool = True

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES if self.trains else (FORWARD,)
