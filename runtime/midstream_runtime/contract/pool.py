"""Layout of the KV pool: one sealed memfd that the engine writes and the agents read and fill.

    +-----------------+ 0
    | header          | HEADER_BYTES, written once before anyone else has the fd
    +-----------------+ index_offset
    | index           | slots x ENTRY_BYTES: what each slot holds
    +-----------------+ data_offset (page-aligned)
    | slot 0          | slot_bytes each: KV of `block_tokens` consecutive tokens of one request, all layers
    | slot 1          |     [layer][key, value][token][kv head][head_dim] of `dtype`, row-major
    | ...             |
    +-----------------+ total_bytes

All integers are little-endian. The memfd carries F_SEAL_SHRINK, F_SEAL_GROW and F_SEAL_SEAL, so a mapping
never faults.

Who writes: the engine alone writes header and index, and the data of slots it did not reserve for the agent.
Between `reserve` and the resume (or `land`) that names them, the agent alone writes the data of RESERVED
slots. A reader of an index entry that changes under it sees an odd `sequence`, or another one afterwards, and
reads again; an entry that stays odd belongs to a writer that died in the middle of it (`TornEntry`).

A reader takes a block by `PoolView.take`: SEALED before and after the copy, under the same `sequence`, and the
copy has the entry's checksum. It never waits for the writer, nor the writer for it. On a machine that reorders
stores (arm64) the checksum is what holds; Python has no barriers.

A SEALED slot is full, and its bytes do not change until it is FREE again; `block_hash` names its content:
sha256 over canonical CBOR of [parent hash, [token ids...], null], vLLM's `sha256_cbor` chain, whose first
parent is ROOT_HASH. Since its bytes are settled, several owners may have it at once; it is FREE when the last
has gone. `checksum` is the CRC-32 (zlib's) of each quarter of the slot, one after the other: it guards against
damage and torn writes, not against malice, and the slot's writer makes it once. An OPEN slot is still being
filled: hash and checksum are zero, except that a pause writes the checksum of the open blocks that it hands
out (valid until the resume).

The unfilled rest of an OPEN slot is zero, so a slot is always moved whole.
"""

from __future__ import annotations

import hashlib
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

MAGIC = b"MSKVPOOL"
VERSION = 2  # 1 had blake2b-128 for a checksum
HEADER_BYTES = 4096
PAGE_BYTES = 4096
HASH_SCHEME = "sha256_cbor"
ROOT_HASH = bytes(32)
HASH_BYTES, CHECKSUM_BYTES = 32, 16

# magic, version, header_bytes, total_bytes, index_offset, data_offset, slots, slot_bytes, entry_bytes,
# block_tokens, layers, kv_heads, head_dim, reserved, dtype, hash scheme, model fingerprint (hex), pool
# fingerprint (hex)
HEADER = struct.Struct("<8sIIQQQIIIIIIII16s16s32s32s")
# sequence, state, reserved, filled tokens, epoch (how often the slot was freed), block hash, checksum
ENTRY = struct.Struct("<IBBHQ32s16s")
ENTRY_BYTES = ENTRY.size
SEQUENCE = struct.Struct("<I")
STATE_OFFSET = SEQUENCE.size
assert ENTRY_BYTES == 64


class SlotState(IntEnum):
    FREE = 0
    RESERVED = 1
    """An agent may be writing it."""
    OPEN = 2
    """Belongs to a request that still adds tokens to it."""
    SEALED = 3
    """Full, hashed, immutable."""


_TORN_AFTER_S = 0.05
"""An entry is odd for microseconds; a writer that was descheduled in the middle of one is back well before."""


class PoolLayoutError(ValueError):
    """The bytes are no pool that this code can use; the message says why."""


class TornEntry(RuntimeError):
    """The writer died (or stands still) in the middle of an index entry: what the slot holds is not known."""


@dataclass(frozen=True)
class PoolLayout:
    """Decoded header."""

    slots: int
    block_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    """float16, bfloat16, float32 or float64."""
    model_fingerprint: str

    @property
    def slot_elements(self) -> int:
        return self.layers * 2 * self.kv_heads * self.block_tokens * self.head_dim

    @property
    def slot_bytes(self) -> int:
        return self.slot_elements * ELEMENT_BYTES[self.dtype]

    @property
    def index_offset(self) -> int:
        return HEADER_BYTES

    @property
    def data_offset(self) -> int:
        end = HEADER_BYTES + self.slots * ENTRY_BYTES
        return -(-end // PAGE_BYTES) * PAGE_BYTES

    @property
    def total_bytes(self) -> int:
        return self.data_offset + self.slots * self.slot_bytes

    @property
    def fingerprint(self) -> str:
        """32 hex digits over all that decides what a slot's bytes mean; the number of slots is not part of
        it."""
        parts = (
            VERSION, self.model_fingerprint, self.dtype, self.block_tokens,
            self.layers, self.kv_heads, self.head_dim, HASH_SCHEME,
        )  # fmt: skip
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]

    def pack(self) -> bytes:
        """HEADER_BYTES bytes."""
        header = HEADER.pack(
            MAGIC,
            VERSION,
            HEADER_BYTES,
            self.total_bytes,
            self.index_offset,
            self.data_offset,
            self.slots,
            self.slot_bytes,
            ENTRY_BYTES,
            self.block_tokens,
            self.layers,
            self.kv_heads,
            self.head_dim,
            0,
            self.dtype.encode(),
            HASH_SCHEME.encode(),
            self.model_fingerprint.encode(),
            self.fingerprint.encode(),
        )
        return header.ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, data: bytes, total_bytes: int) -> PoolLayout:
        """Layout of a pool from its first bytes and the size of its file. Everything in it is checked, none
        trusted."""
        if len(data) < HEADER.size or data[:8] != MAGIC:
            raise PoolLayoutError("no KV pool: the magic is missing")
        fields = HEADER.unpack_from(data)
        version, slots, (block_tokens, layers, kv_heads, head_dim) = fields[1], fields[6], fields[9:13]
        dtype, scheme, model = (_text(field) for field in fields[14:17])
        if version != VERSION:
            raise PoolLayoutError(f"KV pool version {version}, this code reads {VERSION}: use one release")
        if scheme != HASH_SCHEME or dtype not in ELEMENT_BYTES:
            raise PoolLayoutError(f"unknown hash scheme or dtype in the KV pool: {scheme}, {dtype}")
        layout = cls(slots, block_tokens, layers, kv_heads, head_dim, dtype, model)
        # All other fields follow from these: a header that says anything else is not believed.
        try:
            consistent = layout.pack()[: HEADER.size] == data[: HEADER.size]
        except (struct.error, UnicodeEncodeError) as error:
            raise PoolLayoutError("the KV pool's header holds impossible values") from error
        if not consistent or layout.total_bytes != total_bytes or slots == 0 or layout.slot_bytes == 0:
            raise PoolLayoutError(f"the KV pool's header contradicts itself or its size of {total_bytes} bytes")
        return layout


ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("ascii", errors="replace")


class SlotInfo(NamedTuple):
    """Decoded index entry."""

    state: int
    filled: int
    epoch: int
    block_hash: bytes
    checksum: bytes


class PoolView:
    """Reader of a mapped pool, for processes without torch. Copies nothing but index entries."""

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.layout = PoolLayout.unpack(bytes(memory[: HEADER.size]), len(memory))
        self._slot_bytes, self._data_offset = self.layout.slot_bytes, self.layout.data_offset

    def info(self, slot: int) -> SlotInfo:
        """A consistent index entry; IndexError for a slot that is not there, TornEntry for one whose writer
        died in it."""
        return self._entry(slot)[1]

    def take(self, slot: int, *, verify: bool = True) -> tuple[SlotInfo, bytes] | None:
        """A sealed block and its entry; None when the slot holds none, or another one meanwhile, or is torn.
        `verify=False`, for tests: believe whatever is there."""
        try:
            before = self._entry(slot)
            data = bytes(self.slot(slot))
            after = self._entry(slot)
        except TornEntry:
            return None
        info = before[1]
        if not verify:
            return info, data
        if info.state != SlotState.SEALED or before != after or checksum(data) != info.checksum:
            return None
        return info, data

    def _entry(self, slot: int) -> tuple[int, SlotInfo]:
        """The sequence under which the entry was read, and the entry."""
        if not 0 <= slot < self.layout.slots:
            raise IndexError(f"slot {slot} of a pool with {self.layout.slots}")
        at = HEADER_BYTES + slot * ENTRY_BYTES
        give_up = 0.0
        while True:
            before, state, _, filled, epoch, block_hash, checksum = ENTRY.unpack_from(self.memory, at)
            (after,) = SEQUENCE.unpack_from(self.memory, at)
            if before == after and before % 2 == 0:
                return before, SlotInfo(state, filled, epoch, block_hash, checksum)
            give_up = give_up or time.monotonic() + _TORN_AFTER_S
            if time.monotonic() > give_up:
                raise TornEntry(f"slot {slot}: its writer died in the middle of the index entry")

    def checksum_hex(self, slot: int) -> str:
        """Checksum of a SEALED slot, or of one that a pause has just handed out, from the index: no pass over
        its bytes."""
        at = HEADER_BYTES + slot * ENTRY_BYTES + _CHECKSUM_AT
        return bytes(self.memory[at : at + CHECKSUM_BYTES]).hex()

    def slot(self, slot: int) -> memoryview:
        """The slot's bytes in place."""
        first = self._data_offset + slot * self._slot_bytes
        return self.memory[first : first + self._slot_bytes]

    def actual_checksum(self, slot: int) -> bytes:
        return checksum(self.slot(slot))


_CHECKSUM_AT = ENTRY_BYTES - CHECKSUM_BYTES


def checksum(data: memoryview | bytes, crc32: Callable[[memoryview], int] = zlib.crc32) -> bytes:
    """16 bytes. `crc32`: another way to the same number. A cryptographic hash would take five times as long on a path
    where bytes are compared with those that their own sender named."""
    view = memoryview(data)
    return QUARTERS.pack(*(crc32(view[part]) for part in quarters(len(view))))


QUARTERS = struct.Struct("<4I")
"""A checksum."""


def quarters(size: int) -> list[slice]:
    """The parts of so many bytes that have a CRC each."""
    return [slice(size * i // 4, size * (i + 1) // 4) for i in range(4)]


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Chained hash of one full block."""
    head_of = _HEADS.__getitem__
    try:
        items = b"".join(map(head_of, token_ids))
    except KeyError:
        for token in token_ids:
            _HEADS[token] = _cbor_head(0, token)
        items = b"".join(map(head_of, token_ids))
    beginning = b"\x83" + _cbor_head(2, len(parent)) + parent + _cbor_head(4, len(token_ids))
    return hashlib.sha256(beginning + items + b"\xf6").digest()


_HEADS: dict[int, bytes] = {}
"""Encoded token ids: a moved answer's blocks are named again while its client waits. No larger than a
vocabulary."""


@lru_cache(maxsize=64)
def _cbor_head(major: int, value: int) -> bytes:
    """Shortest head of a canonical CBOR item (RFC 8949, section 4.2.1)."""
    if value < 24:
        return bytes([major << 5 | value])
    for code, size in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if value < 1 << (8 * size):
            return bytes([major << 5 | code]) + value.to_bytes(size, "big")
    raise ValueError(f"{value} does not fit a CBOR head")
