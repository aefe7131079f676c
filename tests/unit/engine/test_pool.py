"""The KV pool: layout that agents rely on, ownership of slots, readers beside a writer."""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import random
import signal
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from midstream_runtime.contract.errors import Final, Retryable
from midstream_runtime.contract.pool import (
    HEADER,
    HEADER_BYTES,
    ROOT_HASH,
    PoolLayout,
    PoolLayoutError,
    PoolView,
    SlotState,
    block_hash,
    checksum,
)

LAYOUT = PoolLayout(
    slots=8, block_tokens=16, layers=4, kv_heads=2, head_dim=16, dtype="float16", model_fingerprint="ab" * 16
)
KILLS = int(os.environ.get("MIDSTREAM_KILLS", "60"))


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
                assert PoolLayout.unpack(bytes(bad), LAYOUT.total_bytes) == LAYOUT, (
                    f"byte {at} is not checked"
                )
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
    assert [view.info(slot).state for slot in own + reserved] == [SlotState.OPEN] * 2 + [
        SlotState.RESERVED
    ] * 2
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
    assert info.checksum == hashlib.blake2b(pool.view.slot(slot), digest_size=16).digest()


def test_block_hash_is_the_canonical_cbor_chain() -> None:
    ids = [0, 23, 24, 255, 256, 65535, 65536, 1 << 32]
    expected = (
        b"\x83\x58\x20" + bytes(32) + b"\x88"
        b"\x00\x17\x18\x18\x18\xff\x19\x01\x00\x19\xff\xff\x1a\x00\x01\x00\x00\x1b\x00\x00\x00\x01\x00\x00\x00\x00"
        b"\xf6"
    )  # fmt: skip
    assert block_hash(ROOT_HASH, ids) == hashlib.sha256(expected).digest()
    assert block_hash(block_hash(ROOT_HASH, ids), ids) != block_hash(ROOT_HASH, ids)


def _scribble(pool: Any) -> None:
    """Endless writer: whole slots of one byte, sealed, freed."""
    rng = random.Random(os.getpid())
    while True:
        (slot,) = pool.allocate(1)
        pool.view.slot(slot)[:] = bytes([rng.randrange(256)]) * LAYOUT.slot_bytes
        pool.seal(slot, ROOT_HASH, [1] * 16)
        if pool.free_slots == 0:
            pool.release(list(range(LAYOUT.slots)))


def test_reader_never_takes_a_torn_block_when_the_writer_is_killed(torch: ModuleType) -> None:
    """The rule for readers: an even sequence, state SEALED, and after the copy the same entry and the
    checksum."""
    from midstream_runtime.pool import KvPool

    rng, good, torn = random.Random(1), 0, 0
    for _ in range(KILLS):
        pool = KvPool(LAYOUT, populate=False)
        child = os.fork()
        if child == 0:
            try:
                _scribble(pool)
            finally:
                os._exit(1)
        view = other_mapping(pool)
        for _ in range(rng.randrange(20, 200)):
            slot = rng.randrange(LAYOUT.slots)
            at = HEADER_BYTES + slot * 64
            if struct.unpack_from("<I", view.memory, at)[0] % 2:
                torn += 1
                continue
            before = view.info(slot)
            copy = bytes(view.slot(slot))
            if before.state != SlotState.SEALED:
                continue
            if checksum(copy) != before.checksum:
                torn += 1
                continue
            assert len(set(copy)) == 1, "a torn block was taken for a good one"
            good += 1
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pool.close()
    print(f"good {good}, torn and rejected {torn}")
    assert good > 0
    assert torn > 0, "the writer never was in the middle of anything: the test sees nothing"


def test_contract_needs_neither_torch_nor_the_engine() -> None:
    source = Path(__file__).resolve().parents[3] / "runtime/midstream_runtime/contract/pool.py"
    assert "torch" not in {
        line.split()[1] for line in source.read_text().splitlines() if line.startswith("import ")
    }
