"""A job's KV at the target: slots of the pod's pool for the blocks that come, and the pod's word on those it has.

What the source offers is looked up in the pod (`kv_have`); for the rest slots are reserved, as many as it takes and the
pool gives. After each round of the pre-copy the blocks that have landed are sealed in the pod (`kv_land`), where other
streams and other jobs find them: 32 streams with one system prompt need its blocks once. A block that did not come is
computed again by the engine, and nothing is lost but time.

All batches of a job share its KV. It has a connection to the pod of its own: what the pod keeps for it ends with that
connection, and no slow answer about KV breaks the one over which sockets come.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from midstream_runtime.contract import handoff as pod
from midstream_runtime.contract.errors import MidstreamError

from midstream_agent.handoff import HandoffClient
from midstream_agent.kv import PoolView
from midstream_agent.kv_receive import KvReceiver, KvServer
from midstream_agent.settings import Kv

log = logging.getLogger(__name__)
NOT_HERE = -1


class KvTarget:
    """Make it in PREPARE, close it when the last streams are staged, or all are thrown away. It owns the connection to
    the pod and borrows the view, which must outlive it."""

    def __init__(
        self, server: KvServer, settings: Kv, handoff: HandoffClient, job_id: str, source_node: str, view: PoolView
    ) -> None:
        self._server, self._handoff, self._job_id = server, handoff, job_id
        self._lock = asyncio.Lock()  # slots are asked for, and sealed, by one at a time
        self._lands = True
        self._open = True
        self._spare = 0
        self._done: set[int] = set()
        """Ids of blocks that are sealed, or in a stream: not to be landed (again)."""
        self.full = False
        """The pool had no room for all that was offered."""
        self.shared_blocks = 0
        """Had been here already."""
        self.port = server.port
        self.receiver = KvReceiver(job_id, source_node, view, self._have, self._settle, self.close, settings.answer_s)
        server.expect(self.receiver)

    @property
    def ticket(self) -> bytes:
        """For the source, over the peer session: with it its streams are let in."""
        return self.receiver.ticket

    async def reserve(self, spare: int) -> int:
        """Keep so many slots ready beyond what is offered: for blocks that become full, or are not, at the pause.
        Returns how many there are now: fewer when the pool is full."""
        async with self._lock:
            self._spare = spare
            await self._provide(spare)
        return self.receiver.free_slots

    async def slots_for(self, ids: Sequence[int]) -> list[int]:
        """For `stage`: where the blocks are, NOT_HERE for those that are not. `ids` as the source names them; 0 for
        one that it did not send."""
        if not self._open or self._handoff.broken:
            return [NOT_HERE] * len(ids)  # the pod may have taken back what is not in a stream
        landed = [self.receiver.landed(number) for number in ids]
        twice = len({block.slot for block in landed if block}) < sum(1 for block in landed if block)
        async with self._lock:
            if twice:
                await self._seal()  # only a sealed slot may be in two streams
            slots, used = [], set[int]()
            for block in landed:
                usable = block is not None and (self._lands or block.slot not in used)
                slots.append(block.slot if block is not None and usable else NOT_HERE)
                used.add(slots[-1])
            self._done.update(ids)
        return slots

    async def close(self) -> None:
        """No block is written any more; what no stream took is free again. Idempotent."""
        self._server.forget(self.receiver)
        await self.receiver.close()
        async with self._lock:
            if not self._open:
                return
            self._open = False
            try:
                await self._handoff.ask("kv_end", {"job": self._job_id})
            except MidstreamError as e:
                # a pod that has gone took its slots along; of one that does not answer they end with the connection
                log.warning("job %s: the target pod did not hear the end of its KV: %s", self._job_id, e)
            self._handoff.close()

    # -- asked by the source, through the receiver --------------------------------------------------------------

    async def _have(self, hashes: Sequence[bytes]) -> list[int | None]:
        async with self._lock:
            answer = await self._handoff.ask("kv_have", {"job": self._job_id}, b"".join(hashes))
            slots = [None if slot < 0 else int(slot) for slot in answer.header["slots"]]
            slots += [None] * (len(hashes) - len(slots))
            here = sum(1 for slot in slots if slot is not None)
            self.shared_blocks += here
            await self._provide(len(hashes) - here + self._spare)
            return slots[: len(hashes)]

    async def _settle(self) -> None:
        """Seal what has landed since; then have the spare slots ready again."""
        async with self._lock:
            await self._seal()
            await self._provide(self._spare)

    # -- with the lock ------------------------------------------------------------------------------------------

    async def _provide(self, wanted: int) -> None:
        """Reserve until so many slots are free here; less and less when the pool is full."""
        while (missing := wanted - self.receiver.free_slots) > 0:
            try:
                answer = await self._handoff.ask("kv_reserve", {"job": self._job_id, "slots": missing})
            except MidstreamError as e:
                if e.code not in ("pool_full", "no_pool"):
                    raise
                self.full = True
                wanted = self.receiver.free_slots + missing // 2
                continue
            self.receiver.add_slots([int(slot) for slot in answer.header["slots"]])
            return

    async def _seal(self) -> None:
        landed = ((number, self.receiver.landed(number)) for number in self.receiver.landed_ids())
        new = {n: block for n, block in landed if block is not None and block.name and n not in self._done}
        if not new or not self._lands:
            return
        body = b"".join(pod.BLOCK.pack(0, block.name, block.checksum) for block in new.values())
        try:
            await self._handoff.ask("kv_land", {"job": self._job_id, "slots": [b.slot for b in new.values()]}, body)
        except MidstreamError as e:
            if e.code != "no_pool":
                raise
            self._lands = False  # an engine that shares no blocks: each goes to one stream
        self._done.update(new)
