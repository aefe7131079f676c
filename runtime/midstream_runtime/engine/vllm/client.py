"""The engine protocol over a stock vLLM server.

An answer is one streamed request to /v1/completions with token ids as its prompt, read by a task of its own. A pause
stops handing events on and leaves the request running: a rollback goes on where it stopped, and what came meanwhile
is not part of the state. At the target the server begins with the ids that came, KV from the pool, before the
client's socket is live; its tokens wait for `resume`.

A server that goes away does not end its answers: they go on from their ids when it is back, within `Settings.outage_s`.

KV goes to the pool block by block as vLLM fills it, and blocks are named by the ids that lead to them: so this end
knows the names of an answer's blocks while the server goes on with it, and which of them the pool has (`kv`).

What runs concurrently: a task an answer; `watch`, which reads the server's health and metrics and reconnects the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable
from midstream_runtime.contract.pool import ROOT_HASH, block_hash
from midstream_runtime.engine.client import Sink, StartRequest
from midstream_runtime.engine.protocol import (
    EngineInfo,
    EngineState,
    KvBlock,
    PoolInfo,
    RequestStats,
    SamplingParams,
    TokenEvent,
)
from midstream_runtime.engine.vllm.answer import Answer, Diverged
from midstream_runtime.engine.vllm.kvpool import PoolClient
from midstream_runtime.engine.vllm.upstream import Upstream, refused, sse

log = logging.getLogger(__name__)

DETOKENIZED_IDS = 16
"""Enough to see whether the last character of a text is whole: UTF-8 has four bytes at most."""


@dataclass(frozen=True, slots=True)
class Settings:
    outage_s: float = 300.0
    """How long answers wait for a server that restarts: loading a large model takes minutes."""
    retry_s: float = 0.25
    watch_s: float = 1.0
    """Between two looks at health and metrics; the target picker sees figures of this age."""


DEFAULTS = Settings()
NAMED_AT_ONCE = 128
"""Blocks, between two looks at the event loop: under a millisecond. Tokens of other answers are handed on meanwhile."""
REFUSALS = 3
"""A server that answers an answer's continuation with an error so often in a row will not do better."""


@dataclass
class _Running:
    answer: Answer
    sink: Sink
    paused: bool
    head: asyncio.Future[None]
    """The server has taken the request, or refused it."""
    waiting: list[TokenEvent] = field(default_factory=list)
    """Came during a pause."""
    held: tuple[EngineState, list[int]] | None = None
    """State at the pause, and the ids whose KV belongs to it."""
    pinned: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    """Hashes of its first full blocks, as far as somebody has asked."""
    task: asyncio.Task[None] | None = None

    @property
    def taken(self) -> bool:
        return self.head.done()


class _Outage:
    """How long an answer waits for its server, from the first failure without progress."""

    def __init__(self, settings: Settings) -> None:
        self._deadline = asyncio.get_running_loop().time() + settings.outage_s
        self._refusals = 0

    def is_over(self, error: MidstreamError) -> bool:
        self._refusals += error.code == "engine_refused"
        return self._refusals > REFUSALS or asyncio.get_running_loop().time() > self._deadline


class VllmEngine:
    """Use `connect`, then `close`. Methods are for one event loop."""

    def __init__(self, url: str, pool_path: str | None, settings: Settings) -> None:
        self.upstream = Upstream(url)
        self.settings = settings
        self.on_lost: Callable[[MidstreamError], None] | None = None
        self.on_change: Callable[[EngineInfo], None] | None = None
        """The server, and its pool, are there again."""
        self.healthy = True
        self.load: dict[str, float] | None = None
        self.replays = self.diverged = self.outages = 0
        self._pool_path = pool_path
        self._pool: PoolClient | None = None
        self._info: EngineInfo | None = None
        self._running: dict[str, _Running] = {}
        self._lost = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, url: str, pool_path: str | None = None, settings: Settings = DEFAULTS) -> VllmEngine:
        """Retryable("engine_lost") or ("pool_unreachable") while the server is not up."""
        engine = cls(url, pool_path, settings)
        await engine._greet()
        engine._watching = asyncio.get_running_loop().create_task(engine._watch(), name="vllm-watch")
        engine._watching.add_done_callback(engine._watch_ended)
        return engine

    async def close(self) -> None:
        self._lost.set()
        tasks = [r.task for r in self._running.values() if r.task is not None]
        tasks += [self._watching] if self._watching is not None else []
        self._running.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._pool is not None:
            self._pool.close()

    async def lost(self) -> None:
        await self._lost.wait()

    # -- the server ----------------------------------------------------------------------------------------

    async def info(self) -> EngineInfo:
        assert self._info is not None
        return self._info

    def pool_fd(self) -> int | None:
        return self._pool.fd if self._pool is not None and not self._pool.lost.is_set() else None

    async def _greet(self) -> None:
        """Learn what the server serves; its pool, where one is expected."""
        models = await self.upstream.json("GET", "/v1/models")
        card = next((m for m in models["data"] if not m.get("parent")), None)
        if card is None:
            raise Retryable("engine_lost", "the vLLM server lists no model of its own yet")
        context = int(card["max_model_len"])
        fingerprint = hashlib.sha256(f"{card.get('root')} {context}".encode()).hexdigest()[:32]
        pool = None
        if self._pool_path is not None:
            self._pool = await PoolClient.connect(self._pool_path)
            pool = PoolInfo(**self._pool.info["pool"])
            fingerprint = str(self._pool.info["fingerprint"])
        self._info = EngineInfo(str(card["id"]), fingerprint, context, 0, -1, -1, 0.0, "vllm", pool)

    async def _watch(self) -> None:
        while not self._lost.is_set():
            await asyncio.sleep(self.settings.watch_s)
            try:
                self.load = load_of(await self.upstream.text("/metrics"))
                if self._pool is not None:
                    with contextlib.suppress(Retryable):
                        await self._pool.stats()  # notices a server that was started again
                    if self.pool_fd() is None:
                        await self._come_back()
                self.healthy = True
            except (MidstreamError, LookupError, TypeError, ValueError) as error:
                if self.healthy:
                    log.warning("vLLM: %s", error)
                self.healthy, self.load = False, None

    def _watch_ended(self, task: asyncio.Task[None]) -> None:
        """It ends with the engine; anything else is a bug, and the keeper begins again."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("vLLM: the watch failed", exc_info=error)
            self._fail_all(Retryable("engine_lost", f"the watch over the vLLM server failed: {error!r}"))

    async def _come_back(self) -> None:
        """vLLM was started again: its pool is a new one, and empty."""
        before = await self.info()
        await self._greet()
        info = await self.info()
        if info.fingerprint != before.fingerprint:
            self._fail_all(
                Final("engine_model", f"vLLM came back with other weights ({info.model}): start the pod again")
            )
        if self.on_change is not None:
            self.on_change(info)

    def _fail_all(self, error: MidstreamError) -> None:
        self._lost.set()
        for running in self._running.values():
            _cancel(running)
        self._running.clear()
        if self.on_lost is not None:
            self.on_lost(error)

    async def tokenize(self, text: str) -> list[int]:
        info = await self.info()
        answer = await self.upstream.json("POST", "/tokenize", {"model": info.model, "prompt": text})
        return list(answer["tokens"])

    async def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        info = await self.info()
        data = {"model": info.model, "messages": [dict(m) for m in messages]}
        return list((await self.upstream.json("POST", "/tokenize", data))["tokens"])

    # -- answers -------------------------------------------------------------------------------------------

    async def start(self, requests: Sequence[StartRequest], sink: Sink) -> dict[str, MidstreamError]:
        """New answers: returns when the server has taken or refused them. Answers that came: their KV is published and
        the server begins; no failure of the pool or the server is theirs, they are computed from their ids."""
        errors: dict[str, MidstreamError] = {}
        fresh: list[tuple[str, _Running]] = []
        for request in requests:
            if request.request_id in self._running:
                raise Final("request_exists", f"request {request.request_id} is already there: use another id")
            try:
                running = await self._admit(request, sink)
            except MidstreamError as error:
                errors[request.request_id] = error
                continue
            if request.state is None:
                fresh.append((request.request_id, running))
        for name, running in fresh:
            try:
                await running.head
            except MidstreamError as error:
                self._running.pop(name, None)
                errors[name] = error
        return errors

    async def _admit(self, request: StartRequest, sink: Sink) -> _Running:
        loop = asyncio.get_running_loop()
        if request.state is None:
            answer = Answer.new(request.prompt_ids, request.params or SamplingParams())
        else:
            answer = await self._restore(request.state)
        running = _Running(answer, sink, request.paused, loop.create_future())
        if request.state is not None:
            running.head.set_result(None)  # a server that is not there yet is waited for
        running.head.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._running[request.request_id] = running
        running.task = loop.create_task(self._run(request.request_id, running), name=f"vllm-{request.request_id}")
        return running

    async def _restore(self, state: EngineState) -> Answer:
        if state.extra.get("engine") != "vllm":
            raise Final("engine_kind", "the answer came from another kind of engine: choose a pod of the same workload")
        try:
            answer = Answer.restore(state)
        except (KeyError, TypeError, ValueError) as error:
            raise Final("bad_request", f"the state of an answer is malformed: {error!r}") from error
        slots = [block.slot for block in state.kv]
        if self._pool is not None and any(slot is not None for slot in slots):
            try:
                published = await self._pool.publish(slots, answer.kv_ids)
                assert self._info is not None and self._info.pool is not None
                answer.kv_tokens = published * self._info.pool.block_tokens
            except MidstreamError as error:  # restarted since the slots were reserved
                log.warning("KV that came is lost, its answer is computed from its ids: %s", error)
        return answer

    async def _run(self, name: str, running: _Running) -> None:
        """Until the answer's end, over as many requests to the server as it takes."""
        outage = _Outage(self.settings)
        while not running.answer.finished:
            delivered = running.answer.delivered
            try:
                await self._request(name, running)
            except Diverged:
                self.diverged += 1
                log.warning("%s: the server wrote something else than before; going on from the ids", name)
                running.answer.fall_back()
            except (LookupError, TypeError, ValueError) as error:
                why = f"vLLM sent what this gateway cannot read: {error!r}"
                self._end(name, running, Final("engine_refused", why))
                return
            except MidstreamError as error:
                if running.answer.delivered > delivered:
                    outage = _Outage(self.settings)
                if isinstance(error, Final) or not running.taken or outage.is_over(error):
                    self._end(name, running, error)
                    return
                self.outages += 1
                await asyncio.sleep(self.settings.retry_s)
        if not running.paused:
            self._running.pop(name, None)
            await self._unpin(running)

    async def _request(self, name: str, running: _Running) -> None:
        answer = running.answer
        assert self._info is not None
        if answer.shown and answer.mode == "ids" and await self._is_whole(answer.ids):
            answer.settle()
        self.replays += answer.mode == "replay" and bool(answer.ids)
        prompt = answer.begin()
        body = answer.body(self._info.model, prompt)
        if body["max_tokens"] < 1:
            self._hand_on(name, running, answer.give_up("length"))
            return
        async with self.upstream.open("POST", "/v1/completions", json.dumps(body).encode()) as response:
            if response.status != 200:
                raise refused(response.status, await response.read())
            if not running.taken:
                running.head.set_result(None)
            async for data in sse(response.body):
                if data == b"[DONE]":
                    break
                chunk = json.loads(data)
                if "error" in chunk:
                    raise refused(500, data)
                self._hand_on(name, running, answer.take(chunk))
                if answer.finished:
                    return
        raise Retryable("engine_lost", "the vLLM server ended in the middle of an answer")

    async def _is_whole(self, ids: Sequence[int]) -> bool:
        """Does the text of these ids end with a whole character?"""
        assert self._info is not None
        data = {"model": self._info.model, "tokens": list(ids[-DETOKENIZED_IDS:])}
        text = str((await self.upstream.json("POST", "/detokenize", data))["prompt"])
        return not text.endswith("\ufffd")

    def _hand_on(self, name: str, running: _Running, events: list[TokenEvent]) -> None:
        if running.paused:
            running.waiting += events
        elif events:
            running.sink([(name, event) for event in events])

    def _end(self, name: str, running: _Running, error: MidstreamError) -> None:
        if not running.taken:
            running.head.set_exception(error)
            return
        running.answer.finished = True
        self._hand_on(name, running, [TokenEvent(-1, error.message, "error")])
        if not running.paused:
            self._running.pop(name, None)

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        resume: EngineState | None = None,
    ) -> AsyncIterator[TokenEvent]:
        queue: asyncio.Queue[TokenEvent] = asyncio.Queue()

        def sink(events: list[tuple[str, TokenEvent]]) -> None:
            for _, event in events:
                queue.put_nowait(event)

        errors = await self.start([StartRequest(request_id, prompt_ids, params, resume)], sink)
        if errors:
            raise errors[request_id]
        try:
            while (event := await queue.get()).finish_reason is None:
                yield event
            yield event
        finally:
            await self.drop([request_id])

    # -- migration -----------------------------------------------------------------------------------------

    async def pause(self, ids: Sequence[str]) -> dict[str, EngineState]:
        for name in ids:
            self.hold(name)
        states = {}
        for name in ids:
            running = self._running.get(name)
            if running is None or running.held is None:
                continue
            state, named = running.held
            slots = await self._pin(running, named)
            states[name] = replace(state, kv=[KvBlock(slot, self._block_tokens()) for slot in slots])
        return states

    def hold(self, name: str) -> None:
        """Stand still now: the server goes on, but what it sends from here on is not part of the state."""
        running = self._running.get(name)
        if running is not None and not running.paused:
            running.paused = True
            running.held = (running.answer.state(), list(running.answer.kv_ids))

    async def resume(self, ids: Sequence[str]) -> None:
        for name in ids:
            running = self._running.get(name)
            if running is None:
                continue
            running.paused, running.held = False, None
            waiting, running.waiting = running.waiting, []
            self._hand_on(name, running, waiting)
            await self._unpin(running)
            if running.answer.finished:
                self._running.pop(name, None)

    async def drop(self, ids: Sequence[str]) -> None:
        for name in ids:
            running = self._running.pop(name, None)
            if running is None:
                continue
            _cancel(running)
            await self._unpin(running)

    async def reserve(self, n: int) -> list[int]:
        if self._pool is None:
            raise _no_pool()
        return await self._pool.reserve(n)

    async def free(self, slots: Sequence[int]) -> None:
        if self._pool is not None and not self._pool.lost.is_set():
            await self._pool.free(slots)

    async def kv(self, known: Mapping[str, int], limit: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for name, first in known.items():
            running = self._running.get(name)
            if running is None or self._pool is None or limit <= 0:
                continue
            names = await self._names_of(running, running.answer.kv_ids)
            with contextlib.suppress(Retryable):  # the pool is gone, and with it what it kept for us
                if slots := await self._pool.pin(names[first : first + limit]):
                    found[name] = slots
                    limit -= len(slots)
        return found

    async def have(self, hashes: Sequence[bytes]) -> list[int | None]:
        if self._pool is not None:
            with contextlib.suppress(Retryable):
                return await self._pool.have(hashes)
        return [None] * len(hashes)

    async def land(self, slots: Sequence[int], names: Sequence[tuple[bytes, bytes]]) -> None:
        if self._pool is None:
            raise _no_pool()
        await self._pool.land(slots, names)

    async def unhold(self, slots: Sequence[int]) -> None:
        if slots and self._pool is not None:
            with contextlib.suppress(Retryable):
                await self._pool.unpin(slots)

    async def stats(self) -> dict[str, Any]:
        pool = await self._pool.stats() if self._pool is not None and not self._pool.lost.is_set() else {}
        counts = {"replays": self.replays, "diverged": self.diverged, "outages": self.outages}
        requests = {name: RequestStats(*r.answer.stats()) for name, r in self._running.items()}
        return {"running": len(self._running), **counts, **pool, "requests": requests}

    async def _pin(self, running: _Running, ids: Sequence[int]) -> list[int]:
        """KV is a cache: without the pool the answer moves all the same."""
        if self._pool is None:
            return []
        with contextlib.suppress(Retryable):
            running.pinned = await self._pool.pin(await self._names_of(running, ids))
        return running.pinned

    async def _names_of(self, running: _Running, ids: Sequence[int]) -> list[bytes]:
        """Hashes of the full blocks of `ids`, which begin as all ids of this answer do."""
        size, names = self._block_tokens(), running.names
        full = len(ids) // size
        while (at := len(names)) < full:  # somebody else may name some meanwhile
            names.append(block_hash(names[-1] if names else ROOT_HASH, ids[at * size : (at + 1) * size]))
            if at % NAMED_AT_ONCE == 0:
                await asyncio.sleep(0)
        return names[:full]

    async def _unpin(self, running: _Running) -> None:
        pinned, running.pinned = running.pinned, []
        if pinned and self._pool is not None:
            with contextlib.suppress(Retryable):
                await self._pool.unpin(pinned)

    def _block_tokens(self) -> int:
        assert self._info is not None and self._info.pool is not None
        return self._info.pool.block_tokens


def _no_pool() -> Final:
    return Final("no_pool", "this vLLM server runs without the Midstream connector: it has no KV pool")


def _cancel(running: _Running) -> None:
    if running.task is not None:
        running.task.cancel()
    if not running.taken:  # whoever started it waits for that
        running.head.set_exception(Retryable("engine_lost", "the answer was given up before the server took it"))


_METRIC = re.compile(
    r"^vllm:(kv_cache_usage_perc|num_requests_waiting|num_requests_running)(?:\{[^}]*\})? (\S+)$", re.M
)


def load_of(metrics: str) -> dict[str, float]:
    """What the target picker wants to know, from vLLM's /metrics: the free share of its KV cache, and its queue."""
    sums: dict[str, float] = {}
    for name, value in _METRIC.findall(metrics):
        sums[name] = sums.get(name, 0.0) + float(value)
    return {
        "kv_free": max(0.0, 1.0 - sums["kv_cache_usage_perc"]),
        "running": sums["num_requests_running"],
        "waiting": sums["num_requests_waiting"],
    }
