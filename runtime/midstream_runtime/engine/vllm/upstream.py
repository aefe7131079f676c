"""HTTP/1.1 to the vLLM server: h11 over asyncio's streams, a connection a request.

Closing the connection of an answer aborts it in vLLM. Connections are not kept: an answer lasts seconds, and an abort
would cost its connection anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

from midstream_runtime.contract.errors import Final, Retryable

CONNECT_S = 5.0
"""To a server of the same pod: it listens or it does not."""
CALL_S = 60.0
"""Tokenizing a prompt of the whole context takes well under a second; a server that is compiling answers late."""
READ_BYTES = 1 << 16
MAX_HEAD_BYTES = 64 << 10


@dataclass(slots=True)
class Response:
    """Head of an answer; its body is read from `Upstream.open`'s iterator."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: AsyncIterator[bytes]

    async def read(self) -> bytes:
        return b"".join([part async for part in self.body])


class Upstream:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise Final("engine_url", f"{url!r} is no server's address: write http://HOST:PORT")
        self.host, self.port = parts.hostname, parts.port or 80

    async def json(self, method: str, path: str, data: Any = None) -> Any:
        """The answer's JSON. Retryable("engine_lost") when the server is not there, Final("engine_refused") with the
        server's own words when it refuses."""
        body = b"" if data is None else json.dumps(data).encode()
        answer = await self._call(method, path, body)
        return json.loads(answer)

    async def text(self, path: str) -> str:
        return (await self._call("GET", path)).decode("utf-8", "replace")

    async def _call(self, method: str, path: str, body: bytes = b"") -> bytes:
        try:
            async with asyncio.timeout(CALL_S), self.open(method, path, body) as response:
                answer = await response.read()
        except TimeoutError as error:
            raise Retryable("engine_lost", f"the vLLM server did not answer {path} within {CALL_S:g} s") from error
        if response.status != 200:
            raise refused(response.status, answer)
        return answer

    @asynccontextmanager
    async def open(
        self, method: str, target: str, body: bytes = b"", headers: Sequence[tuple[str, str]] = ()
    ) -> AsyncIterator[Response]:
        """Send a request and read the head of its answer; leaving the context closes the connection."""
        reader, writer = await self._connect()
        try:
            parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
            fields = [("host", f"{self.host}:{self.port}"), ("content-length", str(len(body))), ("connection", "close")]
            fields += headers or [("content-type", "application/json")]
            data = parser.send(h11.Request(method=method, target=target, headers=fields)) or b""
            data += parser.send(h11.Data(data=body)) or b""
            writer.write(data + (parser.send(h11.EndOfMessage()) or b""))
            head = await _event(parser, reader)
            while isinstance(head, h11.InformationalResponse):
                head = await _event(parser, reader)
            if not isinstance(head, h11.Response):
                raise Retryable("engine_lost", f"the vLLM server answered {head!r} instead of a response")
            yield Response(head.status_code, head.headers.raw_items(), _body(parser, reader))
        except h11.LocalProtocolError as error:
            raise Final("bad_request", f"the request cannot be passed on: {error}") from error
        except (OSError, h11.RemoteProtocolError) as error:
            raise Retryable("engine_lost", f"the vLLM server ended the connection: {error}") from error
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            async with asyncio.timeout(CONNECT_S):
                return await asyncio.open_connection(self.host, self.port)
        except (OSError, TimeoutError) as error:
            where = f"http://{self.host}:{self.port}"
            raise Retryable("engine_lost", f"no vLLM server at {where} ({error}): start it, or wait for it") from error


async def sse(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Data of the events of a stream; `[DONE]` is one of them."""
    rest = b""
    async for part in body:
        *events, rest = (rest + part).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    yield line[5:].strip()


def refused(status: int, body: bytes) -> Final | Retryable:
    """The server's refusal in its own words."""
    try:
        error = json.loads(body)
        message = str(error.get("error", error).get("message") or error)
    except (ValueError, AttributeError):
        message = body[:300].decode("utf-8", "replace")
    family = Final if status < 500 else Retryable
    return family("engine_refused", f"vLLM answered {status}: {message}")


async def _event(parser: h11.Connection, reader: asyncio.StreamReader) -> Any:
    while (event := parser.next_event()) is h11.NEED_DATA:
        parser.receive_data(await reader.read(READ_BYTES))
    return event


async def _body(parser: h11.Connection, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while not isinstance(event := await _event(parser, reader), h11.EndOfMessage):
        if not isinstance(event, h11.Data):
            raise Retryable("engine_lost", "the vLLM server ended in the middle of an answer")
        yield bytes(event.data)
