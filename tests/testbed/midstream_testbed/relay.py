"""A TCP listener in one network namespace whose connections go on in another.

The testbed's namespaces have no route to the machine's own: a test reaches the API server, and the API server a
webhook that a test serves, through a process that has inherited a listening socket of the one side and runs in the
other: ``python relay.py FD HOST PORT``. Half-closed connections stay half closed.
"""

from __future__ import annotations

import asyncio
import socket
import sys

CHUNK_BYTES = 1 << 18


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until EOF, then pass the EOF on. A reset of either side ends both."""
    while data := await reader.read(CHUNK_BYTES):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
    try:
        onward_reader, onward_writer = await asyncio.open_connection(host, port)
    except OSError:
        writer.transport.abort()  # nobody listens there: the client sees a reset, as it would have
        return
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(pump(reader, onward_writer))
            both.create_task(pump(onward_reader, writer))
    except* OSError:
        writer.transport.abort()
        onward_writer.transport.abort()
    finally:
        writer.close()
        onward_writer.close()


async def serve(listener: socket.socket, host: str, port: int) -> None:
    """Until cancelled. The loop itself knows tasks weakly, and streams forget theirs when one side is lost: a relay
    whose other side is open still would be collected as garbage in the middle of what it does."""
    relays: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(relay(reader, writer, host, port), name="relay")
        relays.add(task)
        task.add_done_callback(relays.discard)

    server = await asyncio.start_server(accept, sock=listener, backlog=512)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], int(sys.argv[3])))
