"""Streams that go on until a test ends, from any place (endless_client.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from midstream_testbed.namespace import Namespace, Process
from world import HERE, PORT, V4, World


def start(world: World, where: Namespace, address: str, count: int, seed: int) -> Process:
    argv = [sys.executable, str(HERE / "endless_client.py"), address, str(PORT), str(count), str(seed)]
    pipe = subprocess.PIPE
    return where.popen(argv, env=world.fleet.env(), name="endless", stdin=pipe, stdout=pipe)


def all_go_on(clients: Process, count: int) -> None:
    """Each stream brings more bytes, all of them right; then they end."""
    out, _ = clients.communicate(b"\n", timeout=60)
    assert json.loads(out) == {"ok": count, "errors": []}, clients.output()


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
