"""Accepts clients, and answers the node's agent on the handoff socket.

A job is what the agent calls one migration of this pod. It holds the streams that are frozen here for it:

    (none) --pause--> PAUSED --release--> gone          at the source
    (none) --blank--> BLANK --stage--> STAGED --activate--> gone          at the target

An agent that dies leaves PAUSED and STAGED jobs as they are: the streams stay frozen until an agent of this node
decides (it has a journal). A job that is only BLANK has no state of anybody's and ends with the agent's connection; so
do the KV slots that it has while streams go on (`KvJob`): a stream that was staged owns its blocks by then.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from midstream_runtime.contract import handoff as wire
from midstream_runtime.contract.errors import Final, MidstreamError, Retryable
from midstream_runtime.contract.pool import HASH_BYTES
from midstream_runtime.handoff.app import App, Handler, KvEntry
from midstream_runtime.handoff.connection import Connection

log = logging.getLogger(__name__)

TUNNEL_BYTES = 100
"""Room that every segment leaves for a tunnel between nodes (VXLAN over IPv6: 70, and options). TCP's MSS is fixed
when a connection is made, so it must leave this room from the first day."""
BACKLOG = 4096
_STATE = struct.Struct("<I")


@dataclass(slots=True)
class Job:
    """Streams of one migration. `slots` are reserved KV slots that nobody has taken yet."""

    state: str
    connections: list[Connection] = field(default_factory=list)
    handlers: list[Handler] = field(default_factory=list)
    blanks: list[socket.socket] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    asked_by: int = 0
    reply: tuple[dict[str, Any], bytes] = ({}, b"")


@dataclass(slots=True)
class KvJob:
    """KV slots that one migration has here, apart from the state of its streams: copied while they go on."""

    asked_by: int
    reserved: set[int] = field(default_factory=set)
    """To be written by the agent, not landed, in no stream yet."""
    held: list[int] = field(default_factory=list)
    """One entry for each hold."""


@dataclass(slots=True)
class Reply:
    fields: dict[str, Any] = field(default_factory=dict)
    payload: bytes = b""
    fds: list[int] = field(default_factory=list)  # borrowed


class Handoff:
    """One server's connections, listeners and handoff socket."""

    def __init__(self, app: App, path: str | None = None) -> None:
        self.app = app
        self.path = path or os.environ.get("MIDSTREAM_HANDOFF") or wire.DEFAULT_PATH
        self.connections: dict[int, Connection] = {}
        self._listeners: list[socket.socket] = []
        self._numbers = count(1)
        self._jobs: dict[str, Job] = {}
        self._kv_jobs: dict[str, KvJob] = {}
        self._sessions: set[asyncio.Task[None]] = set()
        self._left: set[str] = set()
        self._verbs: dict[str, Callable[[dict[str, Any], bytes], Awaitable[Reply]]] = {
            kind: getattr(self, f"_on_{kind}")
            for kind in (
                "hello", "prepare", "settle", "streams", "pause", "resume", "release", "blank", "reserve", "stage",
                "activate", "discard", "fds", "status", "kv", "kv_reserve", "kv_have", "kv_land", "kv_end",
            )
        }  # fmt: skip

    # -- clients -------------------------------------------------------------------------------------------

    def listen(self, host: str, port: int, path_mtu_bytes: int) -> None:
        """Listen for clients; an IPv6 wildcard takes IPv4 too. Plain TCP: MPTCP sockets cannot be repaired."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        headers = 60 if family == socket.AF_INET6 and host != "::" else 40
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, path_mtu_bytes - headers - TUNNEL_BYTES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
        sock.bind((host, port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
        self._listeners.append(sock)

    def stop_listening(self) -> None:
        """No new clients; those that are connected stay."""
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener.fileno())
            listener.close()
        self._listeners.clear()

    def accept_all(self) -> int:
        """Accept until the kernel has no more; how many came."""
        accepted = 0
        for listener in self._listeners:
            while (sock := _accept(listener)) is not None:
                self._adopt(sock, None).thaw()
                accepted += 1
        return accepted

    def _adopt(self, sock: socket.socket, state: bytes | None) -> Connection:
        connection = Connection(sock, next(self._numbers), self._forget)
        self.connections[connection.id] = connection
        if state is None:
            connection.handler = self.app.connected(connection)
        return connection

    def _forget(self, connection: Connection) -> None:
        self.connections.pop(connection.id, None)

    # -- the handoff socket --------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Accept clients and agents until cancelled; then close everything."""
        loop = asyncio.get_running_loop()
        control = _control_socket(self.path)
        for listener in self._listeners:
            loop.add_reader(listener.fileno(), self.accept_all)
        self.accept_all()
        try:
            while True:
                sock, _ = await loop.sock_accept(control)
                sock.setblocking(False)
                task = loop.create_task(self._session(sock), name=f"handoff-{sock.fileno()}")
                self._sessions.add(task)
                task.add_done_callback(self._sessions.discard)
        finally:
            for task in list(self._sessions):
                task.cancel()
            self.stop_listening()
            control.close()
            for connection in list(self.connections.values()):
                connection.drop()

    async def _session(self, sock: socket.socket) -> None:
        """One agent's connection: requests in order, a reply each."""
        number = id(sock)
        try:
            await self._answer_all(sock, number)
        except (MidstreamError, OSError) as e:
            log.warning("handoff: closing the agent's connection: %s", e)
        finally:
            sock.close()
            await self._end_session(number)

    async def _answer_all(self, sock: socket.socket, number: int) -> None:
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
            await self._answer(sock, {**header, "_session": number}, payload)

    async def _answer(self, sock: socket.socket, header: dict[str, Any], payload: bytes) -> None:
        kind, number = str(header.get("kind")), header.get("id")
        try:
            verb = self._verbs.get(kind)
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
        await _send(sock, {"kind": kind, "id": number, **reply.fields}, reply)

    async def _end_session(self, number: int) -> None:
        for name, job in list(self._jobs.items()):
            if job.state == "BLANK" and job.asked_by == number:
                await self._drop_staged(name)
        for name, kv in list(self._kv_jobs.items()):
            if kv.asked_by == number:
                await self._end_kv(name)

    # -- requests: both sides ------------------------------------------------------------------------------

    async def _on_hello(self, header: dict[str, Any], _: bytes) -> Reply:
        described = self.app.pool()
        listeners = [_listener(x) for x in self._listeners]
        fields = {
            "version": wire.VERSION,
            "min_version": wire.MIN_VERSION,
            "pod_kind": self.app.kind,
            "model": self.app.model(),
            "pool": described[0] if described else None,
            "listeners": listeners,
            "load": self.app.load(),
        }
        return Reply(fields, fds=[described[1]] if described else [])

    async def _on_status(self, header: dict[str, Any], _: bytes) -> Reply:
        jobs = {name: {"state": j.state, "streams": len(j.connections)} for name, j in self._jobs.items()}
        return Reply({"connections": len(self.connections), "jobs": jobs})

    async def _on_fds(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._jobs.get(header["job"])
        if job is None:
            raise Final("unknown_job", f"this pod knows no job {header['job']}")
        return Reply({**job.reply[0], "state": job.state}, job.reply[1], _fds(job))

    # -- requests: source ----------------------------------------------------------------------------------

    async def _on_prepare(self, header: dict[str, Any], _: bytes) -> Reply:
        # Nothing to do: every close lingers until the client has all bytes, whether a job is under way or not.
        return Reply()

    async def _on_settle(self, header: dict[str, Any], _: bytes) -> Reply:
        return Reply({"accepted": self.accept_all()})

    async def _on_streams(self, header: dict[str, Any], _: bytes) -> Reply:
        described = (_describe(c) for c in self._on_addresses(header))
        return Reply({"streams": [d for d in described if d is not None]})

    def _on_addresses(self, header: dict[str, Any]) -> list[Connection]:
        wanted, excluded = set(header["addresses"]), set(header.get("exclude", ()))
        only = set(header["streams"]) if "streams" in header else None
        frozen = {c.id for job in self._jobs.values() for c in job.connections}
        found = []
        for connection in self.connections.values():
            if connection.id in excluded or connection.id in frozen or (only is not None and connection.id not in only):
                continue
            if connection.local()[0] in wanted:
                found.append(connection)
        return found

    async def _on_pause(self, header: dict[str, Any], _: bytes) -> Reply:
        name = str(header["job"])
        if name not in self._jobs:
            await self._pause(name, self._on_addresses(header))
        job = self._jobs[name]
        if job.state != "PAUSED":
            raise Final("job_state", f"job {name} is {job.state} in this pod: it cannot be paused")
        return Reply(job.reply[0], job.reply[1], _fds(job))

    async def _pause(self, name: str, connections: list[Connection]) -> None:
        for connection in connections:
            connection.freeze()
        served = [c for c in connections if c.handler is not None]
        handlers = [c.handler for c in served if c.handler is not None]
        job = self._jobs[name] = Job("PAUSED", connections, handlers)
        try:
            paused = await self.app.pause(handlers)
        except BaseException:
            del self._jobs[name]
            for connection in connections:
                connection.thaw()
            raise
        if len(paused.states) != len(handlers):
            raise Final("pod_internal", f"{len(paused.states)} states for {len(handlers)} streams")
        states = dict(zip((c.id for c in served), paused.states, strict=True))
        kv = [
            {"slot": k.slot, "bytes": k.length_bytes, "checksum": k.digest.hex(), "hash": k.block_hash.hex()}
            for k in paused.kv
        ]
        listed = [{"id": c.id} for c in connections]
        job.reply = ({"streams": listed, "kv": kv}, _pack([(c, states.get(c.id)) for c in connections]))

    async def _on_resume(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._jobs.pop(str(header["job"]), None)
        if job is not None:
            for connection in job.connections:
                connection.thaw()
            await self.app.resume(job.handlers)
        return Reply()

    async def _on_release(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._jobs.pop(str(header["job"]), None)
        if job is not None:
            self._left |= _addresses(job.connections)
            for connection in job.connections:
                connection.drop()
            await self.app.release(job.handlers)
        return Reply()

    def leaving(self) -> set[str]:
        """Addresses that this pod still has though streams of theirs have left: their migration is not over."""
        self._left = {address for address in self._left if _is_here(address)}
        return set(self._left)

    # -- requests: target ----------------------------------------------------------------------------------

    async def _on_blank(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._target_job(header)
        for sock in job.blanks:
            sock.close()
        job.blanks = [_blank(family) for family in header["families"]]
        return Reply(fds=_fds(job))

    async def _on_reserve(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._target_job(header)
        await self.app.free(job.slots)
        job.slots = []
        job.slots = await self.app.reserve(int(header["slots"]))
        return Reply({"slots": job.slots})

    def _target_job(self, header: dict[str, Any]) -> Job:
        job = self._jobs.setdefault(str(header["job"]), Job("BLANK"))
        if job.state != "BLANK":
            raise Final("job_state", f"job {header['job']} is {job.state} in this pod: it cannot be prepared")
        job.asked_by = header["_session"]
        return job

    async def _on_stage(self, header: dict[str, Any], payload: bytes) -> Reply:
        job = self._target_job(header)
        if len(job.blanks) != header["count"]:
            raise Final("stage_count", f"{header['count']} streams for {len(job.blanks)} blank sockets")
        states = _unpack(payload, len(job.blanks))
        slots = [None if s < 0 else int(s) for s in header["slots"]]
        connections = [self._adopt(sock, b"") for sock in job.blanks]
        job.blanks, job.connections = [], connections
        for connection, (own, unsent, _) in zip(connections, states, strict=True):
            connection.load(own, unsent)
        served = [(c, state) for c, (_, _, state) in zip(connections, states, strict=True) if state is not None]
        job.handlers = list(await self.app.stage([c for c, _ in served], [s for _, s in served], slots))
        for (connection, _state), handler in zip(served, job.handlers, strict=True):
            connection.handler = handler
        taken = {s for s in slots if s is not None}
        await self.app.free([s for s in job.slots if s not in taken])
        for kv in self._kv_jobs.values():
            kv.reserved -= taken
        job.slots = []
        job.state = "STAGED"
        return Reply()

    async def _on_activate(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._jobs.pop(str(header["job"]), None)
        if job is not None:
            for connection in job.connections:
                connection.thaw()
            await self.app.activate(job.handlers)
            self._left -= _addresses(job.connections)
        return Reply()

    async def _on_discard(self, header: dict[str, Any], _: bytes) -> Reply:
        await self._drop_staged(str(header["job"]))
        return Reply()

    async def _drop_staged(self, name: str) -> None:
        job = self._jobs.pop(name, None)
        if job is None:
            return
        for sock in job.blanks:
            sock.close()
        for connection in job.connections:
            connection.drop()
        await self.app.release(job.handlers)
        await self.app.free(job.slots)

    # -- requests: KV while streams go on --------------------------------------------------------------------

    def _kv_job(self, header: dict[str, Any]) -> KvJob:
        job = self._kv_jobs.setdefault(str(header["job"]), KvJob(header["_session"]))
        job.asked_by = header["_session"]
        return job

    async def _on_kv(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._kv_job(header)
        done, job.held = job.held, []
        await self.app.unhold(done)
        known = {int(number): int(blocks) for number, blocks in header["known"]}
        served = [c for c in self._on_addresses(header) if c.handler is not None]
        handlers = [c.handler for c in served if c.handler is not None]
        lists = await self.app.kv(handlers, [known.get(c.id, 0) for c in served], wire.MAX_KV_BLOCKS)
        blocks = [block for blocks in lists for block in blocks]
        job.held = [block.slot for block in blocks]
        streams = [[c.id, len(blocks)] for c, blocks in zip(served, lists, strict=True)]
        body = b"".join(wire.BLOCK.pack(b.slot, b.block_hash, b.digest) for b in blocks)
        return Reply({"streams": streams}, body)

    async def _on_kv_reserve(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._kv_job(header)
        slots = await self.app.reserve(int(header["slots"]))
        job.reserved.update(slots)
        return Reply({"slots": slots})

    async def _on_kv_have(self, header: dict[str, Any], payload: bytes) -> Reply:
        job = self._kv_job(header)
        if len(payload) % HASH_BYTES:
            raise Final("handoff_protocol", "kv_have: the payload is no list of hashes")
        names = [payload[at : at + HASH_BYTES] for at in range(0, len(payload), HASH_BYTES)]
        slots = await self.app.have(names)
        job.held += [slot for slot in slots if slot is not None]
        return Reply({"slots": [-1 if slot is None else slot for slot in slots]})

    async def _on_kv_land(self, header: dict[str, Any], payload: bytes) -> Reply:
        job = self._kv_job(header)
        slots = [int(slot) for slot in header["slots"]]
        if len(payload) != wire.BLOCK.size * len(slots):
            raise Final("handoff_protocol", "kv_land: one block a slot is needed")
        if len(set(slots)) != len(slots) or not job.reserved.issuperset(slots):
            raise Final("kv_not_reserved", f"KV slots {slots[:8]} are not this job's: reserve, fill, then land them")
        named = zip(slots, wire.BLOCK.iter_unpack(payload), strict=True)
        await self.app.land([KvEntry(slot, 0, digest, name) for slot, (_, name, digest) in named])
        job.reserved.difference_update(slots)
        job.held += slots
        return Reply()

    async def _on_kv_end(self, header: dict[str, Any], _: bytes) -> Reply:
        await self._end_kv(str(header["job"]))
        return Reply()

    async def _end_kv(self, name: str) -> None:
        job = self._kv_jobs.pop(name, None)
        if job is not None:
            await self.app.free(sorted(job.reserved))
            await self.app.unhold(job.held)


# -- sockets -----------------------------------------------------------------------------------------------


def _accept(listener: socket.socket) -> socket.socket | None:
    while True:
        try:
            return listener.accept()[0]
        except BlockingIOError:
            return None
        except ConnectionAbortedError:
            continue  # reset while it waited
        except OSError as e:
            log.warning("handoff: accept: %s", e)
            return None


def _control_socket(path: str) -> socket.socket:
    """Listen on `path`, taking the place of a socket that a dead process left."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # connecting needs write permission: this user's, and root's
    try:
        sock.bind(path)
    finally:
        os.umask(mask)
    sock.listen()
    sock.setblocking(False)
    return sock


def _addresses(connections: Sequence[Connection]) -> set[str]:
    """This end's, of connections that are open."""
    return {str(c.local()[0]) for c in connections if not c.closed}


def _is_here(address: str) -> bool:
    """Whether an interface of this network namespace has the address."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as e:
            if e.errno != errno.EADDRNOTAVAIL:
                raise
            return False
    return True


def _blank(family: int) -> socket.socket:
    if family not in (4, 6):
        raise Final("handoff_protocol", f"family {family!r} is neither 4 nor 6")
    sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setblocking(False)
    return sock


def _listener(sock: socket.socket) -> dict[str, Any]:
    name = sock.getsockname()
    return {"address": name[0], "port": name[1], "family": 6 if sock.family == socket.AF_INET6 else 4}


def _describe(connection: Connection) -> dict[str, Any] | None:
    try:
        fields: dict[str, Any] = {"id": connection.id, "local": connection.local(), "remote": connection.remote()}
    except OSError:  # reset by the client: its reader is about to notice
        return None
    if connection.handler is None:
        return {**fields, "movable": True, "reason": "", "tokens": 0, "kv_bytes": 0}
    return {**fields, **connection.handler.movable()._asdict()}


def _fds(job: Job) -> list[int]:
    return [s.fileno() for s in job.blanks] or [c.sock.fileno() for c in job.connections]


async def _send(sock: socket.socket, header: dict[str, Any], reply: Reply) -> None:
    """A reply in as many frames as its fds need."""
    loop = asyncio.get_running_loop()
    fds = reply.fds
    while True:
        part, fds = fds[: wire.MAX_FDS_PER_FRAME], fds[wire.MAX_FDS_PER_FRAME :]
        last = not fds
        body = header if last else {"kind": header["kind"], "id": header["id"]}
        data = wire.encode({**body, "fds": len(part), "more": not last}, reply.payload if last else b"")
        sent = await _send_first(sock, data, part)
        await loop.sock_sendall(sock, memoryview(data)[sent:])
        if last:
            return


async def _send_first(sock: socket.socket, data: bytes, fds: Sequence[int]) -> int:
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


def _error(e: MidstreamError) -> Reply:
    return Reply({"code": e.code, "message": e.message, "retryable": isinstance(e, Retryable)})


# -- state of the streams: u32 bytes of a JSON list, the list (one object a stream), then unsent bytes and handler
#    state of each, end to end -------------------------------------------------------------------------------


def _pack(streams: list[tuple[Connection, bytes | None]]) -> bytes:
    heads, bodies = [], []
    for connection, state in streams:
        heads.append({**connection.save(), "state": -1 if state is None else len(state)})
        bodies += [connection.unsent(), state or b""]
    text = json.dumps(heads, separators=(",", ":")).encode()
    return b"".join([_STATE.pack(len(text)), text, *bodies])


def _unpack(payload: bytes, wanted: int) -> list[tuple[dict[str, Any], bytes, bytes | None]]:
    (length,) = _STATE.unpack_from(payload)
    heads = json.loads(payload[_STATE.size : _STATE.size + length])
    if len(heads) != wanted:
        raise Final("stage_count", f"state of {len(heads)} streams for {wanted} sockets")
    at = _STATE.size + length
    found: list[tuple[dict[str, Any], bytes, bytes | None]] = []
    for head in heads:
        unsent, size = int(head["unsent"]), int(head["state"])
        if unsent < 0 or at + unsent + max(size, 0) > len(payload):
            raise Final("handoff_protocol", "the streams' state is shorter than it says")
        body = payload[at + unsent : at + unsent + size] if size >= 0 else None
        found.append((head, payload[at : at + unsent], body))
        at += unsent + max(size, 0)
    return found
