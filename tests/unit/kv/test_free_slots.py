"""What the planner is told of a pool's room: the agent counts by the pool's own index."""

from __future__ import annotations

import fcntl
import os

import pytest
from midstream_agent.kv import F_SEAL_SHRINK, Geometry, PoolView
from midstream_runtime.contract.errors import Final
from midstream_runtime.contract.pool import ENTRY, ENTRY_BYTES, PoolLayout, SlotState

F_ADD_SEALS = 1033
LAYOUT = PoolLayout(
    slots=12, block_tokens=4, layers=1, kv_heads=1, head_dim=4, dtype="float32", model_fingerprint="ab" * 16
)


def pool(states: list[SlotState], data_offset: int = LAYOUT.data_offset) -> PoolView:
    """A pool in these states, with the layout that engines write."""
    fd = os.memfd_create("pool", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, LAYOUT.total_bytes)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    for slot, state in enumerate(states):
        entry = ENTRY.pack(2, state, 0, 4, 1, b"\0" * 32, b"\0" * 16)
        os.pwrite(fd, entry, LAYOUT.index_offset + slot * ENTRY_BYTES)
    geometry = Geometry("f", LAYOUT.slots, LAYOUT.slot_bytes, data_offset, LAYOUT.block_tokens)
    return PoolView(fd, geometry, writable=False)


@pytest.mark.parametrize("used", [SlotState.OPEN, SlotState.SEALED, SlotState.RESERVED])
def test_only_slots_that_nobody_has_count(used: SlotState) -> None:
    view = pool([used, SlotState.FREE, used, used])
    assert view.free_slots() == LAYOUT.slots - 3
    view.close()


def test_a_pool_that_claims_no_room_for_its_index_is_refused() -> None:
    view = pool([], data_offset=LAYOUT.index_offset)
    with pytest.raises(Final, match="no room for its index"):
        view.free_slots()
    view.close()
