"""The source's node is gone for good: what this node has of its streams is all that is left of them.

Whole checkpoints go live (rows SOURCE_GONE and GO_LIVE of docs/ownership.md), streams that were live stay so, the rest
has died with the source. Should the source live all the same, it must never hear that a checkpoint was thrown away
that went live here: so the job and its journal are kept until this node's boot ends, and refuse DISCARD.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from midstream_runtime.contract.errors import Final, MidstreamError

from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import logs
from midstream_agent.hold_layout import NOTE
from midstream_agent.target import ACTIVATED, GONE, RESTORED, TargetJob
from midstream_agent.target_jobs import TargetJobs

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Count:
    streams: int = 0
    lost: int = 0
    why: str = ""


async def take_over(jobs: TargetJobs, job_id: str, node: str, evidence: str, epoch: int) -> pb.DeclareGoneReply:
    """Idempotent: an operator that has not heard the answer asks again."""
    logs.JOB.set(job_id)
    first = jobs.jobs.get(job_id)
    if first is None:
        raise Final("unknown_job", f"this agent has nothing of job {job_id}")
    if first.source_node != node:
        raise Final("peer_identity", f"job {job_id} belongs to node {first.source_node}, not to {node}")
    jobs.check_gone_epoch(first, epoch)
    log.warning("job %s: the source's node %s is gone (%s): its streams are taken over", job_id, node, evidence)
    count = Count(first.further)
    batches = [job for name, job in jobs.jobs.items() if name.startswith(f"{job_id}~")]
    async with first.lock:
        whole = first.state in (RESTORED, ACTIVATED)
        if whole:
            first.arrival.take_over()
        await _take_over(jobs, first, evidence, count)
        for job in batches:
            async with job.lock:  # its session may still be about what the source said last
                await _take_over(jobs, job, evidence, count)
                job.close()
        if whole:
            await first.keep_addresses()
    message = f"{count.streams} streams are live here, {count.lost} are lost" + (f": {count.why}" if count.why else "")
    return pb.DeclareGoneReply(streams=count.streams, lost=count.lost, message=message)


async def _take_over(jobs: TargetJobs, job: TargetJob, evidence: str, count: Count) -> None:
    if job.state not in (RESTORED, ACTIVATED):
        count.lost += len(job.families)
        count.why = count.why or "no whole checkpoint of them had come"
        await job.discard()
        jobs.forget(job)
        return
    if not job.gone and job.journal is not None:
        job.journal.decide(GONE, node=job.source_node, evidence=evidence)
    job.gone = evidence
    try:
        if job.state == RESTORED:
            await job.activate(pb.PeerCommit(notes=bytes(NOTE.size * job.streams)))
    except MidstreamError as e:
        if not isinstance(e, Final):
            raise
        count.lost, count.why = count.lost + job.streams, count.why or str(e)
    else:
        count.streams, count.lost = count.streams + job.streams - len(job.broken), count.lost + len(job.broken)
        count.why = count.why or "; ".join(sorted(set(job.broken)))
