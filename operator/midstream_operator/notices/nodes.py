"""Taints and deletions of nodes: what node-termination-handler, Karpenter, the autoscaler or a person say of a node.

The kinds are those of the other sources, and the subject is the instance where there is one: a spot interruption that
node-termination-handler taints, IMDS reports and SQS carries is one notice. Cordoning alone is none: who drains evicts
as well, and evictions are heard (eviction.py).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field

from midstream_operator.notices.base import Handle, Notice, NoticeKind
from midstream_operator.notices.instances import instance_of
from midstream_operator.view import DELETED, Node, View

log = logging.getLogger(__name__)

_NTH = "aws-node-termination-handler/"
# Prefix of a taint's key -> what it says. Our own taints (midstream.dev/) are an answer, not a notice; the
# autoscaler's DeletionCandidate is a thought and no decision.
TAINTS: tuple[tuple[str, NoticeKind], ...] = (
    (f"{_NTH}spot-itn", NoticeKind.SPOT_INTERRUPTION),
    (f"{_NTH}rebalance-recommendation", NoticeKind.REBALANCE),
    (f"{_NTH}scheduled-maintenance", NoticeKind.MAINTENANCE),
    (f"{_NTH}asg-lifecycle-termination", NoticeKind.SCALE_IN),
    ("karpenter.sh/disrupted", NoticeKind.DRAIN),
    ("karpenter.sh/disruption", NoticeKind.DRAIN),
    ("ToBeDeletedByClusterAutoscaler", NoticeKind.SCALE_IN),
    (DELETED, NoticeKind.DRAIN),
)


@dataclass(slots=True)
class NodeSource:
    view: View
    retry_s: float
    name: str = "node"
    _queue: asyncio.Queue[Notice] = field(default_factory=asyncio.Queue)

    async def run(self, handle: Handle) -> None:
        self.view.node_listeners.append(self._changed)
        try:
            for node in list(self.view.nodes.values()):
                self._changed(node)
            while True:
                await self._tell(await self._queue.get(), handle)
        finally:
            self.view.node_listeners.remove(self._changed)

    def _changed(self, node: Node) -> None:
        notice = notice_of(node)
        if notice is not None:
            self._queue.put_nowait(notice)

    async def _tell(self, notice: Notice, handle: Handle) -> None:
        try:
            await handle(notice)
        except Exception:
            log.exception("taint of %s: told again", notice.node)
            asyncio.get_running_loop().call_later(self.retry_s, self._queue.put_nowait, notice)


def notice_of(node: Node) -> Notice | None:
    """No deadline: a taint does not say until when."""
    kind = next((kind for prefix, kind in TAINTS if node.leaving.startswith(prefix)), None)
    if kind is None:
        return None
    return Notice(kind, "node", node=node.name, instance_id=instance_of(node), details={"why": node.leaving})
