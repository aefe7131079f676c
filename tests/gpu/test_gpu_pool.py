"""KV between a device and the pool: out by one stream, in by another, by way of slots that agents read and write."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from midstream_runtime.contract.pool import PoolLayout

SIZES = [512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20]
COPIED_BYTES, TURNS = 256 << 20, 7


def layout_of(slot_bytes: int, slots: int) -> PoolLayout:
    """float16, 16 tokens a slot."""
    return PoolLayout(slots, 16, slot_bytes // 65_536, 8, 128, "float16", "gpu-test".ljust(32, "0"))


def blocks_on(torch: ModuleType, device: Any, count: int, elements: int) -> Any:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, elements, generator=generator).to(device, torch.float16)


def mover_over(pool: Any, device: Any, **options: Any) -> Any:
    from midstream_runtime.device import Mover

    return Mover(pool.rows().view(pool.layout.slots, -1), device, **options)


@pytest.mark.parametrize("chunk_bytes", [1000, 64 << 10, 4 << 20])
def test_blocks_come_back_as_they_went(torch: ModuleType, device: Any, chunk_bytes: int) -> None:
    """Slots in any order, in runs and alone, pieces smaller and larger than a slot."""
    from midstream_runtime.pool import KvPool

    pool = KvPool(layout_of(128 << 10, 16))
    mover = mover_over(pool, device, chunk_bytes=chunk_bytes)
    slots = [3, 4, 5, 9, 2, 1, 0, 15]
    blocks = blocks_on(torch, device, len(slots), pool.layout.slot_elements)
    mover.save(blocks, slots)
    mover.wait()
    for slot, block in zip(slots, blocks.cpu(), strict=True):
        assert bytes(pool.view.slot(slot)) == block.numpy().tobytes()
    back = torch.zeros_like(blocks)
    mover.load(slots, back)
    assert torch.equal(back, blocks)
    places = list(range(len(slots)))[::-1]
    mover.load(slots, back, places)
    mover.wait()
    assert torch.equal(back, blocks.flip(0))
    assert not any(bytes(pool.view.slot(6))), "no other slot was written"
    pool.close()


def test_a_copy_waits_for_the_work_before_it(torch: ModuleType, cuda: Any) -> None:
    """The model's stream is still busy with the block when the copy is asked for."""
    from midstream_runtime.pool import KvPool

    pool = KvPool(layout_of(1 << 20, 4))
    mover = mover_over(pool, cuda)
    large = torch.randn(4096, 4096, device=cuda)
    blocks = torch.zeros(1, pool.layout.slot_elements, dtype=torch.float16, device=cuda)
    for _ in range(20):
        large = (large @ large).clamp(-1, 1)
    blocks.fill_(1.0)
    blocks.add_(large.flatten()[0].to(torch.float16) * 0 + 2.0)
    mover.save(blocks, [1])
    mover.wait()
    assert torch.equal(pool.rows().view(4, -1)[1], torch.full_like(blocks[0], 3.0).cpu())
    pool.close()


def test_the_pool_is_registered_for_dma(torch: ModuleType, cuda: Any) -> None:
    from midstream_runtime.device import pin, unpin
    from midstream_runtime.pool import KvPool

    pool = KvPool(layout_of(1 << 20, 8))
    assert not pool.rows().is_pinned()
    assert pin(pool.rows())
    assert pool.rows().is_pinned()
    unpin(pool.rows())
    assert not pool.rows().is_pinned()
    pool.close()


def test_without_a_gpu_nothing_is_registered(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from midstream_runtime.device import pin

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pin(torch.zeros(4096)) is False


@pytest.mark.parametrize("slot_bytes", SIZES)
@pytest.mark.parametrize("way", ["d2h", "h2d"])
def test_the_rate_of_copies_is_written_down(
    torch: ModuleType, cuda: Any, figures: list[dict[str, Any]], slot_bytes: int, way: str
) -> None:
    """Slots of the pool against one plain pinned buffer of the same bytes, in turns; no figure is asserted."""
    from midstream_runtime.device import pin, unpin
    from midstream_runtime.pool import KvPool

    count = COPIED_BYTES // slot_bytes
    pool = KvPool(layout_of(slot_bytes, count))
    assert pin(pool.rows())
    mover = mover_over(pool, cuda)
    blocks = blocks_on(torch, cuda, 1, pool.layout.slot_elements).expand(count, -1).contiguous()
    plain = torch.empty(blocks.shape, dtype=torch.float16, pin_memory=True)
    slots = [n for pair in zip(range(count // 2), range(count // 2, count), strict=True) for n in pair]  # no runs

    def through_the_pool() -> None:
        if way == "d2h":
            mover.save(blocks, slots)
        else:
            mover.load(slots, blocks)
        mover.wait()

    def at_once() -> None:
        to, source = (plain, blocks) if way == "d2h" else (blocks, plain)
        to.copy_(source, non_blocking=True)
        torch.cuda.synchronize()

    rates: dict[Callable[[], None], list[float]] = {through_the_pool: [], at_once: []}
    for turn in range(TURNS + 1):
        for copy, found in rates.items():
            torch.cuda.synchronize()
            began = time.perf_counter()
            copy()
            if turn:  # the first one warms up
                found.append(COPIED_BYTES / (time.perf_counter() - began) / 1e9)
    ours, theirs = (statistics.median(found) for found in rates.values())
    figures.append({
        "name": f"gpu_{way}_{slot_bytes >> 10}k", "unit": "of a plain pinned copy", "value": round(ours / theirs, 3),
        "goal": 0.9, "better": "higher", "n": TURNS, "p50": round(ours / theirs, 3),
        "p99": round(min(rates[through_the_pool]) / theirs, 3), "reference": "plain pinned copy, GB/s",
        "reference_value": round(theirs, 3),
    })  # fmt: skip
    unpin(pool.rows())
    pool.close()
