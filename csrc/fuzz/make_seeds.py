"""Writes csrc/fuzz/seeds: checkpoints of real sockets, small, one for each kind that a reader must know.

They are committed, for two reasons: the fuzzer starts from them, and a test decodes them with today's library, so
that a change that could not read yesterday's checkpoints is seen. Needs CAP_NET_ADMIN and a loopback with IPv6:

    PYTHONPATH=agent:runtime unshare -rn sh -c 'ip link set lo up; python3 csrc/fuzz/make_seeds.py'
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from midstream_agent import tcp

SEEDS = Path(__file__).resolve().parent / "seeds"
Pair = tuple[socket.socket, socket.socket]


@contextlib.contextmanager
def pair(kind: str) -> Iterator[Pair]:
    """(client, server) over loopback."""
    address = "127.0.0.1" if kind == "v4" else "::1"
    listener = socket.socket(socket.AF_INET if kind == "v4" else socket.AF_INET6)
    if kind == "mapped":
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", 0))
        address = "127.0.0.1"
    else:
        listener.bind((address, 0))
    listener.listen()
    client = socket.socket(socket.AF_INET6 if address == "::1" else socket.AF_INET)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2304)
    client.connect((address, listener.getsockname()[1]))
    server, _ = listener.accept()
    with listener, client, server:
        yield client, server


def queues(ends: Pair) -> None:
    client, server = ends
    client.send(b"unread")
    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)  # the kernel's minimum
    server.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            server.send(b"unsent")


def options(ends: Pair) -> None:
    server = ends[1]
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 9))
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def close_wait(ends: Pair) -> None:
    ends[0].shutdown(socket.SHUT_WR)


def finish(ends: Pair) -> None:
    ends[1].shutdown(socket.SHUT_WR)


def fin_wait2(ends: Pair) -> None:
    finish(ends)
    while ends[1].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x05":
        time.sleep(0.01)  # the client delays its ACK


def fin_wait1(ends: Pair) -> None:
    queues(ends)
    finish(ends)


def last_ack(ends: Pair) -> None:
    queues(ends)
    close_wait(ends)
    finish(ends)


def closing(ends: Pair) -> None:
    queues(ends)
    finish(ends)
    close_wait(ends)


def idle(ends: Pair) -> None:
    del ends


def main() -> None:
    SEEDS.mkdir(exist_ok=True)
    makers = (idle, queues, options, close_wait, fin_wait1, fin_wait2, last_ack, closing)
    cases = [("v4", make) for make in makers] + [("v6", idle), ("v6", options), ("mapped", idle)]
    for kind, make in cases:
        with pair(kind) as ends:
            make(ends)
            write(f"{kind}-{make.__name__}", [ends[1]])
    with pair("v4") as one, pair("v6") as two:
        write("two", [one[1], two[1]])
    write("none", [])


def write(name: str, sockets: list[socket.socket]) -> None:
    batch = tcp.Batch.checkpoint([s.fileno() for s in sockets])
    assert not any(batch.errors), [tcp.strerror(e) for e in batch.errors]
    data = batch.encode()
    (SEEDS / f"{name}.ckpt").write_bytes(data)
    print(name, len(data), [(i.state, i.send_bytes, i.recv_bytes) for i in batch.infos()])


if __name__ == "__main__":
    main()
