"""The source's side while clients wait: streams are paused, held, exported, and brought back to life.

Nothing in here may be slow that could be done in PREPARE.
"""

from __future__ import annotations

import time
from typing import Any

from midstream_runtime.contract.errors import Final

from midstream_agent import pods, tcp
from midstream_agent.bring_up import bring_up
from midstream_agent.hold import FLOW_FROZEN, FLOW_HELD
from midstream_agent.source import SourceJob, count_broken
from midstream_agent.source_prepare import resume

# -- PAUSE -------------------------------------------------------------------------------------------------


async def pause(job: SourceJob) -> None:
    """Take the streams from the pod at a token boundary; refuse by name what cannot move."""
    at, _ = job.live_pod()
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
        await _resume(job)


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


async def _resume(job: SourceJob) -> None:
    await resume(job)
    job._close_fds()


async def unpause(job: SourceJob) -> None:
    await _resume(job)
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
        await _resume(job)
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


async def thaw(job: SourceJob) -> None:
    """Back to life in the order of ACTIVATE: a thaw that only ends repair stalls clients for up to seconds."""
    if not job.fds or not job.keys:
        return
    if job.batch is None:
        # after a restart: how far an earlier process got is not known, its sockets may be live again
        job.leave_out_ended()
        freeze(job)
        job.batch = tcp.Batch.checkpoint(job.fds)
    batch = job.batch
    notes = job.node.hold.read_notes(job.keys, job.streams)
    broken = bring_up(job.node, batch, job.fds, job.keys, notes, thaw=True)
    count_broken(job.report, "THAW", broken, job.note)
    job.batch = None
