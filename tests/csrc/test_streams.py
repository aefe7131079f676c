"""Byte-exact both ways: many streams under load, moved as a batch, back and forth, at random instants."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from collections import Counter
from typing import Any

import pytest

_PATTERN = random.Random(7).randbytes(1 << 16) * 3


def piece(at: int, count: int) -> bytes:
    """Bytes of an endless stream in which no shift goes unseen."""
    start = at % (1 << 16)
    return _PATTERN[start : start + count]


class End:
    """One end of a stream: sends `total` bytes and expects as many, with pauses of its own."""

    def __init__(self, sock: Any, seed: int, out_total: int, in_total: int) -> None:
        self.sock, self.random = sock, random.Random(seed)
        self.out_total, self.in_total, self.sent, self.got = out_total, in_total, 0, 0
        self.error: str | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or (self.sent == self.out_total and self.got == self.in_total)

    def step(self) -> None:
        """Whatever can be done without waiting; now and then nothing, to let queues fill."""
        if self.random.random() < 0.3:
            return
        try:
            if self.got < self.in_total and (data := self.sock.recv(self.random.randrange(1, 65536))):
                if data != piece(self.got, len(data)):
                    self.error = f"wrong bytes at {self.got}"
                self.got += len(data)
        except BlockingIOError:
            pass
        except OSError as e:
            self.error = f"recv: {e}"
        try:
            if self.sent < self.out_total:
                size = min(self.random.choice((1, 200, 3000, 65536)), self.out_total - self.sent)
                self.sent += self.sock.send(piece(self.sent, size))
        except BlockingIOError:
            pass
        except OSError as e:
            self.error = f"send: {e}"


class Driver:
    """Runs ends in a thread; pause() returns once no end is being touched."""

    def __init__(self, ends: list[End]) -> None:
        self.ends = ends
        self._go, self._idle, self._stop = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._go.set()
        self._thread.start()

    def _run(self) -> None:
        while not self._stop and not all(e.done for e in self.ends):
            if not self._go.is_set():
                self._idle.set()
                self._go.wait()
            for end in self.ends:
                if not end.done:
                    end.step()
            waiting = [e.sock for e in self.ends if not e.done]
            if waiting:
                select.select(waiting, waiting, [], 0.01)
        self._idle.set()
        self._stop = True

    def pause(self) -> None:
        self._idle.clear()
        self._go.clear()
        if not self._stop:
            self._idle.wait()

    def resume(self) -> None:
        self._go.set()

    def finish(self) -> list[str]:
        """Wait for the ends, at most a minute; says which have not got to their end."""
        self._thread.join(60)
        self._stop = True
        self.resume()
        self._thread.join()
        return [f"sent {e.sent} of {e.out_total}, got {e.got} of {e.in_total}" for e in self.ends if not e.done]


KINDS = [
    ("both", 4, "cubic", 1500),
    ("up", 4, "bbr", 9001),
    ("down", 4, "bbr", 1500),
    ("both", 6, "bbr", 9001),
    ("down", 6, "reno", 1500),
    ("up", 6, "cubic", 1500),
]


@pytest.mark.parametrize(("direction", "family", "congestion", "mtu"), KINDS)
def test_streams_are_byte_exact(lab_of: Any, move: Any, direction: str, family: int, congestion: str, mtu: int) -> None:
    lab = lab_of(mtu)
    rng = random.Random(f"{direction}{family}{congestion}")
    listener = lab.listen(lab.a, family)
    clients, servers = [], []
    up, down = (0 if direction == "down" else 6_000_000), (0 if direction == "up" else 6_000_000)
    for i in range(16):
        client, server = lab.connect(listener, family)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        for s in (client, server):
            s.setblocking(False)
        clients.append(End(client, 2 * i, up, down))
        servers.append(End(server, 2 * i + 1, down, up))
    front, back = Driver(clients), Driver(servers)
    queues: Counter[str] = Counter()
    node = lab.a
    for _ in range(6):
        time.sleep(rng.uniform(0.01, 0.08))
        back.pause()
        m = move(lab, node, [e.sock for e in servers])
        m.freeze()
        for info in m.batch.infos():
            queues["unread" if info.recv_bytes else "nothing unread"] += 1
            queues["unacked" if info.send_bytes - info.unsent_bytes else "nothing in flight"] += 1
            queues["unsent" if info.unsent_bytes else "nothing unsent"] += 1
        if rng.random() < 0.25:
            time.sleep(rng.choice((0, 0.03)))
            m.thaw()
        else:
            m.restore()
            time.sleep(rng.choice((0, 0.03, 0.3)))
            for end, sock in zip(servers, m.activate(), strict=True):
                sock.setblocking(False)
                end.sock = sock
            node = m.target
        back.resume()
    print(f"{direction} v{family} {congestion}: {dict(queues)}")
    assert not front.finish() + back.finish()
    assert not [e.error for e in (*clients, *servers) if e.error]
    assert all(e.sent == e.out_total and e.got == e.in_total for e in (*clients, *servers))
