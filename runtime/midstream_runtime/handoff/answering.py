"""Requests of an agent and the replies to them, with file descriptors, on the handoff socket (contract/handoff.py)."""

from __future__ import annotations

import array
import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream_runtime.contract import handoff as wire
from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Reply:
    fields: dict[str, Any] = field(default_factory=dict)
    payload: bytes = b""
    fds: list[int] = field(default_factory=list)  # borrowed


Verbs = dict[str, Callable[[dict[str, Any], bytes], Awaitable[Reply]]]


async def answer_all(sock: socket.socket, verbs: Verbs, session: int) -> None:
    """One agent's connection: requests in order, a reply each, until it ends. The verbs see which session asks."""
    loop = asyncio.get_running_loop()
    buffer = bytearray()
    while True:
        while need := wire.missing(buffer):
            data = await loop.sock_recv(sock, max(need, 1 << 16))
            if not data:
                return
            buffer += data
        header, payload, used = wire.decode(buffer)
        del buffer[:used]
        await _answer(sock, verbs, {**header, "_session": session}, payload)


async def _answer(sock: socket.socket, verbs: Verbs, header: dict[str, Any], payload: bytes) -> None:
    kind, number = str(header.get("kind")), header.get("id")
    try:
        verb = verbs.get(kind)
        if verb is None:
            raise Final("handoff_protocol", f"this pod knows no request {kind!r}")
        reply = await verb(header, payload)
    except MidstreamError as e:
        reply, kind = _error(e), "error"
    except (KeyError, TypeError, ValueError) as e:
        log.exception("handoff: request %s", kind)
        reply, kind = _error(Final("handoff_protocol", f"request {kind!r} is malformed: {e!r}")), "error"
    except Exception as e:  # the agent must hear of it, whatever it was: it rolls back then
        log.exception("handoff: request %s", kind)
        reply, kind = _error(Final("pod_internal", f"request {kind!r} failed in the pod: {e!r}")), "error"
    await send(sock, {"kind": kind, "id": number, **reply.fields}, reply)


def _error(e: MidstreamError) -> Reply:
    return Reply({"code": e.code, "message": e.message, "retryable": isinstance(e, Retryable)})


async def send(sock: socket.socket, header: dict[str, Any], reply: Reply) -> None:
    """A reply in as many frames as its fds need."""
    loop = asyncio.get_running_loop()
    fds = reply.fds
    while True:
        part, fds = fds[: wire.MAX_FDS_PER_FRAME], fds[wire.MAX_FDS_PER_FRAME :]
        last = not fds
        body = header if last else {"kind": header["kind"], "id": header["id"]}
        data = wire.encode({**body, "fds": len(part), "more": not last}, reply.payload if last else b"")
        sent = await send_first(sock, data, part)
        await loop.sock_sendall(sock, memoryview(data)[sent:])
        if last:
            return


async def send_first(sock: socket.socket, data: bytes, fds: Sequence[int]) -> int:
    """sendmsg with the fds on the first byte; asyncio has no call for it."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    while True:
        try:
            return sock.sendmsg([data], rights)
        except BlockingIOError:
            await _writable(sock)


async def _writable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def on_writable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_writer(sock.fileno(), on_writable)
    try:
        await ready
    finally:
        loop.remove_writer(sock.fileno())
