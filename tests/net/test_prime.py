"""At the target the client speaks first: PRIME and PLAY reach the pod through the host's forwarding path.

A stateful filter that meets a restored connection must see a packet of its client before one of the pod, or it takes
the pod for the one who connects: the testbed's policy then drops what it says (counter pod_first) and the SNAT rule
rewrites it (counter snatted). The streams here are such that the pod speaks right after the migration, and the client
never does by itself.
"""

from __future__ import annotations

import itertools
import json
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from bytes_client import pattern
from midstream_testbed import pcap
from midstream_testbed.capture import Capture
from midstream_testbed.machine import Host
from midstream_testbed.pcap import Packet
from world import PORT, V4, V6, World

INJECTOR = "msinj1"
STREAMS_A_PLACE = 3
FAMILIES = pytest.mark.parametrize("address", [V4, V6], ids=["v4", "v6"])
Flow = tuple[str, int]  # the client's address and port


@pytest.fixture(params=["world", "small_world"], ids=["mtu9001", "mtu1500"])
def any_world(request: pytest.FixtureRequest) -> World:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, World)
    return found


@contextmanager
def talkers(world: World, address: str, up: int = 1) -> Iterator[dict[Flow, socket.socket]]:
    """Streams from every place: the pod sends a few single bytes, rests for ever, and goes on when it has moved."""
    request = {"seed": 7, "up": up, "down": 5000, "chunk": 1, "read_pause_s": 0.0, "write_pause_s": 1e6}
    found: dict[Flow, socket.socket] = {}
    try:
        for place in world.places().values():
            for _ in range(STREAMS_A_PLACE):
                sock = place.connect(address, PORT)
                found[sock.getsockname()[:2]] = sock
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.sendall(json.dumps(request).encode() + b"\n")
                sock.settimeout(20)
                assert sock.recv(1) == pattern(8)[:1]
        yield found
    finally:
        for sock in found.values():
            # what is unread would end it with an RST; here that is all the same
            sock.close()


@contextmanager
def watched(world: World) -> Iterator[tuple[Host, Capture, Capture]]:
    """The host that the next hop reaches, what its injector plays, and what its pod's eth0 sees."""
    host, pod = world.agent(world.away).host, world.pods[world.away]
    with host.capture(INJECTOR) as played, pod.capture() as seen:
        yield host, played, seen


def drain(streams: dict[Flow, socket.socket]) -> None:
    """What came so far, so that the next byte is a later one."""
    for sock in streams.values():
        sock.setblocking(False)
        with suppress(BlockingIOError):
            while sock.recv(65536):
                pass
        sock.settimeout(20)


def hop(world: World) -> None:
    report = world.hop()
    assert report["phase"] == "PHASE_SUCCEEDED", report["output"]


def by_client(capture: Capture) -> dict[Flow, list[Packet]]:
    """A capture's packets of either direction, by client."""
    packets: dict[Flow, list[Packet]] = {}
    for p in capture.stop():
        client = (p.src, p.sport) if p.dport == PORT else (p.dst, p.dport)
        packets.setdefault(client, []).append(p)
    assert capture.dropped == 0
    return packets


def tracked(host: Host, address: str) -> set[tuple[str, str, str, str]]:
    """conntrack's original direction (src, dst, sport, dport) of each connection of the floating IP."""
    family = "ipv6" if ":" in address else "ipv4"
    listing = host.run(["conntrack", "-L", "-f", family, "-p", "tcp"]).stdout
    found = re.findall(r"^tcp .*?src=(\S+) dst=(\S+) sport=(\d+) dport=(\d+)", listing, re.MULTILINE)
    return {entry for entry in found if address in entry[:2]}


def verdicts(world: World) -> dict[str, int]:
    """Packets that the rules of both hosts took for the pod's beginning, for invalid, or rewrote."""
    total: dict[str, int] = {}
    for host in (world.a, world.b):
        for name, count in host.counters().items():
            total[name] = total.get(name, 0) + count
    return total


@FAMILIES
def test_the_client_speaks_first_at_the_target(any_world: World, address: str) -> None:
    before = verdicts(any_world)
    with talkers(any_world, address) as streams:
        for _ in range(2):  # there and back: the way back meets the entries that the way there left
            drain(streams)
            with watched(any_world) as (host, played, seen):
                hop(any_world)
                for sock in streams.values():
                    assert sock.recv(1), "the pod went on and the client heard it"
            primes, arrived = by_client(played), by_client(seen)
            for client in streams:
                first, spoke = arrived[client][0], [p for p in arrived[client] if p.sport == PORT]
                assert (first.src, first.sport) == client, "the pod spoke first"
                assert _same(first, primes[client][0]), "what came first was not PRIME"
                assert first.flags == pcap.ACK and first.length == 0
                assert spoke, "the pod's answer was seen, so this test sees both directions"
                assert (client[0], address, str(client[1]), str(PORT)) in tracked(host, address)
    assert verdicts(any_world) == before


@FAMILIES
def test_what_a_client_sent_into_the_hold_is_played_to_the_pod(any_world: World, address: str) -> None:
    """Without it the client's retransmission timer decides; its packet would carry a later timestamp."""
    with talkers(any_world, address, up=20) as streams:
        source = any_world.agent(any_world.at)
        source.arm("source.SEND.do.before=delay:400")
        with watched(any_world) as (_, played, seen):
            drain(streams)
            job = any_world.hop_in_background()
            any_world.wait_fired(source.host.name, "source.SEND.do.before")
            for sock in streams.values():
                sock.sendall(pattern(7)[:20])
            assert any_world.wait_job(job) == "Succeeded"
            any_world.at = any_world.away
            for sock in streams.values():
                assert sock.recv(1)
        plays, arrived = by_client(played), by_client(seen)
        for client in streams:
            kept = [p for p in plays[client] if p.length]
            assert kept[0].payload == pattern(7)[:20]
            first = next(p for p in arrived[client] if p.length and p.dport == PORT)
            assert _same(first, kept[0]), "a retransmission of the client was sooner"


@FAMILIES
def test_without_the_injector_the_policy_drops_what_the_pod_says(world: World, address: str) -> None:
    """The control of this file: the same streams, and PRIME lost on its way, draw the counter that must stay 0."""
    with talkers(world, address) as streams:
        host = world.agent(world.away).host
        chain = f"type filter hook prerouting priority -400; iifname {INJECTOR} drop;"
        host.nft(f"table inet ms_lost {{\nchain c {{\n{chain}\n}}\n}}")
        try:
            before = host.counters()["pod_first"]
            hop(world)
            outside = [s for s in streams if s[0] in (world.outside.ipv4, world.outside.ipv6)]
            dropped = host.counters()["pod_first"] - before
            assert dropped >= len(outside), "what the pod said to clients outside the node passed all the same"
        finally:
            host.nft("delete table inet ms_lost")


def test_answers_keep_the_connections_clock(small_world: World) -> None:
    """A restored socket that hears a client before it is live answers with its host's clock; PAWS then kills it.

    Uploads at full speed, so that packets fall into every instant of an activation.
    """
    clients = [small_world.outside, small_world.inside]
    groups = [small_world.clients(c, 20, 900 + i, address=V6, kind="up", size=3_000_000, slow="writer", seconds=5.0)
              for i, c in enumerate(clients)]  # fmt: skip
    captures = [c.capture(snaplen=128) for c in clients]
    small_world.wait_streams(V6, 40)
    for _ in range(8):
        hop(small_world)
    for group in groups:
        assert group.finish()["errors"] == []
    jumps = [jump for capture in captures for jump in _jumps(capture)]
    assert jumps == []


def _jumps(capture: Capture) -> list[str]:
    """Where a server's timestamp runs ahead by more than the wall clock: seconds are far more than any hold."""
    packets = [p for p in capture.stop() if p.sport == PORT and p.tsval is not None]
    assert capture.dropped == 0 and len(packets) > 100
    found = []
    for flow in pcap.flows(packets).values():
        for a, b in itertools.pairwise(flow):
            ahead = struct.unpack("i", struct.pack("I", ((b.tsval or 0) - (a.tsval or 0)) & 0xFFFFFFFF))[0]
            if not -10_000 < ahead < 10_000:
                found.append(f"{b.flow} {a.tsval} -> {b.tsval}")
    return found


def _same(a: Packet, b: Packet) -> bool:
    def parts(p: Packet) -> tuple[Any, ...]:
        return p.flow, p.seq, p.ack, p.flags, p.tsval, p.tsecr, p.payload

    return parts(a) == parts(b)
