"""The jobs of one agent as a source: started, followed, aborted, taken up again after a restart."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import batches, saga, source_prepare, tcp
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import logs
from midstream_agent.journal import Journal, journals
from midstream_agent.node import Node
from midstream_agent.source import Aborted, SourceJob
from midstream_agent.steps import BATCH_STEPS, STEPS
from midstream_agent.transit import Transit

log = logging.getLogger(__name__)
MOVE_ADDRESS = "MOVE_ADDRESS"
_JOB_ID = re.compile(r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")
ENDED = frozenset({pb.PHASE_SUCCEEDED, pb.PHASE_ROLLED_BACK, pb.PHASE_FAILED, pb.PHASE_ABORTED})


@dataclass(slots=True)
class Record:
    """A job's events so far, and whoever waits for more."""

    report: pb.JobReport
    events: list[pb.MigrateEvent] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    job: SourceJob | None = None

    def add(self, event: pb.MigrateEvent) -> None:
        """Keep an event; whoever follows hears of it at once, unless clients wait: then right after. That an address is
        to move is heard at once all the same: clients wait for the operator, who asks the cloud for it."""
        self.events.append(event)
        if self.job is None or not self.job.clients_wait or event.step == MOVE_ADDRESS:
            self.news.set()

    @property
    def ended(self) -> bool:
        return self.report.phase in ENDED

    async def follow(self) -> AsyncIterator[pb.MigrateEvent]:
        """All events from the first one; ends with the one that carries the report."""
        seen = 0
        while True:
            while seen < len(self.events):
                event = self.events[seen]
                seen += 1
                yield event
                if event.HasField("report"):
                    return
            self.news.clear()
            if seen == len(self.events):
                await self.news.wait()


class SourceJobs:
    """One active job a pod; ended ones are remembered for `status` up to a limit."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.records: dict[str, Record] = {}
        self._busy: dict[str, str] = {}

    def start(self, request: pb.MigrateRequest) -> Record:
        """Begin a job, or find it when it is known already."""
        if request.job_id in self.records:
            return self.records[request.job_id]
        self._check(request)
        record = self._record(request)
        self._busy[request.pod.uid] = request.job_id
        self._node.tasks.start(f"job {request.job_id}", self._run(request, record))
        return record

    def _check(self, request: pb.MigrateRequest) -> None:
        if not _JOB_ID.match(request.job_id):
            raise Final("bad_job_id", f"job id {request.job_id!r}: use lower case letters, digits, '-' and '.'")
        self._node.check_epoch(f"pod:{request.pod.uid}", request.epoch)
        other = self._busy.get(request.pod.uid)
        if other:
            raise Final("pod_busy", f"job {other} is moving this pod already: wait for it or abort it")

    def _record(self, request: pb.MigrateRequest) -> Record:
        report = pb.JobReport(
            job_id=request.job_id,
            phase=pb.PHASE_PENDING,
            source_node=self._node.settings.node,
            target_node=request.target_node.name,
        )
        record = self.records[request.job_id] = Record(report)
        for job_id in [k for k, r in self.records.items() if r.ended][: -self._node.settings.limits.jobs_remembered]:
            del self.records[job_id]
        return record

    async def _run(self, request: pb.MigrateRequest, record: Record) -> None:
        facts = {"request": request.SerializeToString().hex()}
        journal = Journal.create(self._node.journal_folder, "source", request.job_id, facts)
        job = SourceJob(self._node, request, journal, record.add, report=record.report)
        record.job = job
        logs.JOB.set(request.job_id)
        log.info("job %s: begins, %s of this node to %s", request.job_id, request.pod.name, request.target_node.name)
        try:
            await saga.run(STEPS, job, job.clock)
            _through(job)
        except saga.Failed as e:
            _undone(job, e)
        except MidstreamError as e:
            _failed(job, e)
        except Exception as e:
            log.exception("job %s", request.job_id)
            _failed(job, Final("internal", f"{type(e).__name__}: {e}"))
        finally:
            await source_prepare.end_copy(job)
            self._end(job, record)

    def _end(self, job: SourceJob, record: Record) -> None:
        self._busy.pop(job.request.pod.uid, None)
        self._node.forget_epoch(f"gone:{job.request.job_id}")
        if record.report.reason == "streams_remain":
            self._node.tasks.start(f"rest of {job.request.job_id}", self._finish_later(job))
        else:
            job.close()
            if record.ended:
                job.journal.remove()
        for t in job.clock.steps:
            record.report.steps.add(name=t.name, start_ms=t.start_ms, took_ms=t.took_ms, outcome=t.outcome)
        record.job = None
        self._node.metrics.ended(record.report)
        if record.report.phase != pb.PHASE_SUCCEEDED:
            # its exceptions and their frames refer to each other, and to the call whose end closes the connection
            asyncio.get_running_loop().call_soon(gc.collect)
        record.add(
            pb.MigrateEvent(at_ms=job.clock.now_ms(), phase=record.report.phase, what="end", report=record.report)
        )

    async def _finish_later(self, job: SourceJob) -> None:
        """The job has ended; what it left at the source is tidied up when its last stream is over."""
        job.abort_asked, job.request.deadline_unix_ms = False, 0
        try:
            await saga.roll_forward(STEPS[-1:], job, job.clock)
        finally:
            job.close()
        job.journal.remove()

    def active(self) -> int:
        """Jobs under way."""
        return len(self._busy)

    def abort(self, job_id: str) -> tuple[bool, str]:
        """Idempotent. After the point of no return it stops nothing and says so."""
        record = self.records.get(job_id)
        if record is None:
            raise Final("unknown_job", f"this agent knows no job {job_id}")
        if record.ended or record.job is None:
            return False, f"job {job_id} has ended"
        if record.report.phase == pb.PHASE_COMMITTING:
            record.job.abort_asked = True
            return False, f"job {job_id} is past the point of no return: it goes on, but begins no further batch"
        record.job.abort_asked = True
        return True, f"job {job_id} is being rolled back"

    def declare_gone(self, job_id: str, node: str, evidence: str, epoch: int) -> None:
        record = self.records.get(job_id)
        job = record.job if record else None
        if job is None or job.request.target_node.name != node:
            raise Final("unknown_job", f"no running job {job_id} of this agent has {node} as its target")
        self._node.check_gone_epoch(job_id, epoch, job.request.epoch)
        job.journal.decide("GONE", node=node, evidence=evidence)
        job.peer_gone = evidence

    # -- after a restart of the agent ------------------------------------------------------------------

    async def recover(self) -> None:
        """Finish what an earlier process of this boot began: back before COMMIT, forward after it."""
        for path in journals(self._node.journal_folder, "source"):
            journal = Journal.load(path)
            request = pb.MigrateRequest.FromString(bytes.fromhex(journal.facts["request"]))
            if journal.decided("RELEASED"):
                journal.remove()
                continue
            if journal.facts.get("part_of"):
                continue  # taken up with its job
            record = self._record(request)
            self._busy[request.pod.uid] = request.job_id
            self._node.tasks.start(f"recover {request.job_id}", self._recover(request, record, journal))

    async def _recover(self, request: pb.MigrateRequest, record: Record, journal: Journal) -> None:
        job = SourceJob(self._node, request, journal, record.add, report=record.report)
        record.job = job
        logs.JOB.set(request.job_id)
        log.info("job %s: taken up after a restart of the agent", request.job_id)
        try:
            await self._take_up_until_done(job)
            if journal.decided("COMMIT"):
                await self._recover_batches(job)
                await saga.roll_forward(STEPS, job, job.clock)
                _through(job)
            else:
                begun = tuple(s for s in STEPS if journal.began(s.name))
                await saga.roll_back(begun, job, job.clock)
                _undone(
                    job, saga.Failed("restart", Final("agent_restarted", "the source's agent restarted: rolled back"))
                )
        except MidstreamError as e:
            await self._settle_without_pod(job)
            _failed(job, e)
        except Exception as e:
            log.exception("job %s", request.job_id)
            _failed(job, Final("internal", f"{type(e).__name__}: {e}"))
        finally:
            self._end(job, record)

    async def _settle_without_pod(self, job: SourceJob) -> None:
        """The source pod has gone, and its sockets: the target must still hear what was decided, and nothing of the
        streams may stay on this node."""
        commit, plan = job.journal.decided("COMMIT"), job.journal.decided("PLAN")
        if job.peer is None:
            job.peer = batches.session_for(job)
        if commit:
            notes = job.journal.blob_path("notes").read_bytes()
            await job.insist(pb.PeerRequest(commit=pb.PeerCommit(notes=notes)))
        elif job.journal.decided("SENT"):
            await job.insist(pb.PeerRequest(discard=pb.PeerDiscard(reason="the source pod has gone")))
        addresses = plan["addresses"] if plan else []
        keys = self._node.flows_of(addresses)
        self._node.hold.delete_flows(keys, len(keys) // tcp.KEY_BYTES)
        self._node.hold.delete_notes(keys, len(keys) // tcp.KEY_BYTES)
        for address in addresses:
            self._node.hold.del_addr(address)
            self._node.hold.end_births(address)
        await job.peer.close()

    async def _recover_batches(self, job: SourceJob) -> None:
        """Further batches that were under way: each back or forward by its own journal."""
        for path in journals(self._node.journal_folder, "source"):
            journal = Journal.load(path)
            if journal.facts.get("part_of") != job.request.job_id:
                journal.close()
                continue
            request = pb.MigrateRequest.FromString(bytes.fromhex(journal.facts["request"]))
            batch = batches.child(job, request, journal)
            await batches.take_up(batch, job)
            if journal.decided("COMMIT"):
                await saga.roll_forward(BATCH_STEPS, batch, batch.clock)
                batches.add_report(job, batch, "lost" if batch.lost else "moved", batch.lost)
            else:
                await saga.roll_back(tuple(s for s in BATCH_STEPS if journal.began(s.name)), batch, batch.clock)
            job.moved_keys += batch.moved_keys
            batch.close()
            journal.remove()

    async def _take_up_until_done(self, job: SourceJob) -> None:
        """A pod that is too busy to answer is asked again: given up here, its streams would stay held for ever."""
        timeouts = self._node.settings.timeouts
        pause_s = timeouts.retry_s
        while True:
            try:
                return await self._take_up(job)
            except (Retryable, OSError) as e:
                log.warning("job %s: not taken up yet: %s", job.request.job_id, e)
                job.note("CONNECT", "retry", f"take up: {e}")
                job.close()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, timeouts.retry_max_s)

    async def _take_up(self, job: SourceJob) -> None:
        """Bring back what the dead process held: pod, fds, peer, addresses."""
        await source_prepare.connect_pod(job)
        await batches.take_up_sockets(job)
        plan = job.journal.decided("PLAN")
        job.addresses = plan["addresses"] if plan else list(job.request.addresses)
        target = job.journal.decided("TARGET")
        job.target_addresses = target["addresses"] if target else []
        commit = job.journal.decided("COMMIT")
        if commit:
            job.addresses = commit["addresses"]
        steer = job.journal.decided("STEER")
        if steer and not job.journal.decided("WAIT"):
            at, _ = job.live_pod()
            job.transit = Transit(self._node, at, job.addresses, steer["peer"], steer["vni"])
            job.report.switchover = "Steer"
        job.moving = job.transit is None and job.journal.began("SEND")
        job.report.kv.reason = "agent_restarted" if job.pool is not None else ""  # what has not moved goes without KV


def _through(job: SourceJob) -> None:
    """All steps are done; the point of no return was passed."""
    if job.lost is not None or job.failed is not None:
        _failed(job, job.lost or job.failed or Final("internal", "no reason was kept"))
    else:
        _succeeded(job)


def _succeeded(job: SourceJob) -> None:
    report = job.report
    report.phase = pb.PHASE_SUCCEEDED
    report.message = (
        f"{report.streams.migrated} streams moved from {report.source_node} to {report.target_node}; "
        f"clients were held for {report.hold_ms:.1f} ms"
    )


def _undone(job: SourceJob, e: saga.Failed) -> None:
    report = job.report
    aborted = isinstance(e.cause, Aborted)
    refused = not job.journal.began("PAUSE")
    report.phase = pb.PHASE_ABORTED if aborted else pb.PHASE_FAILED if refused else pb.PHASE_ROLLED_BACK
    report.reason = e.cause.code
    report.streams.rolled_back = report.streams.total - report.streams.unmovable if not refused else 0
    report.message = f"{e.step}: {e.cause.message}"
    if job.pod_gone:
        report.phase, report.reason = pb.PHASE_FAILED, "source_pod_gone"
        report.streams.lost, report.streams.rolled_back = report.streams.total - report.streams.unmovable, 0
        report.message += "; what served at the source has ended, and with it its streams"


def _failed(job: SourceJob, e: MidstreamError) -> None:
    job.report.phase = pb.PHASE_FAILED
    job.report.reason = e.code
    job.report.message = e.message
