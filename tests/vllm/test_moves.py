"""Answers of stock vLLM servers change nodes between two tokens; greedy text is that of an answer that stayed."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from gateway_pair import Answer, Node, Pair, chat, completion, request
from midstream_runtime.engine.protocol import TokenEvent
from midstream_runtime.engine.vllm.client import VllmEngine
from midstream_runtime.gateway.stream import Stream
from midstream_runtime.handoff import Connection
from vllm_pair import two_vllm_nodes
from vllm_servers import BLOCK_TOKENS, NAME, VllmServer

Servers = tuple[VllmServer, VllmServer]
TOKENS = 200
PROMPT_TOKENS = 70


def prompt(first: int) -> list[int]:
    """Ids of ordinary tokens; another `first`, other KV blocks."""
    return [3 + (first * 97 + i * 31) % 400 for i in range(PROMPT_TOKENS)]


def stop_at(node: Node, connection: Connection, tokens: int) -> asyncio.Event:
    """Set when the answer under way has so many tokens, its prompt included, and stands still: on a busy machine many
    tokens come in one turn of the loop, and whoever polls sees the answer's end next."""
    gateway, engine, stopped = node.gateway, cast(VllmEngine, node.engine), asyncio.Event()
    handler, hand_on = connection.handler, gateway.sink
    assert isinstance(handler, Stream)

    def sink(events: list[tuple[str, TokenEvent]]) -> None:
        hand_on(events)
        answer = handler.answer
        if answer is not None and answer.tokens >= tokens and not stopped.is_set():
            connection.freeze()
            engine.hold(answer.name)
            stopped.set()

    gateway.sink = sink  # type: ignore[method-assign]
    return stopped


async def moved(pair: Pair, body: dict[str, Any], tokens: int, path: str = "/v1/completions", **how: Any) -> Answer:
    """The answer to a request that is moved from a to b when it has so many tokens."""
    client, connection = await pair.client()
    stopped = stop_at(pair.a, connection, tokens)
    client.send(request(body, path))
    async with asyncio.timeout(60):
        await stopped.wait()
    await pair.move(connection, pair.a, pair.b, **how)
    return await client.answer()


async def unmoved(pair: Pair, body: dict[str, Any], path: str = "/v1/completions") -> str:
    client, _ = await pair.client()
    client.send(request(body, path))
    return (await client.answer()).text()


class Hits:
    """Of blocks that a server took from the pool, by its own metrics, since this was made."""

    def __init__(self, server: VllmServer) -> None:
        self._server, self._before = server, self._read(server)

    @staticmethod
    def _read(server: VllmServer) -> tuple[float, float]:
        names = ("vllm:external_prefix_cache_queries_total", "vllm:external_prefix_cache_hits_total")
        return server.metric(names[0]), server.metric(names[1])

    def blocks(self) -> tuple[int, int]:
        """Taken from the pool, and full ones of what the server was asked to continue (it computes the newest token
        always)."""
        queries, hits = (now - then for now, then in zip(self._read(self._server), self._before, strict=True))
        assert queries > 0, "the server was asked for nothing"
        return int(hits) // BLOCK_TOKENS, int(queries - 1) // BLOCK_TOKENS


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
