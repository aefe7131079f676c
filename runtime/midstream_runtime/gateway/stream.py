"""One client's connection as the gateway sees it: requests in, one answer at a time out, in every state movable.

    reading --whole request--> waiting for ids --> answering --last token--> reading ...

What is moved: bytes that are not a whole request yet (or belong to the next one), and the answer under way. A
request whose generation has not begun is put back among the bytes: the target begins it. What an engine's own server
answers is passthrough.py's matter.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable
from midstream_runtime.engine.client import StartRequest
from midstream_runtime.engine.protocol import EngineState, RequestStats, TokenEvent
from midstream_runtime.gateway import http, openai
from midstream_runtime.gateway.passthrough import Passthrough
from midstream_runtime.gateway.replay import Replay
from midstream_runtime.handoff import Connection, Movable

if TYPE_CHECKING:
    from midstream_runtime.gateway.app import Gateway

MAX_WAITING_BYTES = 256 << 10
"""Bytes of further requests that are read while an answer is under way; then TCP slows the client down."""
OWN_PATHS = {"/health", "/metrics"}
"""Answered here also where the engine has a server of its own."""
_PREFIX = {"completion": "cmpl", "chat": "chatcmpl"}
_STATE = struct.Struct("<I")


@dataclass(slots=True)
class Answer:
    """A response under way. `name` is the engine's name of it; another one on each node."""

    form: openai.Form
    name: str
    keep_alive: bool
    raw: bytes = b""
    """The request's bytes, until the engine has it."""
    task: asyncio.Task[None] | None = None
    """Asks the engine to begin."""
    begun: bool = False
    head_sent: bool = False
    pieces: list[tuple[str, float | None]] = field(default_factory=list)
    """Of an answer that is not streamed."""
    make: Callable[[str], bytes] = field(init=False)
    tokens: int = 0
    asked_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.make = self.form.piece()

    def to_json(self, engine: EngineState) -> dict[str, Any]:
        return {
            "form": self.form.to_json(),
            "keep_alive": self.keep_alive,
            "head_sent": self.head_sent,
            "pieces": self.pieces,
            "tokens": self.tokens,
            "engine": engine.to_json(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], name: str) -> Answer:
        pieces = [(str(text), value) for text, value in data["pieces"]]
        answer = cls(openai.Form.from_json(data["form"]), name, bool(data["keep_alive"]), begun=True, pieces=pieces)
        answer.head_sent, answer.tokens = bool(data["head_sent"]), int(data["tokens"])
        return answer


class Stream:
    """Handler of one connection."""

    __slots__ = ("answer", "connection", "deadline", "gateway", "passing", "reader", "__weakref__")  # fmt: skip # noqa: RUF023

    def __init__(self, gateway: Gateway, connection: Connection, raw: bytes = b"", continued: bool = False) -> None:
        self.gateway, self.connection = gateway, connection
        self.reader = http.RequestReader(gateway.settings.max_body_bytes, raw, continued)
        self.answer: Answer | None = None
        self.passing: Passthrough | None = None
        """A request that the engine's own server answers; never beside an `answer`."""
        self.deadline = 0.0
        self.touch()
        gateway.streams.add(self)

    # -- from the connection -------------------------------------------------------------------------------

    def received(self, data: bytes) -> None:
        self.touch()
        self.reader.feed(data)
        self.proceed()

    def eof(self) -> None:
        """A client may finish sending and still read: what it asked for is answered."""
        self.proceed()

    def drained(self) -> None:
        self.touch()

    def lost(self, error: OSError | None) -> None:
        self.gateway.metrics.lost.inc()
        self.forget()

    @property
    def busy(self) -> bool:
        return self.answer is not None or self.passing is not None

    def movable(self) -> Movable:
        if self.passing is not None:
            return self.passing.movable()
        if self.answer is None:
            return Movable()
        tokens = self.answer.tokens
        return Movable(tokens=tokens, kv_bytes=self.gateway.kv_bytes(tokens))

    def save(self) -> bytes:
        """Of a stream without an answer under way; see Gateway.pause for the others."""
        return self.pack(None)

    # -- requests ------------------------------------------------------------------------------------------

    def touch(self) -> None:
        self.deadline = time.monotonic() + self.gateway.settings.idle_s

    def proceed(self) -> None:
        """Take up whole requests until one is being answered."""
        while not self.busy and not self.connection.frozen and self in self.gateway.streams:
            try:
                taken = self.reader.take()
            except http.HttpError as error:
                self._refuse(error, keep_alive=False)
                return
            if taken is None:
                if self.connection.eof:
                    self._close()
                elif self.reader.must_continue():
                    self.connection.write(http.CONTINUE)
                break
            self._route(*taken)
        self.connection.read_more(not self.busy or self.reader.waiting_bytes < MAX_WAITING_BYTES)

    def _route(self, request: http.Request, raw: bytes) -> None:
        path, method = request.path.rstrip("/") or "/", request.method
        kind: openai.Kind | None = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}.get(path)  # type: ignore[assignment]
        try:
            if method == "OPTIONS":
                fields = [("access-control-allow-methods", "*"), ("access-control-allow-headers", "*")]
                self._reply(request, http.answer(204, b"", "text/plain", keep_alive=request.keep_alive, extra=fields))
            elif kind is not None:
                self._must_be(request, "POST")
                self._ask(kind, request, raw)
            elif self.gateway.upstream is not None and path not in OWN_PATHS:
                self.passing = Passthrough(self, request, raw)
            else:
                self._must_be(request, "GET", "HEAD")
                status, body, media = self.gateway.page(path)
                self.gateway.metrics.requests.labels(path, str(status)).inc()
                whole = http.answer(status, body, media, keep_alive=request.keep_alive)
                self._reply(request, whole[: len(whole) - len(body)] if method == "HEAD" else whole)
        except http.HttpError as error:
            self._refuse(error, keep_alive=request.keep_alive, path=path if error.status != 404 else "other")

    def _must_be(self, request: http.Request, *methods: str) -> None:
        if request.method not in methods:
            raise http.HttpError(405, f"{request.path} is for {methods[0]}, not {request.method}", code="bad_method")

    def _reply(self, request: http.Request, data: bytes) -> None:
        self.connection.write(data)
        if not request.keep_alive:
            self._close()

    def _refuse(self, error: http.HttpError, *, keep_alive: bool, path: str = "other") -> None:
        self.gateway.metrics.requests.labels(path, str(error.status)).inc()
        self.connection.write(http.json_answer(error.status, error.body(), keep_alive=keep_alive))
        if not keep_alive:
            self._close()

    # -- answers -------------------------------------------------------------------------------------------

    def _ask(self, kind: openai.Kind, request: http.Request, raw: bytes) -> None:
        info = self.gateway.info
        if kind == "chat" and self.gateway.settings.native_chat and self.gateway.upstream is not None:
            self.passing = Passthrough(self, request, raw)
            return
        try:
            ask = openai.parse(kind, request.body, info.model)
        except http.HttpError:
            if self.gateway.upstream is None:
                raise
            # More than can be carried by ids, or a mistake that the engine's own server words in its own way.
            self.passing = Passthrough(self, request, raw)
            return
        name = f"{_PREFIX[kind]}-{secrets.token_hex(12)}"
        stream = ask.stream
        form = openai.Form(
            kind, name, int(time.time()), info.model, stream, ask.include_usage, request.chunked, ask.params.logprobs
        )
        keep_alive = request.keep_alive and (request.chunked or not stream)
        answer = self.answer = Answer(form, self.gateway.new_name(), keep_alive, raw)
        answer.task = asyncio.get_running_loop().create_task(self._begin(answer, ask), name=answer.name)

    async def _begin(self, answer: Answer, ask: openai.Ask) -> None:
        try:
            engine = self.gateway.engine()
            if isinstance(ask.prompt, str):
                ids = await engine.tokenize(ask.prompt)
            elif ask.kind == "completion":
                ids = list(ask.prompt)  # type: ignore[arg-type]
            else:
                ids = await engine.render_chat(ask.prompt)  # type: ignore[arg-type]
            params = ask.params
            if ask.whole_context:
                params = replace(params, max_tokens=max(1, self.gateway.info.context - len(ids)))
            # From here on the engine knows the answer (its socket keeps the order), and a pause asks it.
            answer.begun, answer.raw, answer.tokens = True, b"", len(ids)
            self.gateway.answers[answer.name] = self
            errors = await engine.start([StartRequest(answer.name, ids, params)], self.gateway.sink)
            if errors:
                raise errors[answer.name]
        except MidstreamError as error:
            if self.answer is answer:
                self.fail(error)
            return
        finally:
            answer.task = None
        if self.answer is answer and answer.form.stream and not answer.head_sent:
            self.connection.write(self._head(answer))

    def _head(self, answer: Answer) -> bytes:
        answer.head_sent = True
        form, extra = answer.form, [("x-request-id", answer.form.id)]
        return http.stream_head(extra, keep_alive=answer.keep_alive, chunked=form.chunked) + form.opening()

    def token(self, event: TokenEvent) -> None:
        """One event of the engine. Must not raise: it is called for every stream of a step."""
        answer = self.answer
        assert answer is not None
        if event.token_id >= 0:
            answer.tokens += 1
        if event.finish_reason == "error":
            self.fail(Retryable("engine_error", event.text or "the engine gave the answer up"))
            return
        form = answer.form
        if form.stream:
            plain = event.finish_reason is None and (event.logprob is None or not form.logprobs)
            data = (answer.make(event.text) if event.text else b"") if plain else form.event(event)
            if not answer.head_sent:
                data = self._head(answer) + data
            if event.finish_reason is not None:
                data += form.closing(event.usage) + (http.LAST_CHUNK if form.chunked else b"")
            if data:
                self.connection.write(data)
        else:
            answer.pieces.append((event.text, event.logprob))
        if event.finish_reason is not None:
            self._finish(answer, event.finish_reason, event.usage)

    def _finish(self, answer: Answer, reason: str, usage: RequestStats | None) -> None:
        if not answer.form.stream:
            data = answer.form.whole(answer.pieces, reason, usage)
            extra = [("x-request-id", answer.form.id)]
            self.connection.write(http.json_answer(200, data, keep_alive=answer.keep_alive, extra=extra))
        self.gateway.finished(answer, 200, usage)
        self._end(answer.keep_alive)

    def fail(self, error: MidstreamError) -> None:
        """The engine refused the request, or is gone: say so as far as the answer's state still lets us."""
        answer = self.answer
        assert answer is not None
        refusal = _refusal(error)
        self.gateway.finished(answer, refusal.status, None)
        if not answer.head_sent:
            self.connection.write(http.json_answer(refusal.status, refusal.body(), keep_alive=answer.keep_alive))
            self._end(answer.keep_alive)
            return
        # The status has gone out: an error event, and an end without the last chunk, which no client takes for whole.
        self.connection.write(answer.form.failure(refusal))
        self._end(keep_alive=False)

    def passed(self, passing: Passthrough, *, keep_alive: bool) -> None:
        """The engine's own server has answered."""
        if self.passing is passing:
            self._end(keep_alive)

    def _end(self, keep_alive: bool) -> None:
        self.answer = self.passing = None
        self.touch()
        if keep_alive:
            self.proceed()
        else:
            self._close()

    def _close(self) -> None:
        self.gateway.streams.discard(self)
        self.connection.close()

    def close_idle(self) -> None:
        """Nothing was asked for a long time, or a request does not get finished."""
        if not self.reader.empty:
            self._refuse(http.HttpError(408, "the request did not come to its end", code="timeout"), keep_alive=False)
            return
        self._close()

    # -- migration -----------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Put back a request that has not reached the engine, or can as well be begun elsewhere."""
        passing = self.passing
        if passing is not None:
            passing.hold()
            if passing.can_begin_again:
                passing.stop()
                self.passing = None
                self.reader.put_back(passing.raw)
        answer = self.answer
        if answer is not None and not answer.begun:
            if answer.task is not None:
                answer.task.cancel()
            self.answer = None
            self.reader.put_back(answer.raw)

    def forget(self) -> None:
        """No more of this stream here; the engine drops its answer."""
        self.gateway.streams.discard(self)
        passing, self.passing = self.passing, None
        if passing is not None:
            passing.stop()
        answer, self.answer = self.answer, None
        if answer is None:
            return
        if answer.task is not None and not answer.begun:
            answer.task.cancel()
        if answer.begun:
            self.gateway.drop(answer.name)

    def pack(self, engine: EngineState | None) -> bytes:
        """u32 bytes of a JSON object (little-endian), the object, then bytes of requests that are not whole."""
        answer = None
        if self.answer is not None:
            if engine is None:
                raise Final("pod_internal", f"the engine does not know the answer {self.answer.name}")
            answer = self.answer.to_json(engine)
        state: dict[str, Any] = {"continued": self.reader.continued, "answer": answer}
        request = b""
        if self.passing is not None:
            movable = self.passing.movable()
            if not movable.movable:
                raise Final("stream_not_movable", f"a stream that is let finish ({movable.reason}) was to be moved")
            request = self.passing.raw
            state["passing"] = {**self.passing.to_json(), "bytes": len(request)}
        text = json.dumps(state, separators=(",", ":")).encode()
        return b"".join([_STATE.pack(len(text)), text, request, self.reader.raw])

    @classmethod
    def unpack(
        cls, gateway: Gateway, connection: Connection, state: bytes, slots: Sequence[int | None]
    ) -> tuple[Stream, StartRequest | None]:
        """A stream that came, and what to ask the engine for. `slots`: where this node has the moved blocks."""
        (length,) = _STATE.unpack_from(state)
        end = _STATE.size + length
        data = json.loads(state[_STATE.size : end])
        passing = data.get("passing")
        rest = end + (passing["bytes"] if passing else 0)
        stream = cls(gateway, connection, state[rest:], bool(data["continued"]))
        if passing:
            stream._pass_on(state[end:rest], Replay(passing["shown"], passing["common"]))
        if data["answer"] is None:
            return stream, None
        answer = stream.answer = Answer.from_json(data["answer"], gateway.new_name())
        engine = EngineState.from_json(data["answer"]["engine"])
        here = [None if block.slot is None else slots[block.slot] for block in engine.kv]
        return stream, StartRequest(answer.name, state=engine.with_slots(here), paused=True)

    def _pass_on(self, raw: bytes, replay: Replay) -> None:
        """A request whose answer is generated again."""
        if self.gateway.upstream is None:
            raise Final("engine_kind", "a vLLM server's answer came to a gateway without one: same pod template?")
        taken = http.RequestReader(self.gateway.settings.max_body_bytes, raw).take()
        if taken is None:
            raise Final("bad_request", "the request of an answer that came is not whole")
        self.passing = Passthrough(self, *taken, replay)


def _refusal(error: MidstreamError) -> http.HttpError:
    status = 503 if isinstance(error, Retryable) else 400
    return http.HttpError(status, error.message, code=error.code)
