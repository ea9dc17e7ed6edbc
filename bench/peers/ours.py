"""This project."""

from bench.lib.case import Case
from bench.peers.peer import Attention, Peer


def _build(case: Case) -> Attention:
    import adasplash

    return lambda query, key, value: adasplash.entmax_attn(query, key, value, case.alpha, case.causal)


PEERS = [Peer("adasplash", "adasplash (ours)", "entmax", _build)]
