"""Which nodes a doctor has try the tunnel to each other."""

from __future__ import annotations

from collections.abc import Iterable

TRIED = 3


def next_to(node: str, nodes: Iterable[str]) -> list[str]:
    """The nodes that `node` tries: the next few by name, in a ring. Of up to seven nodes that is every pair once, as
    the tunnel is tried both ways; of more it is enough to find a node that is cut off, or set up differently."""
    ring = sorted({*nodes, node})
    count, at = len(ring), ring.index(node)
    mine = [d for d in range(1, TRIED + 1) if 2 * d < count or (2 * d == count and at < d)]
    return [ring[(at + d) % count] for d in mine]
