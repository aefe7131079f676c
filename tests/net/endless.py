"""Streams that go on until a test ends, from any place (endless_client.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from midstream_testbed.namespace import Namespace, Process
from world import HERE, PORT, V4, World


def start(world: World, where: Namespace, address: str, count: int, seed: int, patience_s: float = 20) -> Process:
    argv = [sys.executable, str(HERE / "endless_client.py")]
    argv += [address, *(str(x) for x in (PORT, count, seed, patience_s))]
    pipe = subprocess.PIPE
    return where.popen(argv, env=world.fleet.env(), name="endless", stdin=pipe, stdout=pipe)


def all_go_on(clients: Process, count: int) -> None:
    """Each stream brings more bytes, all of them right; then they end."""
    found = end(clients)
    assert found == {"ok": count, "errors": []}, clients.output()


def end(clients: Process) -> dict[str, Any]:
    """How many streams still bring bytes, and what is wrong with the others."""
    out, _ = clients.communicate(b"\n", timeout=60)
    found: dict[str, Any] = json.loads(out)
    return found


@contextmanager
def streams(world: World, count: int, seed: int, address: str = V4) -> Iterator[None]:
    """`count` streams from each place; at the end of the block each is still alive."""
    groups = [start(world, place, address, count, seed + 100 * i) for i, place in enumerate(world.places().values())]
    try:
        world.wait_streams(address, count * len(groups))
        yield
        for clients in groups:
            all_go_on(clients, count)
    finally:
        for clients in groups:
            clients.kill()
            clients.wait()
