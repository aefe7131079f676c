"""Clients of tests/net/bytes_pod.py: N connections that send and read known bytes at random speed, and check each one.

    python bytes_client.py '{"address": "10.77.0.100", "port": 8000, "count": 50, "seed": 1, ...}'

One JSON line on stdout at the end: how many connections ended well, and what went wrong with the others. Bytes are
those of `pattern(seed)`, a random string of prime length repeated for ever, so that a stream that is shifted by any
amount, or that repeats, differs at once. Speeds, pauses and sizes are drawn from the seed; nothing is timed or
asserted by the clock but an idle limit, after which a connection counts as hung.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from dataclasses import dataclass, field
from typing import Any

PERIOD = 65_521  # prime: no power-of-two shift maps the pattern onto itself
CHUNK = 16_384
PAUSE_SHARE = 0.3
LONGEST_PAUSE_S = 0.6
SLOW = ("reader", "writer", "both")  # a slow reader keeps the queues before it full
READ_BYTES = 65_536  # what the pod reads at a time


def pattern(seed: int) -> bytes:
    """Two periods and a chunk, so that any chunk of the endless stream is one slice."""
    once = random.Random(seed).randbytes(PERIOD)
    return once + once[: CHUNK + 1]


def piece(data: bytes, offset: int, length: int) -> bytes:
    """Up to `length` bytes (at most CHUNK) of the endless stream at `offset`."""
    start = offset % PERIOD
    return data[start : start + min(length, CHUNK)]


@dataclass
class Plan:
    """What one connection does. Sizes in bytes; pauses in seconds, one after some of the pieces read or written."""

    seed: int
    up: int
    down: int
    chunk: int
    client_writes_s: float
    client_reads_s: float
    server_writes_s: float
    server_reads_s: float

    @classmethod
    def draw(cls, seed: int, options: dict[str, Any]) -> Plan:
        r = random.Random(seed)
        kind = options.get("kind") or r.choice(["up", "down", "both"])
        size = options.get("size") or int(10 ** r.uniform(*options.get("size_log10", (2, 6.3))))
        chunk = r.choice([100, 1000, CHUNK]) if size < 200_000 else CHUNK
        seconds = options.get("seconds", 2.0)
        up_slow, down_slow = (options.get("slow") or r.choices(SLOW, [6, 2, 2])[0] for _ in range(2))
        up_writes, up_reads = _pauses(up_slow, seconds, size, chunk, min(size, READ_BYTES))
        down_writes, down_reads = _pauses(down_slow, seconds, size, chunk, chunk)
        return cls(
            seed,
            up=size if kind in ("up", "both") else 0,
            down=size if kind in ("down", "both") else 0,
            chunk=chunk,
            client_writes_s=up_writes,
            client_reads_s=down_reads,
            server_writes_s=down_writes,
            server_reads_s=up_reads,
        )

    def header(self) -> bytes:
        body: dict[str, float] = {"seed": self.seed, "up": self.up, "down": self.down, "chunk": self.chunk}
        body |= {"read_pause_s": self.server_reads_s, "write_pause_s": self.server_writes_s}
        return json.dumps(body).encode() + b"\n"


def _pauses(slow: str, seconds: float, size: int, written: int, read: int) -> tuple[float, float]:
    """Longest pauses of a writer and a reader who take that many bytes at a time, to last for about `seconds`."""
    # three pieces in ten are followed by a pause, drawn uniformly from nothing to twice the mean
    writer, reader = (min(2 * seconds * part / size / PAUSE_SHARE, LONGEST_PAUSE_S) for part in (written, read))
    return (writer if slow != "reader" else 0.0), (reader if slow != "writer" else 0.0)


@dataclass
class Outcome:
    ok: int = 0
    sent: int = 0
    received: int = 0
    errors: list[str] = field(default_factory=list)


async def _upload(sock: socket.socket, plan: Plan, r: random.Random, out: Outcome) -> None:
    data, loop, offset = pattern(plan.seed), asyncio.get_running_loop(), 0
    await loop.sock_sendall(sock, plan.header())
    while offset < plan.up:
        chunk = piece(data, offset, min(plan.chunk, plan.up - offset))
        await loop.sock_sendall(sock, chunk)
        offset += len(chunk)
        out.sent += len(chunk)
        if plan.client_writes_s and r.random() < PAUSE_SHARE:
            await asyncio.sleep(r.uniform(0, plan.client_writes_s))


async def _download(sock: socket.socket, plan: Plan, r: random.Random, out: Outcome, idle_s: float) -> None:
    """`down` bytes of the second pattern, then the server's verdict on the upload, then its FIN."""
    data, loop, offset = pattern(plan.seed + 1), asyncio.get_running_loop(), 0
    trailer = b""
    while True:
        got = await asyncio.wait_for(loop.sock_recv(sock, plan.chunk), idle_s)
        if not got:
            break
        body, trailer = got[: plan.down - offset], trailer + got[plan.down - offset :]
        at = 0
        while at < len(body):
            want = piece(data, offset + at, len(body) - at)
            if body[at : at + len(want)] != want:
                raise ValueError(f"byte {offset + at} of {plan.down} differs")
            at += len(want)
        offset += len(body)
        out.received += len(body)
        if plan.client_reads_s and r.random() < PAUSE_SHARE:
            await asyncio.sleep(r.uniform(0, plan.client_reads_s))
    if offset != plan.down or trailer != b"OK":
        raise ValueError(f"ended after {offset} of {plan.down} bytes with {trailer[:80]!r}")


async def _one(options: dict[str, Any], seed: int, out: Outcome) -> None:
    plan, r = Plan.draw(seed, options), random.Random(seed * 7 + 3)
    await asyncio.sleep(r.uniform(0, options.get("spread_s", 0.2)))
    family = socket.AF_INET6 if ":" in options["address"] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if options.get("congestion"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, options["congestion"].encode())
        if options.get("rcvbuf"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["rcvbuf"])
        await asyncio.get_running_loop().sock_connect(sock, (options["address"], options["port"]))
        idle_s = options.get("idle_s", 60)
        async with asyncio.TaskGroup() as group:
            group.create_task(_upload(sock, plan, r, out), name="upload")
            group.create_task(_download(sock, plan, r, out, idle_s), name="download")
        out.ok += 1
    except* (OSError, ValueError, TimeoutError) as e:
        out.errors.append(f"seed {seed} {plan}: {e.exceptions!r}")
    finally:
        sock.close()


async def main(options: dict[str, Any]) -> Outcome:
    out = Outcome()
    async with asyncio.TaskGroup() as group:
        for i in range(options["count"]):
            group.create_task(_one(options, options["seed"] + 2 * i, out), name=f"connection {i}")
    return out


if __name__ == "__main__":
    result = asyncio.run(main(json.loads(sys.argv[1])))
    print(json.dumps(result.__dict__), flush=True)
