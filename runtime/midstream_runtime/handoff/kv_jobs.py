"""KV blocks of streams that go on: what an agent copies, or writes, before it pauses anybody."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from midstream_runtime.contract import handoff as wire
from midstream_runtime.contract.errors import Final
from midstream_runtime.contract.pool import HASH_BYTES
from midstream_runtime.handoff.answering import Reply, Verbs
from midstream_runtime.handoff.app import App, KvEntry
from midstream_runtime.handoff.connection import Connection


@dataclass(slots=True)
class KvJob:
    """KV slots that one migration has here, apart from the state of its streams: copied while they go on."""

    asked_by: int
    reserved: set[int] = field(default_factory=set)
    """To be written by the agent, not landed, in no stream yet."""
    held: list[int] = field(default_factory=list)
    """One entry for each hold."""


class KvJobs:
    """All of a pod. They end with the agent's session that asked last; `streams` finds those that a request names."""

    def __init__(self, app: App, streams: Callable[[dict[str, Any]], list[Connection]]) -> None:
        self._app, self._streams = app, streams
        self._jobs: dict[str, KvJob] = {}

    def verbs(self) -> Verbs:
        return {
            "kv": self.on_kv,
            "kv_reserve": self.on_kv_reserve,
            "kv_have": self.on_kv_have,
            "kv_land": self.on_kv_land,
            "kv_end": self.on_kv_end,
        }

    def taken(self, slots: Iterable[int]) -> None:
        """Streams own these slots now."""
        for job in self._jobs.values():
            job.reserved.difference_update(slots)

    async def end_session(self, session: int) -> None:
        for name, job in list(self._jobs.items()):
            if job.asked_by == session:
                await self._end(name)

    def _job(self, header: dict[str, Any]) -> KvJob:
        job = self._jobs.setdefault(str(header["job"]), KvJob(header["_session"]))
        job.asked_by = header["_session"]
        return job

    async def on_kv(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._job(header)
        done, job.held = job.held, []
        await self._app.unhold(done)
        known = {int(number): int(blocks) for number, blocks in header["known"]}
        served = [c for c in self._streams(header) if c.handler is not None]
        handlers = [c.handler for c in served if c.handler is not None]
        lists = await self._app.kv(handlers, [known.get(c.id, 0) for c in served], wire.MAX_KV_BLOCKS)
        blocks = [block for blocks in lists for block in blocks]
        job.held = [block.slot for block in blocks]
        streams = [[c.id, len(blocks)] for c, blocks in zip(served, lists, strict=True)]
        body = b"".join(wire.BLOCK.pack(b.slot, b.block_hash, b.digest) for b in blocks)
        return Reply({"streams": streams}, body)

    async def on_kv_reserve(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._job(header)
        slots = await self._app.reserve(int(header["slots"]))
        job.reserved.update(slots)
        return Reply({"slots": slots})

    async def on_kv_have(self, header: dict[str, Any], payload: bytes) -> Reply:
        job = self._job(header)
        if len(payload) % HASH_BYTES:
            raise Final("handoff_protocol", "kv_have: the payload is no list of hashes")
        names = [payload[at : at + HASH_BYTES] for at in range(0, len(payload), HASH_BYTES)]
        slots = await self._app.have(names)
        job.held += [slot for slot in slots if slot is not None]
        return Reply({"slots": [-1 if slot is None else slot for slot in slots]})

    async def on_kv_land(self, header: dict[str, Any], payload: bytes) -> Reply:
        job = self._job(header)
        slots = [int(slot) for slot in header["slots"]]
        if len(payload) != wire.BLOCK.size * len(slots):
            raise Final("handoff_protocol", "kv_land: one block a slot is needed")
        if len(set(slots)) != len(slots) or not job.reserved.issuperset(slots):
            raise Final("kv_not_reserved", f"KV slots {slots[:8]} are not this job's: reserve, fill, then land them")
        named = zip(slots, wire.BLOCK.iter_unpack(payload), strict=True)
        await self._app.land([KvEntry(slot, 0, digest, name) for slot, (_, name, digest) in named])
        job.reserved.difference_update(slots)
        job.held += slots
        return Reply()

    async def on_kv_end(self, header: dict[str, Any], _: bytes) -> Reply:
        await self._end(str(header["job"]))
        return Reply()

    async def _end(self, name: str) -> None:
        job = self._jobs.pop(name, None)
        if job is not None:
            await self._app.free(sorted(job.reserved))
            await self._app.unhold(job.held)
