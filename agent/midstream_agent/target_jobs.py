"""All jobs of an agent as a target, and the sessions that serve them."""

from __future__ import annotations

import asyncio
import logging

from midstream_runtime.contract.errors import Final

from midstream_agent import peer, tunnel_check
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import logs
from midstream_agent.journal import Journal, journals
from midstream_agent.node import Node
from midstream_agent.target import ACTIVATED, DISCARDED, NEW, PREPARED, RESTORED, TargetJob

log = logging.getLogger(__name__)


class TargetJobs:
    """All jobs of this agent as a target, and the sessions that serve them."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.jobs: dict[str, TargetJob] = {}
        self.tasks = node.tasks

    async def recover(self) -> None:
        """Take up what an earlier process of this boot left."""
        for path in journals(self._node.journal_folder, "target"):
            journal = Journal.load(path)
            job = await TargetJob.reopen(self._node, journal)
            if parent := self.jobs.get(journal.facts.get("part_of", "")):
                job.part_of(parent)
            if journal.decided(DISCARDED) or not journal.decided(RESTORED):
                job.own_leftovers()
                await job.discard()
                continue
            await job.reacquire()
            self.jobs[job.job_id] = job
            log.info("job %s: restored before this agent started, held until %s decides", job.job_id, job.source_node)

    async def session(self, hello: pb.PeerHello) -> peer.Handler:
        if tunnel_check.is_check(hello.job_id):
            return tunnel_check.Answerer(self._node)
        job = self.jobs.get(hello.job_id)
        if job is None or job.state == DISCARDED:
            job = self.jobs[hello.job_id] = TargetJob(self._node, hello.job_id, hello.node, hello.boot_id)
        elif job.source_node != hello.node:
            raise Final("peer_identity", f"job {hello.job_id} belongs to node {job.source_node}, not to {hello.node}")
        self._node.check_epoch(f"job:{hello.job_id}", hello.epoch)
        return TargetSession(self, job)

    def forget(self, job: TargetJob) -> None:
        """Nobody will ask for it again."""
        self.jobs.pop(job.job_id, None)
        for what in ("job", "gone"):
            self._node.forget_epoch(f"{what}:{job.job_id}")

    def check_gone_epoch(self, job: TargetJob, epoch: int) -> None:
        self._node.check_gone_epoch(job.job_id, epoch)

    def parent_of(self, job_id: str, batch: TargetJob) -> TargetJob:
        """The job whose further batch this is: live here, of the same source."""
        parent = self.jobs.get(job_id)
        if parent is None or parent.state != ACTIVATED or parent.source_node != batch.source_node:
            raise Final("job_state", f"job {job_id} is not under way here: it can have no further batch")
        return parent


class TargetSession(peer.Handler):
    """Requests of one session, one at a time, also when two sessions of a job overlap."""

    def __init__(self, jobs: TargetJobs, job: TargetJob) -> None:
        self._jobs = jobs
        self._job = job
        job.sessions += 1

    async def handle(self, request: pb.PeerRequest, reply: pb.PeerReply) -> None:
        logs.JOB.set(self._job.job_id.partition("~")[0])
        async with self._job.lock:
            try:
                await self._dispatch(request, reply)
            except (OSError, ValueError, KeyError, TypeError) as e:
                log.exception("job %s: %s failed", self._job.job_id, request.WhichOneof("body"))
                raise Final("target_failed", f"{type(e).__name__}: {e}") from e

    async def _dispatch(self, request: pb.PeerRequest, reply: pb.PeerReply) -> None:
        job = self._job
        match request.WhichOneof("body"):
            case "prepare":
                if request.prepare.part_of:
                    job.part_of(self._jobs.parent_of(request.prepare.part_of, job))
                reply.prepared.CopyFrom(await job.prepare(request.prepare))
            case "ship":
                reply.restored.CopyFrom(await job.restore(request.ship))
            case "move_address":
                reply.address_moved.CopyFrom(await job.move_address(request.move_address))
            case "commit":
                reply.activated.CopyFrom(await job.activate(request.commit))
            case "discard":
                await job.discard()
                self._jobs.forget(job)
                reply.discarded.SetInParent()
            case "finish":
                if job.parent is not None:
                    job.parent.count_further(job.streams - len(job.broken))
                await job.finish()
                self._jobs.forget(job)
                reply.finished.SetInParent()
            case other:
                raise Final("peer_protocol", f"this agent does not know the request {other}: upgrade it first")

    def session_ended(self) -> None:
        self._jobs.tasks.start(f"end of {self._job.job_id}'s session", self._end())

    async def _end(self) -> None:
        """Before a checkpoint came there is nothing to wait for; afterwards only the source decides."""
        self._job.sessions -= 1
        async with self._job.lock:
            if self._job.state in (NEW, PREPARED) and not self._job.sessions:
                await self._job.discard()
                self._jobs.forget(self._job)
        if self._job.state == ACTIVATED and self._job.parent is None and self._job.arrival.moved:
            await self._bury()

    async def _bury(self) -> None:
        """Streams and addresses are here; a source that stays silent has nothing left that packets could go to."""
        await asyncio.sleep(self._job.node.settings.timeouts.orphan_linger_s)
        async with self._job.lock:
            if not (self._job.sessions or self._job.gone) and self._jobs.jobs.get(self._job.job_id) is self._job:
                log.info("job %s: its source is silent: the addresses are ours alone now", self._job.job_id)
                await self._job.finish()
                self._jobs.forget(self._job)
