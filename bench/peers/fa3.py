"""FlashAttention-3, softmax: its forward pass alone, which is all that the wheel on PyPI has.

$ pip install --no-deps fa3-fwd
"""

import importlib
import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor

from bench.lib.case import Case
from bench.peers.peer import Attention, Peer

OWN, WHEEL = "flash_attn_interface", "fa3_fwd_interface"


def installed() -> str | None:
    """The module's name, in FlashAttention's own package or else in the wheel `fa3-fwd`; None without either."""
    return next((name for name in (OWN, WHEEL) if importlib.util.find_spec(name)), None)


def interface() -> ModuleType | None:
    name = installed()
    if name == WHEEL:
        # The interface asks for its settings by the name that they have in FlashAttention's own package.
        sys.modules.setdefault("flash_attn_config", importlib.import_module("fa3_fwd_config"))
    return importlib.import_module(name) if name else None


def _build(case: Case) -> Attention:
    flash = interface().flash_attn_func

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # It takes (B, N, H, D) of any strides but the last, so nothing is copied.
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return flash(query, key, value, causal=case.causal).transpose(1, 2)

    return attention


def _refuses(case: Case) -> str | None:
    if case.device != "cuda":
        return "a GPU only"
    if installed() is None:
        return "it is not installed (pip install --no-deps fa3-fwd)"
    if torch.cuda.get_device_capability()[0] != 9:
        return "Hopper GPUs only"
    if case.dtype != "bf16":
        return "bf16 only, as its wheel is built"
    if case.head_dim > 256 or case.head_dim % 8:
        return "head sizes up to 256 that are multiples of 8 only"
    return None


PEERS = [Peer("fa3", "FlashAttention-3", "softmax", _build, _refuses, trains=False)]
