"""α-entmax attention for PyTorch: weights that are exactly zero for most keys, chosen by the data and differentiable.

``adasplash.entmax_attn`` and ``adasplash.entmax_attn_varlen`` are the ops ``torch.ops.adasplash.…`` with documented Python
signatures, ``adasplash.entmax`` is the activation alone; importing this package is what registers the ops.
"""

from adasplash._load import cmake_prefix_path, load_library
from adasplash._load import version as __version__

load_library()

# The ops must be registered first.
from adasplash.activation import entmax, entmax15, sparsemax  # noqa: E402
from adasplash.functional import entmax_attn, entmax_attn_varlen  # noqa: E402
from adasplash.losses import (  # noqa: E402
    Entmax15Loss,
    EntmaxLoss,
    SparsemaxLoss,
    entmax15_loss,
    entmax_loss,
    sparsemax_loss,
)

__all__ = [
    "Entmax15Loss",
    "EntmaxLoss",
    "SparsemaxLoss",
    "__version__",
    "cmake_prefix_path",
    "entmax",
    "entmax15",
    "entmax15_loss",
    "entmax_attn",
    "entmax_attn_varlen",
    "entmax_loss",
    "sparsemax",
    "sparsemax_loss",
]
