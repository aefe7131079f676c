"""Clients of ticker_pod: `ticker_client.py ADDRESS PORT COUNT SECONDS`. Checks that no line is lost or doubled.

Prints a JSON object: lines, longest gap between two lines of each connection (ms, by the arrival in this process),
median gap.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time


async def read(address: str, port: int, end: float, gaps: list[list[float]]) -> int:
    reader, writer = await asyncio.open_connection(address, port)
    number, last, own = 0, 0.0, []
    while time.monotonic() < end:
        line = await reader.readline()
        now = time.monotonic()
        if line != b"%d\n" % number:
            raise AssertionError(f"line {number} reads {line!r}")
        if last:
            own.append((now - last) * 1000)
        number, last = number + 1, now
    gaps.append(own)
    writer.transport.abort()
    return number


async def main(address: str, port: int, count: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    gaps: list[list[float]] = []
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(address, port, end, gaps)) for _ in range(count)]
    longest = sorted(max(own) for own in gaps)
    median = statistics.median(g for own in gaps for g in own)
    print(json.dumps({"lines": sum(t.result() for t in tasks), "longest_ms": longest, "median_ms": median}))


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])))
