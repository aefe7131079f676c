"""Each state in which one direction has ended, or is about to."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

BOTH = pytest.mark.parametrize("family", [4, 6])
HOW = pytest.mark.parametrize("thaw", [False, True], ids=["activate", "thaw"])
STATES = {1: "ESTABLISHED", 4: "FIN_WAIT1", 5: "FIN_WAIT2", 6: "TIME_WAIT", 7: "CLOSE", 8: "CLOSE_WAIT", 9: "LAST_ACK"}


def state(sock: Any) -> str:
    number = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return STATES.get(number, str(number))


def until(condition: Callable[[], bool]) -> None:
    """Wait for the kernel, not for a time: the test's own timeout is the limit."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "did not happen within 10 s"
        time.sleep(0.001)


def read_to_end(sock: Any) -> bytes:
    sock.settimeout(10)
    got = b""
    while part := sock.recv(65536):
        got += part
    return got


def carry(m: Any, thaw: bool) -> Any:
    m.freeze()
    if thaw:
        m.thaw()
        return m.servers[0]
    m.restore()
    return m.activate()[0]


@BOTH
@HOW
def test_close_wait(lab: Any, move: Any, family: int, thaw: bool) -> None:
    client, server = lab.connect(lab.listen(lab.a, family), family)
    client.send(b"request")
    client.shutdown(socket.SHUT_WR)
    until(lambda: state(server) == "CLOSE_WAIT")
    server = carry(move(lab, lab.a, [server]), thaw)
    until(lambda: state(server) == "CLOSE_WAIT")
    assert read_to_end(server) == b"request"
    server.send(b"answer")
    server.close()
    assert read_to_end(client) == b"answer"


@BOTH
@HOW
def test_fin_wait2(lab: Any, move: Any, family: int, thaw: bool) -> None:
    client, server = lab.connect(lab.listen(lab.a, family), family)
    server.send(b"all of it")
    server.shutdown(socket.SHUT_WR)
    until(lambda: state(server) == "FIN_WAIT2")
    server = carry(move(lab, lab.a, [server]), thaw)
    until(lambda: state(server) == "FIN_WAIT2")
    assert read_to_end(client) == b"all of it"
    client.send(b"thanks")
    client.close()
    assert read_to_end(server) == b"thanks"


@BOTH
@HOW
@pytest.mark.parametrize("size", [0, 10, 30000])
def test_fin_wait1(lab: Any, move: Any, family: int, thaw: bool, size: int) -> None:
    client, server = lab.connect(lab.listen(lab.a, family), family)
    m = move(lab, lab.a, [server])
    m.gates[0].lose(to_node=False)
    server.send(b"x" * size) if size else None
    server.shutdown(socket.SHUT_WR)
    assert state(server) == "FIN_WAIT1"
    server = carry(m, thaw)
    assert read_to_end(client) == b"x" * size
    until(lambda: state(server) == "FIN_WAIT2")
    client.send(b"thanks")
    client.close()
    assert read_to_end(server) == b"thanks"


@HOW
def test_fin_wait1_whose_fin_the_client_acknowledged_into_the_hold(lab: Any, move: Any, thaw: bool) -> None:
    client, server = lab.connect(lab.listen(lab.a))
    m = move(lab, lab.a, [server])
    m.gates[0].listen()
    m.gates[0].lose(to_client=False)
    server.send(b"the end")
    server.shutdown(socket.SHUT_WR)
    assert read_to_end(client) == b"the end"
    server = carry(m, thaw)
    until(lambda: state(server) == "FIN_WAIT2")
    client.close()
    assert read_to_end(server) == b""


@BOTH
@HOW
@pytest.mark.parametrize("size", [0, 10])
def test_last_ack(lab: Any, move: Any, family: int, thaw: bool, size: int) -> None:
    client, server = lab.connect(lab.listen(lab.a, family), family)
    client.send(b"bye")
    client.shutdown(socket.SHUT_WR)
    until(lambda: state(server) == "CLOSE_WAIT")
    m = move(lab, lab.a, [server])
    m.gates[0].lose(to_node=False)
    server.send(b"x" * size) if size else None
    server.shutdown(socket.SHUT_WR)
    assert state(server) == "LAST_ACK"
    server = carry(m, thaw)
    assert read_to_end(client) == b"x" * size
    until(lambda: state(server) == "CLOSE")
    assert read_to_end(server) == b"bye"


@BOTH
@HOW
@pytest.mark.parametrize("size", [0, 10])
def test_closing(lab: Any, move: Any, family: int, thaw: bool, size: int) -> None:
    client, server = lab.connect(lab.listen(lab.a, family), family)
    client.send(b"bye")
    m = move(lab, lab.a, [server])
    m.gates[0].lose(to_node=False)
    server.send(b"x" * size) if size else None
    server.shutdown(socket.SHUT_WR)
    client.shutdown(socket.SHUT_WR)
    until(lambda: state(server) == "11")
    server = carry(m, thaw)
    assert read_to_end(client) == b"x" * size
    assert read_to_end(server) == b"bye"
    until(lambda: state(server) == "CLOSE")
    until(lambda: state(client) == "CLOSE")


@HOW
def test_client_finishes_during_the_hold(lab: Any, move: Any, thaw: bool) -> None:
    client, server = lab.connect(lab.listen(lab.a))
    m = move(lab, lab.a, [server])
    m.freeze()
    client.send(b"last words")
    client.shutdown(socket.SHUT_WR)
    if thaw:
        m.thaw()
    else:
        m.restore()
        (server,) = m.activate()
    assert read_to_end(server) == b"last words"
    server.close()
    assert read_to_end(client) == b""


@HOW
def test_client_resets_during_the_hold(lab: Any, move: Any, thaw: bool) -> None:
    client, server = lab.connect(lab.listen(lab.a))
    server.send(b"in flight")
    until(lambda: state(client) == "ESTABLISHED" and len(client.recv(9, socket.MSG_PEEK)) == 9)
    m = move(lab, lab.a, [server])
    m.freeze()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    client.close()
    if thaw:
        m.thaw()
    else:
        m.restore()
        (server,) = m.activate()
    with pytest.raises(ConnectionResetError):
        read_to_end(server)
