"""Everything that is timed, each a `Peer`; one module a family, which lists its own in PEERS.

Nothing heavy is imported before a peer is built: so a process of its own can hold another package of the same name.
"""

from bench.peers import dense, fa3, flex, ours, pypi, sdpa
from bench.peers.peer import Attention, Peer

PEERS: dict[str, Peer] = {peer.name: peer for family in (ours, sdpa, dense, flex, pypi, fa3) for peer in family.PEERS}
OURS = ours.PEERS[0].name

__all__ = ["OURS", "PEERS", "Attention", "Peer"]
