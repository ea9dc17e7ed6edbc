"""torch's own softmax attention: as it chooses by itself, and each of its backends by name."""

from functools import partial

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.lib.case import Case
from bench.peers.peer import Attention, Peer


def _build(case: Case) -> Attention:
    grouped = case.heads_of_key != case.heads
    return partial(scaled_dot_product_attention, is_causal=case.causal, enable_gqa=grouped)


def _backend(name: str, label: str, backend: SDPBackend, devices: tuple[str, ...], half_only: bool = False) -> Peer:
    def refuses(case: Case) -> str | None:
        if case.device not in devices:
            return f"not on {case.device}"
        if half_only and case.device == "cuda" and case.dtype not in ("bf16", "fp16"):
            return "half types only"
        return None

    return Peer(name, label, "softmax", _build, refuses, within=partial(sdpa_kernel, backend))


PEERS = [
    Peer("sdpa", "torch SDPA (softmax)", "softmax", _build),
    _backend("sdpa-flash", "SDPA flash", SDPBackend.FLASH_ATTENTION, ("cpu", "cuda"), half_only=True),
    _backend("sdpa-efficient", "SDPA efficient", SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    _backend("sdpa-cudnn", "SDPA cuDNN", SDPBackend.CUDNN_ATTENTION, ("cuda",), half_only=True),
    _backend("sdpa-math", "SDPA math", SDPBackend.MATH, ("cpu", "cuda")),
]
