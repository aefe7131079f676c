"""The engine's process: one thread that alternates between its socket and steps of the model.

A pause must not wait for a step of many streams, nor for the pace. So the sockets are polled between the
layers of a step as well; a pause abandons the step, and between steps the loop sleeps in the poll. Every
event of a step is written before the answer to a later request, on the same connection: whoever reads the
answer to a pause has read all tokens up to it.

Requests, one frame each, "id" is echoed: info, tokenize, render_chat, generate, pause, resume, drop, reserve,
free, kv, have, land, unhold, stats. Answers have the request's kind, or "error" with code, message,
retryable. Requests, reservations and holds belong to the connection that brought them and go with it."""

from __future__ import annotations

import array
import contextlib
import json
import os
import selectors
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable
from midstream_runtime.contract.pool import CHECKSUM_BYTES, HASH_BYTES
from midstream_runtime.engine import ipc
from midstream_runtime.engine.builtin.core import EngineCore
from midstream_runtime.engine.builtin.model import Interrupted
from midstream_runtime.engine.builtin.template import render_chat
from midstream_runtime.engine.protocol import EngineInfo, EngineState, SamplingParams, TokenEvent

_WIPE_EVERY_S = 0.002
"""Half of the time at most goes into wiping what was freed."""
_READ_BYTES = 1 << 20
_MAX_UNSENT_BYTES = 64 << 20
"""A gateway that is this far behind reads no more; its connection is closed."""


class _Connection:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.parser = ipc.FrameParser()
        self.unsent = bytearray()
        self.requests: set[str] = set()
        self.reserved: set[int] = set()
        self.held: Counter[int] = Counter()
        """Sealed slots that must stay: how often this connection owns each."""

    def send(self, frame: bytes, fds: list[int] | None = None) -> None:
        """Raises OSError when the peer is gone or too slow."""
        if fds:
            # Only `info` has one, and its frame is small: it must leave in one piece with the fd.
            rights = array.array("i", fds).tobytes()
            sent = self.sock.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            self.unsent += frame[sent:]
            return
        if not self.unsent:
            with contextlib.suppress(BlockingIOError):
                frame = frame[self.sock.send(frame) :]
        self.unsent += frame
        if len(self.unsent) > _MAX_UNSENT_BYTES:
            raise BrokenPipeError("the gateway does not read its events")

    def flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.unsent:
                del self.unsent[: self.sock.send(self.unsent)]


class EngineServer:
    """`run()` until `stop()`; everything happens on the calling thread."""

    def __init__(self, core: EngineCore, info: EngineInfo, path: str, pace_ms: float) -> None:
        self._core, self._info, self._pace = core, info, pace_ms / 1000
        self._selector = selectors.DefaultSelector()
        self._connections: dict[int, _Connection] = {}
        self._inbox: deque[tuple[_Connection, dict[str, Any], bytes]] = deque()
        self._closed: list[_Connection] = []
        self._owner: dict[str, _Connection] = {}
        self._stopped = False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(path)
        os.chmod(path, 0o660)
        self._listener.listen(16)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._woken, waker = socket.socketpair()
        for sock in (self._woken, waker):
            sock.setblocking(False)
        self._waker = waker
        self._selector.register(self._woken, selectors.EVENT_READ, self._drain_waker)
        self._handlers: dict[
            str, Callable[[_Connection, dict[str, Any], bytes], tuple[dict[str, Any], bytes]]
        ] = {
            "tokenize": self._on_tokenize,
            "render_chat": self._on_render_chat,
            "generate": self._on_generate,
            "pause": self._on_pause,
            "resume": self._on_resume,
            "drop": self._on_drop,
            "reserve": self._on_reserve,
            "free": self._on_free,
            "kv": self._on_kv,
            "have": self._on_have,
            "land": self._on_land,
            "unhold": self._on_unhold,
            "stats": self._on_stats,
        }

    @property
    def wakeup_fd(self) -> int:
        """For signal.set_wakeup_fd: a signal ends the poll."""
        return self._waker.fileno()

    def stop(self) -> None:
        """Safe in a signal handler and on any thread."""
        self._stopped = True
        with contextlib.suppress(BlockingIOError):
            self._waker.send(b"x")

    def run(self) -> None:
        next_step = time.monotonic()
        while not self._stopped:
            timeout = None if self._core.idle else max(0.0, next_step - time.monotonic())
            if self._core.pool.unwiped:
                timeout = _WIPE_EVERY_S if timeout is None else min(timeout, _WIPE_EVERY_S)
            self._poll(timeout)
            self._handle_inbox()
            self._forget_closed()
            now = time.monotonic()
            if self._core.idle or now < next_step:
                self._core.pool.wipe_some()
                continue
            started = now
            try:
                events = self._core.step(self._interrupting)
            except Interrupted:
                continue
            self._deliver(events)
            self._core.seal_blocks()
            next_step = started + (self._pace if events else max(self._pace, 0.001))

    # Sockets

    def _poll(self, timeout: float | None) -> None:
        for key, mask in self._selector.select(timeout):
            if not isinstance(key.data, _Connection):
                key.data()
                continue
            connection = key.data
            try:
                if mask & selectors.EVENT_WRITE:
                    connection.flush()
                    self._watch(connection)
                if mask & selectors.EVENT_READ:
                    self._read(connection)
            except (OSError, MidstreamError):
                self._close(connection)

    def _drain_waker(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setblocking(False)
        connection = _Connection(sock)
        self._connections[sock.fileno()] = connection
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _read(self, connection: _Connection) -> None:
        with contextlib.suppress(BlockingIOError):
            data = connection.sock.recv(_READ_BYTES)
            if not data:
                raise ConnectionResetError("closed by the gateway")
            for header, payload in connection.parser.feed(data):
                self._inbox.append((connection, header, payload))

    def _send(self, connection: _Connection, frame: bytes, fds: list[int] | None = None) -> None:
        try:
            connection.send(frame, fds)
            self._watch(connection)
        except OSError:
            self._close(connection)

    def _watch(self, connection: _Connection) -> None:
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.unsent else 0)
        if self._selector.get_key(connection.sock).events != mask:
            self._selector.modify(connection.sock, mask, connection)

    def _close(self, connection: _Connection) -> None:
        if self._connections.pop(connection.sock.fileno(), None) is None:
            return
        self._selector.unregister(connection.sock)
        connection.sock.close()
        self._closed.append(connection)

    def _forget_closed(self) -> None:
        """Apart from `_close`, which may happen in the middle of a step that computes these very requests."""
        for connection in self._closed:
            self._core.drop(connection.requests)
            self._core.pool.release_reserved(list(connection.reserved))
            self._core.pool.release(list(connection.held.elements()))
            for request_id in connection.requests:
                self._owner.pop(request_id, None)
        self._closed.clear()

    # Requests

    def _interrupting(self) -> bool:
        """Between the layers of a step: has somebody asked for what must not wait?"""
        self._poll(0)
        return any(header["kind"] == "pause" for _, header, _ in self._inbox)

    def _handle_inbox(self) -> None:
        while self._inbox:
            connection, header, payload = self._inbox.popleft()
            if connection.sock.fileno() < 0:
                continue
            reply: dict[str, Any]
            fds: list[int] | None = None
            body = b""
            try:
                if header["kind"] == "info":
                    reply, body, fds = {}, ipc.encode_json(_info_json(self._info)), [self._core.pool.fd]
                elif header["kind"] in self._handlers:
                    reply, body = self._handlers[header["kind"]](connection, header, payload)
                else:
                    raise Final(
                        "unknown_request", f"this engine does not know {header['kind']!r}: use one release"
                    )
            except MidstreamError as error:
                reply = _error_json(error)
            except (KeyError, TypeError, ValueError) as error:
                reply = _error_json(
                    Final("bad_request", f"{header['kind']}: {type(error).__name__}: {error}")
                )
            self._send(
                connection, ipc.encode({"kind": header["kind"], **reply, "id": header.get("id")}, body), fds
            )

    def _on_tokenize(
        self, _c: _Connection, header: dict[str, Any], _p: bytes
    ) -> tuple[dict[str, Any], bytes]:
        tokenizer = self._core.tokenizer
        return {"ids": [tokenizer.bos_id, *tokenizer.encode(str(header["text"]))]}, b""

    def _on_render_chat(
        self, _c: _Connection, header: dict[str, Any], _p: bytes
    ) -> tuple[dict[str, Any], bytes]:
        return {"ids": render_chat(self._core.tokenizer, header["messages"])}, b""

    def _on_generate(
        self, connection: _Connection, header: dict[str, Any], payload: bytes
    ) -> tuple[dict[str, Any], bytes]:
        """Payload: JSON list of {request_id, paused, state | prompt_ids + params}; one may fail alone."""
        errors = {}
        for item in json.loads(payload):
            request_id, paused = str(item["request_id"]), bool(item.get("paused"))
            try:
                if item.get("state") is not None:
                    state = EngineState.from_json(item["state"])
                    self._core.add_state(request_id, state, paused=paused)
                    connection.reserved.difference_update(
                        block.slot for block in state.kv if block.slot is not None
                    )
                else:
                    params = SamplingParams.from_json(item["params"])
                    self._core.add(request_id, item["prompt_ids"], params, paused=paused)
            except MidstreamError as error:
                errors[request_id] = _error_json(error)
            except (KeyError, TypeError, ValueError) as error:
                errors[request_id] = _error_json(
                    Final("bad_request", f"generate: {type(error).__name__}: {error}")
                )
            else:
                connection.requests.add(request_id)
                self._owner[request_id] = connection
        return {"errors": errors}, b""

    def _on_pause(self, _c: _Connection, header: dict[str, Any], _p: bytes) -> tuple[dict[str, Any], bytes]:
        states = self._core.pause(header["ids"])
        return {}, ipc.encode_json({name: state.to_json() for name, state in states.items()})

    def _on_resume(self, _c: _Connection, header: dict[str, Any], _p: bytes) -> tuple[dict[str, Any], bytes]:
        self._core.resume(header["ids"])
        return {}, b""

    def _on_drop(self, _c: _Connection, header: dict[str, Any], _p: bytes) -> tuple[dict[str, Any], bytes]:
        self._core.drop(header["ids"])
        for request_id in header["ids"]:
            self._disown(request_id)
        return {}, b""

    def _on_reserve(
        self, connection: _Connection, header: dict[str, Any], _p: bytes
    ) -> tuple[dict[str, Any], bytes]:
        count = int(header["n"])
        if count < 0:
            raise Final("bad_request", f"cannot reserve {count} slots")
        slots = self._core.pool.reserve(count)
        connection.reserved.update(slots)
        return {"slots": slots}, b""

    def _on_free(
        self, connection: _Connection, header: dict[str, Any], _p: bytes
    ) -> tuple[dict[str, Any], bytes]:
        slots = connection.reserved.intersection(header["slots"])
        connection.reserved -= slots
        self._core.pool.release_reserved(sorted(slots))
        return {}, b""

    def _on_kv(
        self, connection: _Connection, header: dict[str, Any], _p: bytes
    ) -> tuple[dict[str, Any], bytes]:
        """Sealed slots of requests, from the given block on, `limit` in all; held until `unhold`."""
        left, found = int(header["limit"]), {}
        for name, first in header["known"].items():
            slots = self._core.sealed_slots(str(name), max(0, int(first)))[: max(0, left)]
            if slots:
                found[name] = slots
                left -= len(slots)
                self._hold(connection, slots)
        return {"slots": found}, b""

    def _on_have(
        self, connection: _Connection, _h: dict[str, Any], payload: bytes
    ) -> tuple[dict[str, Any], bytes]:
        """Payload: block hashes end to end. The slots that hold them, -1 for those that are not here; held."""
        names = [payload[at : at + HASH_BYTES] for at in range(0, len(payload), HASH_BYTES)]
        slots = [-1 if (slot := self._core.pool.find(name)) is None else slot for name in names]
        self._hold(connection, [slot for slot in slots if slot >= 0])
        return {"slots": slots}, b""

    def _hold(self, connection: _Connection, slots: list[int]) -> None:
        self._core.pool.share(slots)
        connection.held.update(slots)

    def _on_land(
        self, connection: _Connection, header: dict[str, Any], payload: bytes
    ) -> tuple[dict[str, Any], bytes]:
        """Payload: hash and checksum of each slot. Reserved before, sealed and held now."""
        size = HASH_BYTES + CHECKSUM_BYTES
        if len(payload) != size * len(header["slots"]):
            raise Final("bad_request", "land: one hash and one checksum a slot are needed")
        foreign = set(header["slots"]) - connection.reserved
        if foreign:
            raise Final("kv_not_reserved", f"KV slots {sorted(foreign)[:8]} were not reserved by this gateway")
        for at, slot in enumerate(header["slots"]):
            block = payload[at * size : (at + 1) * size]
            self._core.pool.land(slot, block[:HASH_BYTES], block[HASH_BYTES:])
            self._core.decoder.load_slots([slot])
            connection.reserved.discard(slot)
            connection.held[slot] += 1
        return {}, b""

    def _on_unhold(
        self, connection: _Connection, header: dict[str, Any], _p: bytes
    ) -> tuple[dict[str, Any], bytes]:
        ours = Counter(header["slots"]) & connection.held
        connection.held -= ours
        self._core.pool.release(list(ours.elements()))
        return {}, b""

    def _on_stats(self, _c: _Connection, _h: dict[str, Any], _p: bytes) -> tuple[dict[str, Any], bytes]:
        return {}, ipc.encode_json(self._core.stats())

    # Events

    def _deliver(self, events: list[tuple[str, TokenEvent]]) -> None:
        """One frame a connection and step."""
        frames: dict[_Connection, list[Any]] = {}
        for request_id, event in events:
            connection = self._owner.get(request_id)
            if connection is not None:
                frames.setdefault(connection, []).append((request_id, *event))
            if event.finish_reason is not None:
                self._disown(request_id)
        for connection, batch in frames.items():
            self._send(connection, ipc.encode({"kind": "events", "events": batch}))

    def _disown(self, request_id: str) -> None:
        connection = self._owner.pop(request_id, None)
        if connection is not None:
            connection.requests.discard(request_id)


def _error_json(error: MidstreamError) -> dict[str, Any]:
    return {
        "error": {"code": error.code, "message": error.message, "retryable": isinstance(error, Retryable)}
    }


def _info_json(info: EngineInfo) -> dict[str, Any]:
    data = dict(vars(info))
    data["pool"] = dict(vars(info.pool)) if info.pool is not None else None
    return data
