"""KV blocks of a pod's pool, read at the source and written at the target, through a mapping of the memfd.

The pool comes over the handoff as a memfd. Only one that is sealed against shrinking is mapped: a pod could
otherwise truncate it under the agent, which would die of SIGBUS. Slots are the pod's numbers and are checked
against the pool's own geometry; checksums are made at the source's gateway and verified here at the target
before the engine may see a block.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Any

from midstream_runtime.contract import pool
from midstream_runtime.contract.errors import Final

from midstream_agent import tcp

F_GET_SEALS, F_SEAL_SHRINK = 1034, 0x0002


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where the slots of a pool are. Bytes, but for `slots` (a count) and `block_tokens`."""

    fingerprint: str
    slots: int
    slot_bytes: int
    data_offset: int
    block_tokens: int

    @classmethod
    def parse(cls, pool: dict[str, Any]) -> Geometry:
        try:
            got = cls(
                str(pool["fingerprint"]),
                int(pool["slots"]),
                int(pool["slot_bytes"]),
                int(pool["data_offset"]),
                int(pool["block_tokens"]),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise Final("pool_malformed", f"the pod describes its KV pool badly: {e!r}") from e
        if min(got.slots, got.slot_bytes, got.block_tokens) <= 0 or got.data_offset < 0:
            raise Final("pool_malformed", "the pod's KV pool has a size of zero or less")
        return got

    @property
    def bytes(self) -> int:
        return self.data_offset + self.slots * self.slot_bytes


class PoolView:
    """A mapping of a pod's KV pool; owns it, and the fd that it was made from (`fd`, which sendfile reads)."""

    def __init__(self, fd: int, geometry: Geometry, writable: bool) -> None:
        self.geometry, self.fd = geometry, fd
        try:
            _check_sealed(fd, geometry)
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            self._map = mmap.mmap(fd, geometry.bytes, mmap.MAP_SHARED, access)
        except BaseException:
            os.close(fd)
            raise
        self._view = memoryview(self._map)

    def close(self) -> None:
        """Threads that still write into a slot keep the mapping until they are done."""
        os.close(self.fd)
        self._view.release()
        with contextlib.suppress(BufferError):
            self._map.close()

    def read(self, slot: int, length: int) -> bytes:
        return bytes(self._slice(slot, length))

    def write(self, slot: int, data: bytes, checksum: bytes) -> None:
        """Store a block; Final("kv_checksum") when what arrived is not what left the source."""
        if digest(data) != checksum:
            raise Final("kv_checksum", f"KV block for slot {slot} does not match its checksum: recompute")
        self._slice(slot, len(data))[:] = data

    def free_slots(self) -> int:
        """By the pod's own index (contract/pool.py). A number of this moment, and the pod's word."""
        first = pool.HEADER_BYTES + pool.STATE_OFFSET
        if pool.HEADER_BYTES + self.geometry.slots * pool.ENTRY_BYTES > self.geometry.data_offset:
            raise Final("pool_malformed", "the pod's KV pool has no room for its index")
        states = self._view[first : first + self.geometry.slots * pool.ENTRY_BYTES : pool.ENTRY_BYTES]
        return bytes(states).count(pool.SlotState.FREE)

    def place(self, slot: int, length: int) -> tuple[int, memoryview]:
        """Offset of the slot in the pool's fd, and its bytes in place. The caller releases the view."""
        view = self._slice(slot, length)
        return self.geometry.data_offset + slot * self.geometry.slot_bytes, view

    def _slice(self, slot: int, length: int) -> memoryview:
        g = self.geometry
        if not 0 <= slot < g.slots or not 0 <= length <= g.slot_bytes:
            raise Final("kv_slot", f"slot {slot} with {length} bytes is outside the pod's pool of {g.slots} slots")
        start = g.data_offset + slot * g.slot_bytes
        return self._view[start : start + length]


def digest(data: bytes | memoryview) -> bytes:
    """The pool's checksum of a block."""
    return pool.checksum(data, tcp.crc32)


def _check_sealed(fd: int, geometry: Geometry) -> None:
    try:
        seals = fcntl.fcntl(fd, F_GET_SEALS)
    except OSError as e:
        raise Final("pool_not_sealed", "the pod's KV pool is no memfd: refused (a file could be truncated)") from e
    if not seals & F_SEAL_SHRINK:
        raise Final("pool_not_sealed", "the pod's KV pool is not sealed against shrinking: refused")
    size = os.fstat(fd).st_size
    if size < geometry.bytes:
        raise Final("pool_truncated", f"the pod's KV pool has {size} bytes and claims {geometry.bytes}: refused")
