"""Hold and gate on real interfaces, against real clients' kernels.

Nothing here waits for a time to pass: each step waits for a packet or for a socket.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from bpf_net import Net, ctl, freeze, key_of, thaw
from midstream_agent.hold import FLOW_FROZEN, FLOW_HELD, Hold
from midstream_agent.hold_layout import NOTE, NOTE_DATA

pytestmark = pytest.mark.timeout(60)
DONE_TCP_INFO_SND_WND = 228  # offset of tcpi_snd_wnd in struct tcp_info (linux/tcp.h, 5.4)


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    with Net() as net:
        yield net


@contextmanager
def attached(hold: Hold, net: Net, role: str) -> Iterator[None]:
    """The role's programs on the interface where they belong."""
    place = (net.path("pod"), "eth0", "pod") if role == "pod" else (net.path("node"), "eth0", "nic")
    hold.attach(*place)
    try:
        yield
    finally:
        hold.detach(*place)


@contextmanager
def offload_off(net: Net, what: str) -> Iterator[None]:
    """Software checksums (or no GSO) on the node's interface towards the client, and only there."""
    if not what:
        yield
        return
    net.exec("node", "ethtool", "-K", "eth0", what, "off")
    try:
        yield
    finally:
        net.exec("node", "ethtool", "-K", "eth0", what, "on")


class Held:
    """A connection whose server is frozen and held."""

    def __init__(self, hold: Hold, client: socket.socket, server: socket.socket) -> None:
        self.hold, self.client, self.server = hold, client, server
        self.key = key_of(server)
        hold.create_notes(self.key, 1)
        hold.set_flows(self.key, ctl(FLOW_FROZEN), 1)
        self.snd_nxt, self.rcv_nxt, self.tsval = freeze(server)
        hold.set_flows(self.key, ctl(FLOW_HELD, self.snd_nxt, self.rcv_nxt, self.tsval), 1)

    def thaw(self) -> None:
        self.hold.delete_flows(self.key, 1)
        self.hold.delete_notes(self.key, 1)
        thaw(self.server)


def tcp_of(frame: bytes) -> tuple[bytes, bytes, bool]:
    """(TCP header, payload, is it from the server) of a frame to or from port 443."""
    l4 = 14 + (40 if frame[12:14] == b"\x86\xdd" else (frame[14] & 15) * 4)
    header = frame[l4 : l4 + (frame[l4 + 12] >> 4) * 4]
    return header, frame[l4 + len(header) :], header[:2] == struct.pack("!H", 443)


def next_answer(sniffer: socket.socket) -> tuple[int, int, int, int, int]:
    """(seq, ack, window, TSval, payload bytes) of the next packet from the server."""
    while True:
        header, payload, from_server = tcp_of(sniffer.recv(1 << 17))
        if from_server:
            seq, ack, _, window = struct.unpack("!IIHH", header[4:16])
            return seq, ack, window, struct.unpack("!I", header[24:28])[0], len(payload)


def drain(sniffer: socket.socket) -> list[bytes]:
    """What has arrived by now."""
    sniffer.setblocking(False)
    frames = []
    with suppress(BlockingIOError):
        while True:
            frames.append(sniffer.recv(1 << 17))
    return [f for f in frames if f[12:14] in (b"\x08\x00", b"\x86\xdd") and 6 in (f[20], f[23])]


def receive_all(sock: socket.socket, size: int) -> bytes:
    sock.settimeout(20)
    data = b""
    while len(data) < size:
        piece = sock.recv(1 << 20)
        assert piece, "closed early"
        data += piece
    return data


@pytest.mark.parametrize("off", ["", "tx", "gso"])
@pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
@pytest.mark.parametrize("role", ["pod", "nic"])
def test_client_takes_the_zero_window_and_goes_on_afterwards(
    hold: Hold, net: Net, role: str, v6: bool, off: str
) -> None:
    with offload_off(net, off), attached(hold, net, role):
        client, server = net.connect(v6)
        with client, server, net.sniff("client") as sniffer:
            bad = net.counter("client", "InCsumErrors")
            held = Held(hold, client, server)
            upload = bytes(range(256)) * 800
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            client.sendall(upload)
            # the second answer is to a probe: the client's kernel believed the first
            for _ in range(2):
                assert next_answer(sniffer) == (held.snd_nxt, held.rcv_nxt, 0, held.tsval, 0)
            info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            assert struct.unpack_from("=I", info, DONE_TCP_INFO_SND_WND)[0] == 0
            assert net.counter("client", "InCsumErrors") == bad
            note = NOTE.unpack(hold.read_notes(held.key, 1))
            assert note[1] & NOTE_DATA
            assert note[7] == held.rcv_nxt
            assert upload.startswith(note[12][: note[8]])
            held.thaw()
            assert receive_all(server, len(upload)) == upload


def test_full_checksum_on_a_partial_packet_is_seen_by_this_setup(
    loader: Callable[..., Path], broken: Callable[[str, str, str], Path], net: Net
) -> None:
    """Control: a hold that writes the plain checksum, which the software checksum of the node uncovers."""
    sources = broken("ms_answer.h", "pseudo, BPF_F_PSEUDO_HDR)", "pseudo, 0)")
    with (
        Hold.open(loader("--sources", str(sources))) as hold,
        offload_off(net, "tx"),
        attached(hold, net, "pod"),
    ):
        client, server = net.connect()
        with client, server:
            bad = net.counter("client", "InCsumErrors")
            held = Held(hold, client, server)
            client.send(b"x")
            while net.counter("client", "InCsumErrors") == bad:
                pass
            held.thaw()


def test_wrong_checksums_are_seen_by_this_setup(hold: Hold, net: Net) -> None:
    """Control: the counter that the test above trusts does count a damaged packet from the node."""
    with net.sniff("client"):
        client, server = net.connect()
        with client, server:
            bad = net.counter("client", "InCsumErrors")
            header = struct.pack("!HHIIBBHHH", 443, client.getsockname()[1], 1, 1, 5 << 4, 16, 0, 0x1234, 0)
            with net.inside("pod"):
                raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
            with raw:
                raw.bind((server.getsockname()[0], 0))
                raw.sendto(header, (client.getsockname()[0], 0))
            client.send(b"x")
            assert server.recv(1) == b"x"
            assert net.counter("client", "InCsumErrors") == bad + 1


def test_gate_keeps_everything_of_a_frozen_flow_in(hold: Hold, net: Net) -> None:
    with attached(hold, net, "pod"):
        client, server = net.connect()
        with client, server, net.sniff("client") as sniffer:
            key = key_of(server)
            hold.create_notes(key, 1)
            hold.set_flows(key, ctl(FLOW_FROZEN), 1)
            before = hold.counters()
            server.sendall(b"must not leave")
            client.send(b"must not be acknowledged")
            while hold.counters()["gate_drop"] == before["gate_drop"]:
                pass
            assert hold.counters()["answer_zero_window"] == before["answer_zero_window"]
            assert not any(from_server for _, _, from_server in map(tcp_of, drain(sniffer)))
            hold.delete_flows(key, 1)
            assert client.recv(100) == b"must not leave"
            assert server.recv(100) == b"must not be acknowledged"


def test_reset_ends_the_answers_and_a_reused_tuple_stays_unanswered(hold: Hold, net: Net) -> None:
    with attached(hold, net, "pod"):
        client, server = net.connect()
        with server:
            held = Held(hold, client, server)
            port = client.getsockname()[1]
            before = hold.counters()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
            while hold.counters()["dead_drop"] == before["dead_drop"]:
                pass
            with net.inside("client"):
                again = socket.socket()
            with again:
                again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                again.bind(("", port))
                again.setblocking(False)
                again.connect_ex(server.getsockname())
                while hold.counters()["dead_drop"] < before["dead_drop"] + 2:
                    pass
            assert hold.counters()["answer_zero_window"] == before["answer_zero_window"]
            held.thaw()


def test_without_the_hold_the_client_is_reset(loader: Callable[..., Path], net: Net) -> None:
    """Control: the build with the hold left out: the next segment after a silent close draws an RST."""
    with Hold.open(loader("--without-hold")) as hold, attached(hold, net, "pod"):
        client, server = net.connect()
        with client:
            held = Held(hold, client, server)
            server.close()
            with pytest.raises(ConnectionResetError):
                client.send(b"x")
                client.recv(1)
            assert set(hold.counters().values()) == {0}
            hold.delete_flows(held.key, 1)


def test_with_the_hold_the_client_is_not_reset(hold: Hold, net: Net) -> None:
    with attached(hold, net, "pod"):
        client, server = net.connect()
        with client, net.sniff("client") as sniffer:
            held = Held(hold, client, server)
            server.close()
            client.send(b"x")
            assert next_answer(sniffer) == (held.snd_nxt, held.rcv_nxt, 0, held.tsval, 0)
            client.settimeout(0.5)
            with pytest.raises(TimeoutError):
                client.recv(1)
