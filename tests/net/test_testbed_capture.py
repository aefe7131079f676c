"""Captures lose nothing, and their records say what was on the wire."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from midstream_testbed import Client, Vpc, pcap
from midstream_testbed.pcap import ACK, FIN, PSH, RST, SYN, Packet

PORT = 8000


@pytest.fixture(scope="module")
def ends() -> Iterator[tuple[Client, Client]]:
    with Vpc.create() as vpc:
        yield vpc.client("client"), vpc.client("server", in_vpc=True)


def exchange(client: Client, server: Client, ip: str, payload: bytes, *, reset: bool = False) -> None:
    """The server sends `payload`; the client reads all of it, then closes or resets."""
    with server.listen(ip, PORT) as listener, client.connect(ip, PORT) as ours:
        theirs, _ = listener.accept()
        with theirs:
            theirs.setblocking(False)
            sent = received = 0
            while received < len(payload):
                if sent < len(payload):
                    with contextlib.suppress(BlockingIOError):
                        sent += theirs.send(payload[sent : sent + 65536])
                received += len(ours.recv(1 << 20))
            if reset:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("version", [4, 6])
def test_a_capture_holds_every_byte_of_a_stream(ends: tuple[Client, Client], version: int) -> None:
    client, server = ends
    ip = server.ipv4 if version == 4 else server.ipv6
    payload = bytes(i * 7 % 251 for i in range(3_000_000))
    capture = client.capture()
    exchange(client, server, ip, payload)
    packets = capture.stop()
    assert capture.dropped == 0
    down = pcap.select(packets, src=ip, sport=PORT)
    assert pcap.stream_bytes(down) == payload
    assert {packet.version for packet in packets} == {version}
    up = pcap.select(packets, dst=ip, dport=PORT)
    syn = next(packet for packet in up if packet.syn)
    assert syn.mss == 9001 - (40 if version == 4 else 60) and syn.tsval is not None
    assert pcap.max_ack(up) in (down[-1].end, down[-1].seq)
    assert not any(packet.rst for packet in packets)
    assert len(pcap.flows(packets)) == 2


def test_a_reset_is_seen_and_a_snaplen_keeps_lengths(ends: tuple[Client, Client]) -> None:
    client, server = ends
    capture = client.capture(snaplen=96, expression=f"tcp port {PORT}")
    exchange(client, server, server.ipv4, b"x" * 5000, reset=True)
    packets = capture.stop()
    assert [packet.src for packet in packets if packet.rst] == [client.ipv4]
    down = pcap.select(packets, src=server.ipv4)
    assert sum(packet.length for packet in down) == 5000
    with pytest.raises(ValueError, match="cut off"):
        pcap.stream_bytes(down)


def test_packets_can_be_read_while_the_capture_goes_on(ends: tuple[Client, Client]) -> None:
    client, server = ends
    with client.capture() as capture:
        for rounds in (1, 2, 3):
            exchange(client, server, server.ipv4, b"token")
            assert sum(packet.length == 5 for packet in capture.packets) == rounds


def test_a_capture_that_cannot_start_says_why(ends: tuple[Client, Client]) -> None:
    with pytest.raises(RuntimeError, match="eth7"):
        ends[0].capture("eth7")


# -- the parser, on made-up frames

SRC4, DST4 = socket.inet_aton("10.77.0.100"), socket.inet_aton("198.18.0.10")
SRC6, DST6 = socket.inet_pton(socket.AF_INET6, "fd77::1"), socket.inet_pton(socket.AF_INET6, "fdc1::a")
OPTIONS = b"\x02\x04\x23\x05" + b"\x01\x01" + b"\x08\x0a" + struct.pack("!II", 111, 222)


def tcp(payload: bytes = b"token", options: bytes = OPTIONS) -> bytes:
    offset = (20 + len(options)) // 4
    return (
        struct.pack("!HHIIBBHHH", 8000, 40000, 10, 20, offset << 4, PSH | ACK, 512, 0, 0) + options + payload
    )


def ipv4(body: bytes, fragment: int = 0, protocol: int = 6, total: int | None = None) -> bytes:
    length = 20 + len(body) if total is None else total
    head = struct.pack("!BBHHHBBH", 0x45, 0, length, 1, fragment, 64, protocol, 0)
    return bytes(12) + b"\x08\x00" + head + SRC4 + DST4 + body


def ipv6(body: bytes, kind: int = 6) -> bytes:
    return bytes(12) + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(body), kind, 64) + SRC6 + DST6 + body


DESTINATION_OPTIONS = b"\x06\x01" + bytes(14)
VLAN = ipv4(tcp())[:12] + b"\x81\x00\x00\x07" + ipv4(tcp())[12:]


@pytest.mark.parametrize(
    "frame",
    [
        ipv4(tcp()), VLAN, ipv4(tcp()) + bytes(8), ipv4(tcp(), total=0), ipv6(tcp()),
        ipv6(DESTINATION_OPTIONS + tcp(), kind=60),
    ],
    ids=["ipv4", "vlan", "padded", "super-packet", "ipv6", "extension header"],
)  # fmt: skip
def test_segments_are_read(frame: bytes) -> None:
    packet = pcap.parse(5, len(frame), frame)
    assert packet is not None
    assert (packet.ts_ns, packet.sport, packet.dport, packet.seq, packet.ack) == (5, 8000, 40000, 10, 20)
    assert (packet.flags, packet.win, packet.length, packet.payload) == (PSH | ACK, 512, 5, b"token")
    assert (packet.tsval, packet.tsecr, packet.mss, packet.end) == (111, 222, 0x2305, 15)


@pytest.mark.parametrize(
    "frame",
    [
        b"", bytes(14), ipv4(b"", protocol=17), ipv4(tcp(), fragment=100), ipv4(tcp())[:40],
        ipv6(tcp(), kind=17), ipv6(tcp())[:50], bytes(12) + b"\x08\x06" + bytes(28),
    ],
    ids=["empty", "zeros", "udp", "later fragment", "short", "udp6", "short6", "arp"],
)  # fmt: skip
def test_other_frames_are_left_out(frame: bytes) -> None:
    assert pcap.parse(0, len(frame), frame) is None


@pytest.mark.parametrize(
    "options", [b"\x08\x00\x00\x00", b"\x08\x0a\x00\x00", b"\x02\xff\x00\x00", b"\x00\x08\x0a\x00"]
)
def test_broken_options_end_the_list(options: bytes) -> None:
    frame = ipv4(tcp(options=options))
    packet = pcap.parse(0, len(frame), frame)
    assert packet is not None and packet.tsval is None and packet.payload == b"token"


def packet(ts_ms: float, seq: int, length: int, flags: int = ACK, ack: int = 0) -> Packet:
    return Packet(int(ts_ms * 1e6), 4, "a", 1, "b", 2, flags, seq % (1 << 32), ack % (1 << 32), 0, length,
                  bytes(length), None, None, None, length)  # fmt: skip


def test_gaps_count_new_bytes_only_and_survive_the_wrap_of_sequence_numbers() -> None:
    near = (1 << 32) - 10
    flow = [packet(0, near, 10), packet(1, near + 10, 10), packet(4, near, 10), packet(9, near + 20, 5)]
    assert pcap.payload_gaps_ns(flow) == [(0, 1_000_000), (1_000_000, 8_000_000)]
    assert [gap for _, gap in pcap.payload_gaps_ns(flow, new_only=False)] == [1_000_000, 3_000_000, 5_000_000]


def test_max_ack_wraps_and_ignores_resets() -> None:
    near = (1 << 32) - 10
    flow = [
        packet(0, 0, 0, ack=near),
        packet(1, 0, 0, ack=5),
        packet(2, 0, 0, ack=near + 3),
        packet(3, 0, 0, RST, 99),
    ]
    assert pcap.max_ack(flow) == 5
    assert pcap.max_ack([]) is None


def test_a_hole_in_a_capture_is_no_stream() -> None:
    whole = [packet(0, 100, 10), packet(1, 105, 10), packet(2, 115, 1)]
    assert pcap.stream_bytes(whole) == bytes(16)
    with pytest.raises(ValueError, match=r"misses bytes 10\.\.15"):
        pcap.stream_bytes([whole[0], whole[2]])


def test_an_interval_and_an_end_select_packets() -> None:
    flow = [packet(1, 0, 1), packet(2, 1, 1), replace(packet(3, 2, 1), src="c", flags=FIN | SYN)]
    assert pcap.select(flow, src="a", after_ns=1_500_000) == [flow[1]]
    assert pcap.select(flow, dport=2, before_ns=2_000_000) == flow[:2]
    assert pcap.select(flow, src="c")[0].end == 5


def test_a_torn_file_ends_with_its_last_whole_record(tmp_path: Path) -> None:
    frame = ipv4(tcp())
    head = struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1)
    record = struct.pack("<IIII", 3, 7, len(frame), len(frame)) + frame
    path = tmp_path / "torn.pcap"
    path.write_bytes(head + record + record[:-1])
    assert [found.ts_ns for found in pcap.read(path)] == [3_000_007_000]
    path.write_bytes(head[:10])
    assert pcap.read(path) == []
