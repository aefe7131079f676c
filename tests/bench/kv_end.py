"""One end of a KV copy in a process and a namespace of its own, for bench_kv.py: `kv_end.py JSON`. Reads a line, does a
round, answers with a line of JSON; ends with its input.

    send     sends every block of its pool once        {bytes, took_s, cpu_s}
    receive  gets ready for as many blocks again       {cpu_s}, of the round before
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for outer in ("agent", "runtime"):
    sys.path.insert(0, str(ROOT / outer))

from midstream_agent.kv import F_SEAL_SHRINK, Geometry, PoolView, digest  # noqa: E402
from midstream_agent.kv_receive import KvReceiver, KvServer  # noqa: E402
from midstream_agent.kv_send import Block, KvSender, Target  # noqa: E402
from midstream_agent.settings import Kv, TlsFiles  # noqa: E402

F_ADD_SEALS = 1033
JOB, SOURCE, TARGET = "bench", "node-a", "node-b"


def pool(slots: int, slot_bytes: int) -> PoolView:
    geometry = Geometry("bench", slots, slot_bytes, 4096, 16)
    fd = os.memfd_create("pool", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, geometry.bytes)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    return PoolView(fd, geometry, writable=True)


def files(plan: dict[str, Any], name: str) -> TlsFiles:
    folder = Path(plan["pki"])
    return TlsFiles(folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key")


def cpu_s() -> float:
    times = os.times()
    return times.user + times.system


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


async def lines() -> Any:
    while await asyncio.to_thread(sys.stdin.readline):
        yield


async def receive(plan: dict[str, Any], settings: Kv) -> None:
    async def have(names: Sequence[bytes]) -> list[int | None]:
        return [None for _ in names]

    async def nothing() -> None:
        pass

    view = pool(plan["slots"], plan["slot_bytes"])
    server = KvServer(plan["host"], settings, files(plan, TARGET) if settings.tls else None)
    receiver = KvReceiver(JOB, SOURCE, view, have, nothing, nothing, settings.answer_s)
    server.expect(receiver)
    say(port=server.port, ticket=receiver.ticket.hex())
    before = cpu_s()
    async for _ in lines():
        now = cpu_s()
        receiver.add_slots(range(plan["slots"]))
        say(cpu_s=now - before)
        before = cpu_s()
    await receiver.close()
    await server.close()


async def send(plan: dict[str, Any], settings: Kv) -> None:
    view = pool(plan["slots"], plan["slot_bytes"])
    checksums = []
    for slot in range(plan["slots"]):
        data = os.urandom(plan["slot_bytes"])
        view.write(slot, data, digest(data))
        checksums.append(digest(data))
    target = Target(TARGET, plan["host"], plan["port"], bytes.fromhex(plan["ticket"]))
    sender = KvSender(settings, files(plan, SOURCE), JOB, target, view)
    numbers = count(1)
    say(ready=True)
    async for _ in lines():
        blocks = [Block(next(numbers), slot, plan["slot_bytes"], sum_) for slot, sum_ in enumerate(checksums)]
        before = cpu_s()
        report = await sender.send(blocks)
        if report.failed or report.broken_streams:
            raise RuntimeError(f"{len(report.failed)} blocks failed, {report.broken_streams} streams broke")
        say(bytes=report.bytes, took_s=report.took_s, cpu_s=cpu_s() - before)
    await sender.close()


def main() -> None:
    plan: dict[str, Any] = json.loads(sys.argv[1])
    settings = replace(Kv(), port=0, streams=plan["streams"], tls=plan["tls"])
    asyncio.run({"send": send, "receive": receive}[plan["role"]](plan, settings))


if __name__ == "__main__":
    main()
