"""What was in flight when a window that is no multiple of the segment size was full.

The old socket filled the window to its last byte. A restored one that sends the same bytes as new data stops at the
last whole segment that fits; the client then acknowledges bytes that the socket has not sent, and such acks are
dropped: the stream would hang for ever.
"""

from __future__ import annotations

import fcntl
import random
import socket
import struct
import termios
import time
from typing import Any

import pytest
from midstream_agent import tcp

BYTES = 400_000
MTU = 9001  # some seven segments to the window of a client that has not read yet
UNREAD = range(60_000, 100_000, 1000)
SND_WND = 228  # offset of tcpi_snd_wnd in struct tcp_info
SIOCOUTQNSD, TOTAL_RETRANS = 0x894B, 100  # linux/sockios.h; offset of tcpi_total_retrans
PATTERN = random.Random(1).randbytes(BYTES)


def pair(lab: Any, listener: socket.socket, unread_bytes: int) -> tuple[socket.socket, socket.socket]:
    """(client, server), where the client has that many bytes unread, and its window is smaller by as many."""
    client, server = lab.connect(listener)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)  # after the handshake: the window has its scale
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server.setblocking(False)
    server.send(PATTERN[:unread_bytes])
    return client, server


def unread(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))[0])


def to_the_edge(server: socket.socket, sent: int) -> int:
    """What the client's window allows, to the last byte, and then what waits for it."""
    window = struct.unpack_from("I", server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 248), SND_WND)[0]
    return fill(server, sent + server.send(PATTERN[sent : sent + window]))


def fill(server: socket.socket, sent: int) -> int:
    """Write until the kernel takes no more; how much was written so far."""
    while sent < BYTES:
        try:
            sent += server.send(PATTERN[sent:])
        except BlockingIOError:
            break
    return sent


@pytest.mark.parametrize("thaw", [False, True], ids=["moved", "thawed"])
def test_a_full_window_that_is_no_multiple_of_a_segment(lab_of: Any, move: Any, thaw: bool) -> None:
    lab = lab_of(MTU)
    listener = lab.listen(lab.a)
    pairs = [pair(lab, listener, n) for n in UNREAD]
    wait_full([client for client, _ in pairs])
    m = move(lab, lab.a, [server for _, server in pairs])
    m.gates[0].lose(to_client=False, to_node=True)
    sent = [to_the_edge(server, n) for n, (_, server) in zip(UNREAD, pairs, strict=True)]
    wait_full([client for client, _ in pairs])
    m.freeze()
    none = bytes(len(pairs) * tcp.NOTE_BYTES)
    if thaw:
        m.thaw(none)
        live = m.servers
    else:
        m.restore()
        live = m.activate(none)
    finish(pairs, live, sent)


def wait_full(clients: list[socket.socket]) -> None:
    """Until nothing more arrives: the windows are full."""
    seen: list[int] = []
    while (now := [unread(c) for c in clients]) != seen:
        seen = now
        time.sleep(0.05)
    assert sum(n > 0 for n in seen) == len(clients)


def finish(pairs: list[tuple[socket.socket, socket.socket]], live: list[socket.socket], sent: list[int]) -> None:
    """All clients read to the end, in turns, so that one that hangs does not hide the others."""
    got, end = [0] * len(pairs), time.monotonic() + 20
    while any(n < BYTES for n in got):
        for i, (client, _) in enumerate(pairs):
            live[i].setblocking(False)
            sent[i] = fill(live[i], sent[i])
            client.setblocking(False)
            try:
                data = client.recv(65536)
            except BlockingIOError:
                continue
            assert data == PATTERN[got[i] : got[i] + len(data)]
            got[i] += len(data)
        if time.monotonic() > end:
            stuck = [f"{old} unread: {n} of {BYTES}" for old, n in zip(UNREAD, got, strict=True) if n < BYTES]
            raise AssertionError(f"hang: {stuck}")


SMALL_WINDOW = range(120_000, 128_000, 1000)  # bytes unread that leave a window of less than a segment


@pytest.mark.parametrize(
    ("thaw", "in_flight"),
    [(False, False), (False, True), (True, True)],
    ids=["moved-waiting", "moved-in-flight", "thawed-in-flight"],
)
def test_a_window_smaller_than_a_segment_is_filled_at_once(lab_of: Any, move: Any, thaw: bool, in_flight: bool) -> None:
    """Not by a retransmission, nor by a window probe: a fresh socket's timer for both is a second or three. (A thawed
    one that has nothing in flight keeps its own timer, as if nothing had been.)"""
    lab = lab_of(MTU)
    listener = lab.listen(lab.a)
    pairs = [pair(lab, listener, n) for n in SMALL_WINDOW]
    wait_full([client for client, _ in pairs])
    m = move(lab, lab.a, [server for _, server in pairs])
    m.gates[0].lose()
    write = to_the_edge if in_flight else fill
    sent = [write(server, n) for n, (_, server) in zip(SMALL_WINDOW, pairs, strict=True)]
    before = m.freeze().infos()
    none = bytes(len(pairs) * tcp.NOTE_BYTES)
    if thaw:
        m.thaw(none)
        live = m.servers
    else:
        m.restore()
        live = m.activate(none)
    unsent = [not_sent(sock) for sock in live]
    assert unsent == [i.send_bytes - i.snd_wnd for i in before]
    assert all(0 < i.snd_wnd < MTU for i in before)
    wait_full([client for client, _ in pairs])
    full = [n + i.snd_wnd for n, i in zip(SMALL_WINDOW, before, strict=True)]
    assert [unread(client) for client, _ in pairs] == full
    assert [retransmitted(sock) for sock in live] == [0] * len(pairs)
    finish(pairs, live, sent)


def not_sent(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), SIOCOUTQNSD, bytes(4)))[0])


def retransmitted(sock: socket.socket) -> int:
    return int(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 248), TOTAL_RETRANS)[0])
