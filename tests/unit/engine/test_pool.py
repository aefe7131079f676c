"""The KV pool: layout that agents rely on, ownership of slots, readers beside a writer."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import signal
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
from midstream_runtime.contract.errors import Final, Retryable
from midstream_runtime.contract.pool import (
    ENTRY_BYTES,
    HEADER,
    HEADER_BYTES,
    ROOT_HASH,
    SEQUENCE,
    PoolLayout,
    PoolLayoutError,
    PoolView,
    SlotInfo,
    SlotState,
    block_hash,
    checksum,
)

LAYOUT = PoolLayout(
    slots=8, block_tokens=16, layers=4, kv_heads=2, head_dim=16, dtype="float16", model_fingerprint="ab" * 16
)


@pytest.fixture
def pool(torch: ModuleType) -> Any:
    from midstream_runtime.pool import KvPool

    return KvPool(LAYOUT)


def other_mapping(pool: Any) -> PoolView:
    return PoolView(memoryview(mmap.mmap(pool.fd, 0)))


def test_header_tells_the_layout_to_whoever_maps_the_fd(pool: Any) -> None:
    view = other_mapping(pool)
    assert view.layout == LAYOUT
    assert LAYOUT.slot_bytes == 8192
    assert LAYOUT.data_offset % mmap.PAGESIZE == 0
    assert len(view.slot(7)) == LAYOUT.slot_bytes
    assert os.fstat(pool.fd).st_size == LAYOUT.total_bytes


def test_fd_can_neither_shrink_nor_grow(pool: Any) -> None:
    for size in (0, LAYOUT.total_bytes - 1, LAYOUT.total_bytes + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(pool.fd, size)
    assert fcntl.fcntl(pool.fd, 1034) & 7 == 7


def test_pool_fingerprint_changes_with_whatever_changes_a_slot_s_meaning() -> None:
    base = vars(LAYOUT)
    changes = {
        "block_tokens": 32,
        "layers": 3,
        "dtype": "bfloat16",
        "model_fingerprint": "cd" * 16,
        "head_dim": 8,
    }
    prints = {PoolLayout(**{**base, name: value}).fingerprint for name, value in changes.items()}
    assert len(prints | {LAYOUT.fingerprint}) == len(changes) + 1
    assert PoolLayout(**{**base, "slots": 9}).fingerprint == LAYOUT.fingerprint


def test_damaged_header_is_refused() -> None:
    good = LAYOUT.pack()[: HEADER.size]
    assert PoolLayout.unpack(good, LAYOUT.total_bytes) == LAYOUT
    for at in range(HEADER.size):
        for flip in (0x01, 0x80, 0xFF):
            bad = bytearray(good)
            bad[at] ^= flip
            try:
                assert PoolLayout.unpack(bytes(bad), LAYOUT.total_bytes) == LAYOUT, f"byte {at} is not checked"
            except PoolLayoutError:
                continue
            pytest.fail(f"byte {at} can be changed unseen")
    with pytest.raises(PoolLayoutError):
        PoolLayout.unpack(good, LAYOUT.total_bytes - 1)
    with pytest.raises(PoolLayoutError):
        PoolLayout.unpack(b"", 0)


def test_torch_rows_are_the_shared_bytes(pool: Any, torch: ModuleType) -> None:
    view = other_mapping(pool)
    rows = pool.rows()
    rows[0] = 1.0
    assert bytes(view.slot(0)[:4]) == struct.pack("<ee", 1.0, 1.0)
    view.slot(0)[:4] = struct.pack("<ee", 2.0, 3.0)
    assert rows[0, :2].tolist() == [2.0, 3.0]


def test_only_reserved_slots_are_adopted_and_only_once(pool: Any) -> None:
    own, reserved = pool.allocate(2), pool.reserve(2)
    view = other_mapping(pool)
    assert [view.info(slot).state for slot in own + reserved] == [SlotState.OPEN] * 2 + [SlotState.RESERVED] * 2
    for slots in (own, [reserved[0]] * 2, [reserved[0], 7], [99]):
        with pytest.raises(Final, match="kv_not_reserved"):
            pool.adopt(slots)
    pool.adopt(reserved)
    with pytest.raises(Final, match="kv_not_reserved"):
        pool.adopt(reserved)
    pool.release_reserved(own + reserved)
    assert pool.free_slots == 4


def test_full_pool_gives_nothing_and_says_so(pool: Any) -> None:
    with pytest.raises(Retryable, match="pool_full"):
        pool.reserve(9)
    assert pool.free_slots == 8


def test_freed_slots_are_wiped_and_have_another_epoch(pool: Any) -> None:
    (slot,) = pool.allocate(1)
    view = other_mapping(pool)
    view.slot(slot)[:] = b"\x11" * LAYOUT.slot_bytes
    pool.seal(slot, ROOT_HASH, [1] * 16)
    before = view.info(slot)
    pool.release([slot])
    after = view.info(slot)
    assert after.state == SlotState.FREE
    assert after.epoch != before.epoch
    assert after.block_hash == ROOT_HASH
    assert not any(view.slot(slot))


def test_sealed_block_has_its_content_s_name_and_checksum(pool: Any) -> None:
    (slot,) = pool.allocate(1)
    pool.rows()[0] = 1.5
    name = pool.seal(slot, ROOT_HASH, list(range(16)))
    info = other_mapping(pool).info(slot)
    assert (info.state, info.filled, info.block_hash) == (SlotState.SEALED, 16, name)
    data, quarter = bytes(pool.view.slot(slot)), LAYOUT.slot_bytes // 4
    quarters = (zlib.crc32(data[at : at + quarter]) for at in range(0, len(data), quarter))
    assert info.checksum == struct.pack("<4I", *quarters)


def test_block_hash_is_the_canonical_cbor_chain() -> None:
    ids = [0, 23, 24, 255, 256, 65535, 65536, 1 << 32]
    expected = (
        b"\x83\x58\x20" + bytes(32) + b"\x88"
        b"\x00\x17\x18\x18\x18\xff\x19\x01\x00\x19\xff\xff\x1a\x00\x01\x00\x00\x1b\x00\x00\x00\x01\x00\x00\x00\x00"
        b"\xf6"
    )  # fmt: skip
    assert block_hash(ROOT_HASH, ids) == hashlib.sha256(expected).digest()
    assert block_hash(block_hash(ROOT_HASH, ids), ids) != block_hash(ROOT_HASH, ids)


def _write_a_block(pool: Any) -> None:
    """One life of a block, its data in two halves: taken, filled, sealed, freed, wiped, taken and filled again."""
    half = LAYOUT.slot_bytes // 2
    for fill in (b"\x11", b"\x22"):
        (slot,) = pool.allocate(1)
        pool.view.slot(slot)[:half] = fill * half
        pool.view.slot(slot)[half:] = fill * half
        pool.seal(slot, ROOT_HASH, [1] * 16)
        if fill == b"\x11":
            pool.release([slot])


class Writer:
    """A process that writes a block, one line of source at a time: `step` lets it go on to the next line."""

    def __init__(self, pool: Any) -> None:
        go_out, self._go = os.pipe()
        self._told, told_in = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go)
            try:
                self._run(pool, go_out, told_in)
            finally:
                os._exit(1)
        os.close(go_out)
        os.close(told_in)
        self.running = bool(os.read(self._told, 1))

    @staticmethod
    def _run(pool: Any, go: int, told: int) -> None:
        traced = {_write_a_block.__code__.co_filename, type(pool)._write.__code__.co_filename}

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if frame.f_code.co_filename not in traced:
                return None
            if event == "line":
                os.write(told, b".")
                if not os.read(go, 1):
                    os._exit(0)  # the test has gone
            return trace

        sys.settrace(trace)
        _write_a_block(pool)
        sys.settrace(None)
        os._exit(0)

    def step(self) -> None:
        os.write(self._go, b".")
        self.running = bool(os.read(self._told, 1))

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._go)
        os.close(self._told)


def entry_of(view: PoolView, slot: int) -> SlotInfo | None:
    """The slot's entry; None while the writer is (or was killed) in the middle of it."""
    at = HEADER_BYTES + slot * ENTRY_BYTES
    return None if SEQUENCE.unpack_from(view.memory, at)[0] % 2 else view.info(slot)


def may_be_taken(before: SlotInfo | None, copy: bytes, after: SlotInfo | None) -> bool:
    """The rule for readers: an even sequence, state SEALED, and after the copy the same entry and the checksum."""
    return (
        before is not None
        and before.state == SlotState.SEALED
        and before == after
        and checksum(copy) == before.checksum
    )


@pytest.fixture
def one_slot(torch: ModuleType) -> Iterator[Callable[[], tuple[Any, PoolView]]]:
    """Makes pools of one slot, so that a block's second life is in the place of its first; closes them."""
    from midstream_runtime.pool import KvPool

    pools: list[Any] = []

    def make() -> tuple[Any, PoolView]:
        pools.append(KvPool(replace(LAYOUT, slots=1), populate=False))
        return pools[-1], other_mapping(pools[-1])

    yield make
    for pool in pools:
        pool.close()


def test_a_writer_killed_at_any_line_leaves_no_torn_block_that_a_reader_takes(
    one_slot: Callable[[], tuple[Any, PoolView]],
) -> None:
    """SIGKILL before each line of the writer in turn: what it leaves is whole, or is not taken."""
    lines, good, torn = 0, 0, 0
    while True:
        pool, view = one_slot()
        writer = Writer(pool)
        for _ in range(lines):
            writer.step()
        ended = not writer.running
        writer.kill()
        entry, copy = entry_of(view, 0), bytes(view.slot(0))
        torn += entry is None
        if may_be_taken(entry, copy, entry):
            assert copy in (b"\x11" * LAYOUT.slot_bytes, b"\x22" * LAYOUT.slot_bytes), (
                f"a torn block was taken, writer killed at its line {lines}"
            )
            good += 1
        if ended:
            break
        lines += 1
    assert torn >= 6, "three entries are written, and each is torn before at least two of its lines"
    assert good >= 2, "after the first seal, and at the end"


def test_a_reader_whose_copy_takes_long_never_takes_a_block_that_changed_meanwhile(
    one_slot: Callable[[], tuple[Any, PoolView]],
) -> None:
    """A reader that looked at the entry before line i and copies before line j, for all i <= j."""
    pool, view = one_slot()
    writer = Writer(pool)
    seen: list[SlotInfo | None] = []
    good, changed = 0, 0
    while writer.running:
        after, copy = entry_of(view, 0), bytes(view.slot(0))
        seen.append(after)
        for before in seen:
            sealed = before is not None and before.state == SlotState.SEALED
            if may_be_taken(before, copy, after):
                assert copy in (b"\x11" * LAYOUT.slot_bytes, b"\x22" * LAYOUT.slot_bytes)
                good += 1
            elif sealed:
                changed += 1
        writer.step()
    writer.kill()
    assert good > 0
    assert changed > 0, "no sealed block was freed behind the reader's back: the test sees nothing"


def test_contract_needs_neither_torch_nor_the_engine() -> None:
    source = Path(__file__).resolve().parents[3] / "runtime/midstream_runtime/contract/pool.py"
    assert "torch" not in {line.split()[1] for line in source.read_text().splitlines() if line.startswith("import ")}


def test_much_that_is_freed_is_wiped_bit_by_bit_and_before_anybody_has_it(torch: ModuleType) -> None:
    from midstream_runtime.pool import WIPED_AT_ONCE_BYTES, KvPool

    layout = replace(LAYOUT, slots=12, layers=128, head_dim=128)
    assert layout.slot_bytes * 4 == WIPED_AT_ONCE_BYTES
    pool = KvPool(layout)
    slots = pool.allocate(12)
    for slot in slots:
        pool.view.slot(slot)[:] = bytes([1]) * layout.slot_bytes
    pool.release(slots)

    def wiped() -> int:
        return sum(not any(pool.view.slot(slot)[::4096]) for slot in slots)

    assert (wiped(), pool.free_slots, pool.unwiped) == (4, 12, True)
    assert {pool.view.info(slot).state for slot in slots} == {SlotState.FREE}
    pool.wipe_some()
    assert wiped() == 8
    assert pool.allocate(12) == slots and (wiped(), pool.unwiped) == (12, False)
