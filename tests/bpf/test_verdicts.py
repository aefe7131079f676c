"""Every verdict of hold and gate: packet in, map state, verdict, packet out, counters, note.

One row is one packet (or a few, in order, where the first ones make the state). What a row does not name must
not happen: counters are compared as a whole, a packet that is not answered must come out unchanged where it
passes.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from bpf_loader import clear, runner
from bpf_packets import Packet, mark_of, reply_to, sk_buff
from midstream_agent.bpf import TestRun
from midstream_agent.hold import Hold
from midstream_agent.hold_layout import (
    ADDR_LEAVING,
    CTL,
    CTL_TIMESTAMPS,
    FLOW_FROZEN,
    FLOW_HELD,
    FLOW_LIVE,
    FLOW_MOVED,
    MARK_ANSWER,
    NOTE,
    NOTE_DATA,
    NOTE_DATA_MAX,
    NOTE_FIN,
    NOTE_RST,
    NOTE_RST_SEEN,
    NOTE_SEG,
    NOTE_TS,
)

PASS, DROP, REDIRECT = 2**32 - 1, 2, 7
TEST_SKB_CHECKSUM_COMPLETE = 4  # linux/bpf.h: BPF_F_TEST_SKB_CHECKSUM_COMPLETE
SND_NXT, RCV_NXT, TSVAL = 5000, 1000, 777

V4 = Packet()
V6 = Packet(src="2001:db8::7", dst="2001:db8:77::100")
DATA = V4.but(flags="PA", payload=b"request")
NOTE_FIELDS = (
    "version", "flags", "seq", "ack", "window", "tsval", "tsecr", "data_seq", "data_len", "absorbed",
        "answered",
    "rst_seq", "data",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    name: str
    packet: Packet
    verdict: int
    counters: Mapping[str, int]
    state: int = FLOW_HELD
    before: tuple[Packet, ...] = ()  # packets that come first, in the same state
    frozen_before: tuple[Packet, ...] = ()  # packets that come first, in FROZEN
    out: Packet | None = None  # the packet that leaves; None: unchanged where it passes
    note: Mapping[str, object] = field(default_factory=dict)
    program: str = "ms_hold_ingress"
    mark: int = 0
    gso_size: int = 0
    ctl: Mapping[str, int] = field(default_factory=dict)
    flow: bool = True
    with_note: bool = True
    leaving: str = ""
    dead: bool = False


def answer(p: Packet, **changes: object) -> Packet:
    return reply_to(p, SND_NXT, RCV_NXT, TSVAL).but(**changes)


def answered(name: str, p: Packet, **kw: object) -> Row:
    """A row whose packet is absorbed in HELD and answered by a zero window."""
    out = kw.pop("out", None) or answer(p)
    counters = {"absorb_held": 1, "answer_zero_window": 1, **kw.pop("more", {})}  # type: ignore[dict-item]
    return Row(name, p, REDIRECT, counters, out=out, **kw)  # type: ignore[arg-type]


def silent(name: str, p: Packet, **kw: object) -> Row:
    """A row whose packet is absorbed without an answer."""
    counters = {"absorb_held": 1, **kw.pop("more", {})}  # type: ignore[dict-item]
    return Row(name, p, DROP, counters, **kw)  # type: ignore[arg-type]


def egress(p: Packet) -> Packet:
    """A packet of the pod's socket towards the client of `p`."""
    return p.but(src=p.dst, dst=p.src, sport=p.dport, dport=p.sport, seq=p.ack, ack=p.seq)


# MSS, SACK permitted, timestamps, NOP, window scale: as Linux sends them
SYN_OPTIONS = bytes.fromhex("020405b40402080a000000640000000001030307")
SACK = b"\x05\x0a" + bytes(8)
PROBE = V4.but(seq=RCV_NXT - 1)
DATA_FIN = DATA.but(flags="FPA")
BIG = DATA.but(payload=bytes(range(256)) * 12)  # a test run takes a page; test_live.py has larger ones
BIG_V6 = BIG.but(src=V6.src, dst=V6.dst)
HOP_BY_HOP = (0, b"\x00" + bytes([1, 4, 0, 0, 0, 0]))
DST_OPTS = (60, b"\x01" + bytes([1, 12]) + bytes(12))
ROUTING = (43, b"\x00" + bytes(6))
ATOMIC = (44, b"\x00" + struct.pack("!HI", 0, 7))
FRAG_FIRST = (44, b"\x00" + struct.pack("!HI", 1, 7))
FRAG_LATER = (44, b"\x00" + struct.pack("!HI", 8 << 3 | 1, 7))

HELD = [
    answered("zero-length probe before rcv_nxt", PROBE, note={"flags": NOTE_SEG | NOTE_TS, "answered": 1}),
    answered("one-byte probe at rcv_nxt", V4.but(payload=b"x"), note={"data": b"x", "data_seq": RCV_NXT}),
    answered("keepalive with a garbage byte", PROBE.but(payload=b"\0"), note={"data_len": 0}),
    answered("data at rcv_nxt", DATA, note={"data": b"request", "data_seq": RCV_NXT, "data_len": 7,
        "ack": 5000}),
    answered("data beyond the window", DATA.but(seq=RCV_NXT + 90_000), note={"data_len": 0,
        "seq": RCV_NXT + 90_000}),
    answered("data behind a hole", DATA.but(seq=RCV_NXT + 1), note={"data_len": 0}),
    answered("retransmit of what was received", DATA.but(seq=RCV_NXT - 7), note={"data_len": 0}),
    answered("retransmit across rcv_nxt is trimmed", DATA.but(seq=RCV_NXT - 3),
             note={"data": b"uest", "data_seq": RCV_NXT}),
    answered("data without timestamps on a flow without", DATA.but(ts=None), ctl={"flags": 0},
             out=reply_to(DATA.but(ts=None), SND_NXT, RCV_NXT, None), note={"flags": NOTE_SEG | NOTE_DATA}),
    answered("data with timestamps on a flow without", DATA, ctl={"flags": 0},
             out=reply_to(DATA, SND_NXT, RCV_NXT, None)),
    answered("data without timestamps on a flow with", DATA.but(ts=None)),
    answered("FIN at rcv_nxt", V4.but(flags="FA"),
             note={"flags": NOTE_SEG | NOTE_TS | NOTE_FIN, "data_seq": RCV_NXT, "data_len": 0}),
    answered("FIN behind kept data", V4.but(flags="FA", seq=RCV_NXT + 7), before=(DATA,),
             more={"absorb_held": 2, "answer_zero_window": 2}, note={"data": b"request", "fin": False}),
    answered("FIN on data at rcv_nxt", DATA_FIN, note={"data": b"request", "fin": True}),
    answered("FIN beyond a hole is not noted", DATA_FIN.but(seq=RCV_NXT + 7), note={"fin": False,
        "data_len": 0}),
    answered("FIN of data that is cut is not noted", BIG.but(flags="FA"), note={"fin": False,
        "data_len": 2048}),
    answered("old FIN", V4.but(flags="FA", seq=RCV_NXT - 1), note={"fin": False, "data_len": 0}),
    answered("SYN of a client that restarted", V4.but(flags="S", ack=0, seq=99),
             note={"flags": 0, "absorbed": 1, "answered": 1}),
    answered("SYN with an odd option order", V4.but(flags="S", tcp_options=SYN_OPTIONS),
             out=answer(V4)),
    answered("longer segment replaces a shorter", DATA, before=(DATA.but(payload=b"req"),),
             more={"absorb_held": 2, "answer_zero_window": 2}, note={"data": b"request"}),
    answered("shorter segment does not replace a longer", DATA.but(payload=b"r", ts=(101, 51)),
        before=(DATA,),
             more={"absorb_held": 2, "answer_zero_window": 2}, note={"data": b"request", "tsval": 101}),
    answered("sequence numbers wrap", DATA.but(seq=2**32 - 3, ack=2**32 - 9),
             ctl={"rcv_nxt": 2**32 - 1, "snd_nxt": 2**32 - 9},
             out=reply_to(DATA, 2**32 - 9, 2**32 - 1, TSVAL), note={"data": b"quest", "data_seq": 2**32 - 1}),
    answered("ack beyond what was sent is not noted", DATA.but(ack=SND_NXT + 1), more={"skewed": 1},
             note={"flags": 0, "absorbed": 1}),
    answered("seq out of any window is not noted", DATA.but(seq=RCV_NXT + 2**31 - 5), more={"skewed": 1},
             note={"flags": 0}),
    answered("Ethernet padding is no payload", PROBE.but(padding=b"\xaa" * 6), note={"data_len": 0}),
    answered("IPv4 options", DATA.but(ip_options=b"\x01" * 8), note={"data": b"request"}),
    answered("VLAN tag", DATA.but(vlan=[(0x8100, 5)]), note={"data": b"request"}),
    answered("two VLAN tags", DATA.but(vlan=[(0x88A8, 5), (0x8100, 6)]), note={"data": b"request"}),
    answered("largest kept segment", DATA.but(payload=bytes(2048)), note={"data_len": 2048}),
    answered("jumbo frame", DATA.but(payload=b"j" * 3333), note={"data": b"j" * 2048}),
    answered("GSO super-packet", BIG, gso_size=1448, note={"data": BIG.payload[:2048]}),
    answered("GSO super-packet, IPv6", BIG_V6, gso_size=1428, note={"data": BIG.payload[:2048]}),
    answered("GSO super-packet whose length field is 0", BIG.but(raw_total=0), gso_size=1448,
             note={"data": BIG.payload[:2048]}),
    answered("IPv6 data", DATA.but(src=V6.src, dst=V6.dst), note={"data": b"request"}),
    answered("IPv6 SYN", V6.but(flags="S", ts=None)),
    answered("IPv6 with extension headers", DATA.but(src=V6.src, dst=V6.dst, ext=[HOP_BY_HOP, ROUTING,
        DST_OPTS]),
             note={"data": b"request"}),
    answered("IPv6 atomic fragment", DATA.but(src=V6.src, dst=V6.dst, ext=[ATOMIC]),
        note={"data": b"request"}),
    answered("same hold on the NIC", DATA, program="ms_nic_ingress", note={"data": b"request"}),
    answered("no note entry", DATA, with_note=False, more={"note_missing": 1}),
    answered("FROZEN data covers rcv_nxt in HELD", DATA, frozen_before=(DATA.but(payload=b"requestmore"),),
             more={"absorb_frozen": 1}, note={"data": b"requestmore", "data_seq": RCV_NXT}),
    answered("FROZEN data beyond rcv_nxt gives way", DATA, frozen_before=(DATA.but(seq=RCV_NXT + 7),),
             more={"absorb_frozen": 1}, note={"data": b"request", "data_seq": RCV_NXT}),
    silent("pure ACK in window", V4, note={"flags": NOTE_SEG | NOTE_TS, "window": 512, "absorbed": 1,
        "answered": 0}),
    silent("window update", V4.but(window=900, ts=(101, 51)), before=(V4,), more={"absorb_held": 2},
           note={"window": 900, "tsval": 101}),
    silent("older ACK does not replace a newer", V4.but(ack=4000, window=1, ts=(90, 40)), before=(V4,),
           more={"absorb_held": 2}, note={"window": 512, "ack": 5000}),
    silent("pure ACK beyond rcv_nxt", V4.but(seq=RCV_NXT + 50), note={"seq": RCV_NXT + 50}),
    silent("no ACK flag", DATA.but(flags=""), more={"skewed": 1}, note={"flags": 0}),
    silent("RST out of place", V4.but(flags="R", seq=RCV_NXT + 1), note={"flags": 0}),
    silent("RST before rcv_nxt", V4.but(flags="RA", seq=RCV_NXT - 1), note={"flags": 0}),
    Row("RST at rcv_nxt", V4.but(flags="R"), DROP, {"dead_drop": 1}, note={"flags": NOTE_RST, "answered": 0}),
    Row("SYN on a dead, reused tuple", V4.but(flags="S", seq=77), DROP, {"dead_drop": 2},
        before=(V4.but(flags="RA"),), note={"flags": NOTE_RST, "absorbed": 2, "answered": 0}),
    Row("data on a dead flow", DATA, DROP, {"dead_drop": 2}, before=(V4.but(flags="R"),),
        note={"data_len": 0}),
    Row("RST while frozen counts when it was at rcv_nxt", V4.but(flags="S"), DROP, {"absorb_frozen": 1,
        "dead_drop": 1},
        frozen_before=(V4.but(flags="R"),), note={"flags": NOTE_RST}),
    answered("RST while frozen elsewhere does not", V4.but(flags="S"), frozen_before=(V4.but(flags="R",
        seq=9),),
             more={"absorb_frozen": 1}, note={"flags": 0}),
    Row("damaged data", DATA.but(bad_checksum=True), DROP, {"bad_checksum": 1}, note={"flags": 0,
        "absorbed": 0}),
    Row("damaged RST", V4.but(flags="R", bad_checksum=True), DROP, {"bad_checksum": 1}, note={"flags": 0}),
    Row("damaged jumbo frame", DATA.but(payload=b"j" * 3333, bad_checksum=True), DROP, {"bad_checksum": 1}),
    Row("first fragment", DATA.but(fragment=0x2000), DROP, {"fragment": 1}, note={"flags": 0}),
    Row("later fragment", DATA.but(fragment=0x2003), PASS, {"pass_unknown": 1}),
    Row("IPv6 first fragment", DATA.but(src=V6.src, dst=V6.dst, ext=[FRAG_FIRST]), DROP, {"fragment": 1}),
    Row("IPv6 later fragment", DATA.but(src=V6.src, dst=V6.dst, ext=[FRAG_LATER]), PASS, {"pass_unknown": 1}),
    Row("header length below five", DATA.but(raw_doff=4), DROP, {"malformed": 1}, note={"flags": 0}),
    Row("header longer than the packet", V4.but(raw_doff=15), DROP, {"malformed": 1}),
    Row("packet shorter than its length field", DATA.but(raw_total=600), DROP, {"malformed": 1}),
    Row("length field inside the TCP header", DATA.but(raw_total=30), DROP, {"malformed": 1}),
    Row("length field of 0 without GSO", DATA.but(raw_total=0), DROP, {"malformed": 1}),
    Row("TCP header cut short", DATA.but(truncate=14 + 20 + 12, raw_total=32), DROP, {"malformed": 1}),
    Row("option with length 0", V4.but(tcp_options=b"\x01\x05\x00\x00"), DROP, {"malformed": 1}),
    Row("option longer than the header", V4.but(tcp_options=b"\x01\x01\x05\x28"), DROP, {"malformed": 1}),
    silent("all NOPs", V4.but(tcp_options=b"\x01" * 40), note={"flags": NOTE_SEG}),
    silent("options end early", V4.but(tcp_options=b"\x00" + b"\xff" * 7), note={"flags": NOTE_SEG}),
    silent("timestamps behind other options", V4.but(tcp_options=SACK + b"\x08\x0a" + struct.pack("!II", 5,
        6) + b"\x01" * 4),
           note={"tsval": 5, "tsecr": 6}),
]  # fmt: skip

FROZEN = [
    Row("frozen: data is kept in silence", DATA, DROP, {"absorb_frozen": 1}, FLOW_FROZEN,
        note={"data": b"request", "data_seq": RCV_NXT, "absorbed": 1, "answered": 0}),
    Row("frozen: lowest segment stays", DATA.but(seq=RCV_NXT + 7), DROP, {"absorb_frozen": 2}, FLOW_FROZEN,
        before=(DATA,), note={"data": b"request", "data_seq": RCV_NXT}),
    Row("frozen: lower segment replaces", DATA, DROP, {"absorb_frozen": 2}, FLOW_FROZEN,
        before=(DATA.but(seq=RCV_NXT + 7),), note={"data_seq": RCV_NXT}),
    Row("frozen: bare FIN", V4.but(flags="FA"), DROP, {"absorb_frozen": 1}, FLOW_FROZEN,
        note={"fin": True, "data_len": 0, "data_seq": RCV_NXT}),
    Row("frozen: data displaces a bare FIN behind it", DATA, DROP, {"absorb_frozen": 2}, FLOW_FROZEN,
        before=(V4.but(flags="FA", seq=RCV_NXT + 7),), note={"fin": False, "data": b"request"}),
    Row("frozen: RST is remembered", V4.but(flags="R", seq=4242), DROP, {"absorb_frozen": 1}, FLOW_FROZEN,
        note={"flags": NOTE_RST_SEEN, "rst_seq": 4242}),
    Row("frozen: SYN", V4.but(flags="S"), DROP, {"absorb_frozen": 1}, FLOW_FROZEN, note={"flags": 0}),
    Row("frozen: probe is not answered", PROBE, DROP, {"absorb_frozen": 1}, FLOW_FROZEN),
    Row("frozen: egress", egress(DATA), DROP, {"gate_drop": 1}, FLOW_FROZEN, program="ms_gate_egress"),
    Row("frozen: a marked packet does not pass", answer(DATA), DROP, {"gate_drop": 1}, FLOW_FROZEN,
        program="ms_gate_egress", mark=MARK_ANSWER),
]  # fmt: skip

GATE = [
    Row("gate: data of a held flow", egress(DATA), DROP, {"gate_drop": 1}, program="ms_gate_egress"),
    Row("gate: RST of a held flow", egress(V4).but(flags="R"), DROP, {"gate_drop": 1},
        program="ms_gate_egress"),
    Row("gate: the hold's answer", answer(DATA), PASS, {"gate_pass_answer": 1}, program="ms_gate_egress",
        mark=MARK_ANSWER),
    Row("gate: the hold's answer, IPv6", answer(V6), PASS, {"gate_pass_answer": 1}, program="ms_gate_egress",
        mark=MARK_ANSWER),
    Row("gate: an answer without the mark", answer(DATA), DROP, {"gate_drop": 1}, program="ms_gate_egress"),
    Row("gate: marked, but acknowledges more", answer(DATA, ack=RCV_NXT + 1), DROP, {"gate_drop": 1},
        program="ms_gate_egress", mark=MARK_ANSWER),
    Row("gate: marked, but opens the window", answer(DATA, window=1), DROP, {"gate_drop": 1},
        program="ms_gate_egress", mark=MARK_ANSWER),
    Row("gate: marked data", answer(DATA, payload=b"x"), DROP, {"gate_drop": 1}, program="ms_gate_egress",
        mark=MARK_ANSWER),
    Row("gate: GSO super-packet", egress(BIG), DROP, {"gate_drop": 1}, program="ms_gate_egress",
        gso_size=1448),
    Row("gate: live flow", egress(DATA), PASS, {"pass_unknown": 1}, flow=False, program="ms_gate_egress"),
    Row("gate: moved flow", egress(V4).but(flags="R"), DROP, {"moved_drop": 1}, FLOW_MOVED,
        program="ms_gate_egress"),
    Row("gate: first fragment", egress(DATA).but(fragment=0x2000), DROP, {"gate_drop": 1},
        program="ms_gate_egress"),
    Row("gate: SYN from a leaving address", egress(V4).but(flags="S"), PASS, {"pass_unknown": 1}, flow=False,
        leaving=V4.dst, program="ms_gate_egress"),
]  # fmt: skip

OTHERS = [
    Row("moved: data", DATA, DROP, {"moved_drop": 1}, FLOW_MOVED, note={"absorbed": 0}),
    Row("moved: SYN", V4.but(flags="S"), DROP, {"moved_drop": 1}, FLOW_MOVED),
    Row("moved: on the NIC", DATA, DROP, {"moved_drop": 1}, FLOW_MOVED, program="ms_nic_ingress"),
    Row("live state passes", DATA, PASS, {"pass_unknown": 1}, FLOW_LIVE),
    Row("state of a later version passes", DATA, PASS, {"pass_unknown": 1}, 17),
    Row("unknown flow", DATA, PASS, {"pass_unknown": 1}, flow=False),
    Row("another port of a held client", DATA.but(sport=40001), PASS, {"pass_unknown": 1}),
    Row("SYN to a leaving address", V4.but(flags="S"), DROP, {"syn_leaving": 1}, flow=False, leaving=V4.dst),
    Row("SYN to a leaving address, IPv6", V6.but(flags="S"), DROP, {"syn_leaving": 1}, flow=False,
        leaving=V6.dst),
    Row("SYN to a leaving address, NIC", V4.but(flags="SEC"), DROP, {"syn_leaving": 1}, flow=False,
        leaving=V4.dst,
        program="ms_nic_ingress"),
    Row("SYN to another address", V4.but(flags="S"), PASS, {"pass_unknown": 1}, flow=False,
        leaving="10.77.0.101"),
    Row("SYN-ACK to a leaving address", V4.but(flags="SA"), PASS, {"pass_unknown": 1}, flow=False,
        leaving=V4.dst),
    Row("data to a leaving address", DATA, PASS, {"pass_unknown": 1}, flow=False, leaving=V4.dst),
    Row("UDP with the same numbers", DATA.but(protocol=17), PASS, {"pass_unknown": 1}),
    Row("IPv6 UDP", V6.but(protocol=17), PASS, {"pass_unknown": 1}),
    Row("IPv6 with nine extension headers", V6.but(ext=[HOP_BY_HOP] * 9), PASS, {"pass_unknown": 1}),
    Row("IPv6 extension chain cut short", V6.but(ext=[HOP_BY_HOP], truncate=14 + 42), PASS,
        {"pass_unknown": 1}),
    Row("ARP", V4.but(l3=bytes(28), macs=V4.macs), PASS, {"pass_unknown": 1}),
    Row("IPv4 with header length 4", DATA.but(raw_ihl=4), PASS, {"pass_unknown": 1}),
    Row("IPv4 whose header is longer than the packet", V4.but(raw_ihl=15, ts=None), PASS,
        {"pass_unknown": 1}),
    Row("three VLAN tags", DATA.but(vlan=[(0x8100, 1)] * 3), PASS, {"pass_unknown": 1}),
    Row("ports cut off", DATA.but(truncate=14 + 22), PASS, {"pass_unknown": 1}),
]  # fmt: skip

ROWS = HELD + FROZEN + GATE + OTHERS


def key_of(row: Row) -> bytes:
    p = row.packet
    if row.program == "ms_gate_egress":
        p = p.but(src=p.dst, dst=p.src, sport=p.dport, dport=p.sport)
    return p.but(sport=40000).key()


def ctl_of(row: Row, state: int) -> bytes:
    values = {"flags": CTL_TIMESTAMPS, "snd_nxt": SND_NXT, "rcv_nxt": RCV_NXT, "tsval": TSVAL, **row.ctl}
    return CTL.pack(state, values["flags"], values["snd_nxt"], values["rcv_nxt"], values["tsval"], 0, 0, 0)


def prepare(hold: Hold, row: Row, run: Callable[..., TestRun]) -> None:
    key = key_of(row)
    if row.leaving:
        hold.set_addr(row.leaving, ADDR_LEAVING)
    if row.flow and row.with_note:
        hold.create_notes(key, 1)
    if row.frozen_before:
        hold.set_flows(key, CTL.pack(FLOW_FROZEN, *[0] * 7), 1)
        for packet in row.frozen_before:
            run(row.program, packet.frame())
    if row.flow:
        hold.set_flows(key, ctl_of(row, row.state), 1)
    for packet in row.before:
        run(row.program, packet.frame())


def check_note(raw: bytes, expected: Mapping[str, object]) -> None:
    note = dict(zip(NOTE_FIELDS, NOTE.unpack(raw), strict=True))
    note["fin"] = bool(note["flags"] & NOTE_FIN)
    note["data"] = note["data"][: note["data_len"]]
    assert bool(note["flags"] & NOTE_DATA) == bool(note["data_len"])
    assert note["data_len"] <= NOTE_DATA_MAX
    assert note["version"] % 2 == 0
    assert {k: note[k] for k in expected} == expected


def check_row(row: Row, hold: Hold, run_program: Callable[..., TestRun], flags: int = 0) -> None:
    counters = hold.counters()
    prepare(hold, row, run_program)
    packet = row.packet.frame()
    segs = -(-len(row.packet.payload) // row.gso_size) if row.gso_size else 0
    ctx = sk_buff(mark=row.mark, gso_size=row.gso_size, gso_segs=segs)
    result = run_program(row.program, packet, ctx, flags=flags)

    assert result.retval == row.verdict
    changed = {k: n - counters[k] for k, n in hold.counters().items() if n != counters[k]}
    assert changed == row.counters
    if row.out is not None:
        assert result.data.hex(" ") == row.out.frame().hex(" ")
        assert mark_of(result.ctx) == MARK_ANSWER
    elif row.verdict == PASS:
        assert result.data == packet
        assert mark_of(result.ctx) == 0
    if row.note:
        check_note(hold.read_notes(key_of(row), 1), row.note)


def row_named(name: str) -> Row:
    return next(row for row in (*ROWS, *SAME_LENGTH) if row.name == name)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name.replace(" ", "-"))
def test_verdict(row: Row, hold: Hold, run_program: Callable[..., TestRun]) -> None:
    check_row(row, hold, run_program)


# The kernel keeps CHECKSUM_COMPLETE only where the answer is as long as the packet, so only these can tell.
SAME_LENGTH = [
    answered("probe", PROBE),
    answered("probe with IPv4 options", PROBE.but(ip_options=b"\x01" * 12)),
    answered("FIN", V4.but(flags="FA", ts=(2**32 - 1, 2**32 - 1))),
    answered("IPv6 probe", V6.but(seq=RCV_NXT - 1)),
    answered("IPv6 probe with extension headers", V6.but(seq=RCV_NXT - 1, ext=[HOP_BY_HOP, DST_OPTS])),
]


@pytest.mark.parametrize("row", SAME_LENGTH, ids=lambda r: r.name.replace(" ", "-"))
def test_answer_keeps_the_sum_of_a_nic_right(
    row: Row, hold: Hold, run_program: Callable[..., TestRun]
) -> None:
    """CHECKSUM_COMPLETE: the kernel compares skb->csum with the packet that comes out (EBADMSG)."""
    try:
        check_row(row, hold, run_program, flags=TEST_SKB_CHECKSUM_COMPLETE)
    except OSError as e:
        if e.errno == errno.EINVAL:
            pytest.skip("this kernel cannot make a CHECKSUM_COMPLETE packet for a test run (before 6.11)")
        raise


def test_programs_without_the_hold_pass_everything(loader: Callable[..., Path]) -> None:
    """Control: what the table demands is not what happens anyway."""
    with Hold.open(loader("--without-hold")) as hold:
        for row in ROWS:
            if row.verdict != PASS:
                with pytest.raises(AssertionError):
                    check_row(row, hold, runner(hold.bpffs))
            clear(hold)


# a fault put into the sources (file, old text, new text), and a row that must see it
FAULTS = {
    "answers pure ACKs": ("ms_answer.h", "return p->len ||", "return 1 || p->len ||", "pure ACK in window"),
    "acknowledges what it absorbs": (
        "ms_answer.h", "bpf_htonl(ctl->rcv_nxt)", "bpf_htonl(ctl->rcv_nxt + p->len)", "data at rcv_nxt",
    ),
    "believes every RST": (
        "ms_note.h", "p->seq == ctl->rcv_nxt ? flags | MS_NOTE_RST : flags", "flags | MS_NOTE_RST",
        "RST out of place",
    ),
    "answers the dead": ("ms_hold.h", "*answer = 0;", "", "SYN on a dead, reused tuple"),
    "keeps damaged data": ("ms_checksum.h", "return ms_fold(sum) == 0xffff", "return 1", "damaged data"),
    "notes the FIN of cut data": ("ms_note.h", "\t\tfin = 0;\n", "", "FIN of data that is cut is not noted"),
    "forgets the sum of a NIC": ("ms_answer.h", "\tms_csum_update(skb, l3_sum);\n", "", "IPv6 probe"),
    "trusts the mark": (
        "ms_hold.h", "p->ack == ctl->rcv_nxt", "1",
        "gate: marked, but acknowledges more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_table_sees_a_fault(fault: str, loader: Callable[..., Path], broken: Callable[..., Path]) -> None:
    file, old, new, row = FAULTS[fault]
    bpffs = loader("--sources", str(broken(file, old, new)))
    with Hold.open(bpffs) as hold:
        check_row(
            row_named("data at rcv_nxt" if row != "data at rcv_nxt" else "FIN at rcv_nxt"),
            hold,
            runner(bpffs),
        )
        clear(hold)
        # DROP where an answer was due, an answer where silence was, another packet out or another note
        with pytest.raises((AssertionError, OSError)):
            check_row(
                row_named(row), hold, runner(bpffs), TEST_SKB_CHECKSUM_COMPLETE if row == "IPv6 probe" else 0
            )
