"""Pre-copy: full KV blocks go to the target while decoding goes on, round after round, until little is left.

    round 1     all full blocks of the streams                              |#########################|
    round 2     those that became full during round 1                       |#####|
    round n     ...                                                         |#|
    PAUSE       tail: blocks that became full since, and one that is not full for each stream

Full blocks never change, so nothing is sent twice; each round is as long as what was decoded during the one before it.
It converges when KV is made more slowly than the network takes it (`Progress`); if not, or if the deadline is nearer
than the copy, streams are moved without KV and their tokens replayed: KV is dropped before a connection is.

Blocks are known by their hash. Streams with the same beginning have the same hashes for it, and these are sent once;
those that the target's pool has already are not sent at all. An engine that cannot name blocks of streams that go on
has no rounds, and all of its KV is tail.

KV is a cache. What does not come is computed again at the target, and counted by reason; only a pod that lies about
its own pool ends the job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from midstream_runtime.contract import handoff as pod
from midstream_runtime.contract.errors import Final, MidstreamError

from midstream_agent.handoff import HandoffClient
from midstream_agent.kv import Geometry, PoolView
from midstream_agent.kv_send import Block, KvSender
from midstream_agent.settings import Kv

log = logging.getLogger(__name__)
LIES = ("kv_slot", "handoff_protocol", "handoff_size", "handoff_fds")


@dataclass(frozen=True, slots=True)
class Round:
    """What one round did. Bytes of whole blocks."""

    named_bytes: int
    """Full blocks that the pod named for the first time, all streams together."""
    shared_bytes: int
    """Of these: not sent, since another stream or the target has them."""
    sent_bytes: int
    failed_bytes: int
    took_s: float
    since_s: float
    """Since the round before this began (its own time for the first)."""


@dataclass(slots=True)
class Progress:
    """Rounds so far, and what they say about the next one."""

    settings: Kv
    rounds: list[Round] = field(default_factory=list)

    @property
    def bytes_per_s(self) -> float:
        """What the network took, over all rounds that sent anything; 0: not known yet."""
        took_s = sum(r.took_s for r in self.rounds if r.sent_bytes)
        return sum(r.sent_bytes for r in self.rounds) / took_s if took_s else 0.0

    @property
    def new_bytes_per_s(self) -> float:
        """How fast decoding makes full blocks that must be sent; 0 while nobody knows."""
        later = self.rounds[1:]
        since_s = sum(r.since_s for r in later)
        return sum(r.named_bytes - r.shared_bytes for r in later) / since_s if since_s else 0.0

    @property
    def converging(self) -> bool:
        """KV is made more slowly than it is sent."""
        return not self.bytes_per_s or self.new_bytes_per_s < self.bytes_per_s

    def another(self) -> bool:
        """Is one more round worth it? Not when what is left is sent in no time, and not when rounds stop shrinking:
        the tail is then as small as it gets."""
        if not self.rounds:
            return True
        last = self.rounds[-1]
        if not last.named_bytes or len(self.rounds) >= self.settings.rounds_max:
            return False
        if self.bytes_per_s and last.sent_bytes <= self.bytes_per_s * self.settings.tail_ms / 1000:
            return False
        if len(self.rounds) < 2:
            return True
        return last.sent_bytes < self.rounds[-2].sent_bytes * self.settings.shrink


def fits(total_bytes: int, bytes_per_s: float, new_bytes_per_s: float, left_s: float) -> bool:
    """Can all KV be at the target before the deadline? Round n sends total x (new/bytes)^n: a geometric series."""
    if bytes_per_s <= 0 or left_s <= 0:
        return False
    if new_bytes_per_s >= bytes_per_s:
        return False
    return total_bytes / (bytes_per_s - new_bytes_per_s) <= left_s


def tail_choice(
    tail_bytes: int, bytes_per_s: float, tail_tokens: int, prefill_tokens_per_s: float
) -> Literal["move", "recompute"]:
    """At the pause: send the rest, or let the target compute it from the ids, whichever is sooner. What is unknown
    (0) is taken for slow; if both are, the rest is sent."""
    if not tail_bytes or prefill_tokens_per_s <= 0:
        return "move"
    if bytes_per_s <= 0:
        return "recompute"
    return "move" if tail_bytes / bytes_per_s <= tail_tokens / prefill_tokens_per_s else "recompute"


def tail_bound_s(tail_tokens: int, prefill_tokens_per_s: float, most_s: float) -> float:
    """How long clients wait for the rest, should the estimate have been wrong: as long as the target would compute, so
    that they wait twice as long at worst as with the better choice; never more than `most_s`."""
    return min(most_s, tail_tokens / prefill_tokens_per_s) if prefill_tokens_per_s > 0 else most_s


def why_not(ours: Geometry | None, theirs: str, pod_version: int = pod.VERSION) -> str:
    """The name of what keeps KV from being copied, empty when nothing does. `theirs`: the other pool's fingerprint,
    which covers model, dtype, block size and shape. Tokens are replayed then."""
    if ours is None or not theirs:
        return "no_pool"
    if pod_version < pod.KV_VERSION:
        return "kv_old_pod"
    return "" if ours.fingerprint == theirs else "kv_fingerprint"


class PreCopy:
    """The source's pre-copy of one job. Borrows handoff, pool and sender."""

    def __init__(
        self,
        settings: Kv,
        handoff: HandoffClient,
        job_id: str,
        view: PoolView,
        sender: KvSender,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._handoff, self._job_id = settings, handoff, job_id
        self._view, self._sender, self._clock = view, sender, clock
        self.progress = Progress(settings)
        self._known: dict[int, int] = {}
        self._ids: dict[bytes, int] = {}
        self._failed: dict[bytes, str] = {}
        self._next_id = 1
        self._began = 0.0
        self.sent_bytes = 0
        self.shared_bytes = 0
        """Not sent: another stream or the target has them."""
        self.recomputed: dict[str, int] = {}
        """Blocks that the target must compute again, by the reason's name; 'cheaper' is a choice and no failure."""
        self.trouble: MidstreamError | None = None
        """What ended the copy early, if anything did: streams then move without this KV."""

    async def run(self, addresses: Sequence[str], stop: Callable[[], str] = lambda: "") -> Progress:
        """Rounds until another is not worth it. `stop`, asked in between: why the copy must end now, if it must (the
        deadline, an abort). What breaks the copy ends in `trouble`; what no honest pod says is raised."""
        while self.progress.another() and not self.trouble:
            await self.again(addresses, stop)
        return self.progress

    async def again(self, addresses: Sequence[str], stop: Callable[[], str] = lambda: "") -> None:
        """One round, unless something has ended the copy."""
        try:
            if not self.trouble:
                await self.round(addresses, stop)
        except MidstreamError as e:
            self._note_trouble(e)

    def give_up(self, why: str) -> None:
        """No more is sent; what has come is used."""
        self._note_trouble(Final(why, "the copy of KV takes too long: what is missing is computed again"))

    def _note_trouble(self, e: MidstreamError) -> None:
        if e.code in LIES:
            raise e
        log.warning("job %s: KV copy: %s", self._job_id, e)
        self.trouble = self.trouble or e

    async def round(self, addresses: Sequence[str], stop: Callable[[], str] = lambda: "") -> None:
        """Everything that became full since the last one."""
        began = self._clock()
        since_s = began - self._began if self._began else 0.0
        self._began = began
        named = shared = sent = failed = 0
        while blocks := await self._named(addresses):
            if why := stop():
                return self.give_up(why)
            new = self._unsent(blocks)
            try:
                have = await self._sender.offer(new) if new else set()
                report = await self._sender.send([block for block in new if block.id not in have])
            except BaseException:
                self._forget([block.name for block in new])  # nobody knows which of them came
                raise
            self._forget([block.name for block in new if block.id in report.failed])
            self._failed |= {block.name: report.failed[block.id] for block in new if block.id in report.failed}
            await self._sender.settle()
            size = self._view.geometry.slot_bytes
            named += size * len(blocks)
            sent += report.bytes
            self.sent_bytes += report.bytes
            failed += size * len(report.failed)
            shared += size * (len(blocks) - len(new) + len(have))
            self.shared_bytes += size * (len(blocks) - len(new) + len(have))
            if len(blocks) < pod.MAX_KV_BLOCKS:
                break
        took_s = self._clock() - began
        self.progress.rounds.append(Round(named, shared, sent, failed, took_s, since_s or took_s))

    def named(self, stream: int) -> int:
        """Blocks of a stream that rounds have dealt with."""
        return self._known.get(stream, 0)

    async def tail(self, kv: Sequence[dict[str, Any]]) -> list[int]:
        """After PAUSE: sends what is missing of the blocks that the pod handed out, or leaves it to the target's
        engine. Returns the ids for the target, one a block of `kv`; 0 for one that it must compute again."""
        names = [bytes.fromhex(block.get("hash", "")) for block in kv]
        ids = [self._ids.get(name, 0) for name in names]
        missing = [at for at, number in enumerate(ids) if not number]
        given_up = {at: self._given_up(names[at]) for at in missing}
        ours = {at: self._block(kv[at]) for at in missing if not given_up[at]}
        firsts: dict[bytes | str, Block] = {}  # in their order: a block is of use behind those before it only
        for at, block in ours.items():
            firsts.setdefault(block.name or str(at), block)
        failed = await self._send_tail(list(firsts.values())) if firsts else {}
        for at, block in ours.items():
            number = firsts[block.name or str(at)].id
            ids[at] = 0 if number in failed else number
            given_up[at] = failed.get(number, "")
        self.shared_bytes += sum(int(kv[at]["bytes"]) for at, block in ours.items() if block not in firsts.values())
        for why in filter(None, given_up.values()):
            self.recomputed[why] = self.recomputed.get(why, 0) + 1
        return ids

    def _given_up(self, name: bytes) -> str:
        """Why a block is not tried (again) while clients wait."""
        return self.trouble.code if self.trouble else self._failed.get(name, "")

    async def _send_tail(self, blocks: list[Block]) -> dict[int, str]:
        """Why, for each block that did not come."""
        size = sum(block.length for block in blocks)
        rate = self._sender.bytes_per_s or self.progress.bytes_per_s
        tokens = len(blocks) * self._view.geometry.block_tokens
        prefill = self._settings.prefill_tokens_per_s
        if tail_choice(size, rate, tokens, prefill) == "recompute":
            return {block.id: "cheaper" for block in blocks}
        try:
            report = await self._sender.send(blocks, tail_bound_s(tokens, prefill, self._settings.tail_s))
        except MidstreamError as e:
            self._note_trouble(e)
            return {block.id: self._given_up(block.name) for block in blocks}
        self.sent_bytes += report.bytes
        if report.late:
            self.give_up("kv_slow")
        return report.failed

    async def end(self) -> None:
        """Pod and target may free what they kept for this job."""
        if not self.trouble:
            await self._sender.end()
        await self._handoff.ask("kv_end", {"job": self._job_id})

    # -- inside --------------------------------------------------------------------------------------------------

    async def _named(self, addresses: Sequence[str]) -> list[Block]:
        """Full blocks that the pod has not named before; they stay in its pool until this is asked again."""
        fields = {"job": self._job_id, "addresses": list(addresses), "known": list(self._known.items())}
        answer = await self._handoff.ask("kv", fields)
        blocks = list(pod.BLOCK.iter_unpack(answer.payload))
        for number, count in answer.header["streams"]:
            if count < 0:
                raise Final("handoff_protocol", "the pod names fewer than no blocks of a stream")
            self._known[int(number)] = self._known.get(int(number), 0) + count
        size = self._view.geometry.slot_bytes
        return [Block(self._new_id(), slot, size, checksum, name) for slot, name, checksum in blocks]

    def _unsent(self, blocks: Sequence[Block]) -> list[Block]:
        """One of each hash that has not been sent; they count as sent from here on."""
        new = []
        for block in blocks:
            if block.name not in self._ids:
                self._ids[block.name] = block.id
                new.append(block)
        return new

    def _forget(self, names: Sequence[bytes]) -> None:
        """They are not at the target."""
        for name in names:
            del self._ids[name]

    def _block(self, entry: dict[str, Any]) -> Block:
        name = bytes.fromhex(entry.get("hash", ""))
        return Block(self._new_id(), int(entry["slot"]), int(entry["bytes"]), bytes.fromhex(entry["checksum"]), name)

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1
