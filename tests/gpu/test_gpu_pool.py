"""KV between a device and the pool: out by one stream, in by another, by way of slots that agents read and write."""

from __future__ import annotations

import gc
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


@pytest.mark.parametrize("call", ["cuMemcpyBatchAsync_v2", "cuMemcpyBatchAsync", None])
def test_each_way_of_asking_the_driver_copies(
    torch: ModuleType, cuda: Any, monkeypatch: pytest.MonkeyPatch, call: str | None
) -> None:
    """A driver of CUDA 13 has them all; older ones lack the batches."""
    from midstream_runtime import device as module
    from midstream_runtime.pool import KvPool

    if call and not hasattr(module.driver(), call):
        pytest.skip(f"no {call} (probe: the driver's symbols)")
    monkeypatch.setattr(module, "batch_call", lambda: call)
    pool = KvPool(layout_of(512 << 10, 64))
    assert pool.pin()
    mover = mover_over(pool, cuda, chunk_bytes=200 << 10)
    blocks = blocks_on(torch, cuda, 33, pool.layout.slot_elements)
    slots, back = [*range(0, 64, 2), 63], torch.zeros_like(blocks)
    mover.save(blocks, slots)
    mover.wait()
    assert torch.equal(pool.rows().view(64, -1)[slots], blocks.cpu())
    mover.load(slots, back)
    assert torch.equal(back, blocks)
    mover.save(blocks[:1], [1])
    mover.save(blocks[:0], [])
    mover.wait()
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


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "forgotten"])
def test_the_pool_is_registered_for_dma(torch: ModuleType, cuda: Any, closed: bool) -> None:
    """Until it is closed, or the mapping goes: the same addresses can be had again by another pool."""
    from midstream_runtime.device import unpin
    from midstream_runtime.pool import KvPool

    pool = KvPool(layout_of(1 << 20, 8))
    rows = pool.rows()
    assert not rows.is_pinned()
    assert pool.pin()
    assert rows.is_pinned()
    address = rows.data_ptr()
    if closed:
        pool.close()
        assert not rows.is_pinned()
    else:
        del rows, pool
        gc.collect()
    with pytest.raises(RuntimeError, match="CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"):
        unpin(address)


def test_a_registration_that_fails_harms_nothing(torch: ModuleType, cuda: Any) -> None:
    """What torch does next does not raise it: it did, as CUDA's last error."""
    from midstream_runtime.device import pin
    from midstream_runtime.pool import KvPool

    pool = KvPool(layout_of(1 << 20, 8))
    assert pool.pin()
    assert not pin(pool.rows()), "registered already"
    assert torch.ones(4, device=cuda).sum().item() == 4
    pool.close()


def test_without_a_gpu_nothing_is_registered(torch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from midstream_runtime.device import pin

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pin(torch.zeros(4096)) is False


def test_blocks_of_another_kind_are_refused(torch: ModuleType, device: Any) -> None:
    """Bytes are copied as they are: float32 for float16 would write beside the slots."""
    from midstream_runtime.pool import KvPool

    pool = KvPool(layout_of(128 << 10, 4))
    mover = mover_over(pool, device)
    elements = pool.layout.slot_elements
    for wrong in (
        torch.zeros(1, elements, dtype=torch.float32, device=device),
        torch.zeros(1, elements // 2, dtype=torch.float16, device=device),
        torch.zeros(2, elements * 2, dtype=torch.float16, device=device)[:, ::2],
    ):
        with pytest.raises(ValueError, match="copied as they are"):
            mover.save(wrong, [0])
        with pytest.raises(ValueError, match="copied as they are"):
            mover.load([0], wrong)
    pool.close()


@pytest.mark.parametrize("slot_bytes", SIZES)
@pytest.mark.parametrize("way", ["d2h", "h2d"])
def test_the_rate_of_copies_is_written_down(
    torch: ModuleType, cuda: Any, figures: list[dict[str, Any]], slot_bytes: int, way: str
) -> None:
    """Slots of the pool against one plain pinned buffer of the same bytes, in turns; no figure is asserted."""
    from midstream_runtime.pool import KvPool

    count = COPIED_BYTES // slot_bytes
    pool = KvPool(layout_of(slot_bytes, count))
    assert pool.pin()
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
    pool.close()


def test_the_time_of_a_short_contexts_kv_is_written_down(
    torch: ModuleType, cuda: Any, figures: list[dict[str, Any]]
) -> None:
    """2.4 MB out of one engine's memory and into another's, as one of the first public systems reports it (7.5 ms)."""
    from midstream_runtime.pool import KvPool

    pool = KvPool(layout_of(128 << 10, 32))
    assert pool.pin()
    mover = mover_over(pool, cuda)
    count = 2_400_000 // pool.layout.slot_bytes + 1
    blocks, back = (torch.randn(count, pool.layout.slot_elements, device=cuda).half() for _ in range(2))
    slots = list(range(count))[::-1]
    found = []
    for _ in range(200):
        torch.cuda.synchronize()
        began = time.perf_counter()
        mover.save(blocks, slots)
        mover.wait()
        mover.load(slots, back)
        mover.wait()
        found.append((time.perf_counter() - began) * 1e3)
    assert torch.equal(back, blocks)
    found = sorted(found[10:])
    figures.append({
        "name": "gpu_out_and_in_2400k", "unit": "ms", "value": round(statistics.median(found), 3), "goal": 7.5,
        "better": "lower", "n": len(found), "p50": round(statistics.median(found), 3),
        "p99": round(found[len(found) * 99 // 100], 3), "reference": "a public system's report, ms",
        "reference_value": 7.5,
    })  # fmt: skip
    pool.close()
