"""The testbed's relay: what it carries, and that a half-lost connection is no garbage."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator

import pytest
from midstream_testbed import relay

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def relayed() -> AsyncIterator[tuple[Ends, Ends]]:
    """A client's two ends, and those of the server that it reaches through a relay."""
    arrived: asyncio.Queue[Ends] = asyncio.Queue()
    server = await asyncio.start_server(lambda *ends: arrived.put_nowait(ends), "127.0.0.1", 0)
    listener = socket.create_server(("127.0.0.1", 0))
    host, port = server.sockets[0].getsockname()
    serving = asyncio.get_running_loop().create_task(relay.serve(listener, host, port))
    client = await asyncio.open_connection(*listener.getsockname())
    there = await arrived.get()
    try:
        yield client, there
    finally:
        for _, writer in (client, there):
            writer.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        server.close()


def test_a_half_closed_connection_stays_half_closed() -> None:
    asyncio.run(_half_closed())


async def _half_closed() -> None:
    async with relayed() as ((reader, writer), (there_reader, there_writer)):
        writer.write(b"question")
        writer.write_eof()
        assert await there_reader.read() == b"question"
        there_writer.write(b"answer")
        there_writer.write_eof()
        assert await reader.read() == b"answer"


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_client_that_is_gone_leaves_no_garbage_while_the_server_still_talks() -> None:
    """Collected, the relay's task would end with "coroutine ignored GeneratorExit", and what comes now with it."""
    asyncio.run(_client_gone())


async def _client_gone() -> None:
    async with relayed() as ((_, writer), (there_reader, there_writer)):
        writer.transport.abort()
        assert await there_reader.read() == b""
        gc.collect()
        there_writer.write(b"late")
        await there_writer.drain()
        there_writer.write_eof()
        gc.collect()
