"""A job's KV at the source: a connection to the pod of its own, the streams to the target, the pre-copy over both.

All batches of a job share it, one at a time. KV is a cache: whatever goes wrong here costs the target's engine time and
never the job, and `KvCounts.reason` says what it was. The connection is KV's own, so that a pod that is slow to name
blocks does not break the one over which its sockets come.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from midstream_runtime.contract.errors import MidstreamError

from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.handoff import HandoffClient
from midstream_agent.kv import PoolView
from midstream_agent.kv_send import KvSender, Target
from midstream_agent.precopy import PreCopy, fits
from midstream_agent.settings import Kv, TlsFiles

log = logging.getLogger(__name__)


class KvSource:
    """Owns handoff connection and streams; borrows the view, which must outlive it. `report` is the job's."""

    def __init__(
        self, settings: Kv, files: TlsFiles, handoff: HandoffClient, job_id: str, view: PoolView, target: Target,
        report: pb.KvCounts,
    ) -> None:  # fmt: skip
        self._settings, self._handoff, self._job_id, self._report = settings, handoff, job_id, report
        self._lock = asyncio.Lock()
        self._paused_bytes = 0
        self._sender = KvSender(settings, files, job_id, target, view)
        self.copy = PreCopy(settings, handoff, job_id, view, self._sender)

    async def copy_ahead(self, addresses: Sequence[str], stop: Callable[[], bool], deadline_unix_ms: int) -> None:
        """Round after round while the streams go on, until little is left, or the deadline is too near."""

        def why_stop() -> str:
            if stop():
                return "aborted"
            return "" if self._in_time(deadline_unix_ms) else "kv_deadline"

        began = time.monotonic()
        async with self._lock:
            await self.copy.run(addresses, why_stop)
        self._report.copy_ms = (time.monotonic() - began) * 1000
        self._count()

    def _in_time(self, deadline_unix_ms: int) -> bool:
        """KV is dropped before a connection is."""
        rate = self._sender.bytes_per_s
        left_s = deadline_unix_ms / 1000 - time.time() - self._settings.switch_s
        if not deadline_unix_ms or (not rate and left_s > 0):
            return True
        left_bytes = self._report.bytes_total - self.copy.sent_bytes - self.copy.shared_bytes
        return fits(left_bytes, rate, self.copy.progress.new_bytes_per_s, left_s)

    async def catch_up(self, addresses: Sequence[str]) -> None:
        """What has become full since; right before a pause, and no longer than another batch's clients may wait."""
        try:
            async with self._lock, asyncio.timeout(self._settings.tail_s):
                await self.copy.again(addresses)
        except TimeoutError:
            self.copy.give_up("kv_slow")
        self._count()

    def named(self, stream: int) -> int:
        """Blocks of a stream that rounds have dealt with."""
        return self.copy.named(stream)

    async def tail(self, kv: Sequence[dict[str, Any]]) -> list[int]:
        """What paused streams have beyond that; clients wait. The blocks' ids for the target; 0: one did not come."""
        async with self._lock:
            ids = await self.copy.tail(kv)
        self._paused_bytes += sum(int(block["bytes"]) for block in kv)
        self._report.bytes_total = max(self._report.bytes_total, self._paused_bytes)
        self._report.blocks_recomputed += ids.count(0)
        self._count()
        return ids

    def missed(self, blocks: int, why: str) -> None:
        """The target could not use so many blocks of those that were sent."""
        self._report.blocks_recomputed += blocks
        self._report.reason = self._report.reason or why

    def _count(self) -> None:
        report, copy = self._report, self.copy
        report.rounds, report.bytes_sent, report.bytes_shared = (
            len(copy.progress.rounds), copy.sent_bytes, copy.shared_bytes
        )  # fmt: skip
        failures = [why for why in copy.recomputed if why != "cheaper"]
        trouble = copy.trouble.code if copy.trouble and copy.trouble.code != "aborted" else ""
        report.reason = report.reason or trouble or next(iter(failures), "")

    @property
    def bytes_per_s(self) -> float:
        """What the network took; 0: too little was sent to tell."""
        return self._sender.bytes_per_s or self.copy.progress.bytes_per_s

    def summary(self) -> str:
        copy = self.copy
        sent, shared, rate = (x / 1e6 for x in (copy.sent_bytes, copy.shared_bytes, copy.progress.bytes_per_s))
        if copy.trouble is not None:
            return f"KV given up after {sent:.1f} MB: {copy.trouble}"
        rounds = f"{sent:.1f} MB of KV copied in {len(copy.progress.rounds)} rounds at {rate:.0f} MB/s"
        return f"{rounds}, {shared:.1f} MB need not be sent"

    async def close(self) -> None:
        """Idempotent; pod and target may free what they kept."""
        async with self._lock:
            try:
                await self.copy.end()
            except MidstreamError as e:
                log.info("job %s: the end of its KV was not heard: %s", self._job_id, e)
            await self._sender.close()
            self._handoff.close()


def settings_for(settings: Kv, request: pb.MigrateRequest) -> Kv:
    """The job's own limit, where it is lower; and with Copy, KV goes also where computing it again would be sooner."""
    limits = [limit for limit in (settings.bytes_per_s, request.kv_bytes_per_s) if limit]
    prefill = 0.0 if request.kv_mode == pb.KV_MODE_COPY else settings.prefill_tokens_per_s
    return replace(settings, bytes_per_s=min(limits, default=0), prefill_tokens_per_s=prefill)
