"""What an operator would put in front instead: a user-space TCP proxy, `proxy_reference.py LISTEN PORT UPSTREAM PORT`.

Reference of bench_steer.py: what its bytes wait on the way at all times, though it can take no stream to another node.
"""

from __future__ import annotations

import asyncio
import sys

CHUNK_BYTES = 1 << 16


async def splice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction, until its sender ends it."""
    try:
        while data := await reader.read(CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    except ConnectionError:
        writer.transport.abort()


async def main(listen: str, port: int, upstream: str, upstream_port: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            behind, ahead = await asyncio.open_connection(upstream, upstream_port)
        except OSError:
            writer.transport.abort()
            return
        await asyncio.gather(splice(reader, ahead), splice(behind, writer))
        for end in (writer, ahead):
            end.close()

    server = await asyncio.start_server(serve, listen, port)
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
