"""Blocks of vLLM's KV cache in the pool, found by their hash. The only writer of the pool's index.

    FREE --begin--> OPEN --seal--> SEALED --evicted, from the ends of chains--> FREE
    FREE --reserve--> RESERVED (an agent writes) --land (by its name), publish (by its ids)--> SEALED

A SEALED block stays as long as anybody has it pinned: an agent that reads it, a step of vLLM that loads it, a job whose
answer is still to come. One that landed while the same block was saved here is kept beside it until its job lets go.
Callers are vLLM's engine thread, the sealing thread and the threads of pool.sock; one lock covers all of it.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from midstream_runtime.contract.errors import Final, Retryable
from midstream_runtime.contract.pool import ROOT_HASH, PoolLayout, block_hash
from midstream_runtime.pool import KvPool


@dataclass
class StoreCounts:
    """Since the start; `stats` of pool.sock shows them."""

    saved: int = 0
    """Blocks that vLLM filled here."""
    published: int = 0
    """Blocks that came from another node."""
    loaded: int = 0
    """Blocks that vLLM took instead of computing them."""
    evicted: int = 0
    skipped_full: int = 0
    """Blocks not saved, since every slot was pinned, reserved or being filled."""


class BlockStore:
    def __init__(self, layout: PoolLayout) -> None:
        self.pool = KvPool(layout)
        self.layout = layout
        self.counts = StoreCounts()
        self._lock = threading.Lock()
        self._by_hash: OrderedDict[bytes, int] = OrderedDict()
        """Sealed blocks, the one that was used last at the end."""
        self._hash_of: dict[int, bytes] = {}
        """Of every sealed slot, those among them that hold a block a second time (and are pinned)."""
        self._pins: Counter[int] = Counter()
        self._parent: dict[int, bytes] = {}
        """Absent for a block that landed, until ids say what it continues."""
        self._children: Counter[bytes] = Counter()
        """How many blocks here continue this one: without it nobody could find them."""

    # -- chains --------------------------------------------------------------------------------------------

    def chain(self, ids: Sequence[int], parents: Sequence[bytes] = ()) -> list[bytes]:
        """Hashes of the full blocks of `ids`; `parents` are those that are known already."""
        size, hashes = self.layout.block_tokens, list(parents)
        for at in range(len(hashes), len(ids) // size):
            parent = hashes[-1] if hashes else ROOT_HASH
            hashes.append(block_hash(parent, ids[at * size : (at + 1) * size]))
        return hashes

    # -- readers -------------------------------------------------------------------------------------------

    def hits(self, hashes: Sequence[bytes]) -> int:
        """How many of the first blocks of a chain are here."""
        with self._lock:
            return next((i for i, name in enumerate(hashes) if name not in self._by_hash), len(hashes))

    def pin(self, hashes: Iterable[bytes]) -> list[int]:
        """Slots of the first blocks of a chain, as many as are here. They stay until `unpin`."""
        slots = []
        with self._lock:
            for name in hashes:
                slot = self._by_hash.get(name)
                if slot is None:
                    break
                self._by_hash.move_to_end(name)
                self._pins[slot] += 1
                slots.append(slot)
        return slots

    def have(self, hashes: Iterable[bytes]) -> list[int]:
        """Where each of these blocks is, -1 for one that is not here. They stay until `unpin`."""
        with self._lock:
            slots = [self._by_hash.get(name, -1) for name in hashes]
            self._pins.update(slot for slot in slots if slot >= 0)
        return slots

    def unpin(self, slots: Iterable[int]) -> None:
        with self._lock:
            for slot in slots:
                self._pins[slot] -= 1
                if self._pins[slot] <= 0:
                    del self._pins[slot]
                    self._unpinned(slot)

    def loaded(self, slots: Sequence[int]) -> None:
        """vLLM has taken these over, and they were pinned for it."""
        self.unpin(slots)
        self.counts.loaded += len(slots)

    # -- vLLM writes ---------------------------------------------------------------------------------------

    def begin(self, name: bytes) -> int | None:
        """A slot to fill with block `name`; None when it is here already, or no slot can be had."""
        with self._lock:
            if name in self._by_hash:
                self._by_hash.move_to_end(name)
                return None
            if not self._make_room(1):
                self.counts.skipped_full += 1
                return None
            return self.pool.allocate(1)[0]

    def seal(self, slot: int, parent: bytes, ids: Sequence[int]) -> None:
        """The slot is filled: others may find it."""
        with self._lock:
            if self._seal(slot, parent, ids):
                self.counts.saved += 1

    def abandon(self, slots: Sequence[int]) -> None:
        with self._lock:
            self.pool.release(slots)

    # -- an agent writes -----------------------------------------------------------------------------------

    def reserve(self, count: int) -> list[int]:
        """Slots for an agent; Retryable("pool_full") when not enough can be evicted."""
        with self._lock:
            if not self._make_room(count):
                raise Retryable(
                    "pool_full", f"{count} KV slots are needed and all are in use: raise pool_slots of the connector"
                )
            return self.pool.reserve(count)

    def free(self, slots: Sequence[int]) -> None:
        with self._lock:
            self.pool.release_reserved(slots)

    def publish(self, slots: Sequence[int | None], ids: Sequence[int]) -> int:
        """Slots, reserved or landed, hold the blocks of `ids` from its first on (None: that one did not come, and all
        behind it are of no use). Returns how many can be found now; reserved ones behind them are free again."""
        size = self.layout.block_tokens
        came = next((i for i, slot in enumerate(slots) if slot is None), len(slots))
        came = min(came, len(ids) // size)
        with self._lock:
            written = [slot for slot in slots if slot is not None and slot not in self._hash_of]
            self.pool.adopt(written)
            parent = ROOT_HASH
            for at, slot in enumerate(slots[:came]):
                assert slot is not None
                block = ids[at * size : (at + 1) * size]
                name = block_hash(parent, block)
                if slot in written:
                    self._seal(slot, parent, block)
                    self.counts.published += 1
                elif self._hash_of[slot] == name:
                    self._follow(slot, parent)
                else:
                    came = at  # another answer's block: what is behind it is of no use either
                    break
                parent = name
            self.pool.release([slot for slot in slots[came:] if slot in written])
        return came

    def land(self, slots: Sequence[int], names: Sequence[tuple[bytes, bytes]]) -> None:
        """Reserved slots hold whole blocks of these (hash, checksum); they can be found, and stay until `unpin`."""
        with self._lock:
            for slot, (name, digest) in zip(slots, names, strict=True):
                self.pool.land(slot, name, digest)
                self._hash_of[slot] = name
                self._by_hash.setdefault(name, slot)
                self._pins[slot] += 1
            self.counts.published += len(slots)

    def stats(self) -> dict[str, int]:
        with self._lock:
            free, blocks, pinned = self.pool.free_slots, len(self._by_hash), len(self._pins)
        return {**vars(self.counts), "free_slots": free, "blocks": blocks, "pinned": pinned}

    # -- inside, under the lock ----------------------------------------------------------------------------

    def _seal(self, slot: int, parent: bytes, ids: Sequence[int]) -> bool:
        """False when another slot holds the same block: this one is free again."""
        if len(ids) != self.layout.block_tokens:
            raise Final("kv_block_size", f"a KV block holds {self.layout.block_tokens} tokens, not {len(ids)}")
        if (there := self._by_hash.get(block_hash(parent, ids))) is not None:
            self._follow(there, parent)
            self.pool.release([slot])
            return False
        name = self.pool.seal(slot, parent, ids)
        self._by_hash[name], self._hash_of[slot] = slot, name
        self._follow(slot, parent)
        return True

    def _follow(self, slot: int, parent: bytes) -> None:
        """The block in `slot` continues `parent`, which is not evicted before it."""
        if slot not in self._parent and self._by_hash[self._hash_of[slot]] == slot:
            self._parent[slot] = parent
            self._children[parent] += 1

    def _unpinned(self, slot: int) -> None:
        """Of a block that is here twice, one is enough."""
        name = self._hash_of[slot]
        if self._by_hash.setdefault(name, slot) != slot:
            del self._hash_of[slot]
            self.pool.release([slot])

    def _make_room(self, count: int) -> bool:
        """Evict the ends of chains, the one that was used longest ago first."""
        missing = count - self.pool.free_slots
        if missing > len(self._hash_of) - len(self._pins):
            return False
        while missing > 0:
            ends = (s for name, s in self._by_hash.items() if not self._children[name] and s not in self._pins)
            victims = list(islice(ends, missing))
            if not victims:
                return False
            for slot in victims:
                self._evict(slot)
            missing -= len(victims)
        return True

    def _evict(self, slot: int) -> None:
        name, parent = self._hash_of.pop(slot), self._parent.pop(slot, None)
        del self._by_hash[name]
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
        self.pool.release([slot])
        self.counts.evicted += 1
