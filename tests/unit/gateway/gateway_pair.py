"""Two gateways, each with an engine of its own, in one process; a connection is moved between them as the handoff
does it, but for TCP itself: the target gets a duplicate of the very socket."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import pytest
from midstream_runtime.contract.errors import Retryable
from midstream_runtime.contract.pool import PoolView
from midstream_runtime.engine.client import EngineClient
from midstream_runtime.gateway.app import Gateway, Settings
from midstream_runtime.gateway.metrics import Metrics
from midstream_runtime.handoff import Connection, Handler

ROOT = Path(__file__).resolve().parents[3]
PYTHON = os.environ.get("MIDSTREAM_ENGINE_PYTHON", "/usr/bin/python3")
MODEL = "midstream-tiny"
LIMIT_S = 180.0


@pytest.fixture(scope="session")
def engines() -> Iterator[tuple[str, str]]:
    """Sockets of two engine processes."""
    with tempfile.TemporaryDirectory() as folder:
        paths = (f"{folder}/a.sock", f"{folder}/b.sock")
        env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
        argv = [PYTHON, "-m", "midstream_runtime.engine.builtin", "--pool-slots", "512", "--pace-ms", "2", "--socket"]
        running = [subprocess.Popen([*argv, path], env=env) for path in paths]
        yield paths
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=20)


async def connect_engine(path: str) -> EngineClient:
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                return await EngineClient.connect(path)
            except Retryable:
                await asyncio.sleep(0.02)


@dataclass
class Node:
    """A gateway and its engine."""

    gateway: Gateway
    engine: EngineClient
    connections: list[Connection] = field(default_factory=list)

    @classmethod
    async def start(cls, path: str, **settings: Any) -> Node:
        engine = await connect_engine(path)
        gateway = Gateway(
            await engine.info(), Settings(**{"max_body_bytes": 1 << 20, "idle_s": 60.0, **settings}), Metrics()
        )
        gateway.attach(engine)
        return cls(gateway, engine)

    def adopt(self, sock: socket.socket) -> Connection:
        connection = Connection(sock, len(self.connections), self.connections.remove)
        self.connections.append(connection)
        return connection

    def pool(self) -> PoolView:
        described = self.gateway.pool()
        assert described is not None
        return PoolView(memoryview(mmap.mmap(described[1], 0)))

    def metric(self, name: str) -> float:
        value = self.gateway.metrics.registry.get_sample_value(name)
        assert value is not None, name
        return value


class Client:
    """The client's end; reads whole answers with h11, as strictly as h11 does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.raw = b""

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, method: str = "POST") -> Answer:
        """The next whole answer; AssertionError when the connection ends before it is whole."""
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("host", "test")]))
        parser.send(h11.EndOfMessage())
        if self.raw:
            parser.receive_data(self.raw)
        got = Answer()
        async with asyncio.timeout(LIMIT_S):
            while True:
                event = parser.next_event()
                match event:
                    case h11.NEED_DATA:
                        data = await self.reader.read(65536)
                        parser.receive_data(data)
                    case h11.InformationalResponse():
                        got.informational.append(event.status_code)
                    case h11.Response():
                        got.status = event.status_code
                        got.headers = {k.decode(): v.decode() for k, v in event.headers}
                    case h11.Data():
                        got.body += event.data
                    case h11.EndOfMessage():
                        self.raw = parser.trailing_data[0]
                        return got
                    case _:
                        raise AssertionError(f"{event} before the answer was whole")

    async def rest(self) -> bytes:
        """All until the server's FIN."""
        async with asyncio.timeout(LIMIT_S):
            return self.raw + await self.reader.read()


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    informational: list[int] = field(default_factory=list)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """Of a stream that ended as it should, without `[DONE]`."""
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def text(self) -> str:
        """Of all choices, in any of the four shapes."""
        whole = self.events() if self.headers["content-type"].startswith("text/event-stream") else [self.json]
        choices = [choice for event in whole for choice in event["choices"]]
        parts = (
            c.get("text") or c.get("delta", {}).get("content") or c.get("message", {}).get("content") for c in choices
        )
        return "".join(part or "" for part in parts)


@dataclass
class Pair:
    """Two nodes and what tests do with them."""

    a: Node
    b: Node
    clients: list[Client] = field(default_factory=list)

    async def client(self, node: Node | None = None) -> tuple[Client, Connection]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            reader, writer = await asyncio.open_connection(*listener.getsockname(), limit=1 << 24)
            sock, _ = listener.accept()
        connection = (node or self.a).adopt(sock)
        connection.handler = (node or self.a).gateway.connected(connection)
        connection.thaw()
        self.clients.append(Client(reader, writer))
        return self.clients[-1], connection

    async def move(self, connection: Connection, source: Node, target: Node, *, kv: bool = True) -> Connection:
        """The steps of a migration that concern the gateways. `kv` False: no block comes along."""
        handler = connection.handler
        connection.freeze()
        assert handler is not None
        paused = await source.gateway.pause([handler])
        slots: list[int | None] = [None] * len(paused.kv)
        if kv:
            reserved = await target.gateway.reserve(len(paused.kv))
            theirs, ours = source.pool(), target.pool()
            for entry, slot in zip(paused.kv, reserved, strict=True):
                assert theirs.actual_checksum(entry.slot) == entry.digest
                ours.slot(slot)[:] = theirs.slot(entry.slot)
            slots = list(reserved)
        came = target.adopt(socket.socket(fileno=os.dup(connection.sock.fileno())))
        came.load(connection.save(), connection.unsent())
        handlers: list[Handler] = list(await target.gateway.stage([came], paused.states, slots))
        came.handler = handlers[0]
        connection.drop()
        await source.gateway.release([handler])
        came.thaw()
        await target.gateway.activate(handlers)
        return came

    async def roll_back(self, connection: Connection, node: Node) -> None:
        handler = connection.handler
        assert handler is not None
        connection.freeze()
        await node.gateway.pause([handler])
        connection.thaw()
        await node.gateway.resume([handler])


@asynccontextmanager
async def two_nodes(paths: tuple[str, str], **settings: Any) -> AsyncIterator[Pair]:
    pair = Pair(await Node.start(paths[0], **settings), await Node.start(paths[1], **settings))
    free = [(await n.engine.stats())["free_slots"] for n in (pair.a, pair.b)]
    try:
        yield pair
        for node, before in zip((pair.a, pair.b), free, strict=True):
            await settled(node, before)
    finally:
        for client in pair.clients:
            client.writer.transport.abort()
        for node in (pair.a, pair.b):
            for connection in list(node.connections):
                connection.drop()
            await node.engine.close()
        await asyncio.sleep(0)  # aborted transports close their sockets in the next turn of the loop


async def settled(node: Node, free_slots: int) -> None:
    """No answer and no slot is left behind."""
    async with asyncio.timeout(LIMIT_S):
        while node.gateway.answers or (await node.engine.stats())["free_slots"] != free_slots:
            await asyncio.sleep(0.01)


def request(body: dict[str, Any] | bytes, path: str = "/v1/completions", *extra: str, method: str = "POST") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"{method} {path} HTTP/1.1",
        "host: test",
        "content-type: application/json",
        f"content-length: {len(data)}",
    ]
    return "\r\n".join([*lines, *extra, "", ""]).encode() + data


def completion(
    tokens: int = 40, *, stream: bool = True, prompt: Any = "The license grants you", **more: Any
) -> dict[str, Any]:
    base = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
        "ignore_eos": True,
    }
    return {**base, **more}


def chat(tokens: int = 40, *, stream: bool = True, **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a file?"}]
    base = {
        "model": MODEL,
        "messages": messages,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": stream,
        "ignore_eos": True,
    }
    return {**base, **more}
