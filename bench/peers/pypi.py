"""The authors' package `adasplash` from PyPI. It has this project's import name, so it runs in a process of its own.

$ pip install --no-deps --target /some/folder adasplash==0.2.2
$ ADASPLASH_PYPI=/some/folder python -m bench.attention --device cuda --peers adasplash pypi-v2 pypi-v1
"""

import os

from bench.lib.case import Case
from bench.peers.peer import Attention, Peer, grouped

FOLDER = "ADASPLASH_PYPI"


def _v2(case: Case) -> Attention:
    from adasplash import adasplash_v2

    return adasplash_v2


def _v1(case: Case) -> Attention:
    from adasplash import adasplash_v1

    return lambda query, key, value: adasplash_v1(query, key, value, alpha=case.alpha, is_causal=case.causal)


def _refuses_v1(case: Case) -> str | None:
    if case.device != "cuda":
        return "a GPU only"
    if not os.environ.get(FOLDER):
        return f"{FOLDER} does not name a folder with the package"
    if case.length & (case.length - 1) or case.length < 64:
        return "lengths that are powers of two from 64 only"
    if case.head_dim not in (16, 32, 64, 128, 256):
        return "head sizes 16, 32, 64, 128 and 256 only"
    return grouped(case)


def _refuses_v2(case: Case) -> str | None:
    if case.alpha != 1.5 or not case.causal:
        return "α = 1.5 and causal only"
    return _refuses_v1(case)


PEERS = [
    Peer("pypi-v2", "AdaSplash-2 (PyPI 0.2.2)", "entmax", _v2, _refuses_v2, FOLDER),
    Peer("pypi-v1", "AdaSplash-1 (PyPI 0.2.2)", "entmax", _v1, _refuses_v1, FOLDER),
]
