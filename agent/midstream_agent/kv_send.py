"""The source's end of the KV streams: blocks leave the pod's pool without passing through this process.

A job's `KvSender` keeps several TCP streams to the target. Each has a thread for the time of a round; the threads
take blocks from one queue, so that a slow stream carries less and no block waits behind it. Plain streams, and those
whose TLS the kernel does, are fed by sendfile from the pool's memfd; otherwise OpenSSL reads the mapping. TCP's window
is the back-pressure: a target that does not keep up stops these threads and nothing else.

A stream that breaks is connected again; what it had sent and the target had not answered goes back into the queue.
What the pod overwrites while it is being sent arrives damaged, and the target says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import kv_stream as wire
from midstream_agent import tls
from midstream_agent.kv import PoolView
from midstream_agent.kv_rate import TokenBucket
from midstream_agent.settings import Kv, TlsFiles

ANSWERS_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the pod's pool, as the pod describes it: the target believes its checksum only."""

    id: int
    slot: int
    length: int
    checksum: bytes
    name: bytes = b""
    """Its hash, when it is full."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a job's streams go."""

    node: str
    host: str
    port: int
    ticket: bytes


@dataclass(slots=True)
class RoundReport:
    """What became of the blocks of one `send`."""

    landed: set[int] = field(default_factory=set)
    failed: dict[int, str] = field(default_factory=dict)
    """Why, by id: these are computed again at the target."""
    bytes: int = 0
    """Of blocks that landed."""
    took_s: float = 0.0
    late: bool = False
    """Not all had come within the time that was given."""
    broken_streams: int = 0
    damaged: int = 0


class _Round:
    """One `send`, shared by the streams' threads."""

    def __init__(self, blocks: Sequence[Block], tries: int) -> None:
        self._lock = threading.Lock()
        self._waiting = deque(blocks)
        self._tries_left = {block.id: tries for block in blocks}
        self.report = RoundReport()

    def take(self) -> Block | None:
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def put_back(self, blocks: Sequence[Block]) -> None:
        """Of a stream that broke."""
        with self._lock:
            self._waiting.extendleft(reversed(blocks))
            self.report.broken_streams += 1

    def answered(self, block: Block, verdict: int) -> None:
        with self._lock:
            report = self.report
            if verdict == wire.Verdict.LANDED:
                report.landed.add(block.id)
                report.bytes += block.length
                return
            if verdict == wire.Verdict.DAMAGED:
                report.damaged += 1
                self._tries_left[block.id] -= 1
                if self._tries_left[block.id] > 0:
                    self._waiting.append(block)
                    return
                report.failed[block.id] = "kv_checksum"
                return
            report.failed[block.id] = "pool_full"

    def give_up(self, why: str) -> None:
        """No stream is left to send what waits."""
        with self._lock:
            for block in self._waiting:
                self.report.failed[block.id] = why
            self._waiting.clear()

    def so_far(self, blocks: Sequence[Block]) -> RoundReport:
        """A report of its own: threads that are ending still write into ours."""
        with self._lock:
            landed = set(self.report.landed)
            failed = {b.id: self.report.failed.get(b.id, "kv_slow") for b in blocks if b.id not in landed}
            return replace(self.report, landed=landed, failed=failed, late=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)


class KvSender:
    """The streams of one job. Use from one task at a time; `close` in the end, also after an error."""

    def __init__(self, settings: Kv, files: TlsFiles, job_id: str, target: Target, view: PoolView) -> None:
        self._settings, self._job_id, self._target, self._view = settings, job_id, target, view
        self._context = tls.stream_context(files, server=False) if settings.tls else None
        self._bucket = TokenBucket(settings.bytes_per_s, settings.piece_bytes)
        self._streams = [_Stream(self) for _ in range(settings.streams)]
        self._threads = ThreadPoolExecutor(
            settings.streams, thread_name_prefix=f"kv-{job_id}", initializer=wire.step_back, initargs=(settings.nice,)
        )
        self.bytes_per_s = 0.0
        """Of the newest round that was large enough to tell; 0 before there was one."""

    async def send(self, blocks: Sequence[Block], within_s: float | None = None) -> RoundReport:
        """Send blocks; returns when the target has answered for each, or no stream is left. After `within_s` seconds
        what has not come fails, and the streams end. Raises nothing but what is wrong with the target itself
        (Final)."""
        began = time.perf_counter()
        work = _Round(blocks, self._settings.tries)
        try:
            async with asyncio.timeout(within_s):
                await self._send_all(work)
        except TimeoutError:
            work.report = work.so_far(blocks)
        report = work.report
        report.took_s = time.perf_counter() - began
        if report.bytes >= self._settings.piece_bytes and not report.broken_streams:
            self.bytes_per_s = report.bytes / report.took_s
        return report

    async def _send_all(self, work: _Round) -> None:
        while work.waiting:
            streams = [s for s in self._streams if not s.dead][: work.waiting]
            if not streams:
                work.give_up("kv_broken")
                break
            await self._run_all(streams, work)

    async def _run_all(self, streams: Sequence[_Stream], work: _Round) -> None:
        loop = asyncio.get_running_loop()
        running = [loop.run_in_executor(self._threads, stream.run, work) for stream in streams]
        try:
            results = await asyncio.gather(*running, return_exceptions=True)
        except BaseException:
            self.interrupt()  # cancelled: threads must not go on sending from a pool that is about to be closed
            raise
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def offer(self, blocks: Sequence[Block]) -> set[int]:
        """Ids of the blocks that the target has already, and keeps for this job. Retryable when nobody answers."""
        have: set[int] = set()
        step = self._settings.offer_blocks
        for at in range(0, len(blocks), step):
            some = blocks[at : at + step]
            body = b"".join(wire.OFFERED.pack(block.id, block.name) for block in some)
            answers = await self._ask(wire.Kind.OFFER, body, len(some))
            have |= {number for number, verdict in answers if verdict == wire.Verdict.HAVE}
        return have

    async def settle(self) -> None:
        """What has landed can be found, and shared, at the target."""
        await self._ask(wire.Kind.SETTLE, b"", 1)

    async def end(self) -> None:
        """No more comes: the target may free what it kept for more."""
        await self._ask(wire.Kind.END, b"", 0)

    async def _ask(self, kind: wire.Kind, body: bytes, count: int) -> list[tuple[int, int]]:
        loop = asyncio.get_running_loop()
        stream = next((s for s in self._streams if not s.dead), None)
        if stream is None:
            raise Retryable("kv_broken", f"no KV stream to {self._target.node} is left")
        try:
            return await loop.run_in_executor(self._threads, stream.ask, kind, body, count)
        except (OSError, ssl.SSLError) as e:
            raise Retryable("kv_broken", f"KV stream to {self._target.node}: {e}") from e

    def interrupt(self) -> None:
        """Ends what the threads are doing, as if the streams had broken; safe on any thread."""
        for stream in self._streams:
            stream.dead = True
            stream.shut()

    async def close(self) -> None:
        self.interrupt()
        await asyncio.to_thread(self._threads.shutdown)
        for stream in self._streams:
            stream.close()

    # -- for the streams ---------------------------------------------------------------------------------------

    def _connect(self) -> socket.socket:
        """A stream that the target has accepted for this job."""
        settings, target = self._settings, self._target
        sock = socket.create_connection((target.host, target.port), settings.connect_s)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_hostname=target.node)
            wire.greet_as_source(sock, self._job_id, target.ticket)
            wire.block_with(sock, settings.answer_s, settings.stall_s)
        except BaseException:
            sock.close()
            raise
        return sock


class _Stream:
    """One TCP stream. Only one thread at a time is in it; `shut` may be called from any."""

    def __init__(self, sender: KvSender) -> None:
        self._sender = sender
        self._sock: socket.socket | None = None
        self._answers = bytearray()
        self._unanswered: dict[int, Block] = {}
        self.dead = False

    def run(self, work: _Round) -> None:
        """Send what waits until nothing does. Raises Final when the target is not the job's."""
        settings = self._sender._settings
        failures = 0
        while not self.dead:
            try:
                self._send_all(work)
                return
            except (OSError, ssl.SSLError, Retryable):
                work.put_back(list(self._unanswered.values()))
                self.close()
                failures += 1
                if failures >= settings.tries:
                    self.dead = True
                    return
                time.sleep(settings.retry_s)
            except MidstreamError:
                work.put_back(list(self._unanswered.values()))
                self.dead = True
                raise

    def _send_all(self, work: _Round) -> None:
        sock = self._connected()
        while True:
            while not self.dead and (block := work.take()) is not None:
                self._unanswered[block.id] = block
                self._send_block(sock, block)
                self._hear(sock, work, wait=False)
            if self.dead:
                raise wire.Closed("the sender was closed")
            if not self._unanswered:
                return
            self._hear(sock, work, wait=True)

    def ask(self, kind: wire.Kind, body: bytes, count: int) -> list[tuple[int, int]]:
        """One question, outside of rounds; `count` answers."""
        try:
            sock = self._connected()
            sock.sendall(wire.FRAME.pack(kind, 0, len(body), wire.NO_HASH, bytes(16)) + body)
            data = wire.recv_exactly(sock, count * wire.ANSWER.size)
        except BaseException:
            self.close()
            raise
        return list(wire.ANSWER.iter_unpack(data))

    def _connected(self) -> socket.socket:
        sock = self._sock
        if sock is None:
            sock = self._sock = self._sender._connect()
        return sock

    def _send_block(self, sock: socket.socket, block: Block) -> None:
        name = block.name or wire.NO_HASH
        head = wire.FRAME.pack(wire.Kind.BLOCK, block.id, block.length, name, block.checksum)
        offset, place = self._sender._view.place(block.slot, block.length)
        with place:
            if isinstance(sock, ssl.SSLSocket):
                sock.sendall(head)
                if not tls.kernel_encrypts(sock):
                    self._send_pieces(sock, place)
                    return
            else:
                _send_more(sock, head)
        self._send_file(sock, offset, block.length)

    def _send_pieces(self, sock: socket.socket, place: memoryview) -> None:
        step, take = self._sender._settings.piece_bytes, self._sender._bucket.take
        for at in range(0, len(place), step):
            with place[at : at + step] as piece:
                take(len(piece))
                sock.sendall(piece)

    def _send_file(self, sock: socket.socket, offset: int, count: int) -> None:
        step, take, fd = self._sender._settings.piece_bytes, self._sender._bucket.take, self._sender._view.fd
        end = offset + count
        while offset < end:
            piece_end = min(end, offset + step)
            take(piece_end - offset)
            while offset < piece_end:
                sent = os.sendfile(sock.fileno(), fd, offset, piece_end - offset)
                if sent == 0:
                    raise ConnectionError("the pool ended in the middle of a block")
                offset += sent

    def _hear(self, sock: socket.socket, work: _Round, *, wait: bool) -> None:
        """The target's answers so far; with `wait` at least some."""
        while wait or _readable(sock):
            data = sock.recv(ANSWERS_BYTES)
            if not data:
                raise wire.Closed("the target closed the KV stream")
            self._answers += data
            whole = len(self._answers) // wire.ANSWER.size * wire.ANSWER.size
            for number, verdict in wire.ANSWER.iter_unpack(self._answers[:whole]):
                block = self._unanswered.pop(number, None)
                if block is None:
                    raise Final("kv_protocol", f"the target answers for block {number}, which was not sent")
                work.answered(block, verdict)
            del self._answers[:whole]
            wait = False

    def shut(self) -> None:
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._answers.clear()
        self._unanswered.clear()


def _send_more(sock: socket.socket, head: bytes) -> None:
    """The header shares a segment with what follows it."""
    sent = sock.send(head, socket.MSG_MORE)
    if sent < len(head):
        sock.sendall(head[sent:])


def _readable(sock: socket.socket) -> bool:
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))
