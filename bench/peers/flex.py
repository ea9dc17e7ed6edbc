"""FlexAttention with softmax, compiled, where there is a GPU."""

import torch

from bench.lib.case import Case
from bench.peers.peer import Attention, Peer


def _build(case: Case) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if case.causal:
        mask = create_block_mask(
            lambda b, h, query, key: query >= key, None, None, case.length, case.length, device=case.device
        )
    grouped = case.heads_of_key != case.heads
    return lambda query, key, value: compiled(query, key, value, block_mask=mask, enable_gqa=grouped)


def _refuses(case: Case) -> str | None:
    return None if case.device == "cuda" else "it trains on a GPU only"


PEERS = [Peer("flex", "FlexAttention (softmax)", "softmax", _build, _refuses)]
