"""What an application and the kernel can read from a socket is the same after a move."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest
from midstream_agent import tcp

SOL, TCP, IP, IP6 = socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6
SO_BUF_LOCK, SO_MAX_PACING_RATE, TCP_INQ, SO_RCVTIMEO, SO_SNDTIMEO = 72, 47, 36, 20, 21

INTS: dict[str, tuple[int, int, int]] = {  # name: level, option, a value that is no default
    "SO_KEEPALIVE": (SOL, socket.SO_KEEPALIVE, 1),
    "SO_OOBINLINE": (SOL, socket.SO_OOBINLINE, 1),
    "SO_MARK": (SOL, socket.SO_MARK, 77),
    "SO_RCVLOWAT": (SOL, socket.SO_RCVLOWAT, 3),
    "SO_REUSEADDR": (SOL, socket.SO_REUSEADDR, 1),
    "SO_REUSEPORT": (SOL, socket.SO_REUSEPORT, 1),
    "TCP_NODELAY": (TCP, socket.TCP_NODELAY, 1),
    "TCP_CORK": (TCP, socket.TCP_CORK, 1),
    "TCP_KEEPIDLE": (TCP, socket.TCP_KEEPIDLE, 33),
    "TCP_KEEPINTVL": (TCP, socket.TCP_KEEPINTVL, 7),
    "TCP_KEEPCNT": (TCP, socket.TCP_KEEPCNT, 4),
    "TCP_USER_TIMEOUT": (TCP, socket.TCP_USER_TIMEOUT, 90000),
    "TCP_NOTSENT_LOWAT": (TCP, socket.TCP_NOTSENT_LOWAT, 16384),
    "TCP_LINGER2": (TCP, socket.TCP_LINGER2, 17),
    "TCP_INQ": (TCP, TCP_INQ, 1),
}
FOUR = {"IP_TOS": (IP, socket.IP_TOS, 0x48), "IP_TTL": (IP, socket.IP_TTL, 55)}
SIX = {
    "IPV6_TCLASS": (IP6, socket.IPV6_TCLASS, 0x48),
    "IPV6_UNICAST_HOPS": (IP6, socket.IPV6_UNICAST_HOPS, 55),
    "IPV6_V6ONLY": (IP6, socket.IPV6_V6ONLY, None),
}
LAST = {"SO_PRIORITY": (SOL, socket.SO_PRIORITY, 5)}  # TOS changes it
READ_ONLY = {
    "SO_SNDBUF": (SOL, socket.SO_SNDBUF),
    "SO_RCVBUF": (SOL, socket.SO_RCVBUF),
    "SO_BUF_LOCK": (SOL, SO_BUF_LOCK),
    "TCP_MAXSEG": (TCP, socket.TCP_MAXSEG),
    "TCP_WINDOW_CLAMP": (TCP, socket.TCP_WINDOW_CLAMP),
}
RAW = {
    "SO_LINGER": (SOL, socket.SO_LINGER, struct.pack("ii", 1, 9)),
    "SO_MAX_PACING_RATE": (SOL, SO_MAX_PACING_RATE, struct.pack("Q", 5_000_000_000)),
    "SO_RCVTIMEO": (SOL, SO_RCVTIMEO, struct.pack("ll", 12, 500000)),
    "SO_SNDTIMEO": (SOL, SO_SNDTIMEO, struct.pack("ll", 13, 0)),
    "TCP_CONGESTION": (TCP, socket.TCP_CONGESTION, b"reno"),
}


def ints_of(kind: str) -> dict[str, tuple[int, int, Any]]:
    return INTS | (FOUR if kind in ("v4", "mapped") else {}) | (SIX if kind in ("v6", "mapped") else {}) | LAST


def snapshot(sock: Any, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {n: sock.getsockopt(level, opt) for n, (level, opt, _) in ints_of(kind).items()}
    found |= {n: sock.getsockopt(level, opt) for n, (level, opt) in READ_ONLY.items()}
    found |= {n: sock.getsockopt(level, opt, 16).rstrip(b"\0") for n, (level, opt, _) in RAW.items()}
    info = sock.getsockopt(TCP, socket.TCP_INFO, 104)
    state, options, scales = info[0], info[5] & 7, info[6]
    snd_mss, _, _, _ = struct.unpack_from("IIII", info, 16)
    names = (sock.getsockname()[:2], sock.getpeername()[:2])
    return found | {"state": state, "options": options, "wscale": scales, "snd_mss": snd_mss, "names": names}


def change_all(sock: Any, kind: str) -> None:
    for level, option, value in ints_of(kind).values():
        if value is not None:
            sock.setsockopt(level, option, value)
    for level, option, raw in RAW.values():
        sock.setsockopt(level, option, raw)


def pair(lab: Any, kind: str) -> tuple[Any, Any]:
    family = 6 if kind == "v6" else 4
    client, server = lab.connect(lab.listen(lab.a, family, mapped=kind == "mapped"), family)
    return client, server


KINDS = pytest.mark.parametrize("kind", ["v4", "v6", "mapped"])


@KINDS
@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "changed"])
@pytest.mark.parametrize("thaw", [False, True], ids=["activate", "thaw"])
def test_options_are_equal_after_a_move(lab: Any, move: Any, kind: str, changed: bool, thaw: bool) -> None:
    client, server = pair(lab, kind)
    if changed:
        change_all(server, kind)
    client.send(b"unread")
    m = move(lab, lab.a, [server])
    m.gates[0].lose(to_node=False)
    server.send(b"in flight")  # so that a thaw seats the socket again
    before = snapshot(server, kind)
    m.freeze()
    if thaw:
        m.thaw()
    else:
        m.restore()
        (server,) = m.activate()
    assert snapshot(server, kind) == before


@pytest.mark.parametrize("locked", [False, True])
def test_buffer_sizes_and_their_lock_travel(lab: Any, move: Any, locked: bool) -> None:
    _, server = pair(lab, "v4")
    if locked:
        server.setsockopt(SOL, socket.SO_SNDBUF, 40000)
        server.setsockopt(SOL, socket.SO_RCVBUF, 50000)
    before = snapshot(server, "v4")
    assert before["SO_BUF_LOCK"] == (3 if locked else 0)
    (moved,) = move(lab, lab.a, [server]).run()
    assert snapshot(moved, "v4") == before


def test_options_survive_several_hops(lab: Any, move: Any) -> None:
    _, server = pair(lab, "v4")
    change_all(server, "v4")
    before = snapshot(server, "v4")
    for node in (lab.a, lab.b, lab.a):
        (server,) = move(lab, node, [server]).run()
    assert snapshot(server, "v4") == before


def test_socket_bound_to_a_device_stays_bound(lab: Any, move: Any) -> None:
    _, server = pair(lab, "v4")
    server.setsockopt(SOL, socket.SO_BINDTODEVICE, b"eth0")
    (moved,) = move(lab, lab.a, [server]).run()
    assert moved.getsockopt(SOL, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"eth0"


def test_a_second_checkpoint_of_a_frozen_socket_keeps_its_options(lab: Any, move: Any) -> None:
    """An agent that was killed while it held sockets takes the checkpoint again."""
    _, server = pair(lab, "v4")
    server.setsockopt(SOL, socket.SO_REUSEADDR, 1)
    before = snapshot(server, "v4")
    m = move(lab, lab.a, [server])
    m.freeze()
    m.batch = tcp.Batch.checkpoint([server.fileno()])
    m.thaw()
    assert snapshot(server, "v4") == before
