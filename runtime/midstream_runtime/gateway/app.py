"""The gateway: an OpenAI-compatible front of one engine, whose clients can change nodes in every state.

One event loop, no thread. The engine is another process; its tokens come through one callback for all streams.
"""

from __future__ import annotations

import asyncio
import json
import logging
import mmap
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

from midstream_runtime.contract.errors import MidstreamError, Retryable
from midstream_runtime.contract.pool import PoolView, SlotState
from midstream_runtime.engine.client import GatewayEngine
from midstream_runtime.engine.protocol import EngineInfo, EngineState, RequestStats, TokenEvent
from midstream_runtime.engine.vllm.upstream import Upstream
from midstream_runtime.gateway.http import HttpError
from midstream_runtime.gateway.metrics import Metrics
from midstream_runtime.gateway.stream import Answer, Stream
from midstream_runtime.handoff import App, Connection, Handler, KvEntry, Paused

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    max_body_bytes: int
    idle_s: float
    """A connection on which nothing is asked for this long is closed."""
    zero_kv: bool = False
    """For tests: wipe the KV that comes with a migration, so that an answer that uses it must change."""
    native_chat: bool = False
    """Chats go to the engine's own server: it shapes their answers (tool and reasoning parsers)."""


class Gateway(App):
    """`attach` gives it an engine; without one it answers 503."""

    kind = "gateway"

    def __init__(self, info: EngineInfo, settings: Settings, metrics: Metrics) -> None:
        self.info, self.settings, self.metrics = info, settings, metrics
        self.streams: set[Stream] = set()
        self.answers: dict[str, Stream] = {}
        """By the engine's name of the answer."""
        self._engine: GatewayEngine | None = None
        self._names = count(1)
        self._background: set[asyncio.Task[None]] = set()
        self._pool: tuple[mmap.mmap, PoolView] | None = None
        self._started_at = int(time.time())

    # -- engine --------------------------------------------------------------------------------------------

    def attach(self, engine: GatewayEngine) -> None:
        """Use this engine; it must serve the model that `info` names."""
        self._engine = engine
        engine.on_lost, engine.on_change = self._engine_lost, self._engine_changed
        self._map_pool(engine)
        self.metrics.engine_up.set(1)

    def _engine_changed(self, info: EngineInfo) -> None:
        """The same engine with another pool."""
        self.info = info
        if self._engine is not None:
            self._map_pool(self._engine)

    def _map_pool(self, engine: GatewayEngine) -> None:
        self._pool = None
        fd = engine.pool_fd()
        if fd is not None:
            access = mmap.PROT_READ | (mmap.PROT_WRITE if self.settings.zero_kv else 0)
            memory = mmap.mmap(fd, 0, mmap.MAP_SHARED, access)
            self._pool = (memory, PoolView(memoryview(memory)))

    def engine(self) -> GatewayEngine:
        if self._engine is None:
            raise Retryable("engine_lost", "the engine is not there: it is being started again, try later")
        return self._engine

    @property
    def upstream(self) -> Upstream | None:
        """The engine's own HTTP server, for requests that go to it as they came; None: it has none."""
        return self._engine.upstream if self._engine is not None else None

    def _engine_lost(self, error: MidstreamError) -> None:
        self._engine, self._pool = None, None
        self.metrics.engine_up.set(0)
        for stream in list(self.answers.values()):
            stream.fail(error)
        self.answers.clear()

    @property
    def busy(self) -> bool:
        """Is anybody still being answered?"""
        return bool(self.answers) or any(stream.passing is not None for stream in self.streams)

    def new_name(self) -> str:
        return f"a{next(self._names)}"

    def sink(self, events: list[tuple[str, TokenEvent]]) -> None:
        answers = self.answers
        for name, event in events:
            stream = answers.get(name)
            if stream is not None:
                stream.token(event)
        self.metrics.tokens.inc(len(events))

    def drop(self, name: str) -> None:
        self.answers.pop(name, None)
        if self._engine is not None:
            self._later(self._engine.drop([name]))

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Run beside the others; only the engine's loss can end it early, and `_engine_lost` deals with that."""

        async def quietly() -> None:
            try:
                await work
            except MidstreamError as error:
                log.info("engine: %s", error)

        task = asyncio.get_running_loop().create_task(quietly())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # -- clients -------------------------------------------------------------------------------------------

    def connected(self, connection: Connection) -> Stream:
        self.metrics.connections.inc()
        return Stream(self, connection)

    def finished(self, answer: Answer, status: int, usage: RequestStats | None) -> None:
        self.answers.pop(answer.name, None)
        path = "/v1/completions" if answer.form.kind == "completion" else "/v1/chat/completions"
        self.metrics.requests.labels(path, str(status)).inc()
        if usage is not None:
            self.metrics.prompt_tokens.inc(usage.prompt_tokens)
            if answer.name in self.metrics.adopted_names:
                self.metrics.adopted_prefill.inc(usage.prefill_tokens)
                self.metrics.adopted_kv.inc(usage.kv_tokens_used)
        self.metrics.adopted_names.discard(answer.name)

    def page(self, path: str) -> tuple[int, bytes, str]:
        """Status, body and media type of what is not an answer of the model."""
        if path == "/health":
            if self._engine is None or not self._engine.healthy:
                return 503, b'{"status":"no engine"}', "application/json"
            return 200, b'{"status":"ok"}', "application/json"
        if path == "/metrics":
            self.metrics.streams.set(len(self.streams))
            self.metrics.running.set(len(self.answers))
            return 200, self.metrics.render(), "text/plain; version=0.0.4; charset=utf-8"
        model = {"id": self.info.model, "object": "model", "created": self._started_at, "owned_by": "midstream",
                 "max_model_len": self.info.context}  # fmt: skip
        if path == "/v1/models":
            return 200, json.dumps({"object": "list", "data": [model]}).encode(), "application/json"
        if path == f"/v1/models/{self.info.model}":
            return 200, json.dumps(model).encode(), "application/json"
        raise HttpError(404, f"there is nothing at {path}", code="not_found")

    def close_idle(self) -> None:
        now = time.monotonic()
        for stream in list(self.streams):
            if not stream.busy and not stream.connection.frozen and now > stream.deadline:
                stream.close_idle()

    # -- migration: what the handoff asks for ----------------------------------------------------------------

    def model(self) -> dict[str, Any]:
        return {"name": self.info.model, "fingerprint": self.info.fingerprint}

    def pool(self) -> tuple[dict[str, Any], int] | None:
        fd = self._engine.pool_fd() if self._engine is not None else None
        if self.info.pool is None or fd is None:
            return None
        return dict(vars(self.info.pool)), fd

    def load(self) -> dict[str, float] | None:
        return self._engine.load if self._engine is not None else None

    def kv_bytes(self, tokens: int) -> int:
        pool = self.info.pool
        return 0 if pool is None else -(-tokens // pool.block_tokens) * pool.slot_bytes

    async def pause(self, handlers: Sequence[Handler]) -> Paused:
        streams = _ours(handlers)
        for stream in streams:
            stream.suspend()
        names = [s.answer.name for s in streams if s.answer is not None]
        states = await self.engine().pause(names) if names else {}
        # Answers may have ended while the engine stopped: their last bytes are in the send buffers now.
        paused = Paused([])
        for stream in streams:
            state = states.get(stream.answer.name) if stream.answer is not None else None
            paused.states.append(stream.pack(self._name_blocks(state, paused.kv) if state is not None else None))
        return paused

    def _name_blocks(self, state: EngineState, kv: list[KvEntry]) -> EngineState:
        """The state with its blocks' places in `kv` instead of this node's slots."""
        places: list[int | None] = []
        for block in state.kv:
            if block.slot is None or self._pool is None or self.info.pool is None:
                places.append(None)
                continue
            places.append(len(kv))
            info = self._pool[1].info(block.slot)
            name = info.block_hash if info.state == SlotState.SEALED else b""
            kv.append(KvEntry(block.slot, self.info.pool.slot_bytes, info.checksum, name))
        return state.with_slots(places)

    async def resume(self, handlers: Sequence[Handler]) -> None:
        await self._go_on(_ours(handlers))

    async def release(self, handlers: Sequence[Handler]) -> None:
        for stream in _ours(handlers):
            stream.forget()

    async def reserve(self, slots: int) -> list[int]:
        return await self.engine().reserve(slots)

    async def free(self, slots: Sequence[int]) -> None:
        if slots and self._engine is not None:
            await self._engine.free(slots)

    async def kv(self, handlers: Sequence[Handler], known: Sequence[int], limit: int) -> list[list[KvEntry]]:
        names = [s.answer.name if s.answer is not None and s.answer.begun else "" for s in _ours(handlers)]
        if self._engine is None or self._pool is None or self.info.pool is None:
            return [[] for _ in names]
        wanted = {name: blocks for name, blocks in zip(names, known, strict=True) if name}
        slots = await self._engine.kv(wanted, limit)
        return [[self._entry(slot) for slot in slots.get(name, ())] for name in names]

    def _entry(self, slot: int) -> KvEntry:
        assert self._pool is not None and self.info.pool is not None
        info = self._pool[1].info(slot)
        return KvEntry(slot, self.info.pool.slot_bytes, info.checksum, info.block_hash)

    async def have(self, hashes: Sequence[bytes]) -> list[int | None]:
        return await self.engine().have(hashes)

    async def land(self, blocks: Sequence[KvEntry]) -> None:
        await self.engine().land([b.slot for b in blocks], [(b.block_hash, b.digest) for b in blocks])

    async def unhold(self, slots: Sequence[int]) -> None:
        if slots and self._engine is not None:
            await self._engine.unhold(slots)

    async def stage(
        self, connections: Sequence[Connection], states: Sequence[bytes], slots: Sequence[int | None]
    ) -> Sequence[Handler]:
        if self.settings.zero_kv:
            self._wipe(slots)
        came = [Stream.unpack(self, c, state, slots) for c, state in zip(connections, states, strict=True)]
        streams = [stream for stream, _ in came]
        starts = [start for _, start in came if start is not None]
        try:
            for stream in streams:
                if stream.answer is not None:
                    self.answers[stream.answer.name] = stream
                    self.metrics.adopted_names.add(stream.answer.name)
            errors = await self.engine().start(starts, self.sink) if starts else {}
            if errors:
                raise next(iter(errors.values()))
        except MidstreamError:
            for stream in streams:
                stream.forget()
            raise
        return streams

    async def activate(self, handlers: Sequence[Handler]) -> None:
        streams = _ours(handlers)
        self.metrics.adopted.inc(len(streams))
        await self._go_on(streams)

    async def _go_on(self, streams: Sequence[Stream]) -> None:
        names = [s.answer.name for s in streams if s.answer is not None]
        if names and self._engine is not None:
            await self._engine.resume(names)
        for stream in streams:
            stream.touch()
            if stream.passing is not None:
                stream.passing.resume()
            stream.proceed()

    def _wipe(self, slots: Sequence[int | None]) -> None:
        if self._pool is not None:
            for slot in slots:
                if slot is not None:
                    block = self._pool[1].slot(slot)
                    block[:] = bytes(len(block))


def _ours(handlers: Sequence[Handler]) -> list[Stream]:
    return cast(list[Stream], list(handlers))
