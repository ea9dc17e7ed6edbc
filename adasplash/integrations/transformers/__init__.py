"""α-entmax attention in the models of Hugging Face transformers, by one word.

Importing this module registers it::

    import adasplash.integrations.transformers
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("gpt2", attn_implementation="adasplash", adasplash_alpha=1.5)

docs/transformers.md has the whole way, from a softmax checkpoint to a served model.
"""

from adasplash.integrations.transformers.construction import register
from adasplash.integrations.transformers.indexed_cache import IndexedStaticCache
from adasplash.integrations.transformers.layers import configure, shard_alpha
from adasplash.integrations.transformers.normaliser import EntmaxNormaliser
from adasplash.integrations.transformers.record import LayerRecord, LogAttention, Recording, record
from adasplash.integrations.transformers.schedule import AlphaSchedule

register()

__all__ = [
    "AlphaSchedule",
    "EntmaxNormaliser",
    "IndexedStaticCache",
    "LayerRecord",
    "LogAttention",
    "Recording",
    "configure",
    "record",
    "shard_alpha",
]
