"""Notices of the instances' own metadata, as each node's agent reports them: the fastest of the sources.

One call a node stays open; the agent says at once what stands, then each change. An agent that is not there is tried
again, and named in `unheard`: its node's end would be heard by SQS only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from midstream_agent.contract import agent_pb2 as pb

from midstream_operator.errors import OperatorError
from midstream_operator.notices.base import Handle, Notice, NoticeKind
from midstream_operator.view import View

log = logging.getLogger(__name__)

Listen = Callable[[str], AsyncIterator[pb.Notice]]  # of a node's agent


@dataclass(slots=True)
class AgentSource:
    view: View
    listen: Listen
    retry_s: float
    retry_max_s: float
    resync_s: float  # nodes that came or went are seen within this time
    name: str = "imds"
    unheard: dict[str, str] = field(default_factory=dict)  # node -> why

    async def run(self, handle: Handle) -> None:
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                nodes = {agent.node for agent in self.view.agent_pods.values() if agent.endpoint}
                for node in nodes - set(tasks):
                    tasks[node] = asyncio.create_task(self._follow(node, handle), name=f"notices of {node}")
                for node in set(tasks) - nodes:
                    tasks.pop(node).cancel()
                    self.unheard.pop(node, None)
                for task in tasks.values():
                    if task.done():
                        task.result()
                await asyncio.sleep(self.resync_s)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _follow(self, node: str, handle: Handle) -> None:
        """Until cancelled. What could not be recorded is told by the agent again when the call is opened anew."""
        pause_s = self.retry_s
        while True:
            try:
                async for message in self.listen(node):
                    self.unheard.pop(node, None)
                    pause_s = self.retry_s
                    await self._take(node, message, handle)
                why = "its agent ended the call"
            except OperatorError as e:
                why = e.message
            except Exception as e:
                log.exception("notices of %s", node)
                why = f"{type(e).__name__}: {e}"
            if node not in self.unheard:
                log.warning("notices of %s are not heard: %s", node, why)
            self.unheard[node] = why
            await asyncio.sleep(pause_s)
            pause_s = min(self.retry_max_s, pause_s * 2)

    async def _take(self, node: str, message: pb.Notice, handle: Handle) -> None:
        notice = notice_of(node, message)
        if notice is None:
            log.warning("the agent of %s says %r, which this operator does not know", node, message.kind)
        elif message.withdrawn:
            log.info("%s of %s is withdrawn: a job that runs goes on", message.kind, node)
        else:
            await handle(notice)


def notice_of(node: str, message: pb.Notice) -> Notice | None:
    """None: a kind of a newer agent."""
    if message.kind not in set(NoticeKind):
        return None
    return Notice(
        NoticeKind(message.kind),
        "imds",
        node=node,
        instance_id=message.instance_id,
        issued_at=_at(message.issued_unix_ms),
        deadline=_at(message.deadline_unix_ms),
        details=dict(message.details),
    )


def _at(unix_ms: int) -> datetime | None:
    return datetime.fromtimestamp(unix_ms / 1000, UTC) if unix_ms else None
