"""KV ahead of a move that may never come: a rebalance recommendation says that a node is at risk, not that it ends.

The target's pool gets the pod's full blocks as cache, where the move will find them (`kv_have`) and need not send them.
Nothing else is prepared, and nothing is kept between two calls: no stream, address or slot is taken, no journal is
needed, both agents may restart, and what the target's engine needs the room for it evicts. So it may go on for hours,
beside other jobs of the pod; the operator asks again now and then, and cancels its call when the move begins.
"""

from __future__ import annotations

import logging

from midstream_runtime.contract.errors import Final

from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.greeting import fingerprint_of, pool_fingerprint_of
from midstream_agent.journal import Unwritten
from midstream_agent.node import Node
from midstream_agent.peer import PeerSession
from midstream_agent.source import SourceJob
from midstream_agent.source_prepare import begin_copy, connect_pod, end_copy, floating_addresses, list_streams

log = logging.getLogger(__name__)
_SUFFIX = "~warm"  # at the target it is a job of its own


async def warm(node: Node, request: pb.WarmRequest) -> pb.WarmReply:
    """One copy, rounds until little is left. Cancelled, it ends within a round trip."""
    if request.target_node.name == node.settings.node:
        raise Final("same_node", f"{request.target_node.name} is the node the pod runs on: choose another target")
    job = SourceJob(node, _as_move(request), Unwritten(), lambda event: None)
    try:
        await connect_pod(job)
        job.addresses = await floating_addresses(job)
        streams = await list_streams(job)
        job.report.kv.bytes_total = sum(int(s.get("kv_bytes") or 0) for s in streams)
        if job.pool is None:
            job.report.kv.reason = "no_pool"
        elif streams:
            await _copy(job)
        return pb.WarmReply(streams=len(streams), kv=job.report.kv)
    finally:
        await end_copy(job)
        if job.peer is not None:
            await job.peer.close()
        job.close()


async def _copy(job: SourceJob) -> None:
    request, node = job.request, job.node
    to = request.target_node
    job.peer = PeerSession(node.settings, to.name, to.endpoint, request.job_id, request.epoch, node.boot_id)
    await job.peer.open()
    job.reserved_slots = 1  # the target gives what is offered; nothing comes at a pause
    body = pb.PeerPrepare(
        pod=request.target_pod,
        model_fingerprint=fingerprint_of(job.hello),
        pool_fingerprint=pool_fingerprint_of(job.hello),
        kv_slots=job.reserved_slots,
        mtu_bytes=node.settings.nic.mtu_bytes,
        pod_kind=str(job.hello.get("pod_kind", "")),
    )
    reply = await job.peer.ask(pb.PeerRequest(prepare=body))
    begin_copy(job, reply.prepared)
    if job.copy is not None:
        await job.copy.copy_ahead(job.addresses, lambda: False, 0)


def _as_move(request: pb.WarmRequest) -> pb.MigrateRequest:
    return pb.MigrateRequest(
        job_id=request.job_id + _SUFFIX,
        epoch=request.epoch,
        pod=request.pod,
        target_pod=request.target_pod,
        target_node=request.target_node,
        addresses=request.addresses,
        kv_mode=request.kv_mode,
        kv_bytes_per_s=request.kv_bytes_per_s,
    )
