"""Packets for the table tests, byte by byte, with no code shared with what is tested."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

CLIENT_MAC, POD_MAC = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
FLAGS = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16, "U": 32, "E": 64, "C": 128}
TS_NONE: tuple[int, int] | None = None


def ones_sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(total)


@dataclass(frozen=True)
class Packet:
    """One TCP packet from `src` to `dst`. Fields that begin with `raw_` put a lie where a length would be."""

    src: str = "198.51.100.7"
    dst: str = "10.77.0.100"
    sport: int = 40000
    dport: int = 443
    seq: int = 1000
    ack: int = 5000
    flags: str = "A"
    window: int = 512
    ts: tuple[int, int] | None = (100, 50)
    payload: bytes = b""
    tcp_options: bytes | None = None  # instead of the timestamps
    ip_options: bytes = b""
    ext: Sequence[tuple[int, bytes]] = ()  # (header type, content without the next-header byte)
    fragment: int | None = None  # the 16 bits of IPv4's flags and offset
    vlan: Sequence[tuple[int, int]] = ()  # (TPID, TCI)
    macs: bytes = POD_MAC + CLIENT_MAC
    ttl: int = 57
    ident: int = 4711
    padding: bytes = b""
    raw_doff: int | None = None
    raw_total: int | None = None
    raw_ihl: int | None = None
    bad_checksum: bool = False
    truncate: int | None = None
    protocol: int = 6
    l3: bytes | None = field(default=None, repr=False)

    @property
    def v6(self) -> bool:
        return ":" in self.dst

    def but(self, **changes: object) -> Packet:
        return replace(self, **changes)  # type: ignore[arg-type]

    def tcp(self) -> bytes:
        options = self.tcp_options
        if options is None:
            options = b"" if self.ts is None else b"\x01\x01\x08\x0a" + struct.pack("!II", *self.ts)
        doff = self.raw_doff if self.raw_doff is not None else 5 + len(options) // 4
        flags = sum(FLAGS[f] for f in self.flags)
        header = struct.pack(
            "!HHIIBBHHH",
            self.sport,
            self.dport,
            self.seq % 2**32,
            self.ack % 2**32,
            doff << 4,
            flags,
            self.window,
            0,
            0,
        )
        segment = header + options + self.payload
        pseudo = ipaddress.ip_address(self.src).packed + ipaddress.ip_address(self.dst).packed
        check = 0xFFFF ^ ones_sum(pseudo + struct.pack("!II", len(segment), 6) + segment)
        check ^= 0x1234 if self.bad_checksum else 0
        return segment[:16] + struct.pack("!H", check) + segment[18:]

    def ip4(self) -> bytes:
        tcp = self.tcp()
        ihl = 5 + len(self.ip_options) // 4
        total = ihl * 4 + len(tcp) if self.raw_total is None else self.raw_total
        head = struct.pack(
            "!BBHHHBBH4s4s", 0x40 | (ihl if self.raw_ihl is None else self.raw_ihl), 0, total, self.ident,
            0x4000 if self.fragment is None else self.fragment, self.ttl, self.protocol, 0,
            ipaddress.ip_address(self.src).packed, ipaddress.ip_address(self.dst).packed,
        ) + self.ip_options  # fmt: skip
        return head[:10] + struct.pack("!H", 0xFFFF ^ ones_sum(head)) + head[12:] + tcp

    def ip6(self) -> bytes:
        types = [kind for kind, _ in self.ext] + [self.protocol]
        chain = b"".join(bytes([types[i + 1]]) + content for i, (_, content) in enumerate(self.ext))
        body = chain + self.tcp()
        total = len(body) if self.raw_total is None else self.raw_total
        head = struct.pack("!IHBB", 6 << 28, total, types[0], self.ttl)
        return head + ipaddress.ip_address(self.src).packed + ipaddress.ip_address(self.dst).packed + body

    def frame(self) -> bytes:
        ethertype = struct.pack("!H", 0x86DD if self.v6 else 0x0800)
        tags = b"".join(struct.pack("!HH", *tag) for tag in self.vlan)
        l3 = self.l3 if self.l3 is not None else self.ip6() if self.v6 else self.ip4()
        data = self.macs + tags + ethertype + l3 + self.padding
        return data if self.truncate is None else data[: self.truncate]

    def key(self) -> bytes:
        """struct ms_flow_key of a packet that comes in."""
        return _mapped(self.dst) + _mapped(self.src) + struct.pack("!HH", self.dport, self.sport)


def _mapped(ip: str) -> bytes:
    packed = ipaddress.ip_address(ip).packed
    return packed if len(packed) == 16 else bytes(10) + b"\xff\xff" + packed


def reply_to(p: Packet, seq: int, ack: int, tsval: int | None, **changes: object) -> Packet:
    """The answer that the hold should make of a packet."""
    ts = None if tsval is None else (tsval, p.ts[0] if p.ts else 0)
    return Packet(
        src=p.dst, dst=p.src, sport=p.dport, dport=p.sport, seq=seq, ack=ack, flags="A", window=0, ts=ts,
        ttl=64, ident=0, macs=p.macs[6:] + p.macs[:6], vlan=p.vlan,
    ).but(**changes)  # fmt: skip


def sk_buff(mark: int = 0, gso_size: int = 0, gso_segs: int = 0, ifindex: int = 0, tstamp: int = 0) -> bytes:
    """struct __sk_buff with the fields that BPF_PROG_TEST_RUN accepts."""
    ctx = bytearray(192)
    struct.pack_into("=I", ctx, 8, mark)
    struct.pack_into("=I", ctx, 40, ifindex)
    struct.pack_into("=Q", ctx, 152, tstamp)
    struct.pack_into("=I", ctx, 164, gso_segs)
    struct.pack_into("=I", ctx, 176, gso_size)
    return bytes(ctx)


def mark_of(ctx: bytes) -> int:
    return int(struct.unpack_from("=I", ctx, 8)[0])
