"""What this node is told of its own end, and who wants to hear it.

IMDS has no push: four paths are asked about once a second. `said` reads the answers (pure functions), the board keeps
what stands now, and the operator's call hears all of that at once and each change after it, so that an operator that
comes late or comes back misses nothing. One source that does not answer or says nonsense is named in `health` and does
not keep the others from being heard.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from midstream_runtime.contract.errors import MidstreamError

from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.imds import Imds
from midstream_agent.settings import ImdsSettings

log = logging.getLogger(__name__)

SPOT, REBALANCE, MAINTENANCE, LIFECYCLE = "SpotInterruption", "Rebalance", "Maintenance", "Lifecycle"
_QUEUED = 64  # changes that a slow listener may be behind; then its call ends and it comes again


@dataclass(frozen=True, slots=True)
class Said:
    """One notice. The instance is the node's own."""

    kind: str
    issued: datetime | None = None
    deadline: datetime | None = None
    details: tuple[tuple[str, str], ...] = ()


def spot(text: str) -> list[Said]:
    """spot/instance-action: {"action": "terminate", "time": "2026-11-25T10:02:00Z"}: the time is the end itself."""
    found = _object(json.loads(text))
    action = str(found.get("action", ""))
    if action in ("", "none"):
        return []
    return [Said(SPOT, None, _iso(found["time"]), (("action", action),))]


def rebalance(text: str) -> list[Said]:
    """events/recommendations/rebalance: {"noticeTime": "2026-11-25T10:00:00Z"}."""
    return [Said(REBALANCE, _iso(_object(json.loads(text))["noticeTime"]))]


def maintenance(text: str) -> list[Said]:
    """events/maintenance/scheduled: an array; some servers give the one object."""
    found = json.loads(text)
    events = [_object(event) for event in (found if isinstance(found, list) else [found])]
    return [
        Said(MAINTENANCE, None, _worded(event["NotBefore"]), (("code", str(event.get("Code", ""))),
             ("event", str(event.get("EventId", "")))))
        for event in events if event.get("State", "active") == "active"
    ]  # fmt: skip


def lifecycle(text: str) -> list[Said]:
    """autoscaling/target-lifecycle-state: InService, Standby, Warmed:..., Terminated."""
    return [Said(LIFECYCLE, details=(("state", "Terminated"),))] if text.strip() == "Terminated" else []


PATHS: dict[str, Callable[[str], list[Said]]] = {
    "spot/instance-action": spot,
    "events/recommendations/rebalance": rebalance,
    "events/maintenance/scheduled": maintenance,
    "autoscaling/target-lifecycle-state": lifecycle,
}


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"an object is wanted, not {type(value).__name__}")
    return value


def _iso(value: Any) -> datetime:
    found = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _worded(value: Any) -> datetime:
    """21 Jan 2027 09:00:43 GMT."""
    return datetime.strptime(str(value), "%d %b %Y %H:%M:%S GMT").replace(tzinfo=UTC)


@dataclass(slots=True)
class Board:
    """What stands now, by path; listeners hear each change."""

    instance_id: str = ""
    standing: dict[str, list[Said]] = field(default_factory=dict)
    health: dict[str, str] = field(default_factory=dict)  # path -> what is wrong; empty: all is heard
    _listeners: set[asyncio.Queue[pb.Notice | None]] = field(default_factory=set)

    def put(self, path: str, now: list[Said]) -> None:
        before = self.standing.get(path, [])
        self.standing[path] = now
        for said in now:
            if said not in before:
                log.warning("notice: %s by %s", said.kind, said.deadline or "no time")
                self._tell(said, withdrawn=False)
        for said in before:
            if said not in now and said.kind not in {other.kind for other in now}:
                self._tell(said, withdrawn=True)

    def _tell(self, said: Said, *, withdrawn: bool) -> None:
        for queue in list(self._listeners):
            if queue.qsize() >= _QUEUED:
                self._listeners.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(self._message(said, withdrawn))

    def _message(self, said: Said, withdrawn: bool = False) -> pb.Notice:
        return pb.Notice(
            kind=said.kind,
            instance_id=self.instance_id,
            issued_unix_ms=_ms(said.issued),
            deadline_unix_ms=_ms(said.deadline),
            details=dict(said.details),
            withdrawn=withdrawn,
        )

    async def listen(self) -> AsyncIterator[pb.Notice]:
        """All that stands, then each change."""
        queue: asyncio.Queue[pb.Notice | None] = asyncio.Queue()
        for said in [said for standing in self.standing.values() for said in standing]:
            queue.put_nowait(self._message(said))
        self._listeners.add(queue)
        try:
            while (notice := await queue.get()) is not None:
                yield notice
        finally:
            self._listeners.discard(queue)


def _ms(at: datetime | None) -> int:
    return int(at.timestamp() * 1000) if at else 0


async def watch(settings: ImdsSettings, board: Board) -> None:
    """Ask IMDS for ever. `board.health` says what cannot be heard."""
    imds, ever = Imds(settings), False
    pause_s = settings.poll_s
    while True:
        try:
            board.instance_id = board.instance_id or await imds.get("instance-id") or ""
            for path, read in PATHS.items():
                await _look(imds, board, path, read)
            board.health.pop("imds", None)
            ever, pause_s = True, settings.poll_s
        except MidstreamError as e:
            if "imds" not in board.health:
                log.warning("%s", e)
            board.health["imds"] = e.message
            pause_s = min(settings.retry_max_s if ever else settings.absent_max_s, pause_s * 2)
        await asyncio.sleep(pause_s * random.uniform(1 - settings.jitter, 1 + settings.jitter))


async def _look(imds: Imds, board: Board, path: str, read: Callable[[str], list[Said]]) -> None:
    text = await imds.get(path)
    try:
        board.put(path, read(text) if text is not None else [])
        board.health.pop(path, None)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        if path not in board.health:
            log.error("IMDS says what nobody understands at %s: %s: %.200s", path, e, text)
        board.health[path] = f"{type(e).__name__}: {e}"


class HasNotices(Protocol):
    """What the mixin needs of a node."""

    @property
    def notices(self) -> Board: ...


class Service(Protocol):
    """What the mixin needs of the service that it is mixed into: the node, and who may ask."""

    @property
    def _node(self) -> HasNotices: ...

    async def _admit(self, context: Any) -> None: ...


class NoticesMixin:
    """`Agent.Notices`, for the agent's service."""

    async def Notices(self: Service, request: pb.NoticesRequest, context: Any) -> AsyncIterator[pb.Notice]:
        await self._admit(context)
        async for notice in self._node.notices.listen():
            yield notice
