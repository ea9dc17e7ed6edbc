"""α-entmax attention for PyTorch: weights that are exactly zero for most keys, chosen by the data and differentiable.

``adasplash.entmax_attn`` is ``torch.ops.adasplash.entmax_attn`` with a documented Python signature, and
``adasplash.entmax_attn_varlen`` likewise; importing this package is what registers the ops.
"""

from adasplash._load import cmake_prefix_path, load_library
from adasplash._load import version as __version__

load_library()

from adasplash.functional import entmax_attn, entmax_attn_varlen  # noqa: E402  (the op must be registered first)

__all__ = ["__version__", "cmake_prefix_path", "entmax_attn", "entmax_attn_varlen"]
