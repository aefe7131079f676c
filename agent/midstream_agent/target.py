"""The target's side of a migration: blank sockets, KV slots, restore, activation; or all of it thrown away.

    NEW --prepare--> PREPARED --ship--> RESTORED --commit--> ACTIVATED --finish--> gone
                        |                   |
                        +------discard------+--> DISCARDED

RESTORED, ACTIVATED and DISCARDED are journalled before the act. A job that is RESTORED stays so, held, when its
session breaks or this agent restarts: only the source's COMMIT or DISCARD (or the proof that the source's node is
gone) moves it on. A job that is only PREPARED is undone as soon as its session ends: no checkpoint has come yet.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import struct
import time
from dataclasses import dataclass, field

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import failpoints, pods, tcp
from midstream_agent.announce import responder_for
from midstream_agent.bring_up import bring_up, merge_notes
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.greeting import check_mtu, check_same_software, fds_of, greet, listening_ports
from midstream_agent.handoff import HandoffClient
from midstream_agent.hold import ADDR_LEAVING, FLOW_HELD
from midstream_agent.journal import Journal
from midstream_agent.kv import Geometry, PoolView
from midstream_agent.kv_target import NOT_HERE, KvTarget
from midstream_agent.node import Attached, Node
from midstream_agent.precopy import why_not
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
    pool: PoolView | None = None
    kv: KvTarget | None = None
    """Of all batches of the job."""
    journal: Journal | None = None
    addresses: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
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
    """The job of which this is a further batch: addresses and tunnel are its business."""
    transit: Transit | None = None
    live: bool = False
    """The sockets are seated; the pod may not know yet."""
    opened: bool = False
    moved: bool = False
    """The addresses are here, by proof."""
    further: int = 0
    """Streams of further batches that are over."""
    gone: str = ""
    """What proves that the source's node is gone; then this job is remembered for ever."""

    # -- PREPARE ---------------------------------------------------------------------------------------

    async def prepare(self, req: pb.PeerPrepare) -> pb.PeerPrepared:
        if self.state not in (NEW, PREPARED):
            raise Final("job_state", f"job {self.job_id} is {self.state} here: it cannot be prepared again")
        check_mtu(self.node.settings.nic.mtu_bytes, req.mtu_bytes)
        await self._attach(req)
        if self.parent is not None:
            self.addresses, self.transit = self.parent.addresses, self.parent.transit
        else:
            await self._take_addresses(list(req.addresses))
            self._choose_switchover(req)
        self.state = PREPARED
        await self._blank(list(req.families))
        reply = pb.PeerPrepared(node_addresses=self.node.settings.node_addresses)
        await (self.parent or self)._expect_kv(req, reply)
        self._open_journal()
        if self.transit is not None:
            reply.tunnel.address = responder_for(self.transit.peer, self.node.settings.node_addresses)
            reply.tunnel.vni = self.transit.vni
        return reply

    def _choose_switchover(self, req: pb.PeerPrepare) -> None:
        """The source offers a tunnel, or takes the offer back when no packet came through it."""
        assert self.at is not None
        if not req.HasField("tunnel") or self.node.tunnel is None:
            if self.transit is not None:
                self._end_transit()
            return
        if self.transit is None:
            self.transit = Transit(self.node, self.at, self.addresses, req.tunnel.address, req.tunnel.vni)
            self.transit.arrive()

    def _end_transit(self) -> None:
        """Packets of this host for the addresses go to the network again, as before the job."""
        assert self.transit is not None and self.at is not None
        for address in self.addresses:
            self.node.unroute(self.at, address)
        self.transit.retreat()
        self.transit = None

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
            if hello.header.get("pool") and self.pool is None and self.parent is None:
                self.pool = PoolView(hello.fds.pop(0), Geometry.parse(hello.header["pool"]), writable=True)
        finally:
            hello.close()

    async def _take_addresses(self, addresses: list[str]) -> None:
        """Plumb without a route: no packet of this host goes to the pod before the address has moved."""
        assert self.at is not None
        node = self.node
        if self.transit is not None:
            return  # asked again, for other streams
        taken = await node.net.run(node.net.routed_addresses)
        for address in addresses:
            if address in taken:
                raise Final(
                    "address_taken", f"{address} is routed to a pod of {node.settings.node} already: free it first"
                )
        node.address_comes_back(addresses)
        self.addresses = addresses
        for address in addresses:
            if await node.plumb(self.at, address, route=False):
                self.added.append(address)

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

    async def _expect_kv(self, req: pb.PeerPrepare, reply: pb.PeerPrepared) -> None:
        """Let the source's KV streams in, and have slots ready. What cannot come is computed again: no reason to
        refuse the streams."""
        if not req.kv_slots:
            return
        try:
            if self.kv is None and not (why := why_not(self._geometry(), req.pool_fingerprint, self.pod_version)):
                self.kv = self._open_kv()
            elif self.kv is None:
                reply.kv_reason = why
                return
            reply.kv_slots_free = await self.kv.reserve(req.kv_slots)
        except MidstreamError as e:
            log.warning("job %s: no KV can come: %s", self.job_id, e)
            reply.kv_reason = e.code
            return
        reply.kv_port, reply.kv_ticket = self.kv.port, self.kv.ticket

    def _geometry(self) -> Geometry | None:
        return self.pool.geometry if self.pool is not None else None

    def _open_kv(self) -> KvTarget:
        assert self.at is not None and self.pool is not None
        node = self.node
        sock = pods.connect_handoff(self.at.pod, node.settings.handoff_path)
        handoff = HandoffClient(sock, node.settings.timeouts.handoff_s)
        try:
            return KvTarget(node.kv_server, node.kv, handoff, self.job_id, self.source_node, self.pool)
        except BaseException:
            handoff.close()
            raise

    async def _slots_of(self, req: pb.PeerShip, reply: pb.PeerRestored) -> list[int]:
        """Where the streams' KV blocks are in the pod's pool; the reply says how many of those sent are not."""
        kv = (self.parent or self).kv
        slots = [NOT_HERE] * len(req.kv_ids)
        try:
            slots = await kv.slots_for(req.kv_ids) if kv is not None else slots
        except MidstreamError as e:
            log.warning("job %s: its KV cannot be used: %s", self.job_id, e)
            reply.kv_reason = e.code
        reply.kv_missing = sum(1 for number, slot in zip(req.kv_ids, slots, strict=True) if number and slot < 0)
        return slots

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
        await self._stage(req, await self._slots_of(req, reply))
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
        allowed = {tcp.mapped(a) for a in self.addresses}
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
        facts = {
            "pod": self.at.pod.uid,
            "addresses": self.addresses,
            "added": self.added,
            "source": self.source_node,
            "source_boot_id": self.source_boot_id,
            "part_of": self.parent.job_id if self.parent is not None else "",
            "tunnel": {"peer": self.transit.peer, "vni": self.transit.vni} if self.transit is not None else None,
        }
        self.journal = Journal.create(self.node.journal_folder, "target", self.job_id, facts)

    # -- MOVE_ADDRESS ----------------------------------------------------------------------------------

    async def move_address(self, req: pb.PeerMoveAddress) -> pb.PeerAddressMoved:
        """Answer for the addresses from now on, and prove that the network agrees."""
        if self.at is None:
            raise Final("target_lost", f"the pod of job {self.job_id} has gone, and with it what had moved to it")
        if self.state not in (RESTORED, ACTIVATED):
            raise Final("job_state", f"job {self.job_id} is {self.state} here: its addresses stay where they are")
        began = time.perf_counter()
        node = self.node
        if self.transit is not None:
            self.transit.overlap_arriving()
        for address in req.addresses if self.transit is None else ():
            # before COMMIT no connection may be accepted here: a rollback would take its address away
            node.hold.set_addr(address, ADDR_LEAVING)
            node.routes.add(address, self.at.link.index)
        node.nic.announce(list(req.addresses))
        await failpoints.point("target.MOVE_ADDRESS.do.before")
        timeout_s = node.settings.timeouts.address_confirm_s
        try:
            await asyncio.gather(*(self._prove(a, req, timeout_s) for a in req.addresses))
        except TimeoutError as e:
            raise Final("address_not_moved", f"{e}: the network did not move the address") from e
        await failpoints.point("target.MOVE_ADDRESS.do.after")
        if self.transit is not None:
            self.transit.own()
        self.moved = True
        return pb.PeerAddressMoved(took_ms=(time.perf_counter() - began) * 1e3)

    async def _prove(self, address: str, req: pb.PeerMoveAddress, timeout_s: float) -> None:
        await self.node.nic.prove(address, responder_for(address, req.probe_addresses), req.probe_port, timeout_s)

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
        here = self.transit is not None
        self.broken = bring_up(self.node, self.batch, self.blanks, self.keys, notes, thaw=False, here=here)

    def _activated(self) -> pb.PeerActivated:
        return pb.PeerActivated(streams=self.streams, activate_ms=self.activate_ms, broken=self.broken)

    def _let_syns_in(self) -> None:
        """New connections are this node's; packets of streams that are still at the source go there."""
        if self.parent is not None or self.opened:
            return
        self.opened = True
        if self.transit is not None:
            return self.transit.open()
        for address in self.addresses:
            self.node.hold.del_addr(address)

    # -- the source is gone for good (takeover.py) -----------------------------------------------------

    def take_addresses(self) -> None:
        """Whatever the network still thinks, packets for the addresses are this node's, and this node emits."""
        if self.moved or self.at is None:
            return
        if self.transit is not None:
            self.transit.own()
            self.opened = True
        for address in self.addresses if self.transit is None else ():
            self.node.routes.add(address, self.at.link.index)
        self.node.nic.announce(self.addresses)
        self.moved = True

    async def keep_addresses(self) -> None:
        """There is nobody that packets could be steered to or from."""
        if self.kv is not None:
            await self.kv.close()
        if self.transit is not None:
            self._settle()
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
            self._give_addresses_back()
        self._close_blanks()
        if self.handoff is not None and self.state != NEW:
            await self._tell_discard()
        if self.keys:
            self.node.hold.delete_flows(self.keys, self.streams)
            self.node.hold.delete_notes(self.keys, self.streams)
        if self.at is not None:
            for address in self.added:
                await self.node.unplumb(self.at, address)
        self.state = DISCARDED
        await self.finish()

    def _give_addresses_back(self) -> None:
        if self.transit is not None:
            return self._end_transit()
        for address in self.addresses:
            if self.at is not None:
                self.node.unroute(self.at, address)
            self.node.hold.del_addr(address)

    async def _tell_discard(self) -> None:
        assert self.handoff is not None
        try:
            await self.handoff.ask("discard", {"job": self.job_id})
        except Retryable as e:
            # a pod that has gone took its blanks with it: closed in repair, so in silence
            log.warning("job %s: the target pod did not hear the discard: %s", self.job_id, e)

    async def finish(self) -> None:
        """Forget the job: nobody will ask for it again."""
        if self.kv is not None:
            await self.kv.close()
        if self.parent is None:
            await self._settle_addresses()
        self._close_blanks()
        if self.journal is not None:
            self.journal.remove()
            self.journal = None
        self.close()

    async def _settle_addresses(self) -> None:
        try:
            if self.state == ACTIVATED and self.transit is not None:
                self._settle()
            gone = self.at is None
        except OSError as e:
            if e.errno not in (errno.ENODEV, errno.EINVAL):
                raise
            log.warning("job %s: its pod has gone before its addresses had settled", self.job_id)
            gone = True
        if gone:
            await self._let_addresses_go()

    async def _let_addresses_go(self) -> None:
        """Their pod has gone, and with it its link and all that was bound to it."""
        node = self.node
        keys = node.flows_of(self.addresses)
        node.hold.delete_flows(keys, len(keys) // tcp.KEY_BYTES)
        node.hold.delete_notes(keys, len(keys) // tcp.KEY_BYTES)
        for address in self.addresses:
            node.hold.del_addr(address)
            node.hold.end_births(address)
            if node.tunnel is not None:
                node.routes.delete(address, node.tunnel.routed_index)
            await node.net.run(node.net.del_rules, address)

    def count_further(self, streams: int) -> None:
        """A further batch is over; journalled, for whoever asks when the source cannot be asked any more."""
        self.further += streams
        if self.journal is not None:
            self.journal.decide(FURTHER, streams=self.further)

    def _settle(self) -> None:
        """The addresses are like any other of this node; their flows need no entries any more."""
        assert self.transit is not None
        node = self.node
        self.transit.settle()
        keys = node.flows_of(self.addresses)
        node.hold.delete_flows(keys, len(keys) // tcp.KEY_BYTES)
        for address in self.addresses:
            node.hold.end_births(address)
        node.linger_moved(b"", self.addresses)
        self.transit = None

    def close(self) -> None:
        if self.handoff is not None:
            self.handoff.close()
            self.handoff = None
        if self.pool is not None:
            self.pool.close()
            self.pool = None
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
        job.addresses, job.added = facts["addresses"], facts["added"]
        job.further = (journal.decided(FURTHER) or {}).get("streams", 0)
        job.gone = (journal.decided(GONE) or {}).get("evidence", "")
        try:
            job.at = await node.attach_pod(facts["pod"])
            if facts.get("tunnel"):
                job.transit = Transit(node, job.at, job.addresses, facts["tunnel"]["peer"], facts["tunnel"]["vni"])
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
        ours = {tcp.mapped(a) for a in self.addresses}
        keys = [k for k in self.node.hold.flow_keys() if k[:16] in ours]
        self.keys, self.streams = b"".join(keys), len(keys)


def _raise_first(errors: list[int], what: str) -> None:
    for i, error in enumerate(errors):
        if error:
            raise Final(f"{what}_failed", f"socket {i}: {tcp.strerror(error)}")
