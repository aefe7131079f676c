"""Further batches of a job (switchover Steer): each is held, shipped and activated by itself.

A client stalls for its batch, not for all; a batch that fails goes back to life at the source, and the others are
none the worse. Each has a journal, a handoff connection and a point of no return of its own, and is a job of its own
to the target and to the pod, called JOB~2, JOB~3, ...: the steps are those of the first one, without what the job
has done for all (addresses, tunnel, listing).

Some run at a time (`Limits.parallel_batches`): while one is restored at the target the next is frozen.
"""

from __future__ import annotations

import asyncio
import itertools

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import pods, saga, source_commit, source_prepare, tcp
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.greeting import fds_of
from midstream_agent.handoff import HandoffClient
from midstream_agent.journal import Journal
from midstream_agent.peer import PeerSession
from midstream_agent.source import SourceJob

TRIES = 2  # a stream's clients wait for each


async def move_rest(job: SourceJob) -> None:
    """BATCHES: begin the address move, then take batch after batch until nothing movable is left."""
    await source_commit.let_go(job)
    if not job.moving:
        await source_commit.begin_move(job)
    if not job.report.batches:
        add_report(job, job, "lost" if job.lost else "moved", job.lost)
    size = job.node.settings.limits.batch_streams
    while True:
        streams = [] if job.stopped else await source_prepare.remaining_streams(job)
        if not streams:
            break
        groups = [streams[i : i + size] for i in range(0, len(streams), size)]
        queue = [(next(job.batch_numbers), group) for group in groups]
        workers = min(job.node.settings.limits.parallel_batches, len(queue))
        # each to its end: one that were left running, or cancelled, would be between two owners
        ends = await asyncio.gather(*(_worker(job, queue) for _ in range(workers)), return_exceptions=True)
        for end in ends:
            if isinstance(end, BaseException):
                raise end
    await source_prepare.end_copy(job)
    counts = job.report.streams
    counts.total = max(counts.total, counts.migrated + counts.rolled_back + counts.lost + counts.unmovable)


async def _worker(job: SourceJob, queue: list[tuple[int, list[dict[str, object]]]]) -> None:
    """One session with the target serves batch after batch: a TLS handshake takes longer than a batch."""
    session: PeerSession | None = None
    try:
        while queue and not job.stopped:
            number, streams = queue.pop(0)
            batch = await _make(job, number, streams, session)
            try:
                await _run(job, batch)
            finally:
                session = batch.peer
    finally:
        if session is not None:
            await session.close()


async def _make(
    job: SourceJob, number: int, streams: list[dict[str, object]], session: PeerSession | None
) -> SourceJob:
    request = pb.MigrateRequest()
    request.CopyFrom(job.request)
    request.job_id = f"{job.request.job_id}~{number}"
    facts = {"request": request.SerializeToString().hex(), "part_of": job.request.job_id}
    journal = Journal.create(job.node.journal_folder, "source", request.job_id, facts)
    batch = child(job, request, journal)
    batch.only = [int(str(s["id"])) for s in streams]
    batch.listed = streams
    batch.peer = session
    return batch


def child(job: SourceJob, request: pb.MigrateRequest, journal: Journal) -> SourceJob:
    """A batch of `job`, not begun."""

    def notify(event: pb.MigrateEvent) -> None:
        event.message = f"batch {request.job_id.rpartition('~')[2]}: {event.message}".rstrip(": ")
        job.notify(event)

    batch = SourceJob(job.node, request, journal, notify, clock=job.clock.fork(), parent=job)
    batch.report.phase = pb.PHASE_COMMITTING
    batch.at, batch.hello, batch.pool, batch.copy = job.at, dict(job.hello), job.pool, job.copy
    batch.addresses, batch.transit, batch.excluded = job.addresses, job.transit, job.excluded
    batch.target_addresses = job.target_addresses
    return batch


async def _run(job: SourceJob, batch: SourceJob) -> None:
    """The batch's own saga, which leaves its streams at the target or at the source."""
    from midstream_agent.steps import BATCH_STEPS

    try:
        await saga.run(BATCH_STEPS, batch, batch.clock)
        add_report(job, batch, "lost" if batch.lost else "moved", batch.lost)
    except saga.Failed as e:
        _went_back(job, batch, e.cause)
    finally:
        job.moved_keys += batch.moved_keys
        batch.close()
    batch.journal.remove()


def _went_back(job: SourceJob, batch: SourceJob, cause: MidstreamError) -> None:
    """What may pass is tried once more, in a later batch."""
    streams = set(batch.only or ())
    for stream in streams:
        job.tries[stream] = job.tries.get(stream, 0) + 1
    if isinstance(cause, Retryable) and max(job.tries[s] for s in streams) < TRIES:
        job.note("BATCHES", "again", f"{len(streams)} streams went back to the source and are tried again: {cause}")
        return
    add_report(job, batch, "rolled back", cause)
    job.excluded |= streams
    job.stopped = job.stopped or cause.code in ("aborted", "deadline_passed")


async def take_up(batch: SourceJob, job: SourceJob) -> None:
    """After a restart of the agent: connections, and the batch's sockets out of the pod."""
    at = batch.at
    assert at is not None
    sock = pods.connect_handoff(at.pod, batch.node.settings.handoff_path)
    batch.handoff = HandoffClient(sock, batch.node.settings.timeouts.handoff_s)
    await take_up_sockets(batch)


async def take_up_sockets(job: SourceJob) -> None:
    """What a dead process of this boot held of a job or batch, by its journal."""
    sent, commit = job.journal.decided("SENT"), job.journal.decided("COMMIT")
    job.peer = session_for(job)
    job.peer.was_boot_id = str(sent["boot_id"]) if sent else ""
    job.discarded = sent is None
    _, handoff = job.live_pod()
    if job.journal.began("PAUSE"):
        job.fds = await fds_of(handoff, job.request.job_id)
        if not commit:
            job.leave_out_ended()
            job.keys = tcp.flow_keys(job.fds)
    if commit:
        job.keys = commit["keys"]


async def open_batch(batch: SourceJob) -> None:
    """Nothing is frozen yet: a target that does not answer is asked again, until the job's deadline or abort."""
    timeouts = batch.node.settings.timeouts
    pause_s = timeouts.retry_s
    while True:
        if batch.gone() or (batch.peer is not None and batch.peer.rebooted):
            raise Final("target_lost", f"{batch.request.target_node.name} is gone: these streams stay at the source")
        try:
            return await _open(batch)
        except Retryable as e:
            batch.note("OPEN", "retry", str(e))
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, timeouts.retry_max_s)
            batch.check_abort()


async def _open(batch: SourceJob) -> None:
    """A connection to the pod, a hello to the target, blank sockets."""
    assert batch.parent is not None and batch.parent.peer is not None
    settings = batch.node.settings
    at = batch.at
    assert at is not None
    if batch.handoff is not None:
        batch.handoff.close()
    sock = pods.connect_handoff(at.pod, settings.handoff_path)
    batch.handoff = HandoffClient(sock, settings.timeouts.handoff_s)
    if batch.peer is None:
        batch.peer = session_for(batch)
        await batch.peer.open()
    else:
        await batch.peer.rename(batch.request.job_id)
    batch.peer.was_boot_id = batch.parent.peer.was_boot_id
    await source_prepare.ask_prepare(batch, batch.listed)
    if batch.copy is not None:
        await batch.copy.catch_up(batch.addresses)


def session_for(batch: SourceJob) -> PeerSession:
    request, node = batch.request, batch.node
    to = request.target_node
    return PeerSession(node.settings, to.name, to.endpoint, request.job_id, request.epoch, node.boot_id)


async def close_batch(batch: SourceJob) -> None:
    """What the target made ready ends with the session, or with the next hello on it."""


async def finish_batch(batch: SourceJob) -> None:
    """LET_GO: the sockets are closed, the target forgets the batch."""
    await source_commit.let_go(batch)
    batch.journal.decide("RELEASED")
    await source_commit.say_finished(batch)


def add_report(job: SourceJob, batch: SourceJob, outcome: str, cause: MidstreamError | None) -> None:
    """Add what became of a batch to the job's report; the first batch's own numbers are there already."""
    report, part = job.report, batch.report
    count = len(batch.keys) // tcp.KEY_BYTES or len(batch.only or ())
    reason = cause.code if cause else ""
    report.batches.add(streams=count, start_ms=batch.paused_ms, hold_ms=part.hold_ms, outcome=outcome, reason=reason)
    if batch is job:
        return
    report.hold_ms = max(report.hold_ms, part.hold_ms)
    report.checkpoint_bytes += part.checkpoint_bytes
    report.streams.migrated += part.streams.migrated
    report.streams.lost += part.streams.lost
    report.streams.unmovable += part.streams.unmovable
    report.queues.with_bytes += part.queues.with_bytes
    report.queues.bytes += part.queues.bytes
    before = list(report.queues.histogram)  # empty where this agent restarted since
    del report.queues.histogram[:]
    report.queues.histogram.extend(a + b for a, b in itertools.zip_longest(before, part.queues.histogram, fillvalue=0))
    if outcome == "rolled back":
        report.streams.rolled_back += count
        job.failed = job.failed or Final(cause.code if cause else "internal", _why(cause, count))
    elif cause is not None:
        job.lost = job.lost or Final(cause.code, cause.message)


def _why(cause: MidstreamError | None, count: int) -> str:
    return f"a batch of {count} streams went back to the source, which serves it as long as it lives: {cause}"
