"""A live stream moves: what was in the queues arrives, once, in order."""

from __future__ import annotations

from typing import Any

import pytest

BOTH = pytest.mark.parametrize("family", [4, 6])


def read_exactly(sock: Any, count: int) -> bytes:
    sock.settimeout(10)
    got = b""
    while len(got) < count:
        part = sock.recv(count - len(got))
        assert part, f"end of stream after {len(got)} of {count} bytes"
        got += part
    return got


@BOTH
def test_idle_stream_moves_and_both_directions_go_on(lab: Any, move: Any, family: int) -> None:
    client, server = lab.connect(lab.listen(lab.a, family), family)
    (moved,) = move(lab, lab.a, [server]).run()
    client.send(b"ping")
    assert read_exactly(moved, 4) == b"ping"
    moved.send(b"pong")
    assert read_exactly(client, 4) == b"pong"


@BOTH
def test_unread_and_unsent_bytes_travel(lab: Any, move: Any, family: int) -> None:
    client, server = lab.connect(lab.listen(lab.a, family), family)
    client.send(b"u" * 5000)
    server.send(b"d" * 3000)
    assert read_exactly(client, 3000) == b"d" * 3000
    m = move(lab, lab.a, [server])
    m.gates[0].shut()
    server.send(b"lost at the gate")
    m.gates[0].open()
    (moved,) = m.run()
    assert read_exactly(moved, 5000) == b"u" * 5000
    assert read_exactly(client, 16) == b"lost at the gate"
    moved.send(b"after")
    assert read_exactly(client, 5) == b"after"
