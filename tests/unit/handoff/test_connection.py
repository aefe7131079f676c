"""Connections freeze between two bytes, and close only when the client has everything. Real sockets on loopback."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from midstream_runtime.handoff import Connection, Movable
from midstream_runtime.handoff.connection import queued_bytes


class Recorder:
    def __init__(self) -> None:
        self.data = b""
        self.events: list[str] = []

    def received(self, data: bytes) -> None:
        self.data += data

    def eof(self) -> None:
        self.events.append("eof")

    def drained(self) -> None:
        self.events.append("drained")

    def lost(self, error: OSError | None) -> None:
        self.events.append(f"lost {type(error).__name__}")

    def movable(self) -> Movable:
        return Movable()

    def save(self) -> bytes:
        return self.data


async def until(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


class Pair:
    """A client's socket and the served connection behind it."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.client = socket.create_connection(listener.getsockname())
        self.client.setblocking(False)
        self.forgotten: list[Connection] = []
        self.connection = Connection(listener.accept()[0], 1, self.forgotten.append)
        self.handler = Recorder()
        self.connection.handler = self.handler
        listener.close()

    async def read_all(self) -> bytes:
        data = b""
        while part := await asyncio.get_running_loop().sock_recv(self.client, 1 << 20):
            data += part
        return data

    def close(self) -> None:
        self.client.close()
        self.connection.drop()


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    made = Pair()
    try:
        yield made
    finally:
        made.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(main())


def test_a_frozen_connection_neither_reads_nor_writes() -> None:
    async def body() -> None:
        async with pair() as p:
            p.connection.thaw()
            p.client.send(b"one")
            await until(lambda: p.handler.data == b"one")
            p.connection.freeze()
            p.client.send(b"two")
            p.connection.write(b"answer")
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert p.handler.data == b"one"
            assert p.connection.unsent() == b"answer"
            with pytest.raises(BlockingIOError):
                p.client.recv(10)
            p.connection.thaw()
            await until(lambda: p.handler.data == b"onetwo")
            assert await asyncio.get_running_loop().sock_recv(p.client, 10) == b"answer"

    run(body)


def test_bytes_are_whole_when_a_client_reads_slowly_and_the_connection_freezes_often() -> None:
    async def body() -> None:
        async with pair() as p:
            p.connection.thaw()
            sent = bytes(range(256)) * 40_000
            p.connection.write(sent)
            assert p.connection.unsent_bytes > 0
            p.connection.close()

            async def freeze_often() -> None:
                while not p.connection.closed:
                    p.connection.freeze()
                    await asyncio.sleep(0.001)
                    p.connection.thaw()
                    await asyncio.sleep(0.003)

            freezer = asyncio.create_task(freeze_often())
            assert await p.read_all() == sent
            p.client.close()
            await freezer

    run(body)


def test_closing_keeps_the_descriptor_until_the_client_has_finished() -> None:
    async def body() -> None:
        async with pair() as p:
            p.connection.thaw()
            p.connection.write(b"last words")
            p.connection.close()
            assert await p.read_all() == b"last words"
            assert not p.connection.closed
            assert p.forgotten == []
            p.client.close()
            await until(lambda: p.connection.closed)
            assert p.forgotten == [p.connection]

    run(body)


def test_a_close_while_frozen_happens_after_the_thaw() -> None:
    async def body() -> None:
        async with pair() as p:
            p.connection.thaw()
            p.connection.freeze()
            p.connection.write(b"bye")
            p.connection.close()
            assert p.connection.save() == {"unsent": 3, "eof": False, "closing": True, "fin": False}
            p.connection.thaw()
            assert await p.read_all() == b"bye"

    run(body)


def test_a_closing_connection_goes_on_closing_elsewhere() -> None:
    async def body() -> None:
        async with pair() as p:
            p.connection.write(b"bye")
            p.connection.close()
            state, unsent = p.connection.save(), p.connection.unsent()
            moved = Connection(p.connection.sock.dup(), 2, p.forgotten.append)
            p.connection.drop()
            moved.load(state, unsent)
            moved.thaw()
            assert await p.read_all() == b"bye"
            p.client.close()
            await until(lambda: moved.closed)

    run(body)


def test_the_clients_end_of_sending_is_told_once_and_answers_still_go_out() -> None:
    async def body() -> None:
        async with pair() as p:
            p.connection.thaw()
            p.client.send(b"question")
            p.client.shutdown(socket.SHUT_WR)
            await until(lambda: "eof" in p.handler.events)
            assert p.handler.data == b"question"
            p.connection.write(b"answer")
            p.connection.close()
            assert await p.read_all() == b"answer"
            await until(lambda: p.connection.closed)
            assert p.handler.events == ["eof"]

    run(body)


def test_a_reset_is_told_to_the_handler() -> None:
    async def body() -> None:
        async with pair() as p:
            p.connection.thaw()
            p.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            p.client.close()
            await until(lambda: bool(p.handler.events))
            assert p.handler.events == ["lost ConnectionResetError"]
            assert p.forgotten == [p.connection]

    run(body)


def test_a_stream_that_has_left_is_freed_at_once() -> None:
    """Without the garbage collector, which may not come by for many migrations."""

    class Knowing(Recorder):
        def __init__(self, connection: Connection) -> None:
            super().__init__()
            self.connection = connection

    async def body() -> None:
        async with pair() as p:
            p.connection.handler = Knowing(p.connection)
            handler = weakref.ref(p.connection.handler)
            p.connection.freeze()
            p.connection.drop()
            assert handler() is None

    gc.disable()
    try:
        run(body)
    finally:
        gc.enable()


def test_queued_bytes_counts_what_the_client_has_not_taken() -> None:
    async def body() -> None:
        async with pair() as p:
            assert queued_bytes(p.connection.sock) == 0
            with pytest.raises(BlockingIOError):
                while True:
                    p.connection.sock.send(bytes(1 << 20))
            assert queued_bytes(p.connection.sock) > 0

    run(body)
