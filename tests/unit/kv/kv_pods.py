"""Two serving pods and their agents' KV, in one process: real engines, gateways, handoff sockets, KV streams. Only
TCP's own move is left out: the target's blank socket becomes a duplicate of the client's, by dup2 where TCP_REPAIR
would be."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gateway_pair import MODEL, Client, completion, connect_engine, request
from kv_ends import certificates
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.handoff import HandoffClient
from midstream_agent.kv import Geometry, PoolView
from midstream_agent.kv_receive import KvServer
from midstream_agent.kv_send import Target
from midstream_agent.kv_source import KvSource
from midstream_agent.kv_target import KvTarget
from midstream_agent.precopy import PreCopy
from midstream_agent.settings import Kv
from midstream_runtime.contract import handoff as wire
from midstream_runtime.engine.client import EngineClient
from midstream_runtime.gateway.app import Gateway, Settings
from midstream_runtime.gateway.metrics import Metrics
from midstream_runtime.handoff import Handoff

LOOPBACK = "127.0.0.1"
LIMIT_S = 60
KV = Kv(port=0, streams=2, connect_s=5, stall_s=5, retry_s=0.01)


@dataclass
class Pod:
    engine: EngineClient
    gateway: Gateway
    handoff: Handoff
    agent: HandoffClient
    view: PoolView
    port: int
    clients: list[Client] = field(default_factory=list)

    def kv_connection(self) -> HandoffClient:
        """One more of the agent's, as each job has one for KV."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.handoff.path)
        return HandoffClient(sock, timeout_s=30)

    async def ask(self, prompt: str, tokens: int, **more: Any) -> Client:
        reader, writer = await asyncio.open_connection(LOOPBACK, self.port, limit=1 << 24)
        client = Client(reader, writer)
        self.clients.append(client)
        client.send(request(completion(tokens, prompt=prompt, **more)))
        return client

    async def totals(self) -> dict[str, int]:
        totals: dict[str, int] = (await self.engine.stats())["totals"]
        return totals

    async def wait_for(self, streams: int, tokens: int) -> None:
        """Until so many answers have so many tokens, prompt included."""
        async with asyncio.timeout(LIMIT_S):
            while (
                sum(1 for s in self.gateway.answers.values() if s.answer is not None and s.answer.tokens >= tokens)
                < streams
            ):
                await asyncio.sleep(0.002)


@asynccontextmanager
async def pod(engine_path: str, folder: Path, name: str) -> AsyncIterator[Pod]:
    engine = await connect_engine(engine_path)
    gateway = Gateway(await engine.info(), Settings(max_body_bytes=1 << 20, idle_s=600.0), Metrics())
    gateway.attach(engine)
    handoff = Handoff(gateway, str(folder / f"{name}.sock"))
    handoff.listen(LOOPBACK, 0, 1500)
    serving = asyncio.create_task(handoff.serve(), name=name)
    await asyncio.sleep(0)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(handoff.path)
    agent = HandoffClient(sock, timeout_s=30)
    hello = await agent.ask("hello", {"version": wire.VERSION, "min_version": wire.MIN_VERSION, "node": name})
    port = hello.header["listeners"][0]["port"]
    view = PoolView(hello.fds.pop(0), Geometry.parse(hello.header["pool"]), writable=True)
    made = Pod(engine, gateway, handoff, agent, view, port)
    try:
        yield made
    finally:
        for client in made.clients:
            client.writer.transport.abort()
        agent.close()
        view.close()
        serving.cancel()
        await asyncio.wait([serving])
        await engine.close()


@dataclass
class Move:
    """One migration's KV, from the first round to the end. Use `rounds`, `switch`, and look at what it says."""

    a: Pod
    b: Pod
    server: KvServer
    target: KvTarget
    source: KvSource
    report: pb.KvCounts
    ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    @property
    def copy(self) -> PreCopy:
        return self.source.copy

    async def rounds(self, deadline_unix_ms: int = 0) -> None:
        await self.source.copy_ahead([LOOPBACK], lambda: False, deadline_unix_ms)

    async def switch(
        self, *, slots: list[int] | None = None, flip: Literal["", "before it is sent", "after it came"] = ""
    ) -> None:
        """PAUSE to ACTIVATE. `slots` instead of those where the blocks came; `flip`: damage the second block."""
        paused = await self.a.agent.ask("pause", {"job": "j", "addresses": [LOOPBACK]})
        fds = paused.take_fds()
        second = int(paused.header["kv"][1]["slot"])
        if flip == "before it is sent":
            _flip(self.a.view, second)
        self.ids = await self.source.tail(paused.header["kv"])
        if flip == "before it is sent":
            _flip(self.a.view, second)  # as it was: the source keeps it as cache
        self.slots = await self.target.slots_for(self.ids) if slots is None else slots
        if flip == "after it came":
            _flip(self.b.view, self.slots[1])
        blanks = await self.b.agent.ask("blank", {"job": "j", "families": [4] * len(fds)})
        blanks.close()
        for fd, blank in zip(fds, self.b.handoff._jobs["j"].blanks, strict=True):
            os.dup2(fd, blank.fileno())
            os.close(fd)
        fields = {"job": "j", "slots": self.slots, "count": len(fds)}
        await self.b.agent.ask("stage", fields, paused.payload)
        await self.a.agent.ask("release", {"job": "j"})
        await self.b.agent.ask("activate", {"job": "j"})

    async def close(self) -> None:
        await self.source.close()
        await self.target.close()
        await self.server.close()


def _flip(view: PoolView, slot: int) -> None:
    with view.place(slot, view.geometry.slot_bytes)[1] as place:
        for at in range(1, len(place), 2):  # the high bytes of float16: small changes would be lost in rounding
            place[at] ^= 0x40


@asynccontextmanager
async def moving(folder: Path, a: Pod, b: Pod, settings: Kv = KV, *, spare: int = 8) -> AsyncIterator[Move]:
    files = certificates(folder / "pki", "node-a", "node-b")
    server = KvServer(LOOPBACK, settings, files["node-b"] if settings.tls else None)
    target = KvTarget(server, settings, b.kv_connection(), "j", "node-a", b.view)
    where = Target("node-b", LOOPBACK, server.port, target.ticket)
    report = pb.KvCounts()
    source = KvSource(settings, files["node-a"], a.kv_connection(), "j", a.view, where, report)
    move = Move(a, b, server, target, source, report)
    try:
        await target.reserve(spare)
        yield move
    finally:
        await move.close()


@asynccontextmanager
async def two_pods(engines: tuple[str, str], folder: Path) -> AsyncIterator[tuple[Pod, Pod]]:
    """Every slot must be free again in the end, but for those that are cache."""
    async with pod(engines[0], folder, "a") as a, pod(engines[1], folder, "b") as b:
        yield a, b
        async with asyncio.timeout(LIMIT_S):
            for one in (a, b):
                while True:
                    stats = await one.engine.stats()
                    if stats["free_slots"] == stats["slots"] and not stats["requests"]:
                        break
                    await asyncio.sleep(0.01)


async def text_of(client: Client) -> str:
    """The whole answer; its connection is closed."""
    answer = await client.answer()
    client.writer.close()
    assert answer.status == 200, json.dumps(answer.body.decode())
    return answer.text()


__all__ = ["KV", "LOOPBACK", "MODEL", "Move", "Pod", "moving", "text_of", "two_pods"]
