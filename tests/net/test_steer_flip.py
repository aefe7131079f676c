"""The instant in which the network moves an address, for those who send at full speed.

Until then a download leaves both nodes only in part (ms_copies of bpf/midstream_maps.h): what it sends the way that
leads nowhere is limited. From then on the other way leads nowhere. Nobody tells the nodes; they see it by the first
packet that comes to the other one of them. Two downloads, one by a stream that has moved, one by a stream that does
not move at all: neither may lose a byte or wait for a timer. What was on its way is repaired by fast retransmission.

No clock: a download that lives on its retransmission timer shows in the kernel's count of timeouts. One is let pass: a
machine that is busy enough is itself late by the 200 ms after which the kernel counts one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from hold_pod import stream as endless
from hold_world import HoldWorld, Info, Pair, Stream, borrow, until
from midstream_agent.hold import Hold

ENOUGH_BYTES = 128 << 20
"""What a download must have got in each stage: at a megabyte a second, which is what limited copies are, it never would
within the time that tests have."""
BATCHES, PROVED = "source.BATCHES.do.after", "target.MOVE_ADDRESS.do.after"


class Download:
    """A client that reads as fast as it can, in a thread of its own, and checks every byte."""

    def __init__(self, stream: Stream) -> None:
        self.received = 0
        self.wrong = ""
        self._stream = stream
        self._thread = threading.Thread(target=self._read, name=f"download {stream.port}")
        stream.say("get", bytes=1 << 40)
        self._thread.start()

    def _read(self) -> None:
        try:
            while data := self._stream.sock.recv(1 << 18):
                if data != endless(self.received, len(data)):
                    self.wrong = f"bytes {self.received} to {self.received + len(data)} differ"
                    return
                self.received += len(data)
            self.wrong = f"end of stream after {self.received} bytes"
        except OSError as e:
            self.wrong = self.wrong or f"{e} after {self.received} bytes"

    def goes_on(self) -> None:
        """So many bytes more, each of them right."""
        end = self.received + ENOUGH_BYTES
        until(lambda: self.received >= end or self.wrong, f"{ENOUGH_BYTES} bytes more than {end - ENOUGH_BYTES}")
        assert not self.wrong, self.wrong

    def close(self) -> None:
        self.wrong = "closed by the test"
        self._stream.sock.shutdown(2)
        self._thread.join()


@dataclass
class Flow:
    """A download, and the pod's end of it."""

    download: Download
    node: str
    world: HoldWorld
    pair: Pair
    stream: Stream

    def timeouts(self) -> int:
        """Retransmissions by a timer, of this connection since it is on this node."""
        with closing(borrow(self.world.serving(self.pair.pods[self.node]), self.stream.address, self.stream.port)) as s:
            return Info.of(s).total_rto

    def copies(self) -> tuple[int, int]:
        """Packets of the node that left both ways, and those that were spared that."""
        with Hold.open(self.world.agent(self.node).bpffs) as hold:
            counters = hold.counters()
        return counters["out_both"], counters["out_bulk"]


@pytest.fixture(params=[1500, 9001], ids=["mtu1500", "mtu9001"])
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[HoldWorld]:
    with HoldWorld.build(tmp_path, ["flip"], request.param, steer=True) as world:
        world.vpc.fabric.refuse = True  # nothing moves before the test says so; the target asks again and again
        yield world


def test_downloads_go_on_when_their_address_moves(world: HoldWorld) -> None:
    pair = world.pairs["flip"]
    streams = [world.connect(pair) for _ in range(2)]
    streams[1].say("stay")
    streams[1].echo("understood")
    with ExitStack() as stack:
        downloads = [stack.enter_context(closing(Download(s))) for s in streams]
        for node in world.fleet.agents:
            world.agent(node).arm(f"{BATCHES}=delay:1,{PROVED}=wait")
        job = world.hop(pair, "", "--switchover", "steer")
        job.wait(BATCHES)
        flows = [
            Flow(d, node, world, pair, s) for d, node, s in zip(downloads, ("node-b", "node-a"), streams, strict=True)
        ]
        timeouts = [f.timeouts() for f in flows]

        before = [f.copies() for f in flows]
        until(lambda: all(f.copies()[1] > b[1] for f, b in zip(flows, before, strict=True)), "a copy that was spared")
        world.vpc.fabric.refuse = False
        until(lambda: PROVED in world.agent("node-b").fired(), PROVED)  # moved and proved; the agents have said nothing
        for flow in flows:
            flow.download.goes_on()
        before = [f.copies() for f in flows]
        for flow in flows:
            flow.download.goes_on()
        for flow, (both, spared) in zip(flows, before, strict=True):
            assert flow.copies()[0] > both, flow.node
            assert flow.copies()[1] == spared, f"{flow.node} still thinks that the address is where it was"

        world.agent("node-b").arm(f"{PROVED}=delay:1")
        until(lambda: PROVED in world.agent("node-b").fired()[1:], "the agent goes on")
        for flow in flows:
            flow.download.goes_on()
        assert all(f.timeouts() <= before + 1 for f, before in zip(flows, timeouts, strict=True))
        assert [d.wrong for d in downloads] == ["", ""]
    job.succeed()
