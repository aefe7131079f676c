"""The gateway's end of the engine's socket: `Engine` over a unix socket, for one event loop, without torch.

One connection carries requests, answers and events, so their order is the engine's order: when `pause`
returns, every token up to the boundary has been handed over. Two ways to take tokens: `generate` gives an
iterator a request; `start` gives all tokens of a step to one callback, without a task or a queue a stream,
which is what a gateway with hundreds of streams wants.

What runs concurrently: nothing but the loop's reader callback. Reading from the socket, parsing and calling
the sinks happen in it; a sink must not block and must not raise."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable
from midstream_runtime.engine import ipc
from midstream_runtime.engine.protocol import (
    Engine,
    EngineInfo,
    EngineState,
    KvSharing,
    PoolInfo,
    RequestStats,
    SamplingParams,
    TokenEvent,
)

if TYPE_CHECKING:
    from midstream_runtime.engine.vllm.upstream import Upstream

_READ_BYTES = 1 << 20
_ANCILLARY_BYTES = socket.CMSG_SPACE(4 * 4)

Sink = Callable[[list[tuple[str, TokenEvent]]], None]
"""Gets the events of one step that belong to requests started with it, in the engine's order."""


class GatewayEngine(Engine, KvSharing, Protocol):
    """What the gateway uses of an engine beyond the protocol; `EngineClient` and `VllmEngine` are two."""

    on_lost: Callable[[MidstreamError], None] | None
    """Called once, when the engine is gone."""
    on_change: Callable[[EngineInfo], None] | None
    """Called when the engine goes on with another pool."""
    healthy: bool
    load: dict[str, float] | None
    """{kv_free: share, running, waiting}: for whoever chooses a target. None: not known."""

    @property
    def upstream(self) -> Upstream | None:
        """The engine's own HTTP server, for requests that this protocol cannot express."""

    async def start(self, requests: Sequence[StartRequest], sink: Sink) -> dict[str, MidstreamError]: ...

    async def lost(self) -> None: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class StartRequest:
    """One entry of `EngineClient.start`: a new answer, or with `state` one that goes on."""

    request_id: str
    prompt_ids: Sequence[int] = ()
    params: SamplingParams | None = None
    state: EngineState | None = None
    paused: bool = False
    """Load it, KV included, and wait for `resume`: what a migration's target does before its sockets are
    live."""

    def to_json(self) -> dict[str, Any]:
        item: dict[str, Any] = {"request_id": self.request_id, "paused": self.paused}
        if self.state is not None:
            return {**item, "state": self.state.to_json()}
        params = self.params or SamplingParams()
        return {**item, "prompt_ids": list(self.prompt_ids), "params": params.to_json()}


class EngineClient:
    """Use `connect`, then `close`. After the engine is gone every call raises Retryable('engine_lost'), and
    so do the iterators; sinks hear of it through `on_lost`."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._sock, self._loop = sock, loop
        self._parser = ipc.FrameParser()
        self._unsent = bytearray()
        self._next_id = 0
        self._calls: dict[int, asyncio.Future[tuple[dict[str, Any], bytes]]] = {}
        self._sinks: dict[str, Sink] = {}
        self._queues: dict[str, asyncio.Queue[TokenEvent | MidstreamError | None]] = {}
        self._info: EngineInfo | None = None
        self._pool_fd: int | None = None
        self._lost: MidstreamError | None = None
        self._gone = asyncio.Event()
        self._fds: list[int] = []
        self.on_lost: Callable[[MidstreamError], None] | None = None
        self.on_change: Callable[[EngineInfo], None] | None = None
        self.upstream: Upstream | None = None
        self.healthy = True
        self.load: dict[str, float] | None = None

    @classmethod
    async def connect(cls, path: str) -> EngineClient:
        """Retryable('engine_unreachable') when nobody listens at `path`."""
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await loop.sock_connect(sock, path)
        except OSError as error:
            sock.close()
            raise Retryable(
                "engine_unreachable", f"no engine at {path} ({error.strerror}): start it first"
            ) from error
        client = cls(sock, loop)
        loop.add_reader(sock, client._on_readable)
        return client

    async def close(self) -> None:
        """The engine drops this connection's requests and reservations."""
        self._fail(Retryable("engine_lost", "the connection to the engine was closed"))
        if self._pool_fd is not None:
            os.close(self._pool_fd)
            self._pool_fd = None

    async def lost(self) -> None:
        """Returns when the engine is gone."""
        await self._gone.wait()

    # Engine

    async def info(self) -> EngineInfo:
        if self._info is None:
            _, body = await self._call("info")
            if self._fds:
                self._pool_fd = self._fds.pop()
            data = json.loads(body)
            pool = data.pop("pool")
            self._info = EngineInfo(**data, pool=PoolInfo(**pool) if pool else None)
        return self._info

    def pool_fd(self) -> int | None:
        return self._pool_fd

    async def tokenize(self, text: str) -> list[int]:
        header, _ = await self._call("tokenize", text=text)
        return list(header["ids"])

    async def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        header, _ = await self._call("render_chat", messages=[dict(message) for message in messages])
        return list(header["ids"])

    async def generate(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        resume: EngineState | None = None,
    ) -> AsyncIterator[TokenEvent]:
        queue: asyncio.Queue[TokenEvent | MidstreamError | None] = asyncio.Queue()
        self._queues[request_id] = queue

        def sink(events: list[tuple[str, TokenEvent]]) -> None:
            for _, event in events:
                queue.put_nowait(event)

        ended = False
        try:
            errors = await self.start([StartRequest(request_id, prompt_ids, params, resume)], sink)
            if errors:
                ended = True
                raise errors[request_id]
            while not ended:
                item = await queue.get()
                if item is None or isinstance(item, MidstreamError):
                    ended = True
                    if item is not None:
                        raise item
                    return
                ended = item.finish_reason is not None
                yield item
        finally:
            if self._queues.get(request_id) is queue:
                del self._queues[request_id]
            if not ended:
                self._send_call("drop", ids=[request_id])
                self._sinks.pop(request_id, None)

    async def start(self, requests: Sequence[StartRequest], sink: Sink) -> dict[str, MidstreamError]:
        """Begins (or loads, where `paused`) many answers in one message; events go to `sink`, possibly before
        this returns. Returns the refused ones with their errors."""
        for request in requests:
            if request.request_id in self._sinks:
                raise Final(
                    "request_exists", f"request {request.request_id} is already there: use another id"
                )
            self._sinks[request.request_id] = sink
        body = ipc.encode_json([request.to_json() for request in requests])
        try:
            header, _ = await self._call("generate", body)
        except MidstreamError:
            for request in requests:
                self._sinks.pop(request.request_id, None)
            raise
        errors = {request_id: _error(data["error"]) for request_id, data in header["errors"].items()}
        for request_id in errors:
            self._sinks.pop(request_id, None)
        return errors

    async def pause(self, ids: Sequence[str]) -> dict[str, EngineState]:
        _, body = await self._call("pause", ids=list(ids))
        return {request_id: EngineState.from_json(state) for request_id, state in json.loads(body).items()}

    async def resume(self, ids: Sequence[str]) -> None:
        await self._call("resume", ids=list(ids))

    async def drop(self, ids: Sequence[str]) -> None:
        await self._call("drop", ids=list(ids))
        for request_id in ids:
            self._sinks.pop(request_id, None)
            if request_id in self._queues:
                self._queues[request_id].put_nowait(None)

    async def reserve(self, n: int) -> list[int]:
        header, _ = await self._call("reserve", n=n)
        return list(header["slots"])

    async def free(self, slots: Sequence[int]) -> None:
        await self._call("free", slots=list(slots))

    async def kv(self, known: Mapping[str, int], limit: int) -> dict[str, list[int]]:
        header, _ = await self._call("kv", known=dict(known), limit=limit)
        return {str(name): list(slots) for name, slots in header["slots"].items()}

    async def have(self, hashes: Sequence[bytes]) -> list[int | None]:
        header, _ = await self._call("have", b"".join(hashes))
        return [None if slot < 0 else slot for slot in header["slots"]]

    async def land(self, slots: Sequence[int], names: Sequence[tuple[bytes, bytes]]) -> None:
        body = b"".join(name + digest for name, digest in names)
        await self._call("land", body, slots=list(slots))

    async def unhold(self, slots: Sequence[int]) -> None:
        if slots:
            await self._call("unhold", slots=list(slots))

    async def stats(self) -> dict[str, Any]:
        _, body = await self._call("stats")
        stats: dict[str, Any] = json.loads(body)
        stats["requests"] = {name: RequestStats(*values) for name, values in stats["requests"].items()}
        return stats

    # Socket

    async def _call(self, kind: str, body: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
        return await self._send_call(kind, body, **fields)

    def _send_call(
        self, kind: str, body: bytes = b"", **fields: Any
    ) -> asyncio.Future[tuple[dict[str, Any], bytes]]:
        future: asyncio.Future[tuple[dict[str, Any], bytes]] = self._loop.create_future()
        # A call nobody waits for any more must not warn when the engine dies.
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        if self._lost is not None:
            future.set_exception(_again(self._lost))
            return future
        self._next_id += 1
        self._calls[self._next_id] = future
        self._write(ipc.encode({"kind": kind, "id": self._next_id, **fields}, body))
        return future

    def _write(self, frame: bytes) -> None:
        if not self._unsent:
            try:
                frame = frame[self._sock.send(frame) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self._fail(
                    Retryable(
                        "engine_lost", f"the engine is gone ({error.strerror}): it must be started again"
                    )
                )
                return
            if frame:
                self._loop.add_writer(self._sock, self._on_writable)
        self._unsent += frame

    def _on_writable(self) -> None:
        try:
            with contextlib.suppress(BlockingIOError):
                del self._unsent[: self._sock.send(self._unsent)]
        except OSError as error:
            self._fail(
                Retryable("engine_lost", f"the engine is gone ({error.strerror}): it must be started again")
            )
            return
        if not self._unsent:
            self._loop.remove_writer(self._sock)

    def _on_readable(self) -> None:
        try:
            data, ancillary, _, _ = self._sock.recvmsg(_READ_BYTES, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
            self._fds += _received_fds(ancillary)
            if not data:
                raise ConnectionResetError("closed")
            frames = self._parser.feed(data)
        except BlockingIOError:
            return
        except MidstreamError as error:
            self._fail(error)
            return
        except OSError:
            self._fail(Retryable("engine_lost", "the engine is gone: it must be started again"))
            return
        for header, payload in frames:
            if header["kind"] == "events":
                self._on_events(header["events"])
            else:
                self._on_answer(header, payload)

    def _on_events(self, events: list[list[Any]]) -> None:
        batches: dict[Sink, list[tuple[str, TokenEvent]]] = {}
        for request_id, token, text, reason, logprob, usage in events:
            sink = self._sinks.get(request_id)
            if sink is None:
                continue
            stats = RequestStats(*usage) if usage is not None else None
            batches.setdefault(sink, []).append((request_id, TokenEvent(token, text, reason, logprob, stats)))
            if reason is not None:
                del self._sinks[request_id]
        for sink, batch in batches.items():
            sink(batch)

    def _on_answer(self, header: dict[str, Any], payload: bytes) -> None:
        future = self._calls.pop(header.get("id", -1), None)
        if future is None or future.done():
            return
        if "error" in header:
            future.set_exception(_error(header["error"]))
        else:
            future.set_result((header, payload))

    def _fail(self, error: MidstreamError) -> None:
        if self._lost is not None:
            return
        self._lost = error
        self._gone.set()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        for future in self._calls.values():
            if not future.done():
                future.set_exception(_again(error))
        self._calls.clear()
        for queue in self._queues.values():
            queue.put_nowait(_again(error))
        self._sinks.clear()
        if self.on_lost is not None:
            self.on_lost(error)


def _received_fds(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            count = len(data) // 4
            fds += struct.unpack(f"{count}i", data[: 4 * count])
    return fds


def _error(data: Mapping[str, Any]) -> MidstreamError:
    family = Retryable if data["retryable"] else Final
    return family(str(data["code"]), str(data["message"]))


def _again(error: MidstreamError) -> MidstreamError:
    """A fresh one for each waiter: tracebacks would pile up on a shared exception."""
    return type(error)(error.code, error.message)
