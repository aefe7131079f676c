"""The agent's end of the handoff: asks a pod for its sockets and state, and gives them back.

One connection a job and pod. Requests are answered in order, one at a time; a lock keeps it so when the saga
and a status question meet. What the pod sends is hostile until checked: sizes before allocation, kinds, counts
of fds. Every fd that arrives is owned by the caller or closed here.
"""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from midstream_runtime.contract import handoff as wire
from midstream_runtime.contract.errors import Final, Retryable, error_from

from midstream_agent.settings import Limits

_SPACE = socket.CMSG_SPACE(wire.MAX_FDS_PER_FRAME * array.array("i").itemsize)


@dataclass(slots=True)
class Answer:
    """A whole reply: header of its last frame, payload, fds in order (owned by whoever takes them)."""

    header: dict[str, Any]
    payload: bytes = b""
    fds: list[int] = field(default_factory=list)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def take_fds(self, count: int | None = None) -> list[int]:
        """Hand the fds over; Final("handoff_fds") when the pod sent another number than `count`."""
        if count is not None and len(self.fds) != count:
            got = len(self.fds)
            self.close()
            raise Final("handoff_fds", f"the pod sent {got} sockets where {count} were expected")
        fds, self.fds = self.fds, []
        return fds


class HandoffClient:
    """A connected handoff socket."""

    def __init__(self, sock: socket.socket, timeout_s: float, limits: Limits | None = None) -> None:
        sock.setblocking(False)
        self._max_fds = (limits or Limits()).streams_per_job
        self._sock = sock
        self.server_pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._next_id = 0
        self._buffer = bytearray()
        self._fds: list[int] = []
        self._broken = False

    async def __aenter__(self) -> HandoffClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    @property
    def broken(self) -> bool:
        """A request was cut off in its middle: only a new connection can go on."""
        return self._broken

    async def cut_off(self) -> bool:
        """The same; a request that is under way is waited for."""
        async with self._lock:
            return self._broken

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._sock.close()

    async def ask(
        self, kind: str, fields: dict[str, Any] | None = None, payload: bytes = b"", timeout_s: float | None = None
    ) -> Answer:
        """Send one request and return its reply; an error reply is raised as what it says."""
        async with self._lock:
            if self._broken:
                raise Retryable("handoff_closed", "the connection to the pod broke in an earlier request")
            self._next_id += 1
            header = {"kind": kind, "id": self._next_id, **(fields or {})}
            self._broken = True  # until the reply was read whole, the stream is in an unknown place
            try:
                async with asyncio.timeout(timeout_s or self._timeout_s):
                    await self._send(wire.encode(header, payload))
                    answer = await self._receive(self._next_id)
            except TimeoutError as e:
                raise Retryable("handoff_timeout", f"the pod did not answer {kind!r} in time") from e
            except OSError as e:
                raise Retryable("handoff_closed", f"the pod closed the handoff during {kind!r}: {e}") from e
            self._broken = False
        if answer.header.get("kind") == "error":
            answer.close()
            raise error_from(answer.header)
        try:
            _check_shape(kind, answer)
        except (KeyError, TypeError, ValueError) as e:
            answer.close()
            raise Final("handoff_protocol", f"the pod's answer to {kind!r} is malformed: {e!r}") from e
        return answer

    async def _send(self, data: bytes) -> None:
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            await asyncio.get_running_loop().sock_sendall(self._sock, memoryview(data)[sent:])

    async def _receive(self, wanted: int) -> Answer:
        whole = Answer({})
        try:
            while True:
                header, payload, fds = await self._frame()
                whole.header, whole.fds = header, whole.fds + fds
                whole.payload += payload
                if len(whole.payload) > wire.MAX_PAYLOAD_BYTES:
                    raise Final("handoff_size", "the pod sends a longer answer than the protocol allows")
                if len(whole.fds) > self._max_fds:
                    raise Final("handoff_fds", f"the pod sends more than {self._max_fds} sockets")
                if header.get("id") != wanted:
                    raise Final("handoff_protocol", "the pod answered another request than the one asked")
                if not header.get("more"):
                    return whole
        except BaseException:
            whole.close()
            raise

    async def _frame(self) -> tuple[dict[str, Any], bytes, list[int]]:
        while (need := wire.missing(self._buffer)) > 0:
            await self._read(need)
        header, payload, used = wire.decode(self._buffer)
        del self._buffer[:used]
        count = header.get("fds", 0)
        if not isinstance(count, int) or not 0 <= count <= len(self._fds):
            raise Final("handoff_fds", f"the pod announced {count!r} sockets and sent {len(self._fds)}")
        fds, self._fds = self._fds[:count], self._fds[count:]
        return header, payload, fds

    async def _read(self, need: int) -> None:
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(max(need, 1 << 16), _SPACE, socket.MSG_CMSG_CLOEXEC)
                break
            except BlockingIOError:
                await _readable(self._sock)
        for level, kind, body in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(body[: len(body) - len(body) % fds.itemsize])
                self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC or len(self._fds) > 2 * wire.MAX_FDS_PER_FRAME:
            raise Final("handoff_fds", "the pod sent more sockets in a message than the protocol allows")
        if not data:
            raise ConnectionResetError("end of stream")
        self._buffer += data


def _check_shape(kind: str, answer: Answer) -> None:
    """Types of what others will take for granted; KeyError, TypeError or ValueError when the pod gave others."""
    header = answer.header
    if kind == "hello":
        _expect(header["version"], int)
        _expect(header["min_version"], int)
        _expect(header["pod_kind"], str)
        _expect(header.get("pool"), dict, type(None))
        _expect(header.get("model"), dict, type(None))
        if len(answer.fds) != bool(header.get("pool")):
            raise ValueError(f"{len(answer.fds)} descriptors come with it")
        for listener in _expect(header["listeners"], list):
            _expect(listener["port"], int)
    elif kind == "streams":
        for stream in _expect(header["streams"], list):
            _expect(stream["id"], int)
            _expect(stream["movable"], bool)
            for end in ("local", "remote"):
                address, port = stream[end]
                _expect(address, str)
                _expect(port, int)
    elif kind == "pause":
        for stream in _expect(header["streams"], list):
            _expect(stream["id"], int)
        for block in _expect(header.get("kv", []), list):
            _expect(block["slot"], int)
            _expect(block["bytes"], int)
            bytes.fromhex(block["checksum"])
            bytes.fromhex(_expect(block.get("hash", ""), str))
    elif kind == "kv":
        streams = _expect(header["streams"], list)
        if sum(_expect(count, int) for _, count in streams) * wire.BLOCK.size != len(answer.payload):
            raise ValueError("streams and blocks differ in number")
    elif kind in ("reserve", "kv_reserve", "kv_have"):
        for slot in _expect(header["slots"], list):
            _expect(slot, int)


def _expect(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise TypeError(f"{type(value).__name__} where {kinds[0].__name__} is expected")
    return value


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def on_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock.fileno(), on_readable)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())
