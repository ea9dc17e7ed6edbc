"""The names of the package ``adasplash`` 0.2.2 on PyPI, of AdaSplash's authors, over the ops of this one.

Argument names, order, defaults and meaning are those of that package, so that its users only change the requirement.
What steers its solver (``niter``, ``n_iter``, ``use_histogram``, ``fast_math``) is accepted and changes nothing, as
thresholds here are always settled. Its limits on lengths, strides, head sizes, α, grouped queries and devices are gone.
docs/compat.md has the table.
"""

from typing import Optional, Union  # TorchScript knows these names on every torch we support

import torch
from torch import Tensor

from adasplash.activation import activate, entmax
from adasplash.functional import attend, entmax_attn

_NAMES = {"query": "q", "key": "k", "value": "v", "q_seqlens": "varlen", "kv_seqlens": "varlen"}


def _attend(function, q, k, v, alpha, is_causal, varlen):
    """In eager code, so that errors name the function and its arguments."""
    return attend(function, q, k, v, alpha, is_causal, None, varlen, varlen, (-1, -1), None, names=_NAMES)


def adasplash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    is_causal: bool = True,
    varlen: Optional[Tensor] = None,  # noqa: UP045
    niter: Optional[int] = None,  # noqa: UP045
) -> Tensor:
    """α-entmax attention, causal unless told otherwise; :func:`adasplash.entmax_attn` with that package's arguments.

    Args:
        q: (B, H, N, D).
        k: (B, H_kv, N, D); H is a multiple of H_kv.
        v: (B, H_kv, N, D_v).
        alpha: 1 or from 1.01 to 2, or one for each head as a tensor (H,), which is differentiable.
        is_causal: whether query i sees only the keys up to i.
        varlen: (B,) int32 or int64 on q's device: the length of each batch entry, padded on the right. Results beyond
            it are zero and have no gradient.
        niter: ignored.

    Returns:
        (B, H, N, D_v), contiguous, in q's type.

    Raises:
        TypeError: an argument is of another kind than said here.
        RuntimeError: an argument does not fit. The message names it.
    """
    if not torch.jit.is_scripting():
        return _attend("adasplash", q, k, v, alpha, is_causal, varlen)
    return entmax_attn(q, k, v, alpha, is_causal, None, varlen, varlen)


def adasplash_v1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    is_causal: bool = False,
    varlen: Optional[Tensor] = None,  # noqa: UP045
    niter: int = 10,
) -> Tensor:
    """:func:`adasplash.adasplash`, but not causal unless told so."""
    if not torch.jit.is_scripting():
        return _attend("adasplash_v1", q, k, v, alpha, is_causal, varlen)
    return entmax_attn(q, k, v, alpha, is_causal, None, varlen, varlen)


def adasplash_no_block_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    is_causal: bool = False,
    varlen: Optional[Tensor] = None,  # noqa: UP045
    niter: int = 10,
) -> Tensor:
    """The same as :func:`adasplash.adasplash_v1`. Tiles without weight are skipped here too: it is no slower."""
    if not torch.jit.is_scripting():
        return _attend("adasplash_no_block_mask", q, k, v, alpha, is_causal, varlen)
    return entmax_attn(q, k, v, alpha, is_causal, None, varlen, varlen)


def adasplash_v2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    niter: int = 1,
    varlen: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """:func:`adasplash.adasplash` with α = 1.5, causal. Mind the order: ``niter`` (ignored) comes before ``varlen``."""
    if not torch.jit.is_scripting():
        return _attend("adasplash_v2", q, k, v, 1.5, True, varlen)
    return entmax_attn(q, k, v, 1.5, True, None, varlen, varlen)


adasplash2 = adasplash_v2


def triton_entmax(
    x: Tensor,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    n_iter: int = 2,
    use_histogram: bool = True,
    fast_math: bool = False,
) -> Tensor:
    """α-entmax over the last dimension; :func:`adasplash.entmax` with that package's arguments.

    Args:
        x: (..., N).
        alpha: 1 or from 1.01 to 2, or a tensor that broadcasts over rows, which is differentiable.
        n_iter, use_histogram, fast_math: ignored.

    Returns:
        Weights of x's shape and type; rows sum to one.
    """
    if not torch.jit.is_scripting():
        return activate("triton_entmax", x, alpha, -1, {"input": "x"})
    return entmax(x, alpha, -1)


def triton_entmax_v1(
    x: Tensor,
    alpha: Union[float, Tensor] = 1.5,  # noqa: UP007
    n_iter: int = 10,
    fast_math: bool = True,
) -> Tensor:
    """The same as :func:`adasplash.triton_entmax`, with that function's older defaults, which change nothing here."""
    if not torch.jit.is_scripting():
        return activate("triton_entmax_v1", x, alpha, -1, {"input": "x"})
    return entmax(x, alpha, -1)


triton_entmax_v2 = triton_entmax


def triton_sparsemax(x: Tensor, **kwargs) -> Tensor:
    """:func:`adasplash.triton_entmax` with α = 2; ``kwargs`` are its other options."""
    return triton_entmax(x, alpha=2.0, **kwargs)


def triton_entmax15(x: Tensor, **kwargs) -> Tensor:
    """:func:`adasplash.triton_entmax` with α = 1.5; ``kwargs`` are its other options."""
    return triton_entmax(x, alpha=1.5, **kwargs)
