"""Answers of stock vLLM servers change nodes between two tokens; greedy text is that of an answer that stayed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from gateway_pair import chat, completion, request
from vllm_pair import PROMPT_TOKENS, Hits, Servers, moved, prompt, stop_at, two_vllm_nodes, unmoved
from vllm_servers import NAME

TOKENS = 200


def test_a_greedy_answer_moved_at_every_20th_token_is_the_same(servers: Servers) -> None:
    """And its KV came: 0.9 of all full blocks, and never more than the newest one is missing (vLLM schedules a step
    ahead,
    so a block that the newest token filled may not be in the pool yet)."""

    async def run() -> None:
        hits = full = 0
        async with two_vllm_nodes(servers) as pair:
            for at in range(1, TOKENS, 20):
                body = completion(TOKENS, prompt=prompt(at), model=NAME)
                wanted = await unmoved(pair, body)
                assert len(set(wanted)) > 20, "a model that repeats itself would prove nothing"
                count = Hits(servers[1])
                assert (await moved(pair, body, PROMPT_TOKENS + at)).text() == wanted, at
                here, there = count.blocks()
                assert here >= there - 1, at
                hits, full = hits + here, full + there
        assert full >= 40
        assert hits >= 0.9 * full

    asyncio.run(run())


def test_without_the_pool_nothing_is_hit_and_the_text_is_the_same(servers: Servers) -> None:
    body = completion(100, prompt=prompt(301), model=NAME)

    async def run() -> None:
        async with two_vllm_nodes(servers) as pair:
            wanted = await unmoved(pair, body)
            hits = Hits(servers[1])
            assert (await moved(pair, body, PROMPT_TOKENS + 60, kv=False)).text() == wanted
            assert hits.blocks() == (0, 4)

    asyncio.run(run())


def test_wiped_kv_changes_the_answer(servers: Servers) -> None:
    """The negative control of all tests above: the KV that came is what the target computes from."""
    body = completion(100, prompt=prompt(302), model=NAME)

    async def run() -> None:
        async with two_vllm_nodes(servers, zero_kv=True) as pair:
            wanted = await unmoved(pair, body)
            got = (await moved(pair, body, PROMPT_TOKENS + 60)).text()
            assert got[:20] == wanted[:20] and got != wanted

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_chat_is_moved(servers: Servers, stream: bool) -> None:
    body, path = chat(60, stream=stream, model=NAME), "/v1/chat/completions"

    async def run() -> None:
        async with two_vllm_nodes(servers) as pair:
            wanted = await unmoved(pair, body, path)
            assert (await moved(pair, body, 90, path)).text() == wanted

    asyncio.run(run())


@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0.8, "seed": 7},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"repetition_penalty": 1.3},
        {"stop": ["never in this answer", "@@@"]},
    ],
    ids=["seed", "penalties", "repetition", "stop"],
)
def test_what_a_new_prompt_would_lose_is_carried_or_replayed(servers: Servers, more: dict[str, Any]) -> None:
    body = completion(80, prompt=prompt(303), model=NAME, **more)

    async def run() -> None:
        async with two_vllm_nodes(servers) as pair:
            wanted = await unmoved(pair, body)
            got = await moved(pair, body, PROMPT_TOKENS + 40)
            assert got.text() == wanted
            stats = await pair.b.engine.stats()
            assert stats["diverged"] == 0
            assert stats["replays"] == int("seed" in more or "presence_penalty" in more)

    asyncio.run(run())


def test_a_stop_string_across_the_move_ends_the_answer(servers: Servers) -> None:
    body = completion(120, prompt=prompt(304), model=NAME)

    async def run() -> None:
        async with two_vllm_nodes(servers) as pair:
            whole = await unmoved(pair, body)
            middle = len(whole) // 2
            stop = whole[middle - 6 : middle + 6]
            client, _ = await pair.client()
            client.send(request({**body, "stop": stop, "stream": False}))
            answer = (await client.answer()).json
            assert answer["choices"][0]["text"] == whole[: whole.index(stop)]
            last = answer["usage"]["completion_tokens"]
            for tokens in range(last - 9, last - 2):  # vLLM may send the newest two at once
                got = await moved(pair, {**body, "stop": stop}, PROMPT_TOKENS + tokens)
                assert got.text() == answer["choices"][0]["text"], tokens

    asyncio.run(run())


def test_a_rollback_loses_nothing(servers: Servers) -> None:
    body = completion(80, prompt=prompt(305), model=NAME, temperature=0.9, seed=3)

    async def run() -> None:
        async with two_vllm_nodes(servers) as pair:
            wanted = await unmoved(pair, body)
            client, connection = await pair.client()
            stopped = stop_at(pair.a, connection, PROMPT_TOKENS + 30)
            client.send(request(body))
            await stopped.wait()
            await pair.roll_back(connection, pair.a)
            assert (await client.answer()).text() == wanted
            assert (await pair.a.engine.stats())["replays"] == 0

    asyncio.run(run())
