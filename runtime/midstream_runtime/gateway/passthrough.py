"""Requests that go to the engine's own HTTP server as they came, and what becomes of them when their connection moves.

    no byte of the answer is out, and it generates     begun again at the target
    a stream, greedy or with the client's seed         generated again, what the client has is left out (see replay.py)
    everything else                                    not movable, with a reason; the source lets it finish

What runs concurrently: one task a request. During a pause it goes on, and what it has waits.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from midstream_runtime.contract.errors import MidstreamError, Retryable
from midstream_runtime.engine.vllm.upstream import Response, sse
from midstream_runtime.gateway import http
from midstream_runtime.gateway.replay import Replay, ReplayDiverged
from midstream_runtime.handoff import Movable

if TYPE_CHECKING:
    from midstream_runtime.gateway.stream import Stream

GENERATING = {"/v1/completions", "/v1/chat/completions"}
OUTAGE_S = 300.0
"""How long a request that can be begun again waits for a server that restarts."""
RETRY_S = 0.25
_FRAMING = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length"}
_NOT_BACK = {*_FRAMING, "date", "server"}
_NOT_FORWARDED = {*_FRAMING, "host", "expect"}
_REASONS = {
    "tools": "Tools",
    "response_format": "GuidedDecoding",
    "structured_outputs": "GuidedDecoding",
    "n": "SeveralChoices",
    "top_logprobs": "TopLogprobs",
    "prompt_logprobs": "TopLogprobs",
    "logprobs": "TopLogprobs",
}


def reason_of(path: str, body: Mapping[str, Any]) -> str:
    """Why such a stream is let finish: the first thing about it that rules out continuing by ids."""
    if path not in GENERATING:
        return "ServerPath"
    return next((name for field, name in _REASONS.items() if body.get(field)), "ServerParameter")


class Passthrough:
    """One request and its answer. Owned by a Stream, which it tells of its end."""

    def __init__(self, stream: Stream, request: http.Request, raw: bytes, replay: Replay | None = None) -> None:
        self.stream, self.request, self.raw = stream, request, raw
        self.path = request.path.rstrip("/") or "/"
        self.body = _object(request.body)
        self.head_sent = replay is not None
        self.held = replay is not None
        streamed = self.path in GENERATING and bool(self.body.get("stream"))
        fixed = self.body.get("temperature") == 0 or self.body.get("seed") is not None
        self.replay = replay or (Replay() if streamed and fixed else None)
        self._shown = dict(self.replay.shown) if self.replay is not None else {}
        self._waiting = bytearray()
        self._bodiless = request.method == "HEAD"
        self._done = self._broken = False
        self.task = asyncio.get_running_loop().create_task(self._run(), name=f"passthrough {self.path}")

    # -- migration -----------------------------------------------------------------------------------------

    @property
    def can_begin_again(self) -> bool:
        return not self.head_sent and self.path in GENERATING

    def movable(self) -> Movable:
        if self.can_begin_again or self.replay is not None:
            return Movable()
        return Movable(False, reason_of(self.path, self.body))

    def hold(self) -> None:
        """Nothing goes to the client from here on."""
        self.held = True
        if self.replay is not None:
            self._shown = dict(self.replay.shown)

    def resume(self) -> None:
        self.held = False
        self._write(b"")

    def stop(self) -> None:
        self.task.cancel()

    def to_json(self) -> dict[str, Any]:
        assert self.replay is not None
        return {"shown": self._shown, "common": self.replay.common}

    # -- the answer ----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        give_up = asyncio.get_running_loop().time() + OUTAGE_S
        while True:
            try:
                await self._ask()
                break
            except Retryable as error:
                again = self.can_begin_again or self.replay is not None
                if not again or asyncio.get_running_loop().time() > give_up:
                    self._fail(error.code, error.message)
                    break
                if self.replay is not None:
                    self.replay = Replay(self.replay.shown, self.replay.common)
                await asyncio.sleep(RETRY_S)
            except ReplayDiverged as error:
                self._fail("replay_diverged", f"the answer came out otherwise when it was generated again: {error}")
                break
            except MidstreamError as error:
                self._fail(error.code, error.message)
                break
            except (LookupError, TypeError, ValueError) as error:
                self._fail("engine_refused", f"vLLM sent what this gateway cannot read: {error!r}")
                break
        self._done = True
        self._write(b"")

    async def _ask(self) -> None:
        target = self.raw.split(b" ", 2)[1].decode("ascii", "replace")
        headers = [(k, v) for k, v in self.request.headers.items() if k not in _NOT_FORWARDED]
        upstream = self.stream.gateway.upstream
        assert upstream is not None
        async with upstream.open(self.request.method, target, self.request.body, headers) as response:
            if self.replay is not None and response.status == 200:
                await self._events(response, self.replay)
            else:
                await self._bytes(response)

    async def _events(self, response: Response, replay: Replay) -> None:
        self._head(response)
        async for data in sse(response.body):
            if data == b"[DONE]":
                self._write(self._framed(b"data: [DONE]\n\n") + self._end())
                return
            event = replay.feed(json.loads(data))
            if event is not None:
                text = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
                self._write(self._framed(b"data: %b\n\n" % text))
        raise Retryable("engine_lost", "the vLLM server ended in the middle of an answer")

    async def _bytes(self, response: Response) -> None:
        self._head(response)
        async for data in response.body:
            self._write(self._framed(data))
        self._write(self._end())

    def _head(self, response: Response) -> None:
        if self.head_sent:
            return
        fields = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in response.headers]
        fields = [
            (k, v) for k, v in fields if k.lower() not in _NOT_BACK and not k.lower().startswith("access-control")
        ]
        self._bodiless = self._bodiless or response.status in (204, 304)
        if self.request.chunked and not self._bodiless:
            fields.append(("transfer-encoding", "chunked"))
        if not self.keep_alive:
            fields.append(("connection", "close"))
        self.head_sent = True
        self.stream.gateway.metrics.requests.labels("passthrough", str(response.status)).inc()
        self._write(http.head(response.status, fields))

    @property
    def keep_alive(self) -> bool:
        return self.request.keep_alive and self.request.chunked

    def _framed(self, data: bytes) -> bytes:
        return http.chunk(data) if self.request.chunked and data else data

    def _end(self) -> bytes:
        return http.LAST_CHUNK if self.request.chunked and not self._bodiless else b""

    def _fail(self, code: str, message: str) -> None:
        error = http.HttpError(503, message, code=code)
        if not self.head_sent:
            self.head_sent = True
            self._write(http.json_answer(503, error.body(), keep_alive=False))
        else:  # an end without the last chunk: no client takes it for whole
            self._write(self._framed(b"data: %b\n\n" % json.dumps(error.body()).encode()) if self.replay else b"")
        self._broken = True

    def _write(self, data: bytes) -> None:
        self._waiting += data
        if self.held:
            return
        out, self._waiting = bytes(self._waiting), bytearray()
        if out:
            self.stream.connection.write(out)
        if self._done:
            self.stream.passed(self, keep_alive=self.keep_alive and not self._broken)


def _object(body: bytes) -> dict[str, Any]:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
