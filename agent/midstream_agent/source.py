"""The source's side of a migration: what each step of the saga does, and how it is undone.

Until COMMIT is in its journal the source decides, and nobody else; afterwards nobody decides. From PAUSE to
ACTIVATED clients wait, so nothing in these steps may be slow that could be done in PREPARE.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import failpoints, pods, tcp
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.handoff import HandoffClient
from midstream_agent.hold import ADDR_LEAVING, FLOW_FROZEN, FLOW_HELD, FLOW_MOVED
from midstream_agent.journal import Journal
from midstream_agent.kv import Geometry, PoolView
from midstream_agent.kv_send import Target
from midstream_agent.kv_source import KvSource, settings_for
from midstream_agent.node import Attached, Node
from midstream_agent.peer import PeerSession
from midstream_agent.precopy import why_not
from midstream_agent.saga import Clock
from midstream_agent.settings import host_of
from midstream_agent.target import bring_up, fingerprint_of, greet, pool_fingerprint_of, responder_for
from midstream_agent.transit import Transit

log = logging.getLogger(__name__)
SPARE_SLOTS = 4
QUEUE_BUCKETS = (0, 1 << 10, 16 << 10, 256 << 10, 4 << 20)  # upper bounds, bytes; agent.proto names them


class Aborted(Final):
    """The user's word, before the point of no return."""

    def __init__(self) -> None:
        super().__init__("aborted", "the job was aborted before the point of no return: the source goes on serving")


@dataclass(slots=True)
class SourceJob:
    """One job at the source, or one further batch of a job. Owns its fds, its handoff connection, its peer session."""

    node: Node
    request: pb.MigrateRequest
    journal: Journal
    notify: Callable[[pb.MigrateEvent], None]
    side: str = "source"
    clock: Clock = field(default_factory=Clock)
    report: pb.JobReport = field(default_factory=pb.JobReport)
    at: Attached | None = None
    handoff: HandoffClient | None = None
    hello: dict[str, Any] = field(default_factory=dict)
    pool: PoolView | None = None
    copy: KvSource | None = None
    """A batch has its job's; None: nothing is copied."""
    peer: PeerSession | None = None
    addresses: list[str] = field(default_factory=list)
    target_addresses: list[str] = field(default_factory=list)
    excluded: set[int] = field(default_factory=set)
    only: list[int] | None = None
    """The streams of this batch, by their ids in the pod; None: all."""
    parent: SourceJob | None = None
    transit: Transit | None = None
    """Set when streams are steered (switchover Steer); a batch has its job's."""
    no_steer: bool = False
    moved_keys: bytes = b""
    """Of all batches."""
    reserved_slots: int = 0
    """KV slots that the target was asked to keep for the pause."""
    listed: list[dict[str, Any]] = field(default_factory=list)
    """A further batch's streams, as the pod listed them."""
    tries: dict[int, int] = field(default_factory=dict)
    """How often a stream was in a further batch that went back, by its id in the pod."""
    batch_numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))
    paused_ms: float = 0.0
    stopped: bool = False
    """No further batch begins."""
    failed: Final | None = None
    """Why the first batch that went back to the source did so."""
    fds: list[int] = field(default_factory=list)
    kv: list[dict[str, Any]] = field(default_factory=list)
    state: bytes = b""
    keys: bytes = b""
    batch: tcp.Batch | None = None
    moving: bool = False
    discarded: bool = False
    peer_gone: str = ""
    abort_asked: bool = False
    frozen_at: float = 0.0
    clients_wait: bool = False
    lost: Final | None = None

    # -- what the saga's loop asks ---------------------------------------------------------------------

    @property
    def steers(self) -> bool:
        return self.transit is not None

    def note(self, step: str, what: str, message: str = "") -> None:
        event = pb.MigrateEvent(
            at_ms=self.clock.now_ms(), phase=self.report.phase, step=step, what=what, message=message
        )
        self.notify(event)

    def check_abort(self) -> None:
        if self.abort_asked or (self.parent is not None and self.parent.abort_asked):
            raise Aborted
        deadline = self.request.deadline_unix_ms
        if deadline and time.time() * 1000 > deadline:
            raise Final(
                "deadline_passed", "the job's deadline passed before the point of no return: the source goes on"
            )

    def phase(self, phase: pb.Phase.ValueType) -> None:
        self.report.phase = phase

    @property
    def streams(self) -> int:
        return len(self.fds)

    def live_pod(self) -> tuple[Attached, HandoffClient]:
        if self.at is None or self.handoff is None:
            raise Final("job_state", "the job has no pod yet")
        return self.at, self.handoff

    def close(self) -> None:
        self._close_fds()
        owners = (self.handoff, self.pool, self.at) if self.parent is None else (self.handoff,)
        for owner in owners:
            if owner is not None:
                owner.close()
        self.handoff = self.pool = self.at = None

    def _close_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def gone(self) -> bool:
        return bool(self.peer_gone) or (self.parent is not None and self.parent.gone())

    async def insist(self, request: pb.PeerRequest) -> pb.PeerReply | None:
        assert self.peer is not None
        step = {"commit": "COMMIT", "discard": "SEND"}[str(request.WhichOneof("body"))]
        return await self.peer.insist(request, self.gone, lambda why: self.note(step, "retry", why))


# -- CONNECT -----------------------------------------------------------------------------------------------


async def connect(job: SourceJob) -> None:
    job.phase(pb.PHASE_PREPARING)
    await connect_pod(job)
    request = job.request
    if request.target_node.name == job.node.settings.node:
        raise Final("same_node", f"{request.target_node.name} is the node the pod runs on: choose another target")
    job.addresses = await _floating_addresses(job)
    for address in job.addresses:
        if job.node.hold.in_transit(address):
            raise Final("address_in_transit", f"{address} is on its way already, with streams that stay where they are "
                        "until they finish: nothing of it can move again before that")  # fmt: skip
    job.journal.decide("PLAN", addresses=job.addresses)
    job.peer = PeerSession(
        job.node.settings,
        request.target_node.name,
        request.target_node.endpoint,
        request.job_id,
        request.epoch,
        job.node.boot_id,
    )
    await job.peer.open()


async def connect_pod(job: SourceJob) -> None:
    node = job.node
    job.at = await node.attach_pod(job.request.pod.uid)
    sock = pods.connect_handoff(job.at.pod, node.settings.handoff_path)
    job.handoff = HandoffClient(sock, node.settings.timeouts.handoff_s)
    answer = await greet(job.handoff, node.settings.node)
    try:
        job.hello = answer.header
        if answer.header.get("pool"):
            job.pool = PoolView(answer.fds.pop(0), Geometry.parse(answer.header["pool"]), writable=False)
    finally:
        answer.close()


async def _floating_addresses(job: SourceJob) -> list[str]:
    """Those asked for, or all floating IPs of the pod; each must really be one, and here."""
    at, _ = job.live_pod()
    net = job.node.net
    routed = await net.run(net.routed_addresses)
    mine = [a for a in await net.run(net.pod_addresses, at.pod.netns_fd) if a in routed]
    wanted = list(job.request.addresses) or mine
    missing = sorted(set(wanted) - set(mine))
    if missing or not wanted:
        raise Final(
            "no_floating_ip",
            f"pod {job.request.pod.name} does not hold {', '.join(missing) or 'any floating IP'} on this node: "
            "attach one first; streams on the pod's own address cannot move",
        )
    return wanted


async def disconnect(job: SourceJob) -> None:
    if job.peer is not None:
        await job.peer.close()


# -- PREPARE -----------------------------------------------------------------------------------------------


async def prepare(job: SourceJob) -> None:
    """All that takes time and needs no client to wait."""
    at, handoff = job.live_pod()
    job.node.address_comes_back(job.addresses)
    fields = {"job": job.request.job_id, "addresses": job.addresses}
    await handoff.ask("prepare", fields)
    streams = await list_streams(job)
    job.report.kv.bytes_total = sum(int(s.get("kv_bytes") or 0) for s in streams)
    await ask_prepare(job, first_batch(job, streams))
    await _copy_ahead(job)
    await _choose_switchover(job, streams)
    if job.request.dry_run:
        raise Final("dry_run", f"planned: {len(streams)} streams would move to {job.request.target_node.name}")
    if job.transit is None:
        for address in job.addresses:
            job.node.hold.set_addr(address, ADDR_LEAVING)
    if left := await job.node.settle_handshakes(at, job.addresses):
        job.note("PREPARE", "left behind", f"{left} connections whose clients did not complete the handshake")
    await handoff.ask("settle", fields)
    settled = await list_streams(job)
    grown = kv_slots(job, first_batch(job, settled)) - job.reserved_slots
    # more is left for the pause than there are spare slots: no client waits yet, so there is time for more
    if len(settled) != len(streams) or grown > len(settled) * SPARE_SLOTS // 2:
        await ask_prepare(job, first_batch(job, settled))
    if job.transit is not None:
        job.only = [int(s["id"]) for s in first_batch(job, settled)]
    if job.copy is not None:
        await job.copy.catch_up(job.addresses)
    job.phase(pb.PHASE_SWITCHING)


async def _copy_ahead(job: SourceJob) -> None:
    """Pre-copy: as long as it takes, for no client waits and no new one is kept out."""
    if job.copy is None or job.request.dry_run:
        return
    await job.copy.copy_ahead(job.addresses, lambda: job.abort_asked, job.request.deadline_unix_ms)
    if job.report.kv.bytes_total:
        job.note("PREPARE", "copied", job.copy.summary())


async def streams_left(job: SourceJob) -> list[dict[str, Any]]:
    """What the pod still serves; none once it has gone. A slow pod is asked again, over a new connection."""
    at, handoff = job.live_pod()
    try:
        if handoff.broken:
            handoff.close()
            sock = pods.connect_handoff(at.pod, job.node.settings.handoff_path)
            job.handoff = handoff = HandoffClient(sock, job.node.settings.timeouts.handoff_s)
        answer = await handoff.ask("streams", {"addresses": job.addresses})
    except MidstreamError as e:
        if at.pod.pids():
            raise Retryable(e.code, e.message) from e
        job.note("RELEASE", "pod gone", "the source pod has gone, and with it the streams that had not moved")
        return []
    return list(answer.header["streams"])


async def remaining_streams(job: SourceJob) -> list[dict[str, Any]]:
    """Movable streams that no batch has taken yet; those that cannot move any more are counted."""
    new = [s for s in await streams_left(job) if s["id"] not in job.excluded]
    stuck = [s for s in new if not s["movable"]]
    job.excluded |= {int(s["id"]) for s in stuck}
    job.report.streams.unmovable += len(stuck)
    reasons = {str(s["reason"]) for s in stuck} - set(job.report.unmovable_reasons)
    job.report.unmovable_reasons.extend(sorted(reasons))
    return [s for s in new if s["movable"]]


def first_batch(job: SourceJob, streams: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With Wait all streams are one batch: their address moves once."""
    may_steer = job.transit is not None or _may_steer(job)
    return streams[: job.node.settings.limits.batch_streams] if may_steer else streams


def _may_steer(job: SourceJob) -> bool:
    asked = job.request.switchover != pb.SWITCHOVER_WAIT
    return asked and not job.no_steer and job.node.tunnel is not None and int(job.hello.get("version", 0)) >= 2


async def _choose_switchover(job: SourceJob, streams: list[dict[str, Any]]) -> None:
    """Steer wherever the tunnel proves to work, both ways and at full size; a user's word goes before."""
    demanded = job.request.switchover == pb.SWITCHOVER_STEER
    if job.transit is None:
        if demanded:
            raise Final("no_tunnel", "switchover Steer: source or target node has no VXLAN tunnel, or the pod's "
                        "runtime cannot move in batches; see `midstream doctor`, or use Auto or Wait")  # fmt: skip
        job.report.switchover = "Wait"
        if _may_steer(job):  # asked for a first batch only
            job.no_steer = True
            await ask_prepare(job, streams)
        return
    assert job.node.tunnel is not None
    job.journal.decide("STEER", peer=job.transit.peer, vni=job.transit.vni)
    job.transit.leave()
    try:
        for address in job.addresses:
            took_ms = await job.node.tunnel.prove(address, job.request.target_node.name)
    except Final as e:
        job.transit.stay()
        if demanded:
            raise
        job.note("PREPARE", "fallback", f"switchover Wait, since {e.message}")
        job.journal.decide("WAIT")
        job.transit, job.no_steer, job.report.switchover = None, True, "Wait"
        await ask_prepare(job, streams)
        return
    job.report.switchover = "Steer"
    job.note("PREPARE", "proved", f"tunnel: a full-size packet there and back in {took_ms:.1f} ms")


async def list_streams(job: SourceJob) -> list[dict[str, Any]]:
    """The movable streams; the others are counted with their reason, never touched."""
    _, handoff = job.live_pod()
    answer = await handoff.ask("streams", {"addresses": job.addresses})
    listed: list[dict[str, Any]] = answer.header["streams"]
    movable = [s for s in listed if s["movable"] and s["id"] not in job.excluded]
    counts = job.report.streams
    counts.total, counts.unmovable = len(listed), len(listed) - len(movable)
    del job.report.unmovable_reasons[:]
    job.report.unmovable_reasons.extend(sorted({str(s["reason"]) for s in listed if not s["movable"]}))
    job.excluded |= {int(s["id"]) for s in listed if not s["movable"]}
    if len(movable) > job.node.settings.limits.streams_per_job:
        raise Final("too_many_streams", f"{len(movable)} streams exceed the agent's limit: raise --max-streams")
    return movable


def kv_slots(job: SourceJob, streams: list[dict[str, Any]]) -> int:
    """Slots that the target must have free at the pause: for what no round of the pre-copy has dealt with, and for a
    few blocks more of each stream, since decoding goes on until then."""
    if job.pool is None or job.request.kv_mode == pb.KV_MODE_REPLAY:
        return 0
    slots = SPARE_SLOTS * len(streams)
    if job.copy is not None:
        blocks = ((int(s["id"]), int(s.get("kv_bytes") or 0) // job.pool.geometry.slot_bytes) for s in streams)
        slots += sum(max(0, count - job.copy.named(number)) for number, count in blocks)
    return slots


async def ask_prepare(job: SourceJob, streams: list[dict[str, Any]]) -> None:
    """Have the target make ready for these streams; the first time for the addresses, too."""
    assert job.peer is not None
    # batches run side by side, and each takes its slots out of the same ones
    job.reserved_slots = kv_slots(job, streams) * (job.node.settings.limits.parallel_batches if job.parent else 1)
    body = pb.PeerPrepare(
        pod=job.request.target_pod,
        addresses=job.addresses,
        families=[6 if ":" in s["remote"][0].removeprefix("::ffff:") else 4 for s in streams],
        model_fingerprint=fingerprint_of(job.hello),
        pool_fingerprint=pool_fingerprint_of(job.hello),
        kv_slots=job.reserved_slots,
        ports=sorted({int(s["local"][1]) for s in streams}),
        mtu_bytes=job.node.settings.nic.mtu_bytes,
        pod_kind=str(job.hello.get("pod_kind", "")),
        part_of=job.parent.request.job_id if job.parent else "",
    )
    if job.parent is None and (job.transit is not None or _may_steer(job)):
        body.tunnel.CopyFrom(_our_end(job))
    reply = await job.peer.ask(pb.PeerRequest(prepare=body))
    if job.parent is not None:
        return
    if reply.prepared.HasField("tunnel") and job.transit is None:
        at, _ = job.live_pod()
        job.transit = Transit(job.node, at, job.addresses, reply.prepared.tunnel.address, body.tunnel.vni)
    _begin_copy(job, reply.prepared)
    job.target_addresses = list(reply.prepared.node_addresses)
    job.journal.decide("TARGET", addresses=job.target_addresses)
    for address in job.addresses:
        responder_for(address, job.node.settings.node_addresses)
        responder_for(address, job.target_addresses)


def _begin_copy(job: SourceJob, prepared: pb.PeerPrepared) -> None:
    if job.copy is not None or job.pool is None or not job.reserved_slots:
        return
    ours = job.pool.geometry
    reason = prepared.kv_reason or why_not(ours, ours.fingerprint, int(job.hello["version"]))
    if not reason:
        try:
            job.copy = _open_copy(job, job.pool, prepared)
        except MidstreamError as e:
            log.warning("job %s: no KV is copied: %s", job.request.job_id, e)
            reason = e.code
    job.report.kv.reason = reason


def _open_copy(job: SourceJob, pool: PoolView, prepared: pb.PeerPrepared) -> KvSource:
    at, _ = job.live_pod()
    node, to = job.node, job.request.target_node
    target = Target(to.name, host_of(to.endpoint), prepared.kv_port, prepared.kv_ticket)
    settings = settings_for(node.kv, job.request)
    sock = pods.connect_handoff(at.pod, node.settings.handoff_path)
    handoff = HandoffClient(sock, node.settings.timeouts.handoff_s)
    try:
        return KvSource(settings, node.settings.tls, handoff, job.request.job_id, pool, target, job.report.kv)
    except BaseException:
        handoff.close()
        raise


async def end_copy(job: SourceJob) -> None:
    """Before the pool is closed. A batch leaves it to its job."""
    if job.copy is not None and job.parent is None:
        copy, job.copy = job.copy, None
        job.node.kv_bytes_per_s = copy.bytes_per_s or job.node.kv_bytes_per_s
        await copy.close()


def _our_end(job: SourceJob) -> pb.PeerTunnel:
    vni = job.transit.vni if job.transit is not None else secrets.randbelow((1 << 24) - 1) + 1
    return pb.PeerTunnel(address=job.node.settings.node_addresses[0], vni=vni)


async def unprepare(job: SourceJob) -> None:
    # the target undoes its own part as soon as the session ends: it has no checkpoint yet, or was told already
    if job.transit is not None:
        job.transit.stay()
    for address in job.addresses:
        job.node.hold.del_addr(address)
    await end_copy(job)
    if job.handoff is not None:
        await job.handoff.ask("resume", {"job": job.request.job_id})


# -- PAUSE -------------------------------------------------------------------------------------------------


async def pause(job: SourceJob) -> None:
    """Take the streams from the pod at a token boundary; refuse by name what cannot move."""
    at, handoff = job.live_pod()
    job.clients_wait = True
    job.paused_ms = job.clock.now_ms()
    while True:
        await _ask_pause(job)
        refusals = pods.check_stream_fds(at.pod, job.fds, set(job.addresses))
        reasons = [r or tcp.refusal(e) for r, e in zip(refusals, tcp.probe(job.fds), strict=True)]
        if not any(reasons):
            return
        hostile = [r for r in refusals if r not in (None, "NotOnFloatingIP")]
        if hostile:
            raise Final("stream_refused", f"the pod handed over a fd that is refused: {hostile[0]}")
        job.note("PAUSE", "excluded", ", ".join(sorted({r for r in reasons if r})))
        job.report.unmovable_reasons.extend(sorted({r for r in reasons if r}))
        job.report.streams.unmovable += sum(1 for r in reasons if r)
        job.excluded |= {i for i, r in zip(_ids(job), reasons, strict=True) if r}
        await _resume(job, handoff)


async def _ask_pause(job: SourceJob) -> None:
    _, handoff = job.live_pod()
    fields: dict[str, Any] = {"job": job.request.job_id, "addresses": job.addresses}
    if job.excluded:
        fields["exclude"] = sorted(job.excluded)
    if job.only is not None:
        fields["streams"] = job.only
    answer = await handoff.ask("pause", fields, timeout_s=job.node.settings.timeouts.pause_s)
    job.hello["paused"] = answer.header["streams"]
    job.fds = answer.take_fds(len(answer.header["streams"]))
    job.kv, job.state = answer.header.get("kv", []), answer.payload


def _ids(job: SourceJob) -> list[int]:
    return [int(s["id"]) for s in job.hello["paused"]]


async def _resume(job: SourceJob, handoff: HandoffClient) -> None:
    await handoff.ask("resume", {"job": job.request.job_id})
    job._close_fds()


async def unpause(job: SourceJob) -> None:
    _, handoff = job.live_pod()
    await _resume(job, handoff)
    job.clients_wait = False


# -- HOLD, EXPORT ------------------------------------------------------------------------------------------


async def hold(job: SourceJob) -> None:
    """Freeze the flows; from here on no packet changes their sockets. A connection that has ended since PAUSE looked at
    it is left out: the streams are paused again without it."""
    while True:
        try:
            freeze(job)
            if not any(tcp.probe(job.fds)):
                return
        except Final as e:
            if e.code != "tcp_flow_gone":
                raise
        await unhold(job)
        job.keys = b""
        await _resume(job, job.live_pod()[1])
        await pause(job)


def freeze(job: SourceJob) -> None:
    job.frozen_at = time.monotonic()
    job.keys = tcp.flow_keys(job.fds)
    job.node.hold.create_notes(job.keys, job.streams)
    job.node.set_state(job.keys, FLOW_FROZEN)


async def unhold(job: SourceJob) -> None:
    if job.keys:
        count = len(job.keys) // tcp.KEY_BYTES
        job.node.hold.delete_flows(job.keys, count)
        job.node.hold.delete_notes(job.keys, count)


async def export(job: SourceJob) -> None:
    """Both queues and all options of every socket; from here on the sockets are in repair."""
    began = time.perf_counter()
    job.batch = tcp.Batch.checkpoint(job.fds)
    for i, error in enumerate(job.batch.errors):
        if error:
            raise Final("checkpoint_failed", f"socket {i}: {tcp.strerror(error)}")
    job.report.checkpoint_us = (time.perf_counter() - began) * 1e6 / max(job.streams, 1)
    keys, ctls = job.batch.flow_entries(FLOW_HELD)
    job.node.hold.set_flows(keys, ctls, job.streams)


def _count_queues(counts: pb.QueueCounts, queued: list[int]) -> None:
    counts.with_bytes = sum(1 for n in queued if n)
    counts.bytes = sum(queued)
    histogram = [0] * (len(QUEUE_BUCKETS) + 1)
    for n in queued:
        histogram[bisect.bisect_left(QUEUE_BUCKETS, n)] += 1
    counts.histogram.extend(histogram)


async def thaw(job: SourceJob) -> None:
    """Back to life in the order of ACTIVATE: a thaw that only ends repair stalls clients for up to seconds."""
    if not job.fds or not job.keys:
        return
    if job.batch is None:
        # after a restart: how far an earlier process got is not known, its sockets may be live again
        freeze(job)
        job.batch = tcp.Batch.checkpoint(job.fds)
    batch = job.batch
    notes = job.node.hold.read_notes(job.keys, job.streams)
    broken = bring_up(job.node, batch, job.fds, job.keys, notes, thaw=True)
    count_broken(job.report, "THAW", broken, job.note)
    job.batch = None


def count_broken(
    report: pb.JobReport, step: str, broken: Sequence[str], note: Callable[[str, str, str], None]
) -> None:
    """Streams that could not be made live are lost, and the job's status says why."""
    report.streams.lost += len(broken)
    for why in sorted(set(broken)):
        note(step, "stream lost", why)


# -- SEND --------------------------------------------------------------------------------------------------


async def send(job: SourceJob) -> None:
    """The last KV blocks, then the checkpoint: from now on a thaw needs the target's word that it threw it away."""
    assert job.peer is not None and job.batch is not None
    checkpoints = job.batch.encode()
    job.report.checkpoint_bytes = len(checkpoints)
    kv_ids = await _send_tail(job)
    job.journal.decide("SENT", target=job.peer.node, endpoint=job.peer.endpoint, boot_id=job.peer.boot_id)
    ship = pb.PeerShip(checkpoints=checkpoints, state=job.state, streams=job.streams, kv_ids=kv_ids)
    await job.peer.post(pb.PeerRequest(ship=ship))
    if job.transit is None:
        # The target begins the address move only once it has restored. Asking now saves clients a round trip.
        await _ask_move(job)
    reply = await job.peer.answer()
    job.report.restore_us = reply.restored.restore_us
    if job.copy is not None:
        job.copy.missed(reply.restored.kv_missing, reply.restored.kv_reason)


async def _send_tail(job: SourceJob) -> list[int]:
    """Ids of all KV blocks of the paused streams; 0: the target computes it again."""
    if job.copy is not None:
        return await job.copy.tail(job.kv)
    (job.parent or job).report.kv.blocks_recomputed += len(job.kv)
    return [0] * len(job.kv)


async def unsend(job: SourceJob) -> None:
    """Ask until the target says that it threw everything away, or its node is proven gone; then the address back."""
    await _discard(job)
    await unmove_address(job)


async def _discard(job: SourceJob) -> None:
    """A refusal is no confirmation: nothing thaws before the target has thrown the checkpoint away, or is gone."""
    if job.peer is None or job.discarded:
        return
    try:
        await job.insist(pb.PeerRequest(discard=pb.PeerDiscard(reason="rolled back")))
    except Final as e:
        raise Retryable(e.code, f"{e.message}; the streams stay held until the target confirms the discard") from e
    job.discarded = True


# -- MOVE_ADDRESS (switchover Wait) ------------------------------------------------------------------------


def waits(job: SourceJob) -> bool:
    return not job.steers


def steers(job: SourceJob) -> bool:
    return job.steers


async def _ask_move(job: SourceJob) -> None:
    assert job.peer is not None
    job.moving = True
    at, _ = job.live_pod()
    for address in job.addresses:
        job.node.routes.delete(address, at.link.index)
    await job.peer.post(_move_request(job))


def _move_request(job: SourceJob) -> pb.PeerRequest:
    settings = job.node.settings
    body = pb.PeerMoveAddress(
        addresses=job.addresses, probe_addresses=settings.node_addresses, probe_port=settings.probe_port
    )
    return pb.PeerRequest(move_address=body)


async def move_address(job: SourceJob) -> None:
    """The network brings the addresses to the target, which proves it; asked for in SEND."""
    assert job.peer is not None
    timeouts = job.node.settings.timeouts
    reply = await job.peer.answer(timeouts.address_confirm_s + timeouts.peer_reply_s)
    job.note("MOVE_ADDRESS", "proved", f"path proved after {reply.address_moved.took_ms:.1f} ms")


async def unmove_address(job: SourceJob) -> None:
    """The target first lets go, then the address comes back and its path is proved, then clients go on."""
    if not job.moving or job.transit is not None:
        return
    await _discard(job)
    at, _ = job.live_pod()
    node = job.node
    for address in job.addresses:
        node.routes.add(address, at.link.index)
    node.nic.announce(job.addresses)
    if not job.gone():
        await asyncio.gather(*(_prove_back(job, a) for a in job.addresses))
    job.moving = False


async def _prove_back(job: SourceJob, address: str) -> None:
    settings = job.node.settings
    responder = responder_for(address, job.target_addresses)
    try:
        await job.node.nic.prove(address, responder, settings.probe_port, settings.timeouts.address_confirm_s)
    except TimeoutError as e:
        raise Retryable("address_not_back", str(e)) from e


# -- COMMIT, FOLLOW, RELEASE -------------------------------------------------------------------------------


async def commit(job: SourceJob) -> None:
    """The point of no return: journalled, then said until it is answered."""
    notes_path = job.journal.blob_path("notes")
    if job.journal.decided("COMMIT") is None:
        if job.transit is not None:
            # Steered first: what comes after the notes were read meets the target's hold. Not a decision yet: a thaw
            # takes it back, and clients send again what they sent there.
            job.node.set_state(job.keys, FLOW_MOVED)
        notes_path.write_bytes(job.node.hold.read_notes(job.keys, job.streams))
        job.journal.decide("COMMIT", keys=job.keys, addresses=job.addresses)
        job.report.point_of_no_return_ms = job.clock.now_ms()
    job.phase(pb.PHASE_COMMITTING)
    await failpoints.point("source.COMMIT.do.journalled")
    count = len(job.keys) // tcp.KEY_BYTES
    try:
        reply = await job.insist(pb.PeerRequest(commit=pb.PeerCommit(notes=notes_path.read_bytes())))
        if reply is None:
            raise Final("target_lost", "the target's node is gone after the point of no return: its streams are lost")
    except Final as e:
        # never back: the target may have activated before it failed. What is here is let go all the same.
        job.report.streams.lost = count
        job.lost = e
        return
    finally:
        job.node.set_state(job.keys, FLOW_MOVED)
        job.clients_wait = False
        job.moved_keys += job.keys
    job.report.streams.migrated = reply.activated.streams - len(reply.activated.broken)
    if reply.activated.broken:
        count_broken(job.report, "COMMIT", reply.activated.broken, job.note)
        reasons = ", ".join(sorted(set(reply.activated.broken)))
        lost = len(reply.activated.broken)
        why = f"{lost} of {count} streams could not be made live at the target: {reasons}"
        job.lost = Final("activate_failed", why)
    if job.batch is not None:
        _count_queues(job.report.queues, [i.send_bytes + i.recv_bytes for i in job.batch.infos()])
    if job.frozen_at:
        job.report.hold_ms = (time.monotonic() - job.frozen_at) * 1000


async def begin_move(job: SourceJob) -> None:
    """Beside everything else: the network may take its time."""
    assert job.transit is not None
    if job.lost is not None and job.report.streams.migrated == 0:
        job.transit.stay()
        job.node.linger_moved(job.moved_keys, job.addresses)
        raise job.lost  # the target is gone, or has nothing of ours: the address stays where the others are
    assert job.peer is not None
    job.transit.overlap_leaving()  # new connections are the target's from here on, too
    try:
        await job.peer.post(_move_request(job))
        job.moving = True
    except Retryable as e:
        job.note("BATCHES", "retry", f"the address move was not asked for yet: {e}")  # FOLLOW asks again


async def follow_address(job: SourceJob) -> None:
    """The network brings the addresses to the target, which proves it. Until then this node carries the streams."""
    assert job.peer is not None and job.transit is not None
    timeouts = job.node.settings.timeouts
    patience_s = timeouts.address_confirm_s + timeouts.peer_reply_s
    if job.gone() or job.peer.rebooted:
        await _keep_addresses(job)
    try:
        asked = job.peer.answer(patience_s) if job.moving else job.peer.ask(_move_request(job), patience_s)
        reply = await asked
    except MidstreamError as e:
        job.moving = False
        if e.code == "target_lost":
            await _keep_addresses(job)
        count = len(job.moved_keys) // tcp.KEY_BYTES
        held = f"the {count} streams that have moved go through this node until the address has: keep it alive"
        raise Retryable(e.code, f"{e.message}; {held}") from e
    job.transit.follow()
    job.note("FOLLOW", "proved", f"path proved after {reply.address_moved.took_ms:.1f} ms: this node may go")


async def _keep_addresses(job: SourceJob) -> NoReturn:
    """The target's node is gone, or its pod, and with it what had moved there. All else is this node's again, also in
    the eyes of a network that had begun to move the addresses, or was through."""
    assert job.transit is not None
    job.transit.stay()
    job.node.nic.announce(job.addresses)
    job.node.linger_moved(job.node.flows_of(job.addresses), job.addresses)
    moved, job.report.streams.migrated = job.report.streams.migrated, 0
    job.report.streams.lost += moved
    for batch in job.report.batches:
        if batch.outcome == "moved":
            batch.outcome, batch.reason = "lost", "target_lost"
    await say_finished(job)
    raise Final("target_lost", f"the target is gone, and with it {job.report.streams.lost} streams that had moved; all "
                "others and new connections are served by the source")  # fmt: skip


async def let_go(job: SourceJob) -> None:
    """The sockets of a batch leave this node without a word to the clients."""
    _, handoff = job.live_pod()
    try:
        await handoff.ask("release", {"job": job.request.job_id})
    except Retryable as e:
        # the gateway is gone, and with it its copies of the sockets: closed in repair, in silence
        job.note("RELEASE", "retry", str(e))
    job._close_fds()
    job.node.forget_conntrack(job.keys)
    job.node.hold.delete_notes(job.keys, len(job.keys) // tcp.KEY_BYTES)


async def release(job: SourceJob) -> None:
    """Nothing of the addresses is left on this node."""
    if job.transit is None:
        await let_go(job)
    else:
        await _wait_for_the_rest(job)
    at, _ = job.live_pod()
    node = job.node
    for address in job.addresses:
        await node.unplumb(at, address)
    if job.transit is not None:
        job.transit.go()
    # of all batches, also of those that an earlier process of this agent moved
    node.linger_moved(node.flows_of(job.addresses), job.addresses)
    # journalled before it is said: a target that has forgotten the job must not be asked to COMMIT again
    job.journal.decide("RELEASED")
    await say_finished(job)
    if job.peer is not None:
        await job.peer.close()


async def say_finished(job: SourceJob) -> None:
    """The target may forget the job; one that does not hear it forgets after a while."""
    if job.peer is None or job.gone():
        return
    try:
        await job.peer.ask(pb.PeerRequest(finish=pb.PeerFinish()))
    except MidstreamError as e:
        log.info("job %s: the target did not hear the end: %s", job.request.job_id, e)


async def _wait_for_the_rest(job: SourceJob) -> None:
    """Streams that did not move finish at the source, which the tunnel makes possible; then it may go."""
    said = -1
    while left := len(await streams_left(job)):
        if left != said:
            job.note("RELEASE", "waiting", f"{left} streams that do not move finish at the source, through the tunnel")
            said = left
        if job.gone():
            await _keep_addresses(job)
        try:
            job.check_abort()
        except Final as e:
            raise Final("streams_remain", f"{left} streams stay at the source, which serves them through the tunnel as "
                        f"long as it lives ({e.code})") from e  # fmt: skip
        await asyncio.sleep(job.node.settings.timeouts.remaining_poll_s)
