"""The target's end of the KV streams: blocks come in, are verified in place, and only then counted as landed.

One `KvServer` an agent listens; a job's `KvReceiver` is told with which ticket its source will come, and into which
slots of the pod's pool it may write. Every stream has a thread of its own, which is nearly always inside a system
call or a hash, both without the interpreter's lock: the agent's event loop does not wait for it.

A slot goes from the reservation to one block, and back when the block was damaged, or had landed by another stream
already. The engine sees none of it before somebody names the slots to it (`kv_target.KvTarget`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hmac
import logging
import secrets
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from midstream_runtime.contract.errors import Final, MidstreamError
from midstream_runtime.contract.pool import QUARTERS, quarters

from midstream_agent import kv_stream as wire
from midstream_agent import tcp, tls
from midstream_agent.kv import PoolView
from midstream_agent.settings import Kv, TlsFiles

log = logging.getLogger(__name__)
_DISCARD_BYTES = 1 << 20


class Landed(NamedTuple):
    """A block that is whole in a slot of the target's pool."""

    slot: int
    name: bytes
    """Its hash; empty for a block that is not full."""
    checksum: bytes


@dataclass(slots=True)
class Counts:
    """Of one job's streams."""

    blocks: int = 0
    bytes: int = 0
    damaged: int = 0
    refused: int = 0
    """There was no slot for them."""
    again: int = 0
    """Came once more after they had landed."""


T = TypeVar("T")
Have = Callable[[Sequence[bytes]], Coroutine[Any, Any, Sequence[int | None]]]
Settle = Callable[[], Coroutine[Any, Any, None]]


class KvReceiver:
    """One job at the target. `have`, `settle` and `end` run on the event loop that made this object; all else is
    thread-safe. `verify=False`, for tests: believe every block."""

    def __init__(
        self, job_id: str, source_node: str, view: PoolView, have: Have, settle: Settle, end: Settle, answer_s: float,
        *, verify: bool = True,
    ) -> None:  # fmt: skip
        self.job_id, self.source_node = job_id, source_node
        self.ticket = secrets.token_bytes(wire.TICKET_BYTES)
        self.counts = Counts()
        self._view, self._answer_s, self._verify = view, answer_s, verify
        self._have, self._settle, self._end = have, settle, end
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._slots: deque[int] = deque()
        self._landed: dict[int, Landed] = {}
        self._streams: dict[socket.socket, threading.Thread] = {}
        self._closed = False
        self._ending: concurrent.futures.Future[None] | None = None

    # -- for the event loop ------------------------------------------------------------------------------------

    def add_slots(self, slots: Sequence[int]) -> None:
        """More of the pod's reserved slots to write into."""
        with self._lock:
            self._slots.extend(slots)

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    def landed(self, block_id: int) -> Landed | None:
        return self._landed.get(block_id)

    def landed_ids(self) -> list[int]:
        with self._lock:
            return list(self._landed)

    async def close(self) -> None:
        """Nothing is written into the pool any more once this has returned."""
        with self._lock:
            self._closed = True
            streams = dict(self._streams)
        for sock in streams:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        # apart from the loop: a thread may be waiting for an answer of the pod, which the loop fetches
        for thread in streams.values():
            await asyncio.to_thread(thread.join)

    # -- for a stream's thread ---------------------------------------------------------------------------------

    def serve(self, sock: socket.socket) -> None:
        """Take what comes until the stream ends."""
        with self._lock:
            if self._closed:
                return
            self._streams[sock] = threading.current_thread()
        try:
            self._serve(sock)
        finally:
            with self._lock:
                del self._streams[sock]

    def _serve(self, sock: socket.socket) -> None:
        while True:
            kind, number, size, name, checksum = wire.FRAME.unpack(wire.recv_exactly(sock, wire.FRAME.size))
            match kind:
                case wire.Kind.BLOCK:
                    verdict = self._block(sock, number, size, name, checksum)
                    sock.sendall(wire.ANSWER.pack(number, verdict))
                case wire.Kind.OFFER:
                    sock.sendall(self._offer(sock, size))
                case wire.Kind.END:
                    self._ending = asyncio.run_coroutine_threadsafe(self._end(), self._loop)  # which ends this thread
                    return
                case wire.Kind.SETTLE:
                    self._await(self._settle())
                    sock.sendall(wire.ANSWER.pack(number, wire.Verdict.SETTLED))
                case _:
                    raise Final("kv_protocol", f"the source sent a frame of kind {kind}: upgrade this agent first")

    def _block(self, sock: socket.socket, number: int, size: int, name: bytes, checksum: bytes) -> wire.Verdict:
        if not 0 < size <= self._view.geometry.slot_bytes:
            raise Final("kv_protocol", f"the source sent a block of {size} bytes for a slot of another size")
        with self._lock:
            slot = self._slots.popleft() if self._slots else None
        if slot is None:
            _discard(sock, size)
            with self._lock:
                self.counts.refused += 1
            return wire.Verdict.LANDED if number in self._landed else wire.Verdict.NO_ROOM
        kept = False
        try:
            block = Landed(slot, b"" if name == wire.NO_HASH else name, checksum)
            kept, verdict = self._fill(sock, slot, number, size, block)
            return verdict
        finally:
            if not kept:
                with self._lock:
                    self._slots.append(slot)

    def _fill(self, sock: socket.socket, slot: int, number: int, size: int, block: Landed) -> tuple[bool, wire.Verdict]:
        """Was the slot used, and what to answer."""
        slot_bytes = self._view.geometry.slot_bytes
        with self._view.place(slot, slot_bytes)[1] as whole, whole[:size] as place:
            if _receive(sock, place) != block.checksum and self._verify:
                with self._lock:
                    self.counts.damaged += 1
                return False, wire.Verdict.DAMAGED
            if size < slot_bytes:
                whole[size:] = bytes(slot_bytes - size)
        with self._lock:
            if number in self._landed:
                self.counts.again += 1
                return False, wire.Verdict.LANDED
            self._landed[number] = block
            self.counts.blocks += 1
            self.counts.bytes += size
        return True, wire.Verdict.LANDED

    def _offer(self, sock: socket.socket, size: int) -> bytes:
        """HAVE or WANT for each block that the source could send."""
        if size > wire.MAX_OFFER_BYTES or size % wire.OFFERED.size:
            raise Final("kv_protocol", f"the source offers {size} bytes of hashes: no whole number, or too many")
        offered = list(wire.OFFERED.iter_unpack(wire.recv_exactly(sock, size)))
        slots = self._await(self._have([name for _, name in offered]))
        answers = []
        with self._lock:
            for (number, _), slot in zip(offered, slots, strict=True):
                if slot is not None:
                    self._landed[number] = Landed(slot, b"", b"")  # sealed in the pool already: nothing to publish
                answers.append(wire.ANSWER.pack(number, wire.Verdict.WANT if slot is None else wire.Verdict.HAVE))
        return b"".join(answers)

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the event loop and wait here."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(self._answer_s)


class KvServer:
    """Listens for the KV streams of all jobs that were announced with `expect`."""

    def __init__(self, host: str, settings: Kv, files: TlsFiles | None) -> None:
        """Binds; `files` None: without TLS. OSError when the port is taken."""
        self._settings, self._files = settings, files
        self._context = tls.stream_context(files, server=True) if files is not None else None
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server(
            (host, settings.port), family=family, dualstack_ipv6=host == "::", backlog=256
        )
        self._listener.settimeout(1.0)  # how often strangers' time is looked at
        self.port = int(self._listener.getsockname()[1])
        self._receivers: dict[str, KvReceiver] = {}
        self._greeting: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._accepting = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._accepting.start()

    def expect(self, receiver: KvReceiver) -> None:
        """Let the job's streams in; by the certificate of now, since they are renewed under a running agent."""
        if self._files is not None:
            self._context = tls.stream_context(self._files, server=True)
        self._receivers[receiver.job_id] = receiver

    def forget(self, receiver: KvReceiver) -> None:
        if self._receivers.get(receiver.job_id) is receiver:
            del self._receivers[receiver.job_id]

    async def close(self) -> None:
        """No new streams; the receivers are closed by whoever made them."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        await asyncio.to_thread(self._accepting.join)
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            self._end_slow_greetings()
            try:
                sock, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as e:
                if not self._closed:
                    log.warning("KV port: accept: %s", e)
                continue
            if len(self._greeting) >= self._settings.greeting_streams:
                sock.close()
                continue
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            with self._lock:
                self._greeting[sock] = time.monotonic() + self._settings.connect_s
            name = f"kv-from-{address[0]}"
            threading.Thread(target=self._stream, args=(sock, address[0]), name=name, daemon=True).start()

    def _end_slow_greetings(self) -> None:
        now = time.monotonic()
        with self._lock:
            slow = [sock for sock, deadline in self._greeting.items() if deadline < now]
        for sock in slow:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _stream(self, sock: socket.socket, address: str) -> None:
        try:
            with sock:
                wire.step_back(self._settings.nice)
                receiver = self._greet(sock)
                wire.block_with(sock, 0, self._settings.stall_s)
                receiver.serve(sock)
        except wire.Closed:
            pass  # a stream's ordinary end
        except (OSError, ValueError, MidstreamError, concurrent.futures.TimeoutError) as e:
            # the source sees the stream end, and sends again what was not answered
            log.warning("KV stream from %s: %s", address, e)
        finally:
            with self._lock:
                self._greeting.pop(sock, None)

    def _greet(self, sock: socket.socket) -> KvReceiver:
        sock.settimeout(self._settings.connect_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        job_id, shown, nonce, theirs = wire.hear_source(sock)
        receiver, name = self._receivers.get(job_id), job_id.encode()
        if receiver is None or not hmac.compare_digest(shown, wire.proof(receiver.ticket, b"source", nonce, name)):
            raise Final("kv_refused", f"a KV stream came for job {job_id!r} without its ticket")
        if isinstance(sock, ssl.SSLSocket) and receiver.source_node not in tls.peer_names(sock):
            names = sorted(tls.peer_names(sock))
            raise Final("peer_identity", f"a KV stream of job {job_id} came with the certificate of {names}")
        sock.sendall(wire.proof(receiver.ticket, b"target", theirs, name))
        with self._lock:
            self._greeting.pop(sock, None)
        return receiver


def _receive(sock: socket.socket, place: memoryview) -> bytes:
    """A block, and its checksum: each quarter is looked at while the CPU's cache still has it."""
    found = []
    for part in quarters(len(place)):
        with place[part] as view:
            wire.recv_into_exactly(sock, view)
            found.append(tcp.crc32(view))
    return QUARTERS.pack(*found)


def _discard(sock: socket.socket, count: int) -> None:
    scratch = memoryview(bytearray(min(count, _DISCARD_BYTES)))
    while count:
        part = scratch[: min(count, len(scratch))]
        wire.recv_into_exactly(sock, part)
        count -= len(part)
