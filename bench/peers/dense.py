"""The dense composition with the `entmax` package: matmul, entmax, matmul, with the whole matrix of weights."""

import torch
from torch import Tensor

from bench.lib.case import Case
from bench.peers.peer import Attention, Peer, grouped

MAX_ENTRIES = 2**28  # of the matrix of weights; several such tensors live at once


def _attention(case: Case, activation) -> Attention:
    hidden = None
    if case.causal:
        hidden = torch.ones(case.length, case.length, dtype=torch.bool, device=case.device).triu(1)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-2, -1) * case.head_dim**-0.5
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        return activation(scores) @ value

    return attention


def _exact(case: Case) -> Attention:
    import entmax

    activation = entmax.entmax15 if case.alpha == 1.5 else entmax.sparsemax
    return _attention(case, lambda scores: activation(scores, dim=-1))


def _bisection(case: Case) -> Attention:
    import entmax

    return _attention(case, lambda scores: entmax.entmax_bisect(scores, case.alpha, dim=-1))


def _refuses(case: Case) -> str | None:
    entries = case.batch * case.heads * case.length**2
    if entries > MAX_ENTRIES:
        return f"its {entries:,} weights would take too much memory"
    return grouped(case)


def _refuses_exact(case: Case) -> str | None:
    return _refuses(case) if case.alpha in (1.5, 2) else "α = 1.5 and 2 only"


PEERS = [
    Peer("entmax-exact", "entmax package, dense, exact", "entmax", _exact, _refuses_exact),
    Peer("entmax-bisect", "entmax package, dense, bisection", "entmax", _bisection, _refuses),
]
