"""Servers that restart in mid-move, run out of blocks, or cannot hold what is to come: the text is the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gateway_pair import completion, request
from midstream_runtime.contract.errors import Retryable
from midstream_runtime.contract.pool import SlotState
from vllm_pair import PROMPT_TOKENS, Hits, Servers, moved, prompt, stop_at, two_vllm_nodes, unmoved
from vllm_servers import BLOCK_TOKENS, NAME, VllmServer, free_port

POOL_SLOTS, GPU_BLOCKS = 24, 20


@pytest.fixture(scope="module")
def small_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """vLLM has room for 608 tokens (one block is its own), the pool for 24 blocks."""
    options = ["--num-gpu-blocks-override", str(GPU_BLOCKS), "--max-model-len", "512"]
    folder = tmp_path_factory.mktemp("small")
    server = VllmServer(tiny_model, free_port(), folder, options=options, extra={"pool_slots": POOL_SLOTS})
    try:
        server.start()
        server.wait()
        yield server
    finally:
        server.kill()


def test_preempted_answers_are_the_same_with_what_the_pool_kept_of_them(small_server: VllmServer) -> None:
    """vLLM takes a preempted answer's blocks for others; it comes back with those that were saved before."""
    bodies = [completion(300, prompt=prompt(401 + i), model=NAME) for i in range(3)]

    async def run() -> None:
        async with two_vllm_nodes((small_server, small_server)) as pair:
            wanted = [await unmoved(pair, body) for body in bodies]
            preempted, hits = small_server.metric("vllm:num_preemptions_total"), Hits(small_server)
            got = await asyncio.gather(*(unmoved(pair, body) for body in bodies))
            assert got == wanted
            assert small_server.metric("vllm:num_preemptions_total") > preempted
            assert hits.blocks()[0] > 0

    asyncio.run(run())


def test_a_full_pool_is_refused_and_costs_no_text(servers: Servers, small_server: VllmServer) -> None:
    body = completion(200, prompt=prompt(410), model=NAME)

    async def run() -> None:
        async with two_vllm_nodes((servers[0], small_server)) as pair:
            wanted = await unmoved(pair, body)
            slots = await pair.b.gateway.reserve(POOL_SLOTS)  # evicts whatever nobody reads
            with pytest.raises(Retryable, match="pool_full"):
                await pair.b.gateway.reserve(1)
            assert (await moved(pair, body, PROMPT_TOKENS + 60, kv=False)).text() == wanted
            await pair.b.gateway.free(slots)
            stats: dict[str, Any] = await pair.b.engine.stats()
            assert stats["skipped_full"] > 0 and stats["free_slots"] > 0

    asyncio.run(run())


def test_a_server_that_restarts_in_mid_copy_computes_the_answer_from_its_ids(servers: Servers) -> None:
    body = completion(150, prompt=prompt(420), model=NAME)
    target = servers[1]

    async def run() -> None:
        async with two_vllm_nodes(servers) as pair:
            wanted = await unmoved(pair, body)
            client, connection = await pair.client()
            stopped = stop_at(pair.a, connection, PROMPT_TOKENS + 80)
            client.send(request(body))
            await stopped.wait()
            reserve = pair.b.gateway.reserve

            async def reserve_and_die(slots: int) -> list[int]:
                got = await reserve(slots)
                target.kill()
                target.start()
                return got

            pair.b.gateway.reserve = reserve_and_die  # type: ignore[method-assign]
            await pair.move(connection, pair.a, pair.b)
            await asyncio.to_thread(target.wait)
            async with asyncio.timeout(60):
                answer = await client.answer()
            assert answer.text() == wanted
            assert (await pair.b.engine.stats())["outages"] > 0
            pair.b.gateway.reserve = reserve  # type: ignore[method-assign]
            async with asyncio.timeout(20):
                while pair.b.gateway.pool() is None:
                    await asyncio.sleep(0.05)
            hits = Hits(target)
            again = completion(150, prompt=prompt(421), model=NAME)
            wanted = await unmoved(pair, again)
            assert (await moved(pair, again, PROMPT_TOKENS + 80)).text() == wanted
            assert hits.blocks()[0] > 0, "the new pool takes KV as the old one did"

    asyncio.run(run())


def test_the_pool_names_blocks_as_the_contract_does(servers: Servers) -> None:
    """What an agent reads: sealed slots, whole, under the chain of the contract."""
    body = completion(100, prompt=prompt(430), model=NAME)

    async def run() -> None:
        async with two_vllm_nodes(servers) as pair:
            await unmoved(pair, body)
            client, connection = await pair.client()
            stopped = stop_at(pair.a, connection, PROMPT_TOKENS + 70)
            client.send(request(body))
            await stopped.wait()
            handler = connection.handler
            assert handler is not None
            paused = await pair.a.gateway.pause([handler])
            view = pair.a.pool()
            assert len(paused.kv) == (PROMPT_TOKENS + 70) // BLOCK_TOKENS
            for entry in paused.kv:
                info = view.info(entry.slot)
                assert (info.state, info.filled) == (SlotState.SEALED, BLOCK_TOKENS)
                assert view.actual_checksum(entry.slot) == info.checksum == entry.digest
            connection.thaw()
            await pair.a.gateway.resume([handler])
            await client.answer()

    asyncio.run(run())


def test_what_the_connector_cannot_serve_ends_the_start_by_name(tiny_model: Path, tmp_path: Path) -> None:
    server = VllmServer(tiny_model, free_port(), tmp_path, extra={"pool_slot": 1})
    try:
        server.start()
        with pytest.raises(RuntimeError):
            server.wait()
        assert "vllm_option" in server.log
    finally:
        server.kill()
