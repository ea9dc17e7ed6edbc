"""What is right, in fp64, for some rows of a case, and what the case is like: support, keys that neighbours share, and
empty tiles.

Only sampled queries are worked out, against all keys, so that any length can be checked. With a gradient of the output
that is zero but at those queries, the whole gradients of key and value follow from them too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bench.lib.case import Case
from bench.lib.inputs import TILE, Inputs

# Errors as shares of the largest exact number: twice that of the dense composition in the same type, or at least
FLOOR = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
NAMES = ("out", "dq", "dk", "dv")


def entmax(scores: Tensor, alpha: float) -> Tensor:
    """Weights over the last dimension of scores, hidden keys at -inf, bisected in fp64; differentiable. alpha > 1."""
    kind, scores = scores.dtype, scores.double()
    z = (alpha - 1) * scores.detach()
    z = z - z.amax(-1, keepdim=True)
    low, high = torch.full_like(z[..., :1], -1), torch.zeros_like(z[..., :1])
    for _ in range(60):
        middle = (low + high) / 2
        heavy = (z - middle).clamp(min=0).pow(1 / (alpha - 1)).sum(-1, keepdim=True) >= 1
        low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
    weights = (z - low).clamp(min=0).pow(1 / (alpha - 1))
    u = torch.where(weights > 0, weights.pow(2 - alpha), 0)
    # weights + 0 · (…) in value; its derivative is that of entmax: diag(u) - u uᵀ / Σu.
    centred = scores.masked_fill(u == 0, 0)
    change = u * (centred - (u * centred).sum(-1, keepdim=True) / u.sum(-1, keepdim=True))
    return (weights + (change - change.detach())).to(kind)


class Check(NamedTuple):
    """Sampled queries of a case: their gradient of the output, and the exact results for both kinds of weights."""

    rows: Tensor  # (R,) int64
    grad: Tensor  # (B, H, N, D), zero but at rows
    exact: dict[str, tuple[Tensor, ...]]  # "entmax", "softmax" -> out at rows, dq at rows, dk, dv in fp64
    allowed: dict[str, tuple[float, ...]]  # largest error accepted of each
    support: float  # mean number of keys with weight a query

    def errors(self, weights: str, results: tuple[Tensor, ...], times: float = 1) -> dict[str, float]:
        """Largest errors of out, dq, dk, dv, relative to the largest exact number.

        Of a peer without a backward there is out alone. Raises AssertionError if an error is above `times` what this
        project allows itself.
        """
        errors = {}
        limits = zip(NAMES, self.exact[weights], self.allowed[weights], strict=True)
        for (name, exact, allowed), got in zip(limits, results, strict=False):
            got = got[:, :, self.rows] if name in ("out", "dq") else got
            error = _error(got, exact)
            errors[name] = error
            if not error <= times * allowed:
                raise AssertionError(f"{name} is off by {error:.1e} of its largest number, over {times * allowed:.1e}")
        return errors


def make_check(case: Case, inputs: Inputs, grad: Tensor, count: int = 64) -> Check:
    """Works out `count` queries, evenly spread and with the last one, in fp64 on the case's device."""
    device = inputs.query.device
    rows = torch.linspace(0, case.length - 1, min(count, case.length), dtype=torch.float64).long().to(device)
    sampled = torch.zeros_like(grad)
    sampled[:, :, rows] = grad[:, :, rows]
    exact, allowed, support = {}, {}, 0.0
    for weights in ("entmax", "softmax"):
        exact[weights], support_of = _dense(case, inputs, sampled, rows, weights, torch.float64)
        composed, _ = _dense(case, inputs, sampled, rows, weights, case.torch_dtype)
        allowed[weights] = tuple(
            max(2 * _error(x, y), FLOOR[case.dtype]) for x, y in zip(composed, exact[weights], strict=True)
        )
        support = support_of if weights == "entmax" else support
    return Check(rows, sampled, exact, allowed, support)


def _dense(
    case: Case, inputs: Inputs, grad: Tensor, rows: Tensor, weights: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], float]:
    query = inputs.query[:, :, rows].to(dtype).requires_grad_()
    key, value = (x.to(dtype).requires_grad_() for x in inputs[1:])
    scores = query @ _of_query_heads(case, key).transpose(-2, -1) * case.head_dim**-0.5
    if case.causal:
        hidden = torch.arange(case.length, device=rows.device) > rows[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    p = entmax(scores, case.alpha) if weights == "entmax" else scores.softmax(-1)
    out = p @ _of_query_heads(case, value)
    gradients = torch.autograd.grad(out, (query, key, value), grad[:, :, rows].to(dtype))
    return (out.detach(), *gradients), (p > 0).sum(-1).double().mean().item()


def _of_query_heads(case: Case, x: Tensor) -> Tensor:
    """Key or value for every head of queries."""
    return x.repeat_interleave(case.heads // case.heads_of_key, dim=1)


def _error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


@torch.no_grad()
def keys_of_block(case: Case, inputs: Inputs, blocks: int = 8) -> float:
    """Of the keys that 64 neighbouring queries see, the share that any of them weighs, in the mean over some blocks."""
    shares = []
    size = min(TILE, case.length)
    for first in torch.linspace(0, case.length - size, blocks, dtype=torch.float64).long().tolist():
        rows = torch.arange(first, first + size, device=inputs.query.device)
        seen = first + size if case.causal else case.length
        key = _of_query_heads(case, inputs.key[:, :, :seen])
        scores = inputs.query[:, :, rows].float() @ key.float().transpose(-2, -1) * case.head_dim**-0.5
        if case.causal:
            scores = scores.masked_fill(torch.arange(seen, device=rows.device) > rows[:, None], -torch.inf)
        shares.append((entmax(scores, case.alpha) > 0).any(-2).double().mean().item())
    return sum(shares) / len(shares)


def empty_tiles(case: Case, inputs: Inputs) -> float:
    """Share of the visible 64×64 tiles without weight, by the bits that the op saves for its backward."""
    from adasplash.inspect import saved_by_forward

    capacity = 0 if case.device == "cuda" else 1
    with torch.no_grad():
        _, _, tiles = saved_by_forward(*inputs, case.alpha, case.causal, support_capacity=capacity)
    words = tiles.to(torch.int64).cpu()
    full = sum(int((words >> bit & 1).sum()) for bit in range(32))
    side = -(-case.length // TILE)
    visible = side * (side + 1) // 2 if case.causal else side * side
    return 1 - full / (visible * case.batch * case.heads)
