"""The source's side from the first byte that leaves it: SEND, the point of no return, and what follows the streams.

Until COMMIT is in its journal the source decides, and nobody else; afterwards nobody decides.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import time
from typing import NoReturn

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import failpoints, tcp
from midstream_agent.announce import responder_for
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.hold import FLOW_MOVED
from midstream_agent.source import SourceJob, count_broken
from midstream_agent.source_prepare import streams_left

log = logging.getLogger(__name__)
QUEUE_BUCKETS = (0, 1 << 10, 16 << 10, 256 << 10, 4 << 20)  # upper bounds, bytes; agent.proto names them


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


def _count_queues(counts: pb.QueueCounts, queued: list[int]) -> None:
    counts.with_bytes = sum(1 for n in queued if n)
    counts.bytes = sum(queued)
    histogram = [0] * (len(QUEUE_BUCKETS) + 1)
    for n in queued:
        histogram[bisect.bisect_left(QUEUE_BUCKETS, n)] += 1
    counts.histogram.extend(histogram)


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
