"""α-entmax attention for PyTorch: weights that are exactly zero for most keys, chosen by the data and differentiable.

``adasplash.entmax_attn`` is ``torch.ops.adasplash.entmax_attn`` with a documented Python signature, and
``adasplash.entmax_attn_varlen`` likewise; importing this package is what registers the ops. The names of the authors'
package are in ``adasplash.compat``, and here too.
"""

from adasplash._load import cmake_prefix_path, load_library
from adasplash._load import version as __version__

load_library()

# The ops must be registered first.
from adasplash.functional import entmax_attn, entmax_attn_varlen  # noqa: E402
from adasplash.inspect import AttentionStats, attention_stats, attention_weights  # noqa: E402
from adasplash.modules import EntmaxAttention  # noqa: E402

__all__ = [
    "AttentionStats",
    "EntmaxAttention",
    "__version__",
    "attention_stats",
    "attention_weights",
    "cmake_prefix_path",
    "entmax_attn",
    "entmax_attn_varlen",
]
