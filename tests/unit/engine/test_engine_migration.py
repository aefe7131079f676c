"""An answer leaves one engine process in mid-word and goes on in another, by the protocol that the gateway
uses."""

from __future__ import annotations

import asyncio
import mmap
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from midstream_runtime.contract.pool import PoolView
from midstream_runtime.engine.client import EngineClient
from midstream_runtime.engine.protocol import EngineState, KvBlock, SamplingParams, TokenEvent

StartEngine = Callable[..., str]
LENGTH = 120
GREEDY = SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=LENGTH, temperature=0.9, top_p=0.95, top_k=50, seed=7, ignore_eos=True)


class Pool:
    """A test's own mapping of an engine's pool, as an agent has one."""

    def __init__(self, fd: int) -> None:
        self.map = mmap.mmap(fd, 0)
        self.view = PoolView(memoryview(self.map))


async def connect(path: str) -> tuple[EngineClient, Pool]:
    client = await EngineClient.connect(path)
    await client.info()
    fd = client.pool_fd()
    assert fd is not None
    return client, Pool(fd)


async def take(
    client: EngineClient, name: str, ids: Sequence[int], params: SamplingParams
) -> list[TokenEvent]:
    return [event async for event in client.generate(name, ids, params)]


async def take_some_and_pause(
    client: EngineClient, ids: Sequence[int], params: SamplingParams, count: int
) -> tuple[AsyncIterator[TokenEvent], list[TokenEvent], EngineState]:
    """The iterator comes along: a closed one would drop the request."""
    events: list[TokenEvent] = []
    answer = client.generate("moved", ids, params)
    async for event in answer:
        events.append(event)
        if len(events) == count:
            break
    state = (await client.pause(["moved"]))["moved"]
    while len(events) < len(state.generated_ids):
        events.append(await anext(answer))
    return answer, events, state


async def copy_kv(state: EngineState, source: Pool, client: EngineClient, target: Pool) -> EngineState:
    slots = await client.reserve(len(state.kv))
    for block, slot in zip(state.kv, slots, strict=True):
        assert block.slot is not None
        assert source.view.checksum_hex(block.slot) == source.view.actual_checksum(block.slot).hex()
        target.view.slot(slot)[:] = source.view.slot(block.slot)
    return state.with_slots(slots)


async def go_on(client: EngineClient, state: EngineState) -> list[TokenEvent]:
    return [event async for event in client.generate("moved", (), GREEDY, resume=state)]


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kv", ["moved", "missing", "partly missing", "zeroed"])
def test_moved_answer_is_the_unmoved_answer(
    start_engine: StartEngine, params: SamplingParams, kv: str
) -> None:
    paths = [start_engine("--pool-slots", "64", "--pace-ms", "1") for _ in range(2)]

    async def scenario() -> None:
        (a, pool_a), (b, pool_b) = [await connect(path) for path in paths]
        assert (await a.info()).pool == (await b.info()).pool
        ids = await a.tokenize("It is a truth universally acknowledged, that")
        whole = await take(a, "whole", ids, params)
        answer, head, state = await take_some_and_pause(a, ids, params, 50)
        known = len(ids) + len(state.generated_ids)
        assert sum(block.tokens for block in state.kv) == known - 1
        if kv == "missing":
            there = state.with_slots([None] * len(state.kv))
        else:
            there = await copy_kv(state, pool_a, b, pool_b)
        if kv == "partly missing":
            damaged = there.kv[2].slot
            there = there.with_slots([None if block.slot == damaged else block.slot for block in there.kv])
            assert damaged is not None
            await b.free([damaged])
        if kv == "zeroed":
            for block in there.kv:
                assert block.slot is not None
                pool_b.view.slot(block.slot)[:] = bytes(pool_b.view.layout.slot_bytes)
        await a.drop(["moved"])
        assert [event async for event in answer] == []
        tail = await go_on(b, EngineState.from_json(there.to_json()))
        same = [event.token_id for event in head + tail] == [event.token_id for event in whole]
        usage = tail[-1].usage
        assert usage is not None and usage.completion_tokens == LENGTH
        if kv == "zeroed":
            assert not same, "KV that was zeroed made no difference: the target does not use it"
        else:
            assert same
            assert "".join(event.text for event in head + tail) == "".join(event.text for event in whole)
        used = {"moved": known - 1, "missing": 0, "partly missing": 32, "zeroed": known - 1}[kv]
        assert (usage.kv_tokens_used, usage.prefill_tokens) == (used, known - 1 - used)
        for client in (a, b):
            stats = await client.stats()
            assert stats["free_slots"] == stats["slots"], "slots were leaked"
            await client.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_resume_on_the_source_goes_on_as_if_nothing_had_happened(start_engine: StartEngine) -> None:
    path = start_engine("--pool-slots", "64", "--pace-ms", "1")

    async def scenario() -> None:
        client, _ = await connect(path)
        ids = await client.tokenize("Emma was")
        whole = await take(client, "whole", ids, GREEDY)
        seen: list[TokenEvent] = []
        async for event in client.generate("paused", ids, GREEDY):
            seen.append(event)
            if len(seen) in (1, 17, 40):
                first = await client.pause(["paused"])
                assert await client.pause(["paused"]) == first
                await client.resume(["paused"])
        assert [event.token_id for event in seen] == [event.token_id for event in whole]
        await client.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_state_that_names_slots_nobody_reserved_is_refused(start_engine: StartEngine) -> None:
    path = start_engine("--pool-slots", "64", "--pace-ms", "1")

    async def scenario() -> None:
        client, _ = await connect(path)
        state = EngineState([1, 2, 3], [4], GREEDY, 1, 0, [KvBlock(5, 3)])
        with pytest.raises(Exception, match="kv_not_reserved"):
            await go_on(client, state)
        await client.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
