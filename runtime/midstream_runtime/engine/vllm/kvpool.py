"""The gateway's end of pool.sock (midstream_runtime.vllm_connector.share describes it)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from array import array
from collections.abc import Sequence
from typing import Any

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable
from midstream_runtime.engine import ipc

_READ_BYTES = 1 << 20
CALL_S = 10.0
"""A pin or a publish takes milliseconds; a pause waits for it, and clients with it."""


class PoolClient:
    """One connection; calls go out and come back in order. `lost` is set when vLLM's process is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = asyncio.Lock()
        self._parser = ipc.FrameParser()
        self._loop = asyncio.get_running_loop()
        self.fd = -1
        self.info: dict[str, Any] = {}
        self.lost = asyncio.Event()

    @classmethod
    async def connect(cls, path: str) -> PoolClient:
        """Retryable("pool_unreachable") when no connector listens at `path`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        client = cls(sock)
        try:
            await client._loop.sock_connect(sock, path)
            client.info = await client._fetch_info()
        except OSError as error:
            client.close()
            raise Retryable("pool_unreachable", f"no KV pool at {path} ({error}): is vLLM's connector up?") from error
        return client

    def close(self) -> None:
        self.lost.set()
        self._sock.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    async def pin(self, hashes: Sequence[bytes]) -> list[int]:
        """Slots of the first blocks of a chain, as many as the pool has. They stay until `unpin`."""
        header, _ = await self._call("pin", b"".join(hashes))
        return list(header["slots"])

    async def have(self, hashes: Sequence[bytes]) -> list[int | None]:
        """Where the pool has each of these blocks. They stay until `unpin`."""
        header, _ = await self._call("have", b"".join(hashes))
        return [None if slot < 0 else int(slot) for slot in header["slots"]]

    async def unpin(self, slots: Sequence[int]) -> None:
        await self._call("unpin", slots=list(slots))

    async def reserve(self, count: int) -> list[int]:
        header, _ = await self._call("reserve", n=count)
        return list(header["slots"])

    async def free(self, slots: Sequence[int]) -> None:
        await self._call("free", slots=list(slots))

    async def land(self, slots: Sequence[int], names: Sequence[tuple[bytes, bytes]]) -> None:
        """Reserved slots hold whole blocks of these (hash, checksum): sealed, until `unpin`."""
        await self._call("land", b"".join(name + digest for name, digest in names), slots=list(slots))

    async def publish(self, slots: Sequence[int | None], ids: Sequence[int]) -> int:
        """Slots, reserved or pinned, hold the first blocks of `ids`: vLLM may load them. How many it can use."""
        header, _ = await self._call("publish", _pack(ids), slots=[-1 if s is None else s for s in slots])
        return int(header["published"])

    async def stats(self) -> dict[str, int]:
        _, body = await self._call("stats")
        stats: dict[str, int] = json.loads(body)
        return stats

    async def _fetch_info(self) -> dict[str, Any]:
        """The first answer carries the memfd."""
        await self._loop.sock_sendall(self._sock, ipc.encode({"kind": "info", "id": 0}))
        while True:
            await _readable(self._loop, self._sock)
            with contextlib.suppress(BlockingIOError):
                data, fds, _, _ = socket.recv_fds(self._sock, _READ_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
                if not data:
                    raise ConnectionResetError("closed")
                if fds:
                    self.fd = fds[0]
                for _, body in self._parser.feed(data):
                    info: dict[str, Any] = json.loads(body)
                    return info

    async def _call(self, kind: str, body: bytes = b"", **fields: Any) -> tuple[dict[str, Any], bytes]:
        async with self._lock:
            if self.lost.is_set():
                raise Retryable("pool_unreachable", "vLLM's process is gone, and its KV pool with it")
            try:
                async with asyncio.timeout(CALL_S):
                    await self._loop.sock_sendall(self._sock, ipc.encode({"kind": kind, **fields}, body))
                    header, answer = await self._answer()
            except (OSError, TimeoutError, asyncio.CancelledError) as error:
                self.close()  # an answer that comes later would be taken for the next one's
                if isinstance(error, asyncio.CancelledError):
                    raise
                raise Retryable("pool_unreachable", f"vLLM's KV pool does not answer: {error}") from error
        if "error" in header:
            raise _error(header["error"])
        return header, answer

    async def _answer(self) -> tuple[dict[str, Any], bytes]:
        while True:
            data = await self._loop.sock_recv(self._sock, _READ_BYTES)
            if not data:
                raise ConnectionResetError("closed")
            for frame in self._parser.feed(data):
                return frame


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready = asyncio.Event()
    loop.add_reader(sock, ready.set)
    try:
        async with asyncio.timeout(CALL_S):
            await ready.wait()
    finally:
        loop.remove_reader(sock)


def _pack(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()


def _error(data: dict[str, Any]) -> MidstreamError:
    family = Retryable if data["retryable"] else Final
    return family(str(data["code"]), str(data["message"]))
