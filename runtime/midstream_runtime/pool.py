"""The engine's side of the KV pool: allocation, index writes, torch views of the slots.

One process and one thread owns a `KvPool`. The model's KV pages are the slots themselves: `rows()` is a torch
view of the mapping, written by the decoder and read by agents through the memfd without any copy in between.
Layout and rules for the other readers are in midstream_runtime.contract.pool.

A slot has one owner while it is written. Sealed, it can have several (`share`): requests with the same
beginning, and agents that are copying it. It is freed, or kept as cache, when the last of them has let go; so
nothing that is being read can be evicted."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import weakref
from collections import OrderedDict, deque
from collections.abc import Sequence

import torch

from midstream_runtime.contract.errors import Final, Retryable
from midstream_runtime.contract.pool import (
    ENTRY,
    ENTRY_BYTES,
    HEADER_BYTES,
    SEQUENCE,
    STATE_OFFSET,
    PoolLayout,
    PoolView,
    SlotState,
    block_hash,
    checksum,
)
from midstream_runtime.device import pin, unpin

_F_ADD_SEALS = 1033
_SEAL_SEAL, _SEAL_SHRINK, _SEAL_GROW = 1, 2, 4
_MADV_POPULATE_WRITE = 23
_NO_HASH, _NO_CHECKSUM = bytes(32), bytes(16)
WIPED_AT_ONCE_BYTES = 8 << 20
"""About a millisecond. A long answer that moves away leaves gigabytes to wipe, and others decode meanwhile."""


class KvPool:
    """Slots of one memfd, handed out oldest freed first: a late reader finds its slot untouched for
    longest."""

    def __init__(self, layout: PoolLayout, *, populate: bool = True, cached_slots: int = 0) -> None:
        """Raises OSError when the memory is not there. `populate`: take all pages now instead of in the
        middle of a step. `cached_slots`: so many sealed blocks stay findable after their last owner has let
        go, until somebody needs the room."""
        self.layout = layout
        self.fd = os.memfd_create("midstream-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, layout.total_bytes)
        fcntl.fcntl(self.fd, _F_ADD_SEALS, _SEAL_SEAL | _SEAL_SHRINK | _SEAL_GROW)
        self._map = mmap.mmap(self.fd, layout.total_bytes, mmap.MAP_SHARED)
        if populate:
            # Kernels before 5.14 do not know it: pages then come with the first write.
            with contextlib.suppress(OSError):
                self._map.madvise(_MADV_POPULATE_WRITE)
        self._map[:HEADER_BYTES] = layout.pack()
        self.view = PoolView(memoryview(self._map))
        self._free: deque[int] = deque(range(layout.slots))
        self._dirty: deque[int] = deque()
        """Free, and still to be wiped."""
        self._wiped_at_once = max(1, WIPED_AT_ONCE_BYTES // layout.slot_bytes)
        self._reserved: set[int] = set()
        self._epoch = [0] * layout.slots
        self._owners = [0] * layout.slots
        self._names: dict[int, bytes] = {}
        self._by_name: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._cached_slots = cached_slots
        data = torch.frombuffer(
            self._map,
            dtype=getattr(torch, layout.dtype),
            count=layout.slots * layout.slot_elements,
            offset=layout.data_offset,
        )
        self._slots = data.view(layout.slots, layout.slot_elements)
        self._unpin: weakref.finalize[[int], mmap.mmap] | None = None

    def pin(self) -> bool:
        """Register the slots with CUDA (`device.pin`) for as long as this process maps them: what is unmapped without
        having been unregistered makes the next registration of the same addresses fail."""
        if pin(self._slots):
            self._unpin = weakref.finalize(self._map, unpin, self._slots.data_ptr())
            self._unpin.atexit = False
        return self._unpin is not None

    @property
    def free_slots(self) -> int:
        """Slots that can be had now, cached ones among them."""
        return len(self._free) + len(self._dirty) + len(self._cached)

    @property
    def unwiped(self) -> bool:
        """Is there anything for `wipe_some`?"""
        return bool(self._dirty)

    def wipe_some(self) -> None:
        """A millisecond's worth of what was freed: for the engine, between two steps."""
        self._clean(self._wiped_at_once)

    def rows(self) -> torch.Tensor:
        """All slots as [slots * layers * 2 * block_tokens, kv_heads * head_dim], over the shared memory
        itself."""
        return self._slots.view(-1, self.layout.kv_heads * self.layout.head_dim)

    def allocate(self, count: int) -> list[int]:
        """Zeroed OPEN slots, or Retryable('pool_full') and none."""
        return self._take(count, SlotState.OPEN)

    def reserve(self, count: int) -> list[int]:
        """Slots whose data an agent writes until `adopt` or `release`; Retryable('pool_full') and none."""
        slots = self._take(count, SlotState.RESERVED)
        self._reserved.update(slots)
        return slots

    def adopt(self, slots: Sequence[int]) -> None:
        """Reserved slots become a request's; refuses a slot that was not reserved, or is named twice."""
        if len(set(slots)) != len(slots) or not self._reserved.issuperset(slots):
            raise Final(
                "kv_not_reserved",
                f"KV slots {list(slots)[:8]} were not reserved: reserve slots, fill them, then resume",
            )
        self._reserved.difference_update(slots)
        for slot in slots:
            self._set_state(slot, SlotState.OPEN)

    def land(self, slot: int, name: bytes, digest: bytes) -> None:
        """A reserved slot that an agent has filled with a whole block, and verified, is sealed; whoever
        reserved it owns it still, and others can find and share it."""
        if slot not in self._reserved:
            raise Final("kv_not_reserved", f"KV slot {slot} was not reserved: reserve it, fill it, then land it")
        self._reserved.discard(slot)
        self._publish(slot, self.layout.block_tokens, name, digest)

    def find(self, name: bytes) -> int | None:
        """A sealed slot with the block of that hash; `share` it before anything else happens."""
        return self._by_name.get(name)

    def name_of(self, slot: int) -> bytes | None:
        """Block hash of a sealed slot."""
        return self._names.get(slot)

    def share(self, slots: Sequence[int]) -> None:
        """One more owner for each; all of them must be sealed. Each owner releases."""
        unsealed = [slot for slot in slots if slot not in self._names]
        if unsealed:
            raise Final("kv_not_reserved", f"KV slots {unsealed[:8]} are neither reserved nor sealed: resume without")
        for slot in slots:
            self._owners[slot] += 1
            self._cached.pop(slot, None)

    def release(self, slots: Sequence[int]) -> None:
        """One owner less for each, from any state; without one a slot is FREE, or cached where it is sealed.
        The first are wiped here, the others by `wipe_some`, and at the latest when they are taken."""
        if not slots:
            return
        self._reserved.difference_update(slots)
        ended = []
        for slot in slots:
            self._owners[slot] -= 1
            if self._owners[slot] < 0:
                raise ValueError(f"KV slot {slot} was released more often than it was owned")
            if self._owners[slot] == 0:
                ended.append(slot)
        if self._cached_slots:
            self._cached.update((slot, None) for slot in ended if slot in self._names)
            ended = [slot for slot in ended if slot not in self._names]
            ended += self._evict(len(self._cached) - self._cached_slots)
        self._wipe(ended)

    def release_reserved(self, slots: Sequence[int]) -> None:
        """Frees those of `slots` that are reserved; the others have an owner or are free already."""
        self.release([slot for slot in dict.fromkeys(slots) if slot in self._reserved])

    def seal(self, slot: int, parent: bytes, token_ids: Sequence[int]) -> bytes:
        """Marks a full slot immutable; returns its block hash, the parent of the next block's."""
        name = block_hash(parent, token_ids)
        if self._names.get(slot) != name:
            self._publish(slot, len(token_ids), name, checksum(self.view.slot(slot)))
        return name

    def _publish(self, slot: int, filled: int, name: bytes, digest: bytes) -> None:
        self._write(slot, SlotState.SEALED, filled, name, digest)
        self._names[slot] = name
        self._by_name.setdefault(name, slot)

    def note_open(self, slot: int, filled: int) -> None:
        """Publishes fill and checksum of a block that is not full, for a request that has just paused."""
        self._write(slot, SlotState.OPEN, filled, _NO_HASH, checksum(self.view.slot(slot)))

    def close(self) -> None:
        """The memory itself lives until the last view and fd are gone. No copy to a device may be under way."""
        if self._unpin is not None:
            self._unpin()
        os.close(self.fd)

    def _take(self, count: int, state: SlotState) -> list[int]:
        if count > self.free_slots:
            raise Retryable(
                "pool_full",
                f"the KV pool has {self.free_slots} free slots, {count} are needed: raise --pool-slots",
            )
        self._wipe(self._evict(count - len(self._free) - len(self._dirty)))
        self._clean(count - len(self._free))
        slots = [self._free.popleft() for _ in range(count)]
        for slot in slots:
            self._owners[slot] = 1
            self._set_state(slot, state)
        return slots

    def _evict(self, count: int) -> list[int]:
        """The cached slots that nobody has wanted for longest: they have no owner, so nobody reads them."""
        return [self._cached.popitem(last=False)[0] for _ in range(count)]

    def _wipe(self, slots: list[int]) -> None:
        for slot in slots:
            self._epoch[slot] += 1
            self._write(slot, SlotState.FREE, 0, _NO_HASH, _NO_CHECKSUM)
            name = self._names.pop(slot, None)
            if name is not None and self._by_name.get(name) == slot:
                del self._by_name[name]
        self._dirty.extend(slots)
        if slots:
            self.wipe_some()

    def _clean(self, count: int) -> None:
        slots = [self._dirty.popleft() for _ in range(min(count, len(self._dirty)))]
        if slots:
            self._slots.index_fill_(0, torch.tensor(slots), 0)
            self._free.extend(slots)

    def _set_state(self, slot: int, state: SlotState) -> None:
        """A single byte needs no sequence lock; the entry's other fields are clear since the release."""
        self._map[HEADER_BYTES + slot * ENTRY_BYTES + STATE_OFFSET] = state

    def _write(self, slot: int, state: SlotState, filled: int, name: bytes, digest: bytes) -> None:
        """Index entry under its sequence lock: odd while it changes."""
        at = HEADER_BYTES + slot * ENTRY_BYTES
        (sequence,) = SEQUENCE.unpack_from(self._map, at)
        # Odd even after a writer that died here and left it odd.
        changing = (sequence + 1 | 1) & 0xFFFFFFFF
        changed = (changing + 1) & 0xFFFFFFFF
        SEQUENCE.pack_into(self._map, at, changing)
        ENTRY.pack_into(self._map, at, changing, state, 0, filled, self._epoch[slot], name, digest)
        SEQUENCE.pack_into(self._map, at, changed)
