"""Clients of ticker_pod: `ticker_client.py ADDRESS PORT COUNT SECONDS`. Checks that no line is lost or doubled.

Prints a JSON object: lines, and the longest time that each connection was kept waiting for a line (ms, sorted): from
when it was due at the server to when this process read it.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time

CONNECTS_AT_ONCE = 100  # more at once overflow no listener's queue


async def read(address: str, port: int, end: float, gate: asyncio.Semaphore) -> tuple[int, float]:
    async with gate:
        reader, writer = await asyncio.open_connection(address, port)
    number, worst_ns = 0, 0
    while time.monotonic() < end:
        line = await reader.readline()
        now = time.monotonic_ns()
        said, due_ns = map(int, line.split())
        if said != number:
            raise AssertionError(f"line {number} reads {line!r}")
        number, worst_ns = number + 1, max(worst_ns, now - due_ns)
    writer.transport.abort()
    return number, worst_ns / 1e6


async def main(address: str, port: int, count: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    gate = asyncio.Semaphore(CONNECTS_AT_ONCE)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(address, port, end, gate)) for _ in range(count)]
    found = [t.result() for t in tasks]
    print(json.dumps({"lines": sum(n for n, _ in found), "longest_ms": sorted(ms for _, ms in found)}))


hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
