"""Light packet records out of a pcap file: enough to judge a TCP flow, and nothing that parses twice.

Only what tests ask for is kept: Ethernet (with VLAN tags), IPv4 and IPv6 (with extension headers), TCP.
Sequence numbers are as on the wire. Payload is the length by the IP header: a short snaplen does not change
it, and `payload` then holds what was captured.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
ETH_IPV4, ETH_IPV6, ETH_VLAN, ETH_QINQ = 0x0800, 0x86DD, 0x8100, 0x88A8
IPV6_EXTENSIONS = {0, 43, 60}
IPV6_FRAGMENT = 44
_MAGIC = {0xA1B2C3D4: 1_000, 0xA1B23C4D: 1}  # unit of the fraction, in ns


@dataclass(frozen=True, slots=True)
class Packet:
    ts_ns: int  # CLOCK_REALTIME
    version: int  # 4 or 6
    src: str
    sport: int
    dst: str
    dport: int
    flags: int
    seq: int
    ack: int
    win: int  # unscaled
    length: int  # payload bytes
    payload: bytes
    tsval: int | None
    tsecr: int | None
    mss: int | None
    frame_length: int

    @property
    def flow(self) -> tuple[str, int, str, int]:
        return (self.src, self.sport, self.dst, self.dport)

    @property
    def end(self) -> int:
        """Sequence number after this segment."""
        return (self.seq + self.length + bool(self.flags & SYN) + bool(self.flags & FIN)) & 0xFFFFFFFF

    @property
    def rst(self) -> bool:
        return bool(self.flags & RST)

    @property
    def fin(self) -> bool:
        return bool(self.flags & FIN)

    @property
    def syn(self) -> bool:
        return bool(self.flags & SYN)


def records(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(ts_ns, length on the wire, captured bytes) of each complete record; a torn last one is left out."""
    data = path.read_bytes()
    if len(data) < 24:
        return
    order = "<" if struct.unpack_from("<I", data)[0] in _MAGIC else ">"
    unit = _MAGIC[struct.unpack_from(order + "I", data)[0]]
    offset, head = 24, struct.Struct(order + "IIII")
    while offset + 16 <= len(data):
        seconds, fraction, captured, length = head.unpack_from(data, offset)
        offset += 16
        if offset + captured > len(data):
            return
        yield seconds * 1_000_000_000 + fraction * unit, length, data[offset : offset + captured]
        offset += captured


def _ipv4(frame: bytes, at: int, wire: int) -> tuple[int, str, str, int, int] | None:
    """(version, src, dst, offset of TCP, its length by the header), None when it is not TCP or a later
    fragment."""
    if len(frame) < at + 20 or frame[at + 9] != 6 or struct.unpack_from("!H", frame, at + 6)[0] & 0x1FFF:
        return None
    head = (frame[at] & 15) * 4
    total = struct.unpack_from("!H", frame, at + 2)[0] or wire - at  # 0: a super-packet beyond 64 kB
    src, dst = (socket.inet_ntop(socket.AF_INET, frame[at + i : at + i + 4]) for i in (12, 16))
    return 4, src, dst, at + head, total - head


def _ipv6(frame: bytes, at: int, wire: int) -> tuple[int, str, str, int, int] | None:
    if len(frame) < at + 40:
        return None
    length = struct.unpack_from("!H", frame, at + 4)[0] or wire - at - 40
    kind, here = frame[at + 6], at + 40
    while kind in IPV6_EXTENSIONS and len(frame) >= here + 8:
        kind, here = frame[here], here + 8 * (frame[here + 1] + 1)
    if kind != 6:
        return None
    src, dst = (socket.inet_ntop(socket.AF_INET6, frame[at + i : at + i + 16]) for i in (8, 24))
    return 6, src, dst, here, at + 40 + length - here


def _options(frame: bytes, at: int, end: int) -> tuple[int | None, int | None, int | None]:
    """(TSval, TSecr, MSS) of a TCP header's options."""
    tsval = tsecr = mss = None
    end = min(end, len(frame))
    while at < end and frame[at] != 0:
        if frame[at] == 1:
            at += 1
            continue
        if at + 1 >= end or frame[at + 1] < 2 or at + frame[at + 1] > end:
            break
        if frame[at] == 8:
            tsval, tsecr = struct.unpack_from("!II", frame, at + 2)
        elif frame[at] == 2:
            mss = struct.unpack_from("!H", frame, at + 2)[0]
        at += frame[at + 1]
    return tsval, tsecr, mss


def parse(ts_ns: int, frame_length: int, frame: bytes) -> Packet | None:
    """One frame; None for what is no TCP."""
    at = 12
    while len(frame) >= at + 2 and struct.unpack_from("!H", frame, at)[0] in (ETH_VLAN, ETH_QINQ):
        at += 4
    kind = struct.unpack_from("!H", frame, at)[0] if len(frame) >= at + 2 else 0
    network = {ETH_IPV4: _ipv4, ETH_IPV6: _ipv6}.get(kind)
    found = network(frame, at + 2, frame_length) if network else None
    if found is None or len(frame) < found[3] + 20:
        return None
    version, src, dst, tcp, length = found
    sport, dport, seq, ack, offset, flags, win = struct.unpack_from("!HHIIBBH", frame, tcp)
    head = (offset >> 4) * 4
    options = _options(frame, tcp + 20, tcp + head)
    payload = frame[tcp + head : tcp + length]
    numbers = (flags, seq, ack, win, length - head)
    return Packet(ts_ns, version, src, sport, dst, dport, *numbers, payload, *options, frame_length)


def read(path: Path) -> list[Packet]:
    """Every TCP packet of a capture file, in the order of capture."""
    return [packet for entry in records(path) if (packet := parse(*entry)) is not None]


def select(
    packets: Iterable[Packet],
    *,
    src: str | None = None,
    sport: int | None = None,
    dst: str | None = None,
    dport: int | None = None,
    after_ns: int = 0,
    before_ns: int = 1 << 63,
) -> list[Packet]:
    """Those packets that agree with everything given; both ends of the interval belong to it."""
    wanted = (src, sport, dst, dport)
    return [
        packet
        for packet in packets
        if after_ns <= packet.ts_ns <= before_ns
        and all(want in (None, has) for want, has in zip(wanted, packet.flow, strict=True))
    ]


def flows(packets: Iterable[Packet]) -> dict[tuple[str, int, str, int], list[Packet]]:
    """Packets by direction of each connection: (src, sport, dst, dport)."""
    found: dict[tuple[str, int, str, int], list[Packet]] = {}
    for packet in packets:
        found.setdefault(packet.flow, []).append(packet)
    return found


def before(a: int, b: int) -> bool:
    """Sequence number a comes before b."""
    return 0 < (b - a) & 0xFFFFFFFF < 0x80000000


def payload_gaps_ns(packets: Iterable[Packet], *, new_only: bool = True) -> list[tuple[int, int]]:
    """(start of the gap, its length) between payload packets of one direction; retransmissions don't count as
    progress unless `new_only` is False."""
    gaps: list[tuple[int, int]] = []
    last_ns: int | None = None
    highest: int | None = None
    for packet in packets:
        if packet.length == 0 or (new_only and highest is not None and not before(highest, packet.end)):
            continue
        if last_ns is not None:
            gaps.append((last_ns, packet.ts_ns - last_ns))
        last_ns = packet.ts_ns
        highest = packet.end if highest is None or before(highest, packet.end) else highest
    return gaps


def max_ack(packets: Iterable[Packet]) -> int | None:
    """Highest acknowledgement number that one direction sent."""
    highest: int | None = None
    for packet in packets:
        if packet.flags & ACK and not packet.rst and (highest is None or before(highest, packet.ack)):
            highest = packet.ack
    return highest


def stream_bytes(packets: Iterable[Packet]) -> bytes:
    """The application's bytes of one direction, by sequence number; raises when the capture has a hole."""
    segments = [packet for packet in packets if packet.length and not packet.rst]
    if not segments:
        return b""
    first = segments[0].seq
    for packet in segments:
        first = packet.seq if before(packet.seq, first) else first
    stream = bytearray()
    for packet in sorted(segments, key=lambda packet: (packet.seq - first) & 0xFFFFFFFF):
        start = (packet.seq - first) & 0xFFFFFFFF
        if start > len(stream):
            raise ValueError(f"the capture misses bytes {len(stream)}..{start} of {packet.flow}")
        if len(packet.payload) != packet.length:
            raise ValueError("payload was cut off: capture with snaplen=0 to read streams")
        stream[start : start + packet.length] = packet.payload
    return bytes(stream)
