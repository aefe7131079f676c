"""Sockets that cannot be moved are refused by name, and left as they were."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
from midstream_agent import tcp
from midstream_runtime.contract.errors import Final

MPTCP = getattr(socket, "IPPROTO_MPTCP", 262)


def names(fds: list[int]) -> list[str]:
    """What probe and checkpoint say; both must agree."""
    asked = [tcp.refusal(e) for e in tcp.probe(fds)]
    taken = [tcp.refusal(e) for e in tcp.Batch.checkpoint(fds).errors]
    assert asked == taken
    return asked


def test_a_file_a_closed_fd_and_a_udp_socket(lab: Any) -> None:
    pipe = os.pipe()
    closed = 1 << 20
    udp = lab.a.socket(socket.AF_INET, socket.SOCK_DGRAM)
    unix = lab.a.socket(socket.AF_UNIX)
    assert names([pipe[0], closed, udp.fileno(), unix.fileno()]) == ["NotASocket", "BadFd", "NotTcp", "NotTcp"]
    for fd in pipe:
        os.close(fd)


def test_listener_and_sockets_without_a_connection(lab: Any) -> None:
    listener, fresh = lab.listen(lab.a), lab.a.socket(socket.AF_INET)
    assert names([listener.fileno(), fresh.fileno()]) == ["Listener", "NotConnected"]
    client, server = lab.connect(listener)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.close()
    server.settimeout(10)
    with pytest.raises(ConnectionResetError):
        server.recv(1)
    assert names([server.fileno()]) == ["NotConnected"]


def test_handshake_under_way(lab: Any) -> None:
    lab.gate(lab.a).lose()
    half = lab.client.socket(socket.AF_INET)
    half.setblocking(False)
    half.connect_ex(("10.9.0.1", 9))
    assert names([half.fileno()]) == ["Handshake"]


def test_multipath_tcp(lab: Any) -> None:
    s = lab.a.socket(socket.AF_INET, protocol=MPTCP)
    assert names([s.fileno()]) == ["Mptcp"]


@pytest.mark.parametrize("inline", [0, 1])
def test_urgent_data_pending(lab: Any, inline: int) -> None:
    """Not inline, the kernel hides all behind the urgent byte from the dump. Inline, a peek ends at the mark."""
    client, server = lab.connect(lab.listen(lab.a))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, inline)
    client.send(b"abc")
    client.send(b"!", socket.MSG_OOB)
    client.send(b"def")
    while len(server.recv(100, socket.MSG_PEEK)) < 3:
        pass
    taken = tcp.Batch.checkpoint([server.fileno()])
    assert [tcp.refusal(e) for e in taken.errors] == ["UrgentData"]
    assert server.recv(3) == b"abc"  # it was not left frozen


def test_one_refused_socket_does_not_harm_the_others(lab: Any, move: Any) -> None:
    listener = lab.listen(lab.a)
    client, server = lab.connect(listener)
    batch = tcp.Batch.checkpoint([listener.fileno(), server.fileno()])
    assert [tcp.refusal(e) for e in batch.errors] == ["Listener", ""]
    with pytest.raises(Final):
        batch.encode()
    notes = bytes(2 * tcp.NOTE_BYTES)
    fds = [listener.fileno(), server.fileno()]
    assert batch.thaw_begin(fds, notes) == [0, 0]
    assert batch.thaw_finish(fds, notes) == [0, 0]
    client.send(b"alive")
    assert server.recv(5) == b"alive"
    lab.connect(listener)


def connected_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        return client, listener.accept()[0]


def test_restore_refuses_what_is_no_blank(lab: Any, move: Any) -> None:
    _, server = lab.connect(lab.listen(lab.a))
    m = move(lab, lab.a, [server])
    batch = m.freeze()
    wrong = lab.b.socket(socket.AF_INET6)
    used, _peer = map(lab.b.keep, lab.b.run(connected_pair))
    pipe = os.pipe()
    for fd, name in ((wrong.fileno(), "BlankFamily"), (used.fileno(), "BlankInUse"), (pipe[0], "NotASocket")):
        assert [tcp.refusal(e) for e in batch.restore([fd])] == [name]
    for fd in pipe:
        os.close(fd)
    used.send(b"not frozen")
    lab.b.sh("ip route del 10.8.0.2")
    assert [tcp.refusal(e) for e in batch.restore([lab.b.socket(socket.AF_INET).fileno()])] == ["NoRoute"]
    m.thaw()


def test_restore_beside_a_live_flow_of_the_same_addresses_is_refused(lab: Any, move: Any) -> None:
    _, server = lab.connect(lab.listen(lab.a))
    m = move(lab, lab.a, [server])
    batch = m.freeze()
    assert [tcp.refusal(e) for e in batch.restore([lab.a.socket(socket.AF_INET).fileno()])] == ["FlowExists"]
    m.thaw()


def test_unknown_congestion_control_is_refused_by_name(lab: Any, move: Any) -> None:
    _, server = lab.connect(lab.listen(lab.a))
    m = move(lab, lab.a, [server])
    batch = m.freeze()
    data = bytearray(batch.encode())
    at = data.index(b"bbr") if b"bbr" in data else data.index(b"cubic")
    data[at : at + 1] = b"x"
    data[-8:] = xxh64(bytes(data[:-8])).to_bytes(8, "little")
    foreign = tcp.Batch.decode(bytes(data))
    assert [tcp.refusal(e) for e in foreign.restore([lab.b.socket(socket.AF_INET).fileno()])] == ["NoCongestionControl"]
    m.thaw()


def test_activating_what_was_never_begun_is_refused(lab: Any, move: Any) -> None:
    _, server = lab.connect(lab.listen(lab.a))
    m = move(lab, lab.a, [server])
    batch = m.freeze()
    assert [tcp.refusal(e) for e in batch.activate_finish([server.fileno()], bytes(tcp.NOTE_BYTES))] == ["NotRestored"]
    with pytest.raises(Final):
        batch.thaw_begin([server.fileno()], b"short")
    m.thaw()


def xxh64(data: bytes) -> int:
    """An implementation of its own, from the specification."""
    p1, p2, p3, p4, p5 = (
        0x9E3779B185EBCA87,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0x85EBCA77C2B2AE63,
        0x27D4EB2F165667C5,
    )
    mask = (1 << 64) - 1

    def rot(v: int, n: int) -> int:
        return (v << n | v >> 64 - n) & mask

    def lane(acc: int, v: int) -> int:
        return rot((acc + v * p2) & mask, 31) * p1 & mask

    at, size = 0, len(data)
    if size >= 32:
        accs = [(p1 + p2) & mask, p2, 0, -p1 & mask]
        while size - at >= 32:
            for i in range(4):
                accs[i] = lane(accs[i], int.from_bytes(data[at + 8 * i : at + 8 * i + 8], "little"))
            at += 32
        acc = sum(rot(a, n) for a, n in zip(accs, (1, 7, 12, 18), strict=True)) & mask
        for a in accs:
            acc = ((acc ^ lane(0, a)) * p1 + p4) & mask
    else:
        acc = p5
    acc = (acc + size) & mask
    while size - at >= 8:
        acc = (rot(acc ^ lane(0, int.from_bytes(data[at : at + 8], "little")), 27) * p1 + p4) & mask
        at += 8
    if size - at >= 4:
        acc = (rot(acc ^ int.from_bytes(data[at : at + 4], "little") * p1 & mask, 23) * p2 + p3) & mask
        at += 4
    for byte in data[at:]:
        acc = rot(acc ^ byte * p5 & mask, 11) * p1 & mask
    acc = (acc ^ acc >> 33) * p2 & mask
    acc = (acc ^ acc >> 29) * p3 & mask
    return acc ^ acc >> 32
