"""What of a flow that leaves both ways goes the way that the network does not take yet: packets in order, each at its
time, and of each whether a copy went there.

The clock is the packet's own: programs are compiled that take its time stamp for the time of day.
"""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from bpf_loader import ROOT, runner
from bpf_packets import CLIENT_MAC, POD_MAC, Packet, sk_buff
from midstream_agent.bpf import Map, TestRun
from midstream_agent.hold import AddrEntry, Hold
from midstream_agent.hold_layout import (
    ADDR_ARRIVING,
    ADDR_CTL,
    ADDR_LEAVING,
    ADDR_OUT_DIRECT,
    ADDR_OUT_TUNNEL,
    ADDR_SYN_HERE,
    ADDR_TUNNEL,
    COPIES,
    COPIES_MAX,
    COPY_BURST,
    COPY_NS_BYTE,
    COPY_PAUSE_NS,
)
from test_steering import PASS, PEER, POD_IFINDEX, REDIRECT, VNI, configured, udp

LO = socket.if_nametoindex("lo")
US = 1000
BULK = Packet(src="10.77.0.100", dst="198.51.100.7", sport=443, dport=40000, macs=CLIENT_MAC + POD_MAC,
              payload=bytes(2048))  # fmt: skip
TOKENS = BULK.but(payload=bytes(800))  # each millisecond: nearly what is refilled
ACK = BULK.but(payload=b"")
BULK6 = BULK.but(src="2001:db8:77::100", dst="2001:db8::7")
REQUEST = Packet()
BOTH = ADDR_OUT_TUNNEL | ADDR_OUT_DIRECT | ADDR_TUNNEL | ADDR_SYN_HERE
CLOCK = ("bpf_ktime_get_ns()", "skb->tstamp")
START_NS = 1_000_000_000


class At(NamedTuple):
    ns: int
    packet: Packet
    both: bool
    """Left both ways; otherwise the one way that leads somewhere."""
    seq: int | None = None
    """None: what follows the flow's last one."""


def full(packet: Packet = BULK) -> int:
    """So many of them use up a burst: the one that finds a byte left of it may go."""
    return -(-COPY_BURST // len(packet.frame()))


FULL = full()
DEBT_NS = (FULL * len(BULK.frame()) - COPY_BURST) * COPY_NS_BYTE
"""A burst is used up: the next copy may go after this time."""


def train(count: int, both: bool, packet: Packet = BULK, start_ns: int = 0, step_ns: int = US) -> list[At]:
    return [At(start_ns + i * step_ns, packet, both) for i in range(count)]


def datagram(length: int) -> Packet:
    """Two kilobytes on the wire; where TCP has its seq, each has a number of its own."""
    l3 = udp(BULK, 53, 53)
    return BULK.but(l3=l3[:24] + (8 + length).to_bytes(2, "big") + l3[26:], padding=bytes(2048))


USED_NS = FULL * US
USED = train(FULL, True)
LAST_NS = USED_NS + 19 * US
SPARED = train(20, False, start_ns=USED_NS)
ENDS = [At(USED_NS + i, BULK.but(flags=flags), True) for i, flags in enumerate(("FA", "R", "RA", "SA"))]

TRAINS: dict[str, list[At]] = {
    "a burst goes both ways, what follows it one way": [*USED, *SPARED],
    "IPv6": [*train(full(BULK6), True, BULK6), *train(20, False, BULK6, full(BULK6) * US)],
    "a sparse flow goes both ways for ever": train(400, True, TOKENS, step_ns=COPY_PAUSE_NS // 2),
    "what was used is refilled": [
        *USED, At(DEBT_NS // 2, BULK, False), At(DEBT_NS + US, BULK, True), At(DEBT_NS + 2 * US, BULK, False)],
    "a packet after a pause starts anew, as a probe for a lost tail": [
        *USED, *SPARED, *train(FULL, True, start_ns=LAST_NS + COPY_PAUSE_NS),
        *train(20, False, start_ns=LAST_NS + COPY_PAUSE_NS + USED_NS)],
    "what is sent again goes both ways": [
        *USED, *SPARED, *(At(LAST_NS + i * US, BULK, True, BULK.seq + 100 * i) for i in range(200)),
        At(LAST_NS + 200 * US, BULK, False)],
    "the end of the newest segment, too": [
        *USED, *SPARED, At(LAST_NS, BULK, True, BULK.seq + (FULL + 20) * len(BULK.payload) - 1)],
    "an acknowledgement is nothing that is sent again": [*USED, *SPARED, *train(50, False, ACK, LAST_NS)],
    "one after a shorter pause does not": [*USED, *SPARED, At(LAST_NS + DEBT_NS // 2, BULK, False)],
    "each flow has its own": [
        *USED, *train(FULL, True, BULK.but(dport=40001, seq=10**9), USED_NS), At(2 * USED_NS, BULK, False)],
    "the first and the last word go both ways": [*USED, *ENDS, At(USED_NS + 9, BULK, False)],
    "datagrams go both ways": [At(i, datagram(i), True) for i in range(50)],
}  # fmt: skip


def overlap(hold: Hold, state: int, seen: bool = False) -> None:
    """Addresses that may be on either node, and no flow that has said anything yet."""
    configured(hold)
    for address in (BULK.src, BULK6.src):
        hold.put_addr(address, AddrEntry(state, BOTH, VNI, PEER, POD_IFINDEX, POD_MAC))
    for key in hold.addr_keys() if seen else ():
        *fields, _, pad = ADDR_CTL.unpack(hold._addrs.lookup(key) or b"")
        hold._addrs.update(key, ADDR_CTL.pack(*fields, 1, pad))
    with Map.pinned(hold.bpffs / "ms_copies") as copies:
        slots = b"".join(slot.to_bytes(4, sys.byteorder) for slot in range(COPIES_MAX))
        copies.update_many(slots, bytes(COPIES_MAX * COPIES.size), COPIES_MAX)


def check(packets: list[At], hold: Hold, state: int = ADDR_ARRIVING) -> None:
    """Each packet in turn; the address is as the caller made it."""
    run = runner(hold.bpffs)
    one_way = (REDIRECT, {"out_bulk": 1, "tunnel_out": 1}) if state == ADDR_ARRIVING else (PASS, {"out_bulk": 1})
    ends: dict[bytes, int] = {}
    for number, at in enumerate(packets):
        before = hold.counters()
        seq = ends.get(at.packet.key(), at.packet.seq) if at.seq is None else at.seq
        if at.seq is None:
            ends[at.packet.key()] = seq + len(at.packet.payload)
        result = run("ms_nic_egress", at.packet.but(seq=seq).frame(), sk_buff(ifindex=LO, tstamp=START_NS + at.ns))
        counted = {k: n - before[k] for k, n in hold.counters().items() if n != before[k]}
        expected = (PASS, {"out_both": 1}) if at.both else one_way
        assert (result.retval, counted) == expected, f"packet {number}, at {at.ns} ns"


@pytest.fixture(scope="module")
def variant(loader: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Pinned programs of ours with changes: (old text, new text) of ms_steer.h."""

    def make(*changes: tuple[str, str]) -> Path:
        folder = tmp_path_factory.mktemp("sources") / "bpf"
        shutil.copytree(ROOT / "bpf", folder)
        steer = folder / "ms_steer.h"
        text = steer.read_text()
        for old, new in (CLOCK, *changes):
            assert text.count(old) == 1, f"{text.count(old)} times {old!r}"
            text = text.replace(old, new)
        steer.write_text(text)
        return loader("--sources", str(folder))

    return make


@pytest.fixture(scope="module")
def clocked(variant: Callable[..., Path]) -> Iterator[Hold]:
    with Hold.open(variant()) as hold:
        yield hold


@pytest.mark.parametrize("state", [ADDR_ARRIVING, ADDR_LEAVING], ids=["target", "source"])
@pytest.mark.parametrize("name", TRAINS)
def test_copies_of_a_flow_are_limited(name: str, state: int, clocked: Hold) -> None:
    overlap(clocked, state)
    check(TRAINS[name], clocked, state)


def test_a_bulk_flow_is_never_silent_the_other_way(clocked: Hold) -> None:
    """A hundred milliseconds at 20 MB/s: a burst goes there, and what is refilled meanwhile."""
    overlap(clocked, ADDR_ARRIVING)
    run, before, length = runner(clocked.bpffs), clocked.counters()["out_both"], len(BULK.frame())
    for i, at in enumerate(train(1000, True, step_ns=100 * US)):
        run("ms_nic_egress", BULK.but(seq=i * len(BULK.payload)).frame(), sk_buff(ifindex=LO, tstamp=START_NS + at.ns))
    copies = clocked.counters()["out_both"] - before
    refilled = 1000 * 100 * US // COPY_NS_BYTE
    assert COPY_BURST + refilled - length <= copies * length <= COPY_BURST + refilled + length


def test_all_goes_both_ways_once_the_network_has_brought_a_packet_to_the_target(clocked: Hold) -> None:
    overlap(clocked, ADDR_ARRIVING)
    check([*USED, *SPARED], clocked)
    runner(clocked.bpffs)("ms_nic_ingress", REQUEST.frame(), sk_buff(ifindex=LO))
    check(train(200, True, start_ns=LAST_NS), clocked)
    check(TRAINS["IPv6"], clocked)  # another address, of which none has come


def test_a_new_stage_of_the_address_is_limited_again(clocked: Hold) -> None:
    overlap(clocked, ADDR_ARRIVING, seen=True)
    check(train(200, True), clocked)
    overlap(clocked, ADDR_ARRIVING)
    check([*USED, *SPARED], clocked)


def test_all_goes_both_ways_once_the_peer_has_steered_a_packet_back(clocked: Hold) -> None:
    """That such a packet is seen is shown with a real tunnel, in tests/net/test_steer_flip.py."""
    overlap(clocked, ADDR_LEAVING, seen=True)
    check(train(200, True), clocked, ADDR_LEAVING)


def test_packets_of_a_leaving_address_say_nothing_while_the_network_brings_them_here(clocked: Hold) -> None:
    overlap(clocked, ADDR_LEAVING)
    runner(clocked.bpffs)("ms_nic_ingress", REQUEST.frame(), sk_buff(ifindex=LO))
    check([*USED, *SPARED], clocked, ADDR_LEAVING)


def test_flows_that_share_a_slot_are_limited_too_little_and_never_too_much(variant: Callable[..., Path]) -> None:
    with Hold.open(variant(("flow & (MS_COPIES_MAX - 1)", "flow & 0"))) as hold:
        overlap(hold, ADDR_ARRIVING)
        tokens = At(USED_NS + 20 * US, BULK.but(dport=40001, payload=b"token"), True)
        check([*USED, *SPARED, tokens, *train(FULL, True, start_ns=USED_NS + 21 * US)], hold)


def test_the_time_of_day_is_the_kernels(hold: Hold, run_program: Callable[..., TestRun]) -> None:
    """With the programs as they are; how many copies go depends on how busy the machine is."""
    overlap(hold, ADDR_ARRIVING)
    before = hold.counters()
    run_program("ms_nic_egress", ACK.frame(), sk_buff(ifindex=LO), repeat=10_000)
    counted = {k: n - before[k] for k, n in hold.counters().items() if n != before[k]}
    assert counted["out_both"] >= full(ACK)
    assert counted["out_bulk"] == counted["tunnel_out"] > 0
    assert counted["out_both"] + counted["out_bulk"] == 10_000


# a fault put into the sources (old text, new text), and the packets that must see it
FAULTS = {
    "copies everything": ("return 0;\n\tc->full_ns", "return 1;\n\tc->full_ns",
                          "a burst goes both ways, what follows it one way"),
    "copies nothing": ("\tc->full_ns = full + (u64)skb->len * MS_COPY_NS_BYTE;\n\treturn 1;", "\treturn 0;",
                       "a sparse flow goes both ways for ever"),
    "knows no pause": ("!known || (s64)(now - c->last_ns) >= MS_COPY_PAUSE_NS || ", "!known || ",
                       "a packet after a pause starts anew, as a probe for a lost tail"),
    "takes all flows for one": ("known = c->flow == flow;", "known = 1;", "each flow has its own"),
    "spares what is sent again": ("if (known && ms_before(seq, c->end))\n\t\treturn 1;", "",
                                  "what is sent again goes both ways"),
    "takes an acknowledgement for something sent again": ("ms_before(seq, c->end)", "!ms_before(c->end, seq)",
                                                          "an acknowledgement is nothing that is sent again"),
    "spares the last word": ("!(r->flags & (MS_TCP_SYN | MS_TCP_FIN | MS_TCP_RST))", "1",
                             "the first and the last word go both ways"),
    "spares datagrams": ("return r->tcp && ", "return ", "datagrams go both ways"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_packets_see_a_fault(fault: str, variant: Callable[..., Path]) -> None:
    old, new, name = FAULTS[fault]
    shared = [("flow & (MS_COPIES_MAX - 1)", "flow & 0")] if "all flows" in fault else []
    with Hold.open(variant((old, new), *shared)) as hold:
        overlap(hold, ADDR_ARRIVING)
        with pytest.raises(AssertionError):
            check(TRAINS[name], hold)
