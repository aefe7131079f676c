"""A `websockets` client that checks each echo; run in a namespace: `ws_client.py URL SEED SECONDS`.

Messages of 1 byte to 60 kB, text and binary, some in fragments with pauses, one outstanding or several. Prints a JSON
object with what it did; any difference, or a closed connection, is an exception.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator

import websockets


async def main(url: str, seed: int, seconds: float) -> None:
    r = random.Random(seed)
    echoed = total = 0
    async with websockets.connect(url, compression=None, max_size=None, ping_interval=0.2) as socket:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            wanted = [r.randbytes(int(10 ** r.uniform(0, 4.8))) for _ in range(r.randint(1, 4))]
            for message in wanted:
                await socket.send(message if r.random() < 0.5 else in_fragments(message, r))
            for message in wanted:
                async with asyncio.timeout(30):
                    got = await socket.recv()
                if got != message:
                    raise AssertionError(f"echo of {len(message)} bytes differs")
                echoed += 1
                total += len(message)
            await asyncio.sleep(r.uniform(0, 0.02))
    print(json.dumps({"echoed": echoed, "bytes": total, "close_code": socket.close_code}))


async def in_fragments(message: bytes, r: random.Random) -> AsyncIterator[bytes]:
    cut = r.randint(0, len(message))
    yield message[:cut]
    await asyncio.sleep(r.uniform(0, 0.03))
    yield message[cut:]


asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
