"""Accepts clients, and answers the node's agent on the handoff socket.

A job is what the agent calls one migration of this pod. It holds the streams that are frozen here for it:

    (none) --pause--> PAUSED --release--> gone          at the source
    (none) --blank--> BLANK --stage--> STAGED --activate--> gone          at the target

An agent that dies leaves PAUSED and STAGED jobs as they are: the streams stay frozen until an agent of this node
decides (it has a journal). A job that is only BLANK has no state of anybody's and ends with the agent's connection; so
do the KV slots that it has while streams go on (kv_jobs.py): a stream that was staged owns its blocks by then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from midstream_runtime.contract import handoff as wire
from midstream_runtime.contract.errors import Final, MidstreamError
from midstream_runtime.handoff import sockets
from midstream_runtime.handoff.answering import Reply, Verbs, answer_all
from midstream_runtime.handoff.app import App, Handler
from midstream_runtime.handoff.connection import Connection
from midstream_runtime.handoff.kv_jobs import KvJobs
from midstream_runtime.handoff.states import pack, unpack

log = logging.getLogger(__name__)


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


class Handoff:
    """One server's connections, listeners and handoff socket."""

    def __init__(self, app: App, path: str | None = None) -> None:
        self.app = app
        self.path = path or os.environ.get("MIDSTREAM_HANDOFF") or wire.DEFAULT_PATH
        self.connections: dict[int, Connection] = {}
        self._listeners: list[socket.socket] = []
        self._numbers = count(1)
        self._jobs: dict[str, Job] = {}
        self._kv_jobs = KvJobs(app, self._on_addresses)
        self._sessions: set[asyncio.Task[None]] = set()
        self._left: set[str] = set()
        kinds = (
            "hello", "prepare", "settle", "streams", "pause", "resume", "release", "blank", "reserve", "stage",
            "activate", "discard", "fds", "status",
        )  # fmt: skip
        self._verbs: Verbs = {kind: getattr(self, f"_on_{kind}") for kind in kinds} | self._kv_jobs.verbs()

    # -- clients -------------------------------------------------------------------------------------------

    def listen(self, host: str, port: int, path_mtu_bytes: int) -> None:
        """Listen for clients; an IPv6 wildcard takes IPv4 too."""
        self._listeners.append(sockets.listen(host, port, path_mtu_bytes))

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
            while (sock := sockets.accept(listener)) is not None:
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
        control = sockets.control_socket(self.path)
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
        number = id(sock)
        try:
            await answer_all(sock, self._verbs, number)
        except (MidstreamError, OSError) as e:
            log.warning("handoff: closing the agent's connection: %s", e)
        finally:
            sock.close()
            await self._end_session(number)

    async def _end_session(self, number: int) -> None:
        for name, job in list(self._jobs.items()):
            if job.state == "BLANK" and job.asked_by == number:
                await self._drop_staged(name)
        await self._kv_jobs.end_session(number)

    # -- requests: both sides ------------------------------------------------------------------------------

    async def _on_hello(self, header: dict[str, Any], _: bytes) -> Reply:
        described = self.app.pool()
        listeners = [sockets.listener(x) for x in self._listeners]
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
        job.reply = ({"streams": listed, "kv": kv}, pack([(c, states.get(c.id)) for c in connections]))

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
        self._left = {address for address in self._left if sockets.is_here(address)}
        return set(self._left)

    # -- requests: target ----------------------------------------------------------------------------------

    async def _on_blank(self, header: dict[str, Any], _: bytes) -> Reply:
        job = self._target_job(header)
        for sock in job.blanks:
            sock.close()
        job.blanks = [sockets.blank(family) for family in header["families"]]
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
        states = unpack(payload, len(job.blanks))
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
        self._kv_jobs.taken(taken)
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


def _addresses(connections: Sequence[Connection]) -> set[str]:
    """This end's, of connections that are open."""
    return {str(c.local()[0]) for c in connections if not c.closed}


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
