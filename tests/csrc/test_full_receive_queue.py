"""A server that does not read: its receive queue is as full as the kernel lets it become, or fuller than its buffer.

How much memory a queue takes hangs on how its bytes came: the restored one is packed otherwise than the old one. And
the buffer that a checkpoint names may be too small for its queue: an application may shrink it, and where packets still
come during the dump, the kernel makes it larger after it was read.
"""

from __future__ import annotations

import fcntl
import random
import socket
import struct
import termios
import time
from dataclasses import dataclass
from typing import Any

import pytest

PATTERN = random.Random(3).randbytes(1 << 16)
GROWN_BYTES = 16 << 20  # read as they come: the kernel's own tuning makes the buffer large
SMALLEST = 4096
CASES = (  # SO_RCVBUF or None for the kernel's own tuning, bytes a write, SO_RCVBUF after the queue is full
    (SMALLEST, 100, None),
    (SMALLEST, 65_536, None),
    (65_536, 1448, None),
    (1_000_000, 100, None),
    (1_000_000, 65_536, None),
    (1_000_000, 65_536, 65_536),
    (None, 65_536, None),
    (None, 65_536, 300_000),
)


def piece(at: int, count: int) -> bytes:
    start = at % len(PATTERN)
    return (PATTERN[start:] + PATTERN * (count // len(PATTERN) + 1))[:count]


@dataclass
class Pair:
    client: socket.socket
    server: socket.socket
    write: int
    shrunk: int | None
    sent: int = 0
    got: int = 0

    def send(self) -> int:
        try:
            count = self.client.send(piece(self.sent, self.write))
        except BlockingIOError:
            return 0
        self.sent += count
        return count

    def recv(self) -> int:
        try:
            data = self.server.recv(1 << 16)
        except BlockingIOError:
            return 0
        assert data == piece(self.got, len(data)), f"{self} differs"
        self.got += len(data)
        return len(data)

    @property
    def buffer(self) -> int:
        return self.server.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def connect(lab: Any, rcvbuf: int | None, write: int, shrunk: int | None) -> Pair:
    listener = lab.listen(lab.a)
    if rcvbuf:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
    client, server = lab.connect(listener)
    for sock in (client, server):
        sock.setblocking(False)
    pair = Pair(client, server, write, shrunk)
    while rcvbuf is None and pair.sent < GROWN_BYTES:
        pair.send()
        pair.recv()
    return pair


def unread(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))[0])


def fill(pairs: list[Pair]) -> None:
    """Write until no window is open any more and all has arrived that will."""
    seen: list[int] = []
    while (now := [unread(p.server) for p in pairs]) != seen:
        seen = now
        for p in pairs:
            while p.send():
                pass
        time.sleep(0.1)


def read_all(pairs: list[Pair]) -> None:
    end = time.monotonic() + 60
    while any(p.got < p.sent for p in pairs):
        for p in pairs:
            p.recv()
        assert time.monotonic() < end, f"hang: {[(p.got, p.sent) for p in pairs]}"


@pytest.mark.parametrize("thaw", [False, True], ids=["moved", "thawed"])
@pytest.mark.parametrize("mtu", [1500, 9001])
def test_a_full_receive_queue_fits_wherever_it_goes(lab_of: Any, move: Any, mtu: int, thaw: bool) -> None:
    lab = lab_of(mtu)
    pairs = [connect(lab, *case) for case in CASES]
    fill(pairs)
    for p in pairs:
        if p.shrunk:
            p.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, p.shrunk)
    m = move(lab, lab.a, [p.server for p in pairs])
    m.gates[0].lose()
    for p in pairs:
        p.server.send(b"in flight, so that a thaw seats the socket again")
    before = [p.buffer for p in pairs]
    m.freeze()
    for info, buffer in zip(m.batch.infos(), before, strict=True):
        print(f"{info.recv_bytes} bytes unread in a buffer of {buffer}")
    if thaw:
        m.thaw()
    else:
        m.restore()
        for p, live in zip(pairs, m.activate(), strict=True):
            p.server = live
            live.setblocking(False)
    assert [p.buffer // 2 for p in pairs] == [n // 2 for n in before]
    read_all(pairs)
