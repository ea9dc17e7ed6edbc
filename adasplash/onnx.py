"""What ``torch.onnx.export`` says of a model that has these ops, in either of its two exporters: one sentence.

ONNX has no operator for α-entmax, and one made of what it has would build the M×N matrix and sort it. Translations of a
user's own (``custom_translation_table``, ``register_custom_op_symbolic``) come before this.

Nothing here imports ``torch.onnx``: it is told when it is loaded.
"""

from typing import NoReturn

import torch

from adasplash._when_imported import when_imported

# The ops that an exporter may meet, and the public name of what a user called.
_PUBLIC_NAMES = {
    "entmax_attn": "entmax_attn",
    "entmax_attn_varlen": "entmax_attn_varlen",
    "entmax_attn_summary": "entmax_attn_summary",
    "entmax_attn_varlen_summary": "entmax_attn_varlen_summary",
    "_entmax_attn_summary": "entmax_attn_summary",
    "_entmax_attn_forward": "entmax_attn",
    "_entmax_attn_indexed": "entmax_attn",
    "_entmax_attn_backward": "entmax_attn",
    "entmax_attn_paged": "entmax_attn_paged",
    "entmax_cache_append": "entmax_cache_append",
    "entmax_make_key_index": "make_key_index",
    "entmax_key_index_update": "entmax_key_index_update",
    "entmax": "entmax",
    "_entmax_forward": "entmax",
    "_entmax_backward": "entmax",
}
_FIRST_OPSET = 9


def register() -> None:
    """Has the exporters say the sentence once they are loaded."""
    when_imported("torch.onnx", _register_torchscript)
    when_imported("torch.onnx._internal.exporter._torchlib.ops", _register_dynamo)


class _Refusal:
    """The translation of an op: an error that names what the user called."""

    def __init__(self, name: str):
        self.name = self.__name__ = name

    def __call__(self, *args, **kwargs) -> NoReturn:
        from torch.onnx.errors import OnnxExporterError

        raise OnnxExporterError(
            f"adasplash.{self.name} cannot be exported to ONNX, which has no operator for it; torch.export, "
            "AOTInductor and TorchScript take it"
        )


def _register_torchscript() -> None:
    from torch.onnx import register_custom_op_symbolic

    for op, name in _PUBLIC_NAMES.items():
        register_custom_op_symbolic(f"adasplash::{op}", _Refusal(name), _FIRST_OPSET)


def _register_dynamo() -> None:
    try:
        from torch.onnx._internal.exporter._torchlib._torchlib_registry import onnx_impl

        for op, name in _PUBLIC_NAMES.items():
            packet = getattr(torch.ops.adasplash, op)
            overloads = tuple(getattr(packet, overload) for overload in packet.overloads())
            onnx_impl(overloads, no_compile=True)(_Refusal(name))
    except (ImportError, AttributeError, TypeError):
        pass  # this part of torch is not public; without it torch has a sentence of its own, which names a private op
