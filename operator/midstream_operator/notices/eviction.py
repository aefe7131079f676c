"""A deletionTimestamp on a serving pod, whoever set it: a drain, a rollout, a scale-in, a person.

The pod's preStop hook keeps its containers running until its streams are off or its grace is over, so there is time
until the deletion timestamp, which is the instant of the kill. The pods come from the watch that is open anyway; a
restart of the operator finds those that are being deleted in its first list.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import timedelta

from midstream_operator.notices.base import Handle, Notice, NoticeKind
from midstream_operator.view import Pod, View

log = logging.getLogger(__name__)


@dataclass(slots=True)
class EvictionSource:
    view: View
    margin_s: float  # a job that ends at the kill is too late
    retry_s: float
    name: str = "eviction"
    _queue: asyncio.Queue[Pod] = field(default_factory=asyncio.Queue)

    async def run(self, handle: Handle) -> None:
        self.view.pod_listeners.append(self._changed)
        try:
            for pod in list(self.view.pods.values()):
                self._changed(pod)
            while True:
                await self._tell(await self._queue.get(), handle)
        finally:
            self.view.pod_listeners.remove(self._changed)

    def _changed(self, pod: Pod) -> None:
        if pod.deletion is not None and pod.running and pod.uid in self.view.pods:
            self._queue.put_nowait(pod)

    async def _tell(self, pod: Pod, handle: Handle) -> None:
        try:
            await handle(self.notice(pod))
        except Exception:
            log.exception("eviction of %s/%s: told again", pod.namespace, pod.name)
            asyncio.get_running_loop().call_later(self.retry_s, self._queue.put_nowait, pod)

    def notice(self, pod: Pod) -> Notice:
        """Drain when the node is being emptied, else the pod alone is not wanted any more."""
        node = self.view.nodes.get(pod.node)
        kind = NoticeKind.DRAIN if node is not None and node.leaving else NoticeKind.SCALE_IN
        deadline = pod.deletion - timedelta(seconds=self.margin_s) if pod.deletion else None
        return Notice(
            kind, self.name, node=pod.node, namespace=pod.namespace, pod=pod.name, pod_uid=pod.uid, deadline=deadline
        )
