"""Sealed blocks with several owners, the cache of those without one, and readers beside a writer that is killed."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import time
from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
from midstream_runtime.contract.errors import Final, Retryable
from midstream_runtime.contract.pool import (
    ENTRY_BYTES,
    HEADER_BYTES,
    ROOT_HASH,
    SEQUENCE,
    PoolLayout,
    PoolView,
    SlotState,
    TornEntry,
    block_hash,
    checksum,
)

LAYOUT = PoolLayout(
    slots=8, block_tokens=16, layers=4, kv_heads=2, head_dim=16, dtype="float16", model_fingerprint="ab" * 16
)
IDS = list(range(16))


@pytest.fixture
def make(torch: ModuleType) -> Any:
    from midstream_runtime.pool import KvPool

    return KvPool


def other_mapping(pool: Any) -> PoolView:
    return PoolView(memoryview(mmap.mmap(pool.fd, 0)))


def sealed(pool: Any, first_id: int = 0) -> int:
    (slot,) = pool.allocate(1)
    pool.view.slot(slot)[:] = bytes([first_id % 255 + 1]) * LAYOUT.slot_bytes
    pool.seal(slot, ROOT_HASH, [first_id + i for i in range(16)])
    return int(slot)


def test_a_sealed_block_lives_as_long_as_its_last_owner(make: Any) -> None:
    pool = make(LAYOUT)
    slot, view = sealed(pool), other_mapping(pool)
    pool.share([slot, slot])
    for _ in range(2):
        pool.release([slot])
        assert view.take(slot) is not None
    pool.release([slot])
    assert view.take(slot) is None and view.info(slot).state == SlotState.FREE
    assert pool.free_slots == 8
    with pytest.raises(ValueError, match="more often"):
        pool.release([slot])


@pytest.mark.parametrize("state", ["free", "open", "reserved"])
def test_only_sealed_blocks_are_shared_and_all_or_none(make: Any, state: str) -> None:
    pool = make(LAYOUT)
    good = sealed(pool)
    other = {"free": 7, "open": pool.allocate(1)[0], "reserved": pool.reserve(1)[0]}[state]
    with pytest.raises(Final, match="kv_not_reserved"):
        pool.share([good, other])
    pool.release([good])
    assert other_mapping(pool).info(good).state == SlotState.FREE, "the refused call owns nothing"


def test_a_landed_block_is_found_by_its_hash_and_a_freed_one_is_not(make: Any) -> None:
    pool = make(LAYOUT)
    (slot,) = pool.reserve(1)
    pool.view.slot(slot)[:] = b"\x07" * LAYOUT.slot_bytes
    name = block_hash(ROOT_HASH, IDS)
    assert pool.find(name) is None
    pool.land(slot, name, checksum(pool.view.slot(slot)))
    assert pool.find(name) == slot
    taken = other_mapping(pool).take(slot)
    assert taken is not None and taken[0].block_hash == name and taken[0].filled == 16
    with pytest.raises(Final, match="kv_not_reserved"):
        pool.land(slot, name, bytes(16))
    with pytest.raises(Final, match="kv_not_reserved"):
        pool.adopt([slot])
    pool.release([slot])
    assert pool.find(name) is None


def test_what_nobody_owns_is_kept_while_there_is_room_and_the_oldest_goes_first(make: Any) -> None:
    pool = make(LAYOUT, cached_slots=3)
    slots = [sealed(pool, 100 * n) for n in range(5)]
    names = [pool.name_of(slot) for slot in slots]
    pool.release(slots)
    assert pool.free_slots == 8
    assert [pool.find(name) is not None for name in names] == [False, False, True, True, True]
    pool.share([slots[2]])  # somebody reads the oldest: it is no cache any more
    taken = pool.allocate(7)
    assert slots[2] not in taken
    assert [pool.find(name) is not None for name in names] == [False, False, True, False, False]
    with pytest.raises(Retryable, match="pool_full"):
        pool.allocate(1)
    assert all(not any(pool.view.slot(slot)) for slot in taken), "evicted blocks are wiped"


def test_two_slots_with_one_hash_are_both_released_without_a_trace(make: Any) -> None:
    pool = make(LAYOUT)
    a, b = sealed(pool), sealed(pool)
    name = pool.name_of(a)
    assert name == pool.name_of(b) and pool.find(name) == a
    pool.release([b])
    assert pool.find(name) == a
    pool.release([a])
    assert pool.find(name) is None


def test_sealing_a_shared_block_again_does_not_touch_its_entry(make: Any) -> None:
    pool = make(LAYOUT)
    slot = sealed(pool)
    at = HEADER_BYTES + slot * ENTRY_BYTES
    before = bytes(pool.view.memory[at : at + ENTRY_BYTES])
    pool.seal(slot, ROOT_HASH, IDS)
    assert bytes(pool.view.memory[at : at + ENTRY_BYTES]) == before


def test_an_entry_that_stays_odd_is_torn_and_the_next_writer_repairs_it(make: Any) -> None:
    pool = make(LAYOUT)
    slot, view = sealed(pool), other_mapping(pool)
    at = HEADER_BYTES + slot * ENTRY_BYTES
    (sequence,) = SEQUENCE.unpack_from(pool.view.memory, at)
    SEQUENCE.pack_into(pool.view.memory, at, sequence + 1)
    with pytest.raises(TornEntry):
        view.info(slot)
    assert view.take(slot) is None
    pool.release([slot])
    assert view.info(slot).state == SlotState.FREE


def test_a_block_with_a_flipped_byte_is_not_taken_and_without_the_checks_it_is(make: Any) -> None:
    pool = make(LAYOUT)
    slot, view = sealed(pool), other_mapping(pool)
    view.slot(slot)[LAYOUT.slot_bytes // 2] ^= 1
    assert view.take(slot) is None
    taken = view.take(slot, verify=False)
    assert taken is not None and len(set(taken[1])) == 2


KILLS = 1000
BIG = replace(LAYOUT, slots=2, layers=16)


def write_for_ever(pool: Any, seed: int, started: int) -> None:
    """Blocks of one byte's repetition, written in pieces, sealed, read by others, freed."""
    rng = random.Random(seed)
    size, step = BIG.slot_bytes, BIG.slot_bytes // 4
    os.write(started, b".")
    while True:
        (slot,) = pool.allocate(1)
        fill = bytes([rng.randrange(1, 256)])
        place = pool.view.slot(slot)
        for at in range(0, size, step):
            place[at : at + step] = fill * step
        pool.seal(slot, ROOT_HASH, [rng.randrange(1 << 16) for _ in range(16)])
        pool.release([slot])


def look(view: PoolView, seen: Counter[str], *, verify: bool) -> None:
    """A reader: whole blocks are one byte's repetition."""
    for slot in range(BIG.slots):
        taken = view.take(slot, verify=verify)
        if taken is None:
            seen["not taken"] += 1
        else:
            seen["whole" if len(set(taken[1])) == 1 else "bad"] += 1


@pytest.mark.parametrize("verify", [True, False], ids=["checked", "control without the checks"])
def test_writers_killed_at_random_points_never_make_a_reader_see_a_bad_block(make: Any, verify: bool) -> None:
    """A thousand writers, each killed within a millisecond, while this process reads beside them and after. More of
    them where the machine is so busy that none of a thousand was killed in the middle of a block."""
    rng, seen, torn = random.Random(1), Counter[str](), 0
    pool = make(BIG)
    view = other_mapping(pool)
    wanted = KILLS if verify else KILLS // 10
    for number in range(10 * wanted):
        if number >= wanted and (seen["bad"] if not verify else seen["whole"] and seen["not taken"] and torn):
            break
        told, started = os.pipe()
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                write_for_ever(pool, number, started)
            os._exit(1)
        os.read(told, 1)
        deadline = time.monotonic() + rng.random() * 0.001
        while time.monotonic() < deadline:
            look(view, seen, verify=verify)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "the writer failed by itself"
        os.close(told)
        os.close(started)
        for slot in range(BIG.slots):
            (sequence,) = SEQUENCE.unpack_from(view.memory, HEADER_BYTES + slot * ENTRY_BYTES)
            torn += sequence % 2
        look(view, seen, verify=verify)
    pool.close()
    if not verify:
        assert seen["bad"] > 0, "torn blocks were there to be seen"
        return
    assert seen["bad"] == 0
    assert seen["whole"] > 0 and seen["not taken"] > 0 and torn > 0
