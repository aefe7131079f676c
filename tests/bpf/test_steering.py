"""Where packets go while an address is on its way: state of address and flow, packet in, verdict, packet out.

What comes out of the tunnel needs a tunnel's metadata, which a test run cannot have: `ms_tunnel_ingress` is tried
here with packets that have none (a forged one looks like that), and with real ones in tests/net/test_steer.py.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bpf_loader import clear, runner
from bpf_packets import CLIENT_MAC, POD_MAC, Packet, sk_buff
from midstream_agent.bpf import TestRun
from midstream_agent.hold import AddrEntry, Hold
from midstream_agent.hold_layout import (
    ADDR_ARRIVING,
    ADDR_GONE,
    ADDR_LEAVING,
    ADDR_OUT_DIRECT,
    ADDR_OUT_TUNNEL,
    ADDR_SETTLED,
    ADDR_SYN_HERE,
    ADDR_SYN_PEER,
    ADDR_TUNNEL,
    BIRTH,
    BORN_HERE,
    BORN_PEER,
    CTL,
    FLOW_FROZEN,
    FLOW_HELD,
    FLOW_HERE,
    FLOW_MOVED,
    MARK_TUNNEL,
)

PASS, DROP, REDIRECT = 2**32 - 1, 2, 7
LO = socket.if_nametoindex("lo")  # stands for the tunnel: a test run redirects nothing, a clone is really sent
PEER, VNI, POD_IFINDEX = "10.77.0.18", 4711, 99
NIC_MAC, GATEWAY4, GATEWAY6 = (bytes.fromhex(f"02000000000{n}") for n in (7, 8, 9))
PROBE_PORT = 9444

V4 = Packet(flags="PA", payload=b"request")
V6 = V4.but(src="2001:db8::7", dst="2001:db8:77::100")
SYN = V4.but(flags="S", ack=0, payload=b"")
SYN6 = V6.but(flags="S", ack=0, payload=b"")


def udp(p: Packet, sport: int, dport: int) -> bytes:
    """The IP packet of a datagram with the addresses of `p`."""
    src, dst = (ipaddress.ip_address(a).packed for a in (p.src, p.dst))
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28, 0, 0x4000, 64, 17, 0) + src + dst
    return head + struct.pack("!HHHH", sport, dport, 8, 0)


def icmp_error(about: Packet) -> bytes:
    """A router's "fragmentation needed" (RFC 792, 1191) about a packet of the floating IP."""
    inner = about.ip4()[:28]
    router, to = (ipaddress.ip_address(a).packed for a in ("192.0.2.1", about.src))
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(inner), 0, 0x4000, 64, 1, 0) + router + to
    return head + struct.pack("!BBHHH", 3, 4, 0, 0, 1400) + inner


def icmp6_error(about: Packet) -> bytes:
    inner = about.ip6()[:48]
    router, to = (ipaddress.ip_address(a).packed for a in ("2001:db8::1", about.src))
    head = struct.pack("!IHBB", 6 << 28, 8 + len(inner), 58, 64) + router + to
    return head + struct.pack("!BBHI", 2, 0, 0, 1400) + inner


def answer(p: Packet) -> Packet:
    """What the pod says to the client of `p`."""
    return p.but(src=p.dst, dst=p.src, sport=p.dport, dport=p.sport, macs=CLIENT_MAC + POD_MAC)


def advertisement() -> bytes:
    """An unsolicited neighbour advertisement of the floating IP (RFC 4861)."""
    src, to = (ipaddress.ip_address(a).packed for a in (V6.dst, "ff02::1"))
    return struct.pack("!IHBB", 6 << 28, 24, 58, 255) + src + to + struct.pack("!BBHI", 136, 0, 0, 0) + src


@dataclass(frozen=True)
class Row:
    name: str
    program: str
    packet: Packet
    verdict: int
    counters: Mapping[str, int]
    state: int = 0
    """Of the address; 0: it is on no way."""
    flags: int = 0
    flow: int = 0
    birth: int = 0
    born: int = 0
    """What ms_births says of the packet's flow afterwards."""
    mark: int = 0
    macs: bytes = field(default=b"")
    """Of the packet that comes out; empty: unchanged."""


def nic(name: str, packet: Packet, verdict: int, **kw: object) -> Row:
    counters = {REDIRECT: {"tunnel_out": 1}, PASS: {"pass_unknown": 1}, DROP: {"syn_leaving": 1}}[verdict]
    return Row(name, "ms_nic_ingress", packet, verdict, kw.pop("counters", counters), **kw)  # type: ignore[arg-type]


def routed(name: str, packet: Packet, verdict: int, **kw: object) -> Row:
    """`verdict` PASS: handed to the pod, with the MACs of its link."""
    if verdict != PASS:
        counters = {REDIRECT: {"tunnel_out": 1}, DROP: {"syn_leaving": 1}}[verdict]
        return Row(name, "ms_route_egress", packet, verdict, kw.pop("counters", counters), **kw)  # type: ignore[arg-type]
    macs = POD_MAC + NIC_MAC
    return Row(name, "ms_route_egress", packet, REDIRECT, {"steer_local": 1}, macs=macs, **kw)  # type: ignore[arg-type]


def row(name: str, program: str, packet: Packet, verdict: int, counters: Mapping[str, int], **kw: object) -> Row:
    return Row(name, program, packet, verdict, counters, **kw)  # type: ignore[arg-type]


def out(name: str, packet: Packet, verdict: int, counters: Mapping[str, int], **kw: object) -> Row:
    return row(name, "ms_nic_egress", packet, verdict, counters, **kw)


LEAVING, SHARED = {"state": ADDR_LEAVING}, {"state": ADDR_LEAVING, "flags": ADDR_SYN_PEER}
ARRIVING, OPEN = {"state": ADDR_ARRIVING}, {"state": ADDR_ARRIVING, "flags": ADDR_SYN_HERE}
SETTLED, GONE = {"state": ADDR_SETTLED}, {"state": ADDR_GONE}

WHERE: list[tuple[str, Packet, int, dict[str, int]]] = [
    ("leaving: what has no entry is here", V4, PASS, LEAVING),
    ("leaving: IPv6", V6, PASS, LEAVING),
    ("leaving: MOVED goes to the peer", V4, REDIRECT, {**LEAVING, "flow": FLOW_MOVED}),
    ("leaving: MOVED, IPv6", V6, REDIRECT, {**LEAVING, "flow": FLOW_MOVED}),
    ("leaving: MOVED takes its SYN along", SYN, REDIRECT, {**SHARED, "flow": FLOW_MOVED}),
    ("leaving: a SYN is dropped in silence", SYN, DROP, LEAVING),
    ("shared: a SYN is the peer's", SYN, REDIRECT, {**SHARED, "born": BORN_PEER}),
    ("shared: a SYN is the peer's, IPv6", SYN6, REDIRECT, {**SHARED, "born": BORN_PEER}),
    ("shared: what follows such a SYN", V4, REDIRECT, {**SHARED, "birth": BORN_PEER, "born": BORN_PEER}),
    ("shared: what has no entry is here", V4, PASS, SHARED),
    ("arriving: what has no entry is the peer's", V4, REDIRECT, ARRIVING),
    ("arriving: IPv6", V6, REDIRECT, ARRIVING),
    ("arriving: HERE", V4, PASS, {**ARRIVING, "flow": FLOW_HERE}),
    ("arriving: a SYN is the peer's", SYN, REDIRECT, ARRIVING),
    ("open: a SYN is ours", SYN, PASS, {**OPEN, "born": BORN_HERE}),
    ("open: what follows such a SYN", V4, PASS, {**OPEN, "birth": BORN_HERE, "born": BORN_HERE}),
    ("open: what has no entry is the peer's", V4, REDIRECT, OPEN),
    ("settled: all is here", V4, PASS, SETTLED),
    ("settled: a SYN is here", SYN, PASS, SETTLED),
    ("gone: all is the peer's", V4, REDIRECT, GONE),
    ("gone: a SYN, too", SYN, REDIRECT, GONE),
    ("arriving: what is not TCP is here", V4.but(l3=udp(V4, 53, 53)), PASS, ARRIVING),
    ("leaving: a PMTU message of a MOVED flow", V4.but(l3=icmp_error(answer(V4))), REDIRECT,
     {**LEAVING, "flow": FLOW_MOVED}),
    ("leaving: a PMTU message of a flow that is here", V4.but(l3=icmp_error(answer(V4))), PASS, LEAVING),
    ("leaving: a PMTU message of a MOVED flow, IPv6", V6.but(l3=icmp6_error(answer(V6))), REDIRECT,
     {**LEAVING, "flow": FLOW_MOVED}),
]  # fmt: skip

ROWS = [
    *(nic(f"nic: {name}", packet, verdict, **kw) for name, packet, verdict, kw in WHERE),
    *(routed(f"routed: {name}", packet, verdict, **kw) for name, packet, verdict, kw in WHERE),
    nic("nic: no address on its way", V4, PASS),
    nic("nic: FROZEN is absorbed here", V4, DROP, **LEAVING, flow=FLOW_FROZEN, counters={"absorb_frozen": 1}),
    row("routed: HELD goes to the pod, whose hold answers", "ms_route_egress", V4, REDIRECT, {"steer_local": 1},
        **LEAVING, flow=FLOW_HELD, macs=POD_MAC + NIC_MAC),
    row("routed: no address on its way", "ms_route_egress", V4, DROP, {"tunnel_failed": 1}),
    row("routed: out of the tunnel and nobody's here", "ms_route_egress", V4, DROP, {"tunnel_loop": 1}, **GONE,
        mark=MARK_TUNNEL),
    row("routed: out of the tunnel, ours", "ms_route_egress", V4, REDIRECT, {"steer_local": 1}, **ARRIVING,
        flow=FLOW_HERE, mark=MARK_TUNNEL, macs=POD_MAC + NIC_MAC),
    row("routed: the agents' probe", "ms_route_egress", V4.but(l3=udp(V4, PROBE_PORT, PROBE_PORT)), REDIRECT,
        {"tunnel_out": 1}, **LEAVING),
    out("out: no address on its way", answer(V4), PASS, {}),
    out("out: directly", answer(V4), PASS, {}, **ARRIVING, flags=ADDR_OUT_DIRECT),
    out("out: through the tunnel", answer(V4), REDIRECT, {"tunnel_out": 1}, **ARRIVING, flags=ADDR_OUT_TUNNEL),
    out("out: through the tunnel, IPv6", answer(V6), REDIRECT, {"tunnel_out": 1}, **ARRIVING, flags=ADDR_OUT_TUNNEL),
    out("out: both", answer(V4), PASS, {"out_both": 1}, **ARRIVING, flags=ADDR_OUT_TUNNEL | ADDR_OUT_DIRECT),
    out("out: the proof of the path takes no tunnel", answer(V4).but(l3=udp(answer(V4), PROBE_PORT, PROBE_PORT)), PASS,
        {}, **ARRIVING, flags=ADDR_OUT_TUNNEL),
    out("out: an advertisement stays on its link", answer(V6).but(l3=advertisement()), PASS, {}, **ARRIVING,
        flags=ADDR_OUT_TUNNEL | ADDR_OUT_DIRECT),
    out("out: what is emitted for the peer", answer(V4), PASS, {}, **LEAVING, flags=ADDR_OUT_TUNNEL, mark=MARK_TUNNEL),
    row("tunnel: forged, for an address on its way", "ms_tunnel_ingress", V4, DROP, {"tunnel_peer": 1}, **ARRIVING),
    row("tunnel: forged, from one", "ms_tunnel_ingress", answer(V4), DROP, {"tunnel_peer": 1}, **LEAVING),
    row("tunnel: for no address of ours", "ms_tunnel_ingress", V4, DROP, {"tunnel_peer": 1}),
    row("tunnel: no IP", "ms_tunnel_ingress", V4.but(l3=b"\0" * 40, truncate=60), DROP, {"tunnel_peer": 1}),
]  # fmt: skip


@pytest.fixture
def node(hold: Hold) -> Iterator[Hold]:
    yield configured(hold)
    for address in (V4.dst, V6.dst):
        hold.end_births(address)


def configured(hold: Hold) -> Hold:
    hold.configure(nic_ifindex=LO, tunnel_ifindex=LO, probe_port=PROBE_PORT, nic_mac=NIC_MAC,
                   gateway_mac_v4=GATEWAY4, gateway_mac_v6=GATEWAY6)  # fmt: skip
    return hold


def key_of(given: Row) -> bytes:
    """Of the flow that the packet belongs to, or that it is about."""
    return (V6 if given.packet.v6 or ":" in given.packet.src else V4).key()


def check_row(row: Row, hold: Hold, run: Callable[..., TestRun]) -> None:
    key = key_of(row)
    if row.state:
        entry = AddrEntry(row.state, row.flags | ADDR_TUNNEL, VNI, PEER, POD_IFINDEX, POD_MAC)
        for address in (V4.dst, V6.dst):
            hold.put_addr(address, entry)
    if row.flow:
        hold.create_notes(key, 1)
        hold.set_flows(key, CTL.pack(row.flow, 0, 5000, 1000, 0, 0, 0, 0), 1)
    if row.birth:
        hold._births.update(key, BIRTH.pack(row.birth))
    counters = hold.counters()
    frame = row.packet.frame()
    result = run(row.program, frame, sk_buff(mark=row.mark, ifindex=LO))
    assert result.retval == row.verdict
    assert {k: n - counters[k] for k, n in hold.counters().items() if n != counters[k]} == row.counters
    if row.verdict != DROP:
        assert result.data == (row.macs + frame[12:] if row.macs else frame)
    born = hold._births.lookup(key)
    assert (BIRTH.unpack(born)[0] if born else 0) == row.born


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name.replace(" ", "-"))
def test_where_a_packet_goes(row: Row, node: Hold, run_program: Callable[..., TestRun]) -> None:
    check_row(row, node, run_program)


# a fault put into the sources (old text, new text), and a row that must see it
FAULTS = {
    "steers what came out of the tunnel": (
        "if (skb->mark == MS_MARK_TUNNEL)\n\t\treturn ms_drop(MS_R_TUNNEL_LOOP);", "",
        "routed: out of the tunnel and nobody's here",
    ),
    "believes every sender": (
        "if (addr && ms_is_peer(skb, addr)) {", "if (addr) {", "tunnel: forged, for an address on its way",
    ),
    "forgets what it has steered": (
        "return *birth == MS_BORN_PEER ? MS_WHERE_PEER : MS_WHERE_HERE;", "return MS_WHERE_HERE;",
        "nic: shared: what follows such a SYN",
    ),
    "sends advertisements through the tunnel": ("r.probe || r.local ||", "r.probe ||",
                                                "out: an advertisement stays on its link"),
    "keeps unknown flows of an arriving address": (
        "addr->state == MS_ADDR_ARRIVING || addr->state == MS_ADDR_GONE", "addr->state == MS_ADDR_GONE",
        "nic: arriving: what has no entry is the peer's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_table_sees_a_fault(fault: str, loader: Callable[..., Path], broken: Callable[..., Path]) -> None:
    old, new, name = FAULTS[fault]
    bpffs = loader("--sources", str(broken("ms_steer.h", old, new)))
    rows = {r.name: r for r in ROWS}
    with Hold.open(bpffs) as hold:
        check_row(rows["nic: no address on its way"], configured(hold), runner(bpffs))
        clear(hold)
        with pytest.raises(AssertionError):
            check_row(rows[name], hold, runner(bpffs))
