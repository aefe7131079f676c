"""A job's KV at the target: slots of the pod's pool for the blocks that come, and the pod's word on those it has.

What the source offers is looked up in the pod (`kv_have`); for the rest slots are reserved, as many as it takes and the
pool gives. After each round of the pre-copy the blocks that have landed are sealed in the pod (`kv_land`), where other
streams and other jobs find them: 32 streams with one system prompt need its blocks once. A block that did not come is
computed again by the engine, and nothing is lost but time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from midstream_runtime.contract import handoff as pod
from midstream_runtime.contract.errors import MidstreamError

from midstream_agent.handoff import HandoffClient
from midstream_agent.kv import PoolView
from midstream_agent.kv_receive import KvReceiver, KvServer, Landed
from midstream_agent.settings import Kv

log = logging.getLogger(__name__)
NOT_HERE = -1


class KvTarget:
    """Make it in PREPARE, close it when the streams are staged or thrown away. It borrows handoff and view, and
    everything that it has in the pod belongs to that connection."""

    def __init__(
        self,
        server: KvServer,
        settings: Kv,
        handoff: HandoffClient,
        job_id: str,
        source_node: str,
        view: PoolView,
        pod_version: int = pod.VERSION,
    ) -> None:
        self._server, self._handoff, self._job_id = server, handoff, job_id
        self._shares = self._lands = pod_version >= pod.KV_VERSION
        self._spare = 0
        self._spare_given = False
        self._sealed: set[int] = set()
        self.full = False
        """The pool had no room for all that was offered."""
        self.shared_blocks = 0
        """Had been here already."""
        self.receiver = KvReceiver(job_id, source_node, view, self._have, self._settle, settings.answer_s)
        server.expect(self.receiver)

    @property
    def ticket(self) -> bytes:
        """For the source, over the peer session: with it its streams are let in."""
        return self.receiver.ticket

    async def reserve(self, spare: int) -> int:
        """Keep so many slots ready beyond what is offered: for blocks that become full, or are not, at the pause.
        Returns how many there are now: fewer when the pool is full."""
        self._spare = spare
        await self._provide(spare)
        return self.receiver.free_slots

    async def slots_for(self, ids: Sequence[int]) -> list[int]:
        """For `stage`: where the blocks are, NOT_HERE for those that are not. `ids` as the source names them; 0 for
        one that it did not send."""
        landed = [self.receiver.landed(number) for number in ids]
        twice = len({block.slot for block in landed if block}) < sum(1 for block in landed if block)
        if twice:
            await self._settle()  # only a sealed slot may be in two streams
        slots, used = [], set[int]()
        for block in landed:
            usable = block is not None and (self._lands or block.slot not in used)
            slots.append(block.slot if block is not None and usable else NOT_HERE)
            used.add(slots[-1])
        return slots

    async def close(self) -> None:
        """No block is written any more; what no stream took is free again."""
        self._server.forget(self.receiver)
        await self.receiver.close()
        if not self._shares:
            return
        try:
            await self._handoff.ask("kv_end", {"job": self._job_id})
        except MidstreamError as e:
            # a pod that has gone took its slots along; of one that does not answer they end with the connection
            log.warning("job %s: the target pod did not hear the end of its KV: %s", self._job_id, e)

    # -- asked by the source, through the receiver --------------------------------------------------------------

    async def _have(self, hashes: Sequence[bytes]) -> list[int | None]:
        if not self._shares:
            return [None] * len(hashes)
        answer = await self._handoff.ask("kv_have", {"job": self._job_id}, b"".join(hashes))
        slots = [None if slot < 0 else int(slot) for slot in answer.header["slots"]]
        slots += [None] * (len(hashes) - len(slots))
        here = sum(1 for slot in slots if slot is not None)
        self.shared_blocks += here
        await self._provide(len(hashes) - here + self._spare)
        return slots[: len(hashes)]

    async def _provide(self, wanted: int) -> None:
        """Reserve until so many slots are free here; less and less when the pool is full. An older pod is asked
        once: a second `reserve` would take the first back."""
        if not self._shares and self._spare_given:
            return
        kind = "kv_reserve" if self._shares else "reserve"
        while (missing := wanted - self.receiver.free_slots) > 0:
            try:
                answer = await self._handoff.ask(kind, {"job": self._job_id, "slots": missing})
            except MidstreamError as e:
                if e.code not in ("pool_full", "no_pool"):
                    raise
                self.full = True
                wanted = self.receiver.free_slots + missing // 2
                continue
            self.receiver.add_slots([int(slot) for slot in answer.header["slots"]])
            self._spare_given = True
            return

    async def _settle(self) -> None:
        """Seal what has landed since; then have the spare slots ready again."""
        if not self._shares:
            return
        new: list[Landed] = []
        for number in self.receiver.landed_ids():
            block = self.receiver.landed(number)
            if block is not None and block.name and number not in self._sealed:
                new.append(block)
                self._sealed.add(number)
        if new:
            body = b"".join(pod.BLOCK.pack(0, block.name, block.checksum) for block in new)
            try:
                await self._handoff.ask("kv_land", {"job": self._job_id, "slots": [b.slot for b in new]}, body)
            except MidstreamError as e:
                if e.code != "no_pool":
                    raise
                self._lands = False  # an engine that shares no blocks: each goes to one stream
        await self._provide(self._spare)
