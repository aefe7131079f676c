"""The source's side until clients have to wait: pod and target are found, all is made ready, KV goes ahead.

Nothing here stops a stream; all of it is undone when the job ends before COMMIT.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import pods
from midstream_agent.announce import responder_for
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.greeting import fingerprint_of, greet, pool_fingerprint_of
from midstream_agent.handoff import HandoffClient
from midstream_agent.hold import ADDR_LEAVING
from midstream_agent.kv import Geometry, PoolView
from midstream_agent.kv_send import Target
from midstream_agent.kv_source import KvSource, settings_for
from midstream_agent.peer import PeerSession
from midstream_agent.precopy import why_not
from midstream_agent.settings import host_of
from midstream_agent.source import SourceJob
from midstream_agent.transit import Transit

log = logging.getLogger(__name__)
SPARE_SLOTS = 4


# -- CONNECT -----------------------------------------------------------------------------------------------


async def connect(job: SourceJob) -> None:
    job.phase(pb.PHASE_PREPARING)
    await connect_pod(job)
    request = job.request
    if request.target_node.name == job.node.settings.node:
        raise Final("same_node", f"{request.target_node.name} is the node the pod runs on: choose another target")
    job.addresses = await floating_addresses(job)
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


async def floating_addresses(job: SourceJob) -> list[str]:
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
    at, _ = job.live_pod()
    try:
        answer = await (await _connected(job)).ask("streams", {"addresses": job.addresses})
    except MidstreamError as e:
        if at.pod.pids():
            raise Retryable(e.code, e.message) from e
        job.note("RELEASE", "pod gone", "the source pod has gone, and with it the streams that had not moved")
        return []
    return list(answer.header["streams"])


async def _connected(job: SourceJob) -> HandoffClient:
    """The pod's handoff, over a new connection where the old one broke."""
    at, handoff = job.live_pod()
    if await handoff.cut_off():
        handoff.close()
        sock = pods.connect_handoff(at.pod, job.node.settings.handoff_path)
        job.handoff = handoff = HandoffClient(sock, job.node.settings.timeouts.handoff_s)
    return handoff


async def resume(job: SourceJob) -> None:
    """The pod goes on with the streams that it has. One whose serving process has ended is not asked for ever: there is
    nothing left to go on with, also where another process has taken its place, and the job has to end."""
    at, handoff = job.live_pod()
    job.pod_gone = job.pod_gone or handoff.server_pid not in at.pod.pids()
    if job.pod_gone:
        job.note("PAUSE", "pod gone", "what served at the source has ended, and with it its streams")
        return
    try:
        await (await _connected(job)).ask("resume", {"job": job.request.job_id})
    except Final as e:
        if e.code == "no_handoff":  # it is ending, or its pod is
            raise Retryable(e.code, e.message) from e
        raise


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
    begin_copy(job, reply.prepared)
    job.target_addresses = list(reply.prepared.node_addresses)
    job.journal.decide("TARGET", addresses=job.target_addresses)
    for address in job.addresses:
        responder_for(address, job.node.settings.node_addresses)
        responder_for(address, job.target_addresses)


def begin_copy(job: SourceJob, prepared: pb.PeerPrepared) -> None:
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
        await resume(job)
