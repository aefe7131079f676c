"""Both ends of a job's KV streams in one process: real pools (memfds), real TCP on the loopback, real TLS."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from midstream_agent.kv import F_SEAL_SHRINK, Geometry, PoolView, digest
from midstream_agent.kv_receive import KvReceiver, KvServer
from midstream_agent.kv_send import Block, KvSender, Target
from midstream_agent.settings import Kv, TlsFiles
from midstream_testbed.certs import Authority

F_ADD_SEALS = 1033
SLOT_BYTES = 3 * 4096 + 512
SETTINGS = Kv(port=0, streams=3, tls=False, connect_s=2, stall_s=2, answer_s=5, retry_s=0.01)
LIMIT_S = 60


def pool(slots: int, slot_bytes: int = SLOT_BYTES) -> PoolView:
    geometry = Geometry("f", slots, slot_bytes, 4096, 16)
    fd = os.memfd_create("pool", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, geometry.bytes)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    return PoolView(fd, geometry, writable=True)


def fill(view: PoolView, count: int, first_id: int = 1) -> list[Block]:
    """`count` blocks of bytes that nobody can guess, in slots 0, 1, ..."""
    blocks = []
    for slot in range(count):
        data = os.urandom(view.geometry.slot_bytes)
        view.write(slot, data, digest(data))
        blocks.append(Block(first_id + slot, slot, len(data), digest(data), bytes([slot % 255 + 1]) * 32))
    return blocks


@dataclass
class Ends:
    """A sender, a receiver, and what the receiver's pod would have said."""

    source: PoolView
    target: PoolView
    server: KvServer
    receiver: KvReceiver
    sender: KvSender
    here: dict[bytes, int] = field(default_factory=dict)
    """What `have` answers: slots by hash."""
    settled: list[list[int]] = field(default_factory=list)
    """Ids that had landed, at each SETTLE."""

    def data_of(self, block_id: int) -> bytes:
        landed = self.receiver.landed(block_id)
        assert landed is not None
        return self.target.read(landed.slot, self.target.geometry.slot_bytes)


def certificates(folder: Path, *names: str) -> dict[str, TlsFiles]:
    authority = Authority(folder)
    return {name: TlsFiles(authority.ca, *authority.issue(name)) for name in names}


@asynccontextmanager
async def ends(
    folder: Path, settings: Kv = SETTINGS, slots: int = 64, *, verify: bool = True, slot_bytes: int = SLOT_BYTES,
    certificate: str = "node-a", target_name: str = "node-b", ticket: bytes | None = None,
) -> AsyncIterator[Ends]:  # fmt: skip
    files = certificates(folder, "node-a", "node-b", "node-c")
    source, target = pool(slots, slot_bytes), pool(slots, slot_bytes)

    async def have(names: Sequence[bytes]) -> list[int | None]:
        return [made.here.get(name) for name in names]

    async def settle() -> None:
        made.settled.append(made.receiver.landed_ids())

    server = KvServer("127.0.0.1", settings, files["node-b"] if settings.tls else None)
    async def end() -> None:
        server.forget(receiver)
        await receiver.close()

    receiver = KvReceiver("job", "node-a", target, have, settle, end, settings.answer_s, verify=verify)
    receiver.add_slots(list(range(slots - 1, -1, -1)))
    server.expect(receiver)
    where = Target(target_name, "127.0.0.1", server.port, ticket or receiver.ticket)
    sender = KvSender(replace(settings, port=server.port), files[certificate], "job", where, source)
    made = Ends(source, target, server, receiver, sender)
    try:
        yield made
    finally:
        await sender.close()
        await receiver.close()
        await server.close()
        source.close()
        target.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(LIMIT_S):
            await test()

    asyncio.run(main())
