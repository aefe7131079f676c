"""EC2's instance metadata (IMDSv2), as an agent asks it: session token, a few paths, nothing else.

Plain HTTP/1.1 over asyncio streams: a request a second must not cost a thread. The token is kept until shortly before
it expires and fetched anew when a server refuses it. 404 is an answer ("no interruption is planned"), everything else
that is not 200 is an error by name.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from midstream_runtime.contract.errors import Retryable

from midstream_agent.settings import ImdsSettings

TOKEN_PATH = "/latest/api/token"
TOKEN_TTL_S = 21_600  # the longest that IMDS grants
_MAX_BODY_BYTES = 1 << 20
_BROKEN = (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)


@dataclass(slots=True)
class Imds:
    settings: ImdsSettings
    _token: str = ""
    _token_until_s: float = field(default=float("-inf"))

    async def get(self, path: str) -> str | None:
        """The text at `/latest/meta-data/PATH`; None: there is none. Retryable when IMDS does not answer."""
        full = f"/latest/meta-data/{path}"
        status, body = await self._ask("GET", full, {"X-aws-ec2-metadata-token": await self._session()})
        if status == 401:  # it expired, or the server started anew
            self._token = ""
            status, body = await self._ask("GET", full, {"X-aws-ec2-metadata-token": await self._session()})
        if status == 404:
            return None
        if status != 200:
            raise Retryable("imds_unavailable", f"IMDS answers {status} to {path}")
        return body

    async def _session(self) -> str:
        now_s = asyncio.get_running_loop().time()
        if not self._token or now_s >= self._token_until_s:
            ttl = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
            status, body = await self._ask("PUT", TOKEN_PATH, ttl)
            if status != 200 or not body.isprintable() or not body.strip():  # it goes into a header
                raise Retryable("imds_unavailable", f"IMDS gives no session token ({status}): is the hop limit 2?")
            self._token = body
            self._token_until_s = now_s + TOKEN_TTL_S * 0.9
        return self._token

    async def _ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        try:
            async with asyncio.timeout(self.settings.timeout_s):
                return await self._exchange(method, path, headers)
        except _BROKEN as e:
            raise Retryable("imds_unavailable", f"IMDS does not answer: {type(e).__name__}: {e}") from e

    async def _exchange(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection(self.settings.host, self.settings.port)
        try:
            lines = [f"{method} {path} HTTP/1.1", f"Host: {self.settings.host}", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            if method == "PUT":
                lines.append("Content-Length: 0")
            writer.write("\r\n".join([*lines, "", ""]).encode("ascii"))
            return await _answer(reader)
        finally:
            writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, str]:
    """Status and body; ValueError for what is no HTTP."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    version, _, rest = head[0].partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
        raise ValueError(f"no HTTP answer: {head[0][:40]!r}")
    fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    if "chunked" in fields.get("transfer-encoding", "").lower():
        return int(rest[:3]), (await _chunks(reader)).decode()
    length = int(fields.get("content-length", -1))
    body = await (reader.readexactly(_bounded(length)) if length >= 0 else reader.read(_MAX_BODY_BYTES))
    return int(rest[:3]), body.decode()


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    found = b""
    while size := _bounded(len(found) + int(await reader.readline(), 16)) - len(found):
        found += await reader.readexactly(size)
        await reader.readline()
    return found


def _bounded(length: int) -> int:
    if not 0 <= length <= _MAX_BODY_BYTES:
        raise ValueError(f"an answer of {length} bytes")
    return length
