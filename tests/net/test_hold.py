"""A hold of a minute (LONG=1: fifteen) with clients that keep sending: nobody is reset, nothing is acknowledged that no
queue holds, everybody resumes.

Two jobs are held at the same time: one whose clients are answered by the source's node, one whose address has moved
already, so that the target's node answers. Clients sit outside the VPC, in it, and on both nodes.

Seen to fail: with answers that acknowledge what they absorb (`ack_seq` of ms_answer.h as the end of the segment).
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hold_pod import stream
from hold_world import HoldWorld, Job, Stream, Trace
from midstream_testbed import pcap
from midstream_testbed.capture import Capture

HOLD_S = 900.0 if os.environ.get("LONG") == "1" else 60.0
CHUNKS = {"blocked": 65_536, "now and then": 300}  # bytes a write: until the buffer is full, or every two seconds
pytestmark = pytest.mark.timeout(HOLD_S + 600)  # the first test waits for the fixture, which holds
AT = {"held-here": "source.EXPORT.do.after", "held-there": "source.MOVE_ADDRESS.do.after"}


@dataclass
class Sender:
    """A client that sends all the time, in puts that the server answers with a CRC each."""

    where: str
    kind: str
    stream: Stream
    stop: threading.Event = field(default_factory=threading.Event)
    crcs: list[int] = field(default_factory=list)
    error: BaseException | None = None

    def start(self) -> None:
        self.stream.sock.settimeout(HOLD_S + 60)
        self.thread = threading.Thread(target=self._run, name=f"{self.where} {self.kind}")
        self.thread.start()

    def _run(self) -> None:
        at, size = 0, CHUNKS[self.kind]
        try:
            while not self.stop.is_set():
                data = stream(at, size)
                self.stream.say("put", bytes=size)
                self.stream.sock.sendall(data)
                self.crcs.append(zlib.crc32(data))
                at += size
                self.stop.wait(0.02 if self.kind == "blocked" else 2.0)
        except OSError as e:
            self.error = e

    def finish(self) -> None:
        """All that was sent has arrived, once, in order."""
        self.stop.set()
        self.thread.join(60)
        assert not self.thread.is_alive(), f"{self.where} {self.kind}: still blocked"
        assert self.error is None, f"{self.where} {self.kind}: {self.error!r}"
        wanted = b"".join(b"%08x" % crc for crc in self.crcs)
        assert self.stream.read(len(wanted)) == wanted
        self.stream.echo("and a word")


@dataclass
class Held:
    """One job, held, with its senders and what the captures say of them."""

    name: str
    senders: list[Sender]
    job: Job
    frozen_ns: int
    rcv_nxt: dict[int, int]
    traces: dict[int, Trace] = field(default_factory=dict)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Held]]:
    """Both jobs, after a hold of HOLD_S and a successful end."""
    with HoldWorld.build(tmp_path_factory.mktemp("hold"), list(AT)) as world:
        captures = {
            where: [world.capture(place, i) for i in _interfaces(world, where)]
            for where, place in world.places().items()
        }
        injected = world.capture(world.b, "msinj1")
        jobs = [_begin(world, name) for name in AT]
        for one in jobs:
            one.job.succeed(HOLD_S + 60)
            for sender in one.senders:
                sender.finish()
        seen = {where: [p for capture in those for p in capture.stop()] for where, those in captures.items()}
        played = injected.stop()
        _check_complete([injected, *(capture for those in captures.values() for capture in those)])
        for packets in seen.values():
            packets.sort(key=lambda p: p.ts_ns)
        for one in jobs:
            for s in one.senders:
                one.traces[s.stream.port] = Trace.of(s.stream, seen[s.where], played, one.frozen_ns)
        yield {one.name: one for one in jobs}


def _interfaces(world: HoldWorld, where: str) -> list[str]:
    """Where a client's packets pass, once each: on a node also the pods' own interfaces, as no NIC is on the way."""
    if where not in world.vpc.hosts:
        return ["eth0"]
    return ["eth0", "eth1", *(pair.pods[where].host_ifname for pair in world.pairs.values())]


def _begin(world: HoldWorld, name: str) -> Held:
    pair = world.pairs[name]
    senders = [
        Sender(where, kind, world.connect(pair, family, place))
        for i, (where, place) in enumerate(world.places().items())
        for kind in CHUNKS
        for family in ((4, 6) if where == "outside" else (4 + 2 * (i % 2),))
    ]
    for sender in senders:
        sender.start()
    job = world.hop(pair, f"{AT[name]}=delay:{int(HOLD_S * 1000)}")
    job.wait(AT[name])
    frozen_ns, rcv_nxt = time.time_ns(), job.answers_with()
    if name == "held-there":
        assert rcv_nxt == {port: info.rcv_nxt for port, info in job.checkpoints().items()}
    return Held(name, senders, job, frozen_ns, rcv_nxt)


def _check_complete(captures: list[Capture]) -> None:
    for capture in captures:
        assert capture.dropped == 0, "a capture missed packets: nothing can be said"


NAMES = pytest.mark.parametrize("name", list(AT))


@NAMES
def test_no_client_is_reset(held: dict[str, Held], name: str) -> None:
    for trace in held[name].traces.values():
        assert [p for p in (*trace.ours, *trace.theirs) if p.rst or p.fin] == []


@NAMES
def test_clients_kept_sending_into_the_hold_and_were_answered(held: dict[str, Held], name: str) -> None:
    """Otherwise the other tests would say nothing."""
    for sender in held[name].senders:
        trace = held[name].traces[sender.stream.port]
        since = trace.live_ns - int(HOLD_S * 1e9 * 0.95)
        sent = pcap.select(trace.theirs, after_ns=since, before_ns=trace.live_ns)
        answers = pcap.select(trace.ours, after_ns=since, before_ns=trace.live_ns)
        print(f"{name} {sender.where} {sender.kind}: {len(sent)} packets into the hold, {len(answers)} answers")
        assert len(sent) >= 3 and len(answers) >= 3
        assert all(p.win == 0 and p.length == 0 for p in answers)


@NAMES
def test_nothing_is_acknowledged_that_the_checkpoint_does_not_hold(held: dict[str, Held], name: str) -> None:
    one = held[name]
    assert one.rcv_nxt.keys() == one.traces.keys()
    for port, trace in one.traces.items():
        rcv_nxt = one.rcv_nxt[port]
        beyond = [p for p in trace.ours if p.ts_ns < trace.live_ns and pcap.before(rcv_nxt, p.ack)]
        assert beyond == []
        assert pcap.max_ack(p for p in trace.ours if p.ts_ns < trace.live_ns) == rcv_nxt


@NAMES
def test_the_clients_resume_because_of_us(held: dict[str, Held], name: str) -> None:
    """Not because a probe of theirs came due: after a long hold those are up to two minutes apart."""
    for sender in held[name].senders:
        trace = held[name].traces[sender.stream.port]
        first = next(p for p in trace.after() if p.win)
        goes_on = next((p for p in trace.theirs if p.length and p.ts_ns > first.ts_ns), None)
        assert trace.by_timer(first.ts_ns) == []
        assert goes_on is not None, f"{sender.where} {sender.kind} sent nothing any more"
        print(
            f"{name} {sender.where} {sender.kind}: open after {(first.ts_ns - trace.live_ns) / 1e6:.2f} ms, "
            f"the client's next bytes after {(goes_on.ts_ns - trace.live_ns) / 1e6:.2f} ms"
        )
