"""The target's side of a migration: blank sockets, restore, activation; or all of it thrown away.

    NEW --prepare--> PREPARED --ship--> RESTORED --commit--> ACTIVATED --finish--> gone
                        |                   |
                        +------discard------+--> DISCARDED

RESTORED, ACTIVATED and DISCARDED are journalled before the act. A job that is RESTORED stays so, held, when its
session breaks or this agent restarts: only the source's COMMIT or DISCARD (or the proof that the source's node is
gone) moves it on. A job that is only PREPARED is undone as soon as its session ends: no checkpoint has come yet.
Its addresses are arrival.py's business, its KV arriving_kv.py's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import struct
import time
from dataclasses import dataclass, field

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import failpoints, pods, tcp
from midstream_agent.announce import responder_for
from midstream_agent.arrival import Arrival
from midstream_agent.arriving_kv import ArrivingKv
from midstream_agent.bring_up import bring_up, merge_notes
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.greeting import check_mtu, check_same_software, fds_of, greet, listening_ports
from midstream_agent.handoff import HandoffClient
from midstream_agent.hold import FLOW_HELD
from midstream_agent.journal import Journal
from midstream_agent.node import Attached, Node
from midstream_agent.transit import Transit

log = logging.getLogger(__name__)

NEW, PREPARED, RESTORED, ACTIVATED, DISCARDED = "NEW", "PREPARED", "RESTORED", "ACTIVATED", "DISCARDED"
FURTHER = "FURTHER"
GONE = "GONE"  # in the journal: the source's node, by proof


@dataclass(slots=True)
class TargetJob:
    """One job at the target. Owns its fds, its handoff connection and its namespace fd."""

    node: Node
    job_id: str
    source_node: str
    source_boot_id: str
    state: str = NEW
    at: Attached | None = None
    handoff: HandoffClient | None = None
    kv: ArrivingKv = field(init=False)
    """Of all batches of the job."""
    arrival: Arrival = field(init=False)
    """Its addresses, shared by all batches of the job."""
    journal: Journal | None = None
    pod_version: int = 0
    ports: set[int] = field(default_factory=set)
    families: list[int] = field(default_factory=list)
    blanks: list[int] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """What failed, for each stream that could not be made live."""
    batch: tcp.Batch | None = None
    keys: bytes = b""
    streams: int = 0
    activate_ms: float = 0.0
    sessions: int = 0  # open now: a broken one may end after the next has begun
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    parent: TargetJob | None = None
    """The job of which this is a further batch: addresses, tunnel and KV are its business."""
    live: bool = False
    """The sockets are seated; the pod may not know yet."""
    further: int = 0
    """Streams of further batches that are over."""
    gone: str = ""
    """What proves that the source's node is gone; then this job is remembered for ever."""

    def __post_init__(self) -> None:
        self.arrival = Arrival(self.node, self.job_id)
        self.kv = ArrivingKv(self.node, self.job_id, self.source_node)

    def part_of(self, parent: TargetJob) -> None:
        """A further batch of that job."""
        self.parent, self.arrival, self.kv = parent, parent.arrival, parent.kv

    # -- PREPARE ---------------------------------------------------------------------------------------

    async def prepare(self, req: pb.PeerPrepare) -> pb.PeerPrepared:
        if self.state not in (NEW, PREPARED):
            raise Final("job_state", f"job {self.job_id} is {self.state} here: it cannot be prepared again")
        check_mtu(self.node.settings.nic.mtu_bytes, req.mtu_bytes)
        await self._attach(req)
        assert self.at is not None
        if self.parent is None:
            await self.arrival.take(self.at, list(req.addresses))
            self.arrival.choose_switchover(req.tunnel if req.HasField("tunnel") else None)
        self.state = PREPARED
        await self._blank(list(req.families))
        reply = pb.PeerPrepared(node_addresses=self.node.settings.node_addresses)
        await self.kv.expect(self.at, req, self.pod_version, reply)
        self._open_journal()
        if (transit := self.arrival.transit) is not None:
            reply.tunnel.address = responder_for(transit.peer, self.node.settings.node_addresses)
            reply.tunnel.vni = transit.vni
        return reply

    async def _attach(self, req: pb.PeerPrepare) -> None:
        if self.at is None:
            self.at = await self.node.attach_pod(req.pod.uid)
            sock = pods.connect_handoff(self.at.pod, self.node.settings.handoff_path)
            self.handoff = HandoffClient(sock, self.node.settings.timeouts.handoff_s)
        hello = await greet(self.handoff, self.node.settings.node)
        try:
            check_same_software(hello.header, req)
            self.ports, self.pod_version = listening_ports(hello.header), int(hello.header["version"])
            missing = sorted(set(req.ports) - self.ports)
            if missing:
                raise Final(
                    "target_not_listening", f"the target pod does not listen on port {missing}: same pod template?"
                )
            if hello.header.get("pool") and self.parent is None:
                self.kv.open_pool(hello)
        finally:
            hello.close()

    async def _blank(self, families: list[int]) -> None:
        """Sockets made by the pod itself: its uid, cgroup, namespace and label stay on them."""
        assert self.handoff is not None and self.at is not None
        self._close_blanks()
        answer = await self.handoff.ask("blank", {"job": self.job_id, "families": families})
        self.blanks = answer.take_fds(len(families))
        for i, refusal in enumerate(pods.check_blank_fds(self.at.pod, self.blanks)):
            if refusal:
                raise Final("blank_refused", f"blank socket {i} of the target pod: {refusal}")
        self.families = families

    # -- SEND (the source's word; here: restore) -------------------------------------------------------

    async def restore(self, req: pb.PeerShip) -> pb.PeerRestored:
        if self.state == RESTORED:
            return pb.PeerRestored()
        if self.state != PREPARED:
            raise Final("job_state", f"job {self.job_id} is {self.state} here: nothing can be restored")
        self.batch = tcp.Batch.decode(req.checkpoints)
        self.keys, ctls = self._checked_entries(req.streams)
        await self._match_blanks()
        self.node.hold.create_notes(self.keys, self.streams)
        self.node.hold.set_flows(self.keys, ctls, self.streams)
        self.node.forget_conntrack(self.keys)
        began = time.perf_counter()
        _raise_first(self.batch.restore(self.blanks), "restore")
        restore_us = (time.perf_counter() - began) * 1e6 / max(self.streams, 1)
        reply = pb.PeerRestored(restore_us=restore_us)
        began = time.perf_counter()
        await self._stage(req, await self.kv.slots_of(req, reply))
        reply.stage_ms = (time.perf_counter() - began) * 1e3
        await failpoints.point("target.RESTORE.do.before")
        self._journal_restored(req)
        self.state = RESTORED
        await failpoints.point("target.RESTORE.do.after")
        return reply

    def _checked_entries(self, streams: int) -> tuple[bytes, bytes]:
        """What the checkpoints claim, held against what this job was prepared for."""
        assert self.batch is not None
        self.streams = len(self.batch)
        if self.streams != streams:
            raise Final("checkpoint_count", f"{self.streams} checkpoints came for {streams} streams: refused")
        keys, ctls = self.batch.flow_entries(FLOW_HELD)
        allowed = {tcp.mapped(a) for a in self.arrival.addresses}
        for i in range(self.streams):
            key = keys[i * tcp.KEY_BYTES : (i + 1) * tcp.KEY_BYTES]
            port = struct.unpack_from("!H", key, 32)[0]
            if key[:16] not in allowed or port not in self.ports:
                raise Final(
                    "checkpoint_foreign", f"checkpoint {i} is for an address or port that this pod does not serve"
                )
        return keys, ctls

    async def _match_blanks(self) -> None:
        """Streams that ended since PREPARE change the list; ask for exactly what is needed."""
        assert self.batch is not None
        families = self.batch.families()
        if families != self.families:
            await self._blank(families)

    async def _stage(self, req: pb.PeerShip, slots: list[int]) -> None:
        assert self.handoff is not None
        fields = {"job": self.job_id, "slots": slots, "count": self.streams}
        await self.handoff.ask("stage", fields, req.state)

    def _journal_restored(self, req: pb.PeerShip) -> None:
        assert self.journal is not None
        self.journal.blob_path("checkpoints").write_bytes(req.checkpoints)
        self.journal.decide(RESTORED)

    def _open_journal(self) -> None:
        """In PREPARE already: creating a file takes longer than writing to one, and clients wait later."""
        assert self.at is not None
        if self.journal is not None:
            self.journal.remove()
        transit = self.arrival.transit
        facts = {
            "pod": self.at.pod.uid,
            "addresses": self.arrival.addresses,
            "added": self.arrival.added if self.parent is None else [],
            "source": self.source_node,
            "source_boot_id": self.source_boot_id,
            "part_of": self.parent.job_id if self.parent is not None else "",
            "tunnel": {"peer": transit.peer, "vni": transit.vni} if transit is not None else None,
        }
        self.journal = Journal.create(self.node.journal_folder, "target", self.job_id, facts)

    # -- MOVE_ADDRESS ----------------------------------------------------------------------------------

    async def move_address(self, req: pb.PeerMoveAddress) -> pb.PeerAddressMoved:
        """Answer for the addresses from now on, and prove that the network agrees."""
        if self.at is None:
            raise Final("target_lost", f"the pod of job {self.job_id} has gone, and with it what had moved to it")
        if self.state not in (RESTORED, ACTIVATED):
            raise Final("job_state", f"job {self.job_id} is {self.state} here: its addresses stay where they are")
        return pb.PeerAddressMoved(took_ms=await self.arrival.move(req))

    # -- COMMIT ----------------------------------------------------------------------------------------

    async def activate(self, req: pb.PeerCommit) -> pb.PeerActivated:
        """The point of no return was crossed at the source: these flows live here now. Idempotent."""
        if self.state == ACTIVATED:
            self._let_syns_in()  # this agent may have died before it did
            return self._activated()
        if self.state != RESTORED:
            raise Final("job_state", f"job {self.job_id} is {self.state} here: it was never restored")
        if self.handoff is None:
            raise Final("target_lost", f"the pod of job {self.job_id} has gone, and its sockets with it")
        assert self.journal is not None and self.batch is not None
        began = time.perf_counter()
        await failpoints.point("target.ACTIVATE.do.before")
        self.journal.decide(ACTIVATED)
        await failpoints.point("target.ACTIVATE.do.journalled")
        if not self.live:  # a session that broke right here has made them live already
            notes = merge_notes(req.notes, self.node.hold.read_notes(self.keys, self.streams), self.streams)
            self._go_live(notes)
            self.live = True
        await self._tell_activate()
        self.state = ACTIVATED
        self.node.metrics.arrived.inc(self.streams - len(self.broken))
        self.activate_ms = (time.perf_counter() - began) * 1e3
        await failpoints.point("target.ACTIVATE.do.after")
        self._close_blanks()
        self._let_syns_in()
        self.node.hold.delete_notes(self.keys, self.streams)
        return self._activated()

    async def _tell_activate(self) -> None:
        """The pod serves the streams now; a new connection where an earlier request was cut off."""
        assert self.at is not None and self.handoff is not None
        try:
            if self.handoff.broken:
                self.handoff.close()
                self.handoff = HandoffClient(
                    pods.connect_handoff(self.at.pod, self.node.settings.handoff_path),
                    self.node.settings.timeouts.handoff_s,
                )
            await self.handoff.ask("activate", {"job": self.job_id})
        except Retryable as e:
            if self.at.pod.pids():
                raise
            self._close_blanks()
            text = f"the pod of job {self.job_id} has gone before it could serve its streams: they are lost"
            raise Final("target_lost", text) from e

    def _go_live(self, notes: bytes) -> None:
        """No await in here: it is what every client waits for."""
        assert self.batch is not None
        here = self.arrival.transit is not None
        self.broken = bring_up(self.node, self.batch, self.blanks, self.keys, notes, thaw=False, here=here)

    def _let_syns_in(self) -> None:
        if self.parent is None:
            self.arrival.let_syns_in()

    def _activated(self) -> pb.PeerActivated:
        return pb.PeerActivated(streams=self.streams, activate_ms=self.activate_ms, broken=self.broken)

    async def keep_addresses(self) -> None:
        """The source is gone for good (takeover.py): there is nobody that packets could be steered to or from."""
        await self.kv.close()
        self.arrival.settle()
        self.close()

    # -- the ends --------------------------------------------------------------------------------------

    async def discard(self) -> None:
        """Throw the checkpoint away; blanks are in repair, closing them says nothing. Idempotent."""
        if self.state == DISCARDED:
            return
        if self.state == ACTIVATED:
            raise Final("job_state", f"job {self.job_id} is live here: it cannot be discarded any more")
        if self.journal is not None and self.journal.decided(RESTORED):
            self.journal.decide(DISCARDED)
        await failpoints.point("target.DISCARD.do.before")
        if self.parent is None:
            self.arrival.give_back()
        self._close_blanks()
        if self.handoff is not None and self.state != NEW:
            await self._tell_discard()
        if self.keys:
            self.node.hold.delete_flows(self.keys, self.streams)
            self.node.hold.delete_notes(self.keys, self.streams)
        if self.parent is None:
            await self.arrival.unplumb()
        self.state = DISCARDED
        await self.finish()

    async def _tell_discard(self) -> None:
        assert self.handoff is not None
        try:
            await self.handoff.ask("discard", {"job": self.job_id})
        except Retryable as e:
            # a pod that has gone took its blanks with it: closed in repair, so in silence
            log.warning("job %s: the target pod did not hear the discard: %s", self.job_id, e)

    async def finish(self) -> None:
        """Forget the job: nobody will ask for it again."""
        if self.parent is None:
            await self.kv.close()
            await self.arrival.end(settle=self.state == ACTIVATED)
        self._close_blanks()
        if self.journal is not None:
            self.journal.remove()
            self.journal = None
        self.close()

    def count_further(self, streams: int) -> None:
        """A further batch is over; journalled, for whoever asks when the source cannot be asked any more."""
        self.further += streams
        if self.journal is not None:
            self.journal.decide(FURTHER, streams=self.further)

    def close(self) -> None:
        if self.handoff is not None:
            self.handoff.close()
            self.handoff = None
        if self.parent is None:
            self.kv.close_pool()
        if self.at is not None:
            self.at.close()
            self.at = None

    def _close_blanks(self) -> None:
        for fd in self.blanks:
            os.close(fd)
        self.blanks = []

    # -- after a restart of the agent ------------------------------------------------------------------

    @classmethod
    async def reopen(cls, node: Node, journal: Journal) -> TargetJob:
        """A job of an earlier agent process of this boot; a pod that has gone meanwhile leaves `at` empty."""
        facts = journal.facts
        job = cls(node, facts["job"], facts["source"], facts["source_boot_id"], state=PREPARED, journal=journal)
        job.arrival.addresses, job.arrival.added = facts["addresses"], facts["added"]
        job.further = (journal.decided(FURTHER) or {}).get("streams", 0)
        job.gone = (journal.decided(GONE) or {}).get("evidence", "")
        try:
            job.at = job.arrival.at = await node.attach_pod(facts["pod"])
            if tunnel := facts.get("tunnel"):
                job.arrival.transit = Transit(node, job.at, job.arrival.addresses, tunnel["peer"], tunnel["vni"])
            sock = pods.connect_handoff(job.at.pod, node.settings.handoff_path)
            job.handoff = HandoffClient(sock, node.settings.timeouts.handoff_s)
            hello = await greet(job.handoff, node.settings.node)
            job.ports = listening_ports(hello.header)
            hello.close()
        except MidstreamError as e:
            log.error("job %s: its pod cannot be reached after the restart: %s", job.job_id, e)
        return job

    async def reacquire(self) -> None:
        """A restored job: its sockets are held in the pod, its checkpoints lie beside the journal."""
        assert self.journal is not None
        self.state = RESTORED
        self.batch = tcp.Batch.decode(self.journal.blob_path("checkpoints").read_bytes())
        self.streams = len(self.batch)
        self.keys, _ = self.batch.flow_entries(FLOW_HELD)
        if self.handoff is None:
            return
        self.blanks = await fds_of(self.handoff, self.job_id)
        if not self.blanks and self.journal.decided(ACTIVATED):
            self.state = ACTIVATED  # the pod had them already: only our answer was lost
            self.node.hold.delete_notes(self.keys, self.streams)

    def own_leftovers(self) -> None:
        """Entries of a job that died between making them and journalling RESTORED."""
        ours = {tcp.mapped(a) for a in self.arrival.addresses}
        keys = [k for k in self.node.hold.flow_keys() if k[:16] in ours]
        self.keys, self.streams = b"".join(keys), len(keys)


def _raise_first(errors: list[int], what: str) -> None:
    for i, error in enumerate(errors):
        if error:
            raise Final(f"{what}_failed", f"socket {i}: {tcp.strerror(error)}")
