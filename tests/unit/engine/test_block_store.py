"""The pool behind vLLM's connector: blocks by hash, pins, eviction, reservations; and over pool.sock."""

from __future__ import annotations

import asyncio
import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from midstream_runtime.contract.errors import Final, Retryable
from midstream_runtime.contract.pool import ROOT_HASH, PoolLayout, PoolView, SlotState, block_hash
from midstream_runtime.engine.vllm.kvpool import PoolClient

if TYPE_CHECKING:
    from midstream_runtime.vllm_connector.store import BlockStore

SIZE, SLOTS = 4, 6
LAYOUT = PoolLayout(SLOTS, SIZE, layers=2, kv_heads=1, head_dim=2, dtype="float32", model_fingerprint="ab" * 16)
IDS = list(range(100, 100 + 5 * SIZE))


@pytest.fixture
def store(torch: ModuleType) -> BlockStore:
    from midstream_runtime.vllm_connector.store import BlockStore

    return BlockStore(LAYOUT)


def save(store: BlockStore, ids: list[int], mark: int = 1) -> list[int]:
    """As vLLM fills the blocks of a request; its slots."""
    slots = []
    for at, name in enumerate(store.chain(ids)):
        slot = store.begin(name)
        if slot is not None:
            store.pool.view.slot(slot)[:] = bytes([mark]) * LAYOUT.slot_bytes
            store.seal(slot, store.chain(ids)[at - 1] if at else ROOT_HASH, ids[at * SIZE : (at + 1) * SIZE])
            slots.append(slot)
    return slots


def test_a_block_is_found_by_the_ids_that_lead_to_it(store: BlockStore) -> None:
    slots = save(store, IDS[: 3 * SIZE])
    hashes = store.chain(IDS)
    assert hashes[0] == block_hash(ROOT_HASH, IDS[:SIZE])
    assert store.hits(hashes) == 3
    assert store.pin(hashes) == slots
    assert store.hits(store.chain([0, *IDS])) == 0, "the same block behind other ids is another one"
    assert [store.pool.view.info(slot).state for slot in slots] == [SlotState.SEALED] * 3


def test_a_block_that_is_there_is_not_saved_again(store: BlockStore) -> None:
    save(store, IDS[:SIZE])
    assert save(store, IDS[:SIZE]) == []
    assert store.stats()["blocks"] == 1


def test_the_end_of_the_chain_that_was_used_longest_ago_makes_room(store: BlockStore) -> None:
    save(store, IDS[: 3 * SIZE])
    other = list(range(3 * SIZE))
    save(store, other)
    store.unpin(store.pin(store.chain(IDS[: 3 * SIZE])))
    save(store, [7] * SIZE)
    assert (store.hits(store.chain(IDS[: 3 * SIZE])), store.hits(store.chain(other))) == (3, 2)
    save(store, [8] * 2 * SIZE)
    assert (store.hits(store.chain(IDS[: 3 * SIZE])), store.hits(store.chain(other))) == (3, 0)


def test_a_pinned_block_stays(store: BlockStore) -> None:
    save(store, IDS[: 2 * SIZE])
    pinned = store.pin(store.chain(IDS[: 2 * SIZE]))
    reserved = store.reserve(SLOTS - 2)
    with pytest.raises(Retryable, match="pool_full"):
        store.reserve(1)
    assert store.begin(b"x" * 32) is None and store.stats()["skipped_full"] == 1
    store.unpin(pinned)
    reserved += store.reserve(2)
    assert store.hits(store.chain(IDS[:SIZE])) == 0
    assert sorted(reserved) == list(range(SLOTS))


def test_what_an_agent_wrote_is_found_up_to_the_first_block_that_did_not_come(store: BlockStore) -> None:
    slots = store.reserve(3)
    assert store.publish([slots[0], None, slots[2]], IDS) == 1
    assert store.hits(store.chain(IDS)) == 1
    assert store.stats()["free_slots"] == SLOTS - 2, "one found, one still reserved"


def test_a_slot_that_nobody_reserved_is_not_published(store: BlockStore) -> None:
    with pytest.raises(Final, match="kv_not_reserved"):
        store.publish([3], IDS)


def test_a_block_that_came_twice_is_kept_once(store: BlockStore) -> None:
    save(store, IDS[:SIZE])
    (slot,) = store.reserve(1)
    store.publish([slot], IDS[:SIZE])
    assert (store.stats()["blocks"], store.stats()["free_slots"]) == (1, SLOTS - 1)


def write(store: BlockStore, slot: int, mark: int) -> bytes:
    """As an agent fills a reserved slot; its checksum."""
    store.pool.view.slot(slot)[:] = bytes([mark]) * LAYOUT.slot_bytes
    return store.pool.view.actual_checksum(slot)


def test_blocks_that_landed_are_found_by_their_names_and_go_when_nobody_wants_them(store: BlockStore) -> None:
    hashes, slots = store.chain(IDS[: 3 * SIZE]), store.reserve(3)
    store.land(slots, [(name, write(store, slot, 1)) for name, slot in zip(hashes, slots, strict=True)])
    assert store.have([*hashes, b"x" * 32]) == [*slots, -1]
    store.unpin(slots)
    with pytest.raises(Retryable, match="pool_full"):
        store.reserve(4)
    store.unpin(slots)
    assert store.publish(slots, IDS) == 3, "landed slots are named again by the answer that they came with"
    store.reserve(4)
    assert store.hits(hashes) == 2, "the end of the chain went first"


def test_an_answer_of_landed_and_reserved_slots_is_whole(store: BlockStore) -> None:
    hashes, (first, tail) = store.chain(IDS[: 2 * SIZE]), store.reserve(2)
    store.land([first], [(hashes[0], write(store, first, 1))])
    assert store.publish([first, tail], IDS[: 2 * SIZE]) == 2
    assert store.pin(hashes) == [first, tail]


def test_a_landed_block_of_another_answer_ends_what_can_be_used(store: BlockStore) -> None:
    other, slots = store.chain([9] * SIZE), store.reserve(3)
    store.land([slots[1]], [(other[0], write(store, slots[1], 1))])
    assert store.publish(slots, IDS[: 3 * SIZE]) == 1
    assert store.hits(store.chain(IDS)) == 1
    assert store.stats()["free_slots"] == SLOTS - 2, "the third slot is free again"


def test_a_block_that_landed_beside_its_like_is_free_once_its_job_lets_go(store: BlockStore) -> None:
    (name,), (slot,) = store.chain(IDS[:SIZE]), store.reserve(1)
    (ours,) = save(store, IDS[:SIZE])
    store.land([slot], [(name, write(store, slot, 1))])
    assert store.pin([name]) == [ours]
    store.unpin([ours])
    assert store.publish([slot], IDS[:SIZE]) == 1
    store.unpin([slot])
    assert (store.stats()["blocks"], store.stats()["free_slots"], store.stats()["pinned"]) == (1, SLOTS - 1, 0)


def test_of_two_like_blocks_the_one_that_is_pinned_outlives_the_other(store: BlockStore) -> None:
    (name,), (slot,) = store.chain(IDS[:SIZE]), store.reserve(1)
    save(store, IDS[:SIZE])
    store.land([slot], [(name, write(store, slot, 1))])
    store.free(store.reserve(SLOTS - 1))
    assert store.hits([name]) == 0, "the other was evicted"
    store.unpin([slot])
    assert store.pin([name]) == [slot]


@pytest.fixture
def served(store: BlockStore, tmp_path: Path) -> Iterator[tuple[BlockStore, str]]:
    from midstream_runtime.vllm_connector.share import PoolServer

    path = str(tmp_path / "pool.sock")
    server = PoolServer(store, {"fingerprint": "f", "context": 64, "pool": {"slots": SLOTS}}, path)
    yield store, path
    server.close()


async def settled(store: BlockStore, **wanted: int) -> None:
    async with asyncio.timeout(10):
        while not wanted.items() <= store.stats().items():
            await asyncio.sleep(0.01)


def test_the_gateway_maps_the_pool_and_what_it_holds_ends_with_its_connection(served: tuple[BlockStore, str]) -> None:
    store, path = served
    save(store, IDS[: 2 * SIZE], mark=7)

    async def run() -> None:
        client = await PoolClient.connect(path)
        assert client.info["context"] == 64
        view = PoolView(memoryview(mmap.mmap(client.fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)))
        slots = await client.pin(store.chain(IDS))
        assert [bytes(view.slot(slot)[:1]) for slot in slots] == [b"\7", b"\7"]
        reserved = await client.reserve(3)
        assert (store.stats()["pinned"], store.stats()["free_slots"]) == (2, 1)
        with pytest.raises(Final, match="kv_not_reserved"):
            await client.publish([5], IDS)
        assert await client.publish(reserved[:1], [9] * SIZE) == 1
        client.close()
        await settled(store, pinned=0, free_slots=3)

    asyncio.run(run())


def test_slots_land_over_the_socket_only_with_what_they_are_said_to_hold(served: tuple[BlockStore, str]) -> None:
    store, path = served
    hashes = store.chain(IDS[: 2 * SIZE])

    async def run() -> None:
        client = await PoolClient.connect(path)
        slots = await client.reserve(2)
        names = [(name, write(store, slot, 3)) for name, slot in zip(hashes, slots, strict=True)]
        with pytest.raises(Final, match="kv_checksum"):
            await client.land(slots, [names[0], (hashes[1], bytes(16))])
        with pytest.raises(Final, match="kv_not_reserved"):
            await client.land([5], names[:1])
        assert store.stats()["blocks"] == 0
        await client.land(slots, names)
        assert await client.have([hashes[1], b"x" * 32]) == [slots[1], None]
        assert await client.publish(slots, IDS) == 2
        assert store.stats()["pinned"] == 2
        client.close()
        await settled(store, pinned=0, blocks=2)

    asyncio.run(run())


def test_a_pool_that_is_gone_is_said_to_be(served: tuple[BlockStore, str], tmp_path: Path) -> None:
    async def run() -> None:
        with pytest.raises(Retryable, match="pool_unreachable"):
            await PoolClient.connect(str(tmp_path / "nobody.sock"))
        client = await PoolClient.connect(served[1])
        client._sock.shutdown(2)
        with pytest.raises(Retryable, match="pool_unreachable"):
            await client.stats()
        with pytest.raises(Retryable, match="pool_unreachable"):
            await client.pin(served[0].chain(IDS))

    asyncio.run(run())


def config(**extra: Any) -> SimpleNamespace:
    """Of vLLM's, what the connector reads."""
    policy = extra.pop("policy", "recompute")
    world = extra.pop("world", 1)
    transfer = SimpleNamespace(kv_connector_extra_config=extra, kv_load_failure_policy=policy)
    return SimpleNamespace(
        kv_transfer_config=transfer, parallel_config=SimpleNamespace(world_size=world, data_parallel_size=1)
    )


@pytest.mark.parametrize(
    ("given", "version", "name"),
    [
        (config(), "0.31.2", "vllm_version"),
        (config(), "1.0", "vllm_version"),
        (config(pool_slot=3), "0.32.0", "vllm_option"),
        (config(pool_slots=0), "0.32.0", "vllm_option"),
        (config(policy="fail"), "0.32.0", "vllm_load_policy"),
        (config(world=2), "0.32.0", "vllm_parallel"),
    ],
)
def test_a_server_that_the_connector_does_not_serve_is_refused_by_name(
    torch: ModuleType, given: SimpleNamespace, version: str, name: str
) -> None:
    from midstream_runtime.vllm_connector.geometry import Options

    with pytest.raises(Final, match=name):
        Options.of(given, version)


def test_another_version_is_served_where_the_user_says_so(torch: ModuleType) -> None:
    from midstream_runtime.vllm_connector.geometry import Options

    assert Options.of(config(), "0.32.4+cpu").pool_slots == 1024
    assert Options.of(config(allow_untested_vllm=True), "0.40.0").allow_untested_vllm


class FullAttentionSpec(SimpleNamespace):
    """Of vLLM's, what the connector reads."""


class MambaSpec(FullAttentionSpec):
    pass


SPEC = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": "torch.bfloat16"}


@pytest.mark.parametrize(
    "specs",
    [
        [FullAttentionSpec(**SPEC), FullAttentionSpec(**SPEC)],
        [MambaSpec(**SPEC)],
        [FullAttentionSpec(**SPEC, sliding_window=128)],
        [FullAttentionSpec(**{**SPEC, "dtype": "torch.float8_e4m3fn"})],
        [FullAttentionSpec(**SPEC, head_size_v=32)],
    ],
    ids=["groups", "kind", "window", "dtype", "unequal"],
)
def test_a_cache_that_the_pool_cannot_hold_is_refused(torch: ModuleType, specs: list[FullAttentionSpec]) -> None:
    from midstream_runtime.vllm_connector.geometry import layout_of

    def groups(*specs: FullAttentionSpec) -> SimpleNamespace:
        return SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(kv_cache_spec=s, layer_names=["0", "1", "2"]) for s in specs]
        )

    layout = layout_of(groups(FullAttentionSpec(**SPEC)), 8, "f" * 32)
    assert (layout.layers, layout.block_tokens, layout.dtype) == (3, 32, "bfloat16")
    with pytest.raises(Final, match="vllm_kv_layout"):
        layout_of(groups(*specs), 8, "f" * 32)


def test_weights_are_told_apart_by_their_files(torch: ModuleType, tmp_path: Path) -> None:
    from midstream_runtime.vllm_connector.geometry import weights_id

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Final, match="vllm_weights"):
        weights_id(str(tmp_path), None, "float32")
    path = tmp_path / "model.safetensors"
    path.write_bytes(hashlib.shake_256(b"w").digest(5 << 20))
    first = weights_id(str(tmp_path), None, "float32")
    assert weights_id(str(tmp_path), None, "float32") == first != weights_id(str(tmp_path), None, "float16")
    path.write_bytes(hashlib.shake_256(b"v").digest(5 << 20))
    assert weights_id(str(tmp_path), None, "float32") != first


def test_a_block_of_vllm_is_laid_out_as_the_contract_says(torch: ModuleType) -> None:
    from midstream_runtime.vllm_connector.geometry import in_slot_order

    heads, size, dim = 3, 4, 2
    block = torch.arange(heads * size * 2 * dim).view(heads, size, 2 * dim)
    for head in range(heads):
        for token in range(size):
            for part in range(2):
                expected = block[head, token, part * dim : (part + 1) * dim]
                assert in_slot_order(block)[part, token, head].tolist() == expected.tolist()
