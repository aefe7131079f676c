"""Clients of bytes_pod.py whose streams go on until the test ends: `endless_client.py ADDRESS PORT COUNT SEED [S]`.

When a line comes on stdin, each stream must still bring MORE bytes within S seconds; then one JSON line tells how many
did, and what was wrong with the others. Every byte is checked.
"""

from __future__ import annotations

import asyncio
import json
import sys

from bytes_client import PERIOD, pattern, piece

MORE = 4_000
ENDLESS = 1 << 40
PATIENCE_S = float(sys.argv[5]) if len(sys.argv) > 5 else 20.0


class Stream:
    def __init__(self, seed: int) -> None:
        self.seed, self.received = seed, 0
        self.wrong = ""

    async def read(self, address: str, port: int) -> None:
        reader, writer = await asyncio.open_connection(address, port)
        # one byte of ours is always outstanding: the pod does not end the stream
        plan = {"seed": self.seed, "up": 1, "down": ENDLESS, "chunk": 500, "write_pause_s": 0.1}
        writer.write(json.dumps(plan).encode() + b"\n")
        theirs = pattern(self.seed + 1)
        try:
            while data := await reader.read(PERIOD):
                for at in range(0, len(data), 1000):
                    part = data[at : at + 1000]
                    if part != piece(theirs, self.received, len(part)):
                        raise ValueError(f"something after byte {self.received} is not what was sent")
                    self.received += len(part)
            self.wrong = "the stream ended"
        except (OSError, ValueError) as e:
            self.wrong = f"{type(e).__name__}: {e}"
        finally:
            writer.transport.abort()

    async def goes_on(self) -> None:
        enough = self.received + MORE
        end = asyncio.get_running_loop().time() + PATIENCE_S
        while self.received < enough and not self.wrong:
            if asyncio.get_running_loop().time() > end:
                self.wrong = f"only {self.received - enough + MORE} bytes came in {PATIENCE_S:g} s"
            await asyncio.sleep(0.02)


async def main(address: str, port: int, count: int, seed: int) -> None:
    streams = [Stream(seed + 2 * i) for i in range(count)]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(s.read(address, port)) for s in streams]
        await asyncio.to_thread(sys.stdin.readline)
        await asyncio.gather(*(s.goes_on() for s in streams))
        for task in tasks:
            task.cancel()
    wrong = [s.wrong for s in streams if s.wrong]
    print(json.dumps({"ok": count - len(wrong), "errors": wrong}))


asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
