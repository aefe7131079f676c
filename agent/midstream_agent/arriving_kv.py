"""Whether a job's KV can come to its target, and where its blocks are. All batches of a job share it.

What cannot come is computed again by the engine: no reason to refuse the streams, but one to say in the reply.
"""

from __future__ import annotations

import logging

from midstream_runtime.contract.errors import MidstreamError

from midstream_agent import pods
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.handoff import Answer, HandoffClient
from midstream_agent.kv import Geometry, PoolView
from midstream_agent.kv_target import NOT_HERE, KvTarget
from midstream_agent.node import Attached, Node
from midstream_agent.precopy import why_not

log = logging.getLogger(__name__)


class ArrivingKv:
    """Owner of the view of the pod's pool, and of the copy into it."""

    def __init__(self, node: Node, job_id: str, source_node: str) -> None:
        self._node, self._job_id, self._source_node = node, job_id, source_node
        self._pool: PoolView | None = None
        self._copy: KvTarget | None = None

    def open_pool(self, hello: Answer) -> None:
        """Of the pod that says hello; asked again it keeps what it has."""
        if self._pool is None:
            self._pool = PoolView(hello.fds.pop(0), Geometry.parse(hello.header["pool"]), writable=True)

    async def expect(self, at: Attached, req: pb.PeerPrepare, pod_version: int, reply: pb.PeerPrepared) -> None:
        """Let the source's KV streams in, and have slots ready."""
        if not req.kv_slots:
            return
        geometry = self._pool.geometry if self._pool is not None else None
        try:
            if self._copy is None and (why := why_not(geometry, req.pool_fingerprint, pod_version)):
                reply.kv_reason = why
                return
            copy = self._copy = self._copy or self._begin(at)
            reply.kv_slots_free = await copy.reserve(req.kv_slots)
        except MidstreamError as e:
            log.warning("job %s: no KV can come: %s", self._job_id, e)
            reply.kv_reason = e.code
            return
        reply.kv_port, reply.kv_ticket = copy.port, copy.ticket

    def _begin(self, at: Attached) -> KvTarget:
        assert self._pool is not None
        node = self._node
        sock = pods.connect_handoff(at.pod, node.settings.handoff_path)
        handoff = HandoffClient(sock, node.settings.timeouts.handoff_s)
        try:
            return KvTarget(node.kv_server, node.kv, handoff, self._job_id, self._source_node, self._pool)
        except BaseException:
            handoff.close()
            raise

    async def slots_of(self, req: pb.PeerShip, reply: pb.PeerRestored) -> list[int]:
        """Where the streams' KV blocks are in the pod's pool; the reply says how many of those sent are not."""
        slots = [NOT_HERE] * len(req.kv_ids)
        try:
            slots = await self._copy.slots_for(req.kv_ids) if self._copy is not None else slots
        except MidstreamError as e:
            log.warning("job %s: its KV cannot be used: %s", self._job_id, e)
            reply.kv_reason = e.code
        reply.kv_missing = sum(1 for number, slot in zip(req.kv_ids, slots, strict=True) if number and slot < 0)
        return slots

    async def close(self) -> None:
        """End the copy; the view stays until `close_pool`."""
        if self._copy is not None:
            await self._copy.close()

    def close_pool(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None
