"""The α-entmax activation: what softmax is, with exact zeros.

Annotations are real types, so that TorchScript compiles modules that call these.
"""

from typing import Union  # TorchScript knows this name on every torch we support

import torch
from torch import Tensor

from adasplash._arguments import INTEGER, NUMBER_OR_TENSOR, TENSOR, check, explain


def activate(function, input, alpha, dim, names=None):
    """``entmax`` in eager code, on behalf of a public function: errors name it, and its arguments by `names` where they
    are not those of ``entmax``. A call that names no overload takes longer than the op: torch tries them."""
    op = torch.ops.adasplash.entmax
    if type(dim) is not int:
        check(function, "dim", INTEGER, dim)
    if isinstance(alpha, Tensor):
        overload = op.tensor_alpha
    else:
        if type(alpha) is not float:
            check(function, "alpha", NUMBER_OR_TENSOR, alpha)
        overload = op.default
    if torch.compiler.is_compiling():
        return overload(input, alpha, dim)
    try:
        return overload(input, alpha, dim)
    except (RuntimeError, TypeError, IndexError) as error:
        explain(function, error, {"input": (TENSOR, input)}, "entmax", names)


def entmax(input: Tensor, alpha: Union[float, Tensor] = 1.5, dim: int = -1) -> Tensor:  # noqa: UP007
    """α-entmax of the scores along a dimension: p_j = [(α−1) x_j − τ]₊^(1/(α−1)), τ such that Σ p_j = 1.

    Peters, Niculae and Martins, "Sparse Sequence-to-Sequence Models", 2019, equation 6. Most weights are exactly zero
    where scores differ much; a larger α is sparser.

    Args:
        input: scores of any shape, float32, float16, bfloat16, or float64 on the CPU. Under autocast it is treated as
            torch.softmax treats its input.
        alpha: a number, 1 (``torch.softmax``) or from 1.01 to 2 (sparsemax); or a floating point tensor on input's
            device, with values from 1.01 to 2, whose shape broadcasts to input's with 1 at ``dim``: one α for each
            row. Elsewhere the CPU raises an error, a GPU gives NaN rows.
        dim: the dimension along which weights sum to one.

    Returns:
        Weights of input's shape and type, contiguous. Rows that are −∞ throughout (fully masked) give zeros and have
        zero gradients; a NaN or +∞ makes its row NaN; both but for α = 1, where they are torch.softmax's.
        Differentiable once in input and in a tensor alpha; where a weight is zero its gradient does not matter, even
        if it is NaN.

    Raises:
        TypeError: an argument is of another kind than said here.
        RuntimeError: an argument does not fit. The message names it.
        IndexError: dim is out of range.
        NotImplementedError: double backward, forward-mode AD.
    """
    if not torch.jit.is_scripting():
        return activate("entmax", input, alpha, dim)
    if isinstance(alpha, Tensor):
        return torch.ops.adasplash.entmax(input, alpha, dim)
    return torch.ops.adasplash.entmax(input, alpha, dim)


def sparsemax(input: Tensor, dim: int = -1) -> Tensor:
    """`entmax` with α = 2: the Euclidean projection of the scores onto the simplex (Martins and Astudillo, 2016)."""
    if not torch.jit.is_scripting():
        return activate("sparsemax", input, 2.0, dim)
    return entmax(input, 2.0, dim)


def entmax15(input: Tensor, dim: int = -1) -> Tensor:
    """`entmax` with α = 1.5."""
    if not torch.jit.is_scripting():
        return activate("entmax15", input, 1.5, dim)
    return entmax(input, 1.5, dim)
