"""α-entmax attention for PyTorch: weights that are exactly zero for most keys, chosen by the data and differentiable.

``adasplash.entmax_attn`` is ``torch.ops.adasplash.entmax_attn`` with a documented Python signature, and
``adasplash.entmax_attn_varlen`` likewise; importing this package is what registers the ops. ``adasplash.entmax`` is the
activation alone. ``adasplash.patch_sdpa`` gives entmax to a model that calls torch's
``scaled_dot_product_attention``. ``adasplash.compat`` has the names of PyPI's ``adasplash``, which are here too.
"""

from adasplash._load import cmake_prefix_path, load_library
from adasplash._load import version as __version__

load_library()

# The ops must be registered first.
from adasplash.activation import entmax, entmax15, sparsemax  # noqa: E402
from adasplash.cache import (  # noqa: E402
    entmax_attn_paged,
    entmax_attn_with_kvcache,
    entmax_cache_append,
    entmax_key_index_update,
    make_key_index,
)
from adasplash.checkpoint import ops_to_save  # noqa: E402
from adasplash.compat import (  # noqa: E402
    adasplash,
    adasplash2,
    adasplash_no_block_mask,
    adasplash_v1,
    adasplash_v2,
    triton_entmax,
    triton_entmax15,
    triton_entmax_v1,
    triton_entmax_v2,
    triton_sparsemax,
)
from adasplash.flops import register as _register_flops  # noqa: E402
from adasplash.functional import entmax_attn, entmax_attn_varlen  # noqa: E402
from adasplash.inspect import attention_stats, attention_weights  # noqa: E402
from adasplash.losses import (  # noqa: E402
    Entmax15Loss,
    EntmaxLoss,
    SparsemaxLoss,
    entmax15_loss,
    entmax_loss,
    sparsemax_loss,
)
from adasplash.modules import EntmaxAttention  # noqa: E402
from adasplash.multihead import EntmaxMultiheadAttention  # noqa: E402
from adasplash.onnx import register as _register_onnx  # noqa: E402
from adasplash.replace import patch_sdpa, replace_sdpa, unpatch_sdpa  # noqa: E402
from adasplash.sdpa import scaled_dot_product_attention  # noqa: E402
from adasplash.sharding import register as _register_sharding  # noqa: E402
from adasplash.summary import AttentionStats, entmax_attn_summary, entmax_attn_varlen_summary  # noqa: E402

_register_flops()
_register_onnx()
_register_sharding()

__all__ = [
    "AttentionStats",
    "Entmax15Loss",
    "EntmaxAttention",
    "EntmaxLoss",
    "EntmaxMultiheadAttention",
    "SparsemaxLoss",
    "__version__",
    "adasplash",
    "adasplash2",
    "adasplash_no_block_mask",
    "adasplash_v1",
    "adasplash_v2",
    "attention_stats",
    "attention_weights",
    "cmake_prefix_path",
    "entmax",
    "entmax15",
    "entmax15_loss",
    "entmax_attn",
    "entmax_attn_paged",
    "entmax_attn_summary",
    "entmax_attn_varlen",
    "entmax_attn_varlen_summary",
    "entmax_attn_with_kvcache",
    "entmax_cache_append",
    "entmax_key_index_update",
    "entmax_loss",
    "make_key_index",
    "ops_to_save",
    "patch_sdpa",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "sparsemax",
    "sparsemax_loss",
    "triton_entmax",
    "triton_entmax15",
    "triton_entmax_v1",
    "triton_entmax_v2",
    "triton_sparsemax",
    "unpatch_sdpa",
]
