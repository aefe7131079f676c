"""The preStop hook of a serving pod: answers when the pod may be ended.

The kubelet asks `GET /prestop?seconds=N` of every container before it sends SIGTERM (charts/ injects that). The answer
comes when no answer is under way here any more and no address of streams that have left is here any more, and it stayed
so for a moment, in which connections that were idle move as well; or after N seconds. Whoever drains the node, rolls
out or scales in thereby waits for the migration, which the pod's deletion has started.

A port of its own: clients' requests go through the gateway's sockets, which move away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Callable

log = logging.getLogger("midstream.prestop")
MAX_S = 3600.0
QUIET_S = 3.0  # a job that the pod's deletion starts needs less to take the first streams
POLL_S = 0.1
REQUEST_S = 5.0  # for the request line and headers to come
_REQUEST = re.compile(rb"GET /prestop(?:\?seconds=(\d{1,4}))? HTTP/1\.[01]\r\n")


async def until_quiet(busy: Callable[[], bool], seconds: float) -> bool:
    """True as soon as nothing was under way for QUIET_S; False when `seconds` are over before."""
    loop = asyncio.get_running_loop()
    end, since = loop.time() + min(seconds, MAX_S), loop.time()
    while loop.time() < end:
        if busy():
            since = loop.time()
        elif loop.time() - since >= QUIET_S:
            return True
        await asyncio.sleep(POLL_S)
    return False


async def serve(port: int, busy: Callable[[], bool]) -> asyncio.Server:
    """Listening when it returns. Anything but the hook's request is answered with 404."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
            found = _REQUEST.match(head)
            if found is None:
                writer.write(_response(404, "there is only GET /prestop?seconds=N\n"))
            else:
                quiet = await until_quiet(busy, float(found[1] or MAX_S))
                log.info("preStop: %s", "nothing is under way" if quiet else "the time is over, answers are under way")
                writer.write(_response(200, "quiet\n" if quiet else "deadline\n"))
            await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, port=port, limit=8192)


def _response(status: int, text: str) -> bytes:
    reason = {200: "OK", 404: "Not Found"}[status]
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}\r\nConnection: close"
    return f"{head}\r\n\r\n{text}".encode()
