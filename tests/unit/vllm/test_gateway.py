"""A gateway in front of a (fake) vLLM server: what goes by ids, what is generated again, what is let finish."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from fake_vllm import FakeVllm
from gateway_pair import Answer, Client, Node, Pair, chat, completion, request
from midstream_runtime.contract.errors import Final
from midstream_runtime.engine.vllm.client import Settings, VllmEngine
from midstream_runtime.gateway.app import Gateway
from midstream_runtime.gateway.app import Settings as GatewaySettings
from midstream_runtime.gateway.metrics import Metrics
from midstream_runtime.gateway.stream import Stream
from midstream_runtime.handoff import Connection

FAST = Settings(outage_s=20, retry_s=0.02, watch_s=0.05)
PROMPT = [10, 20, 30]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]


async def node(server: FakeVllm, **settings: Any) -> Node:
    engine = await VllmEngine.connect(server.url, None, FAST)
    gateway = Gateway(await engine.info(), GatewaySettings(1 << 20, 60.0, **settings), Metrics())
    gateway.attach(engine)
    return Node(gateway, engine)  # type: ignore[arg-type]  # all of it that the pair uses is there


@asynccontextmanager
async def two_fakes(**settings: Any) -> AsyncIterator[tuple[Pair, FakeVllm, FakeVllm]]:
    async with FakeVllm() as first, FakeVllm() as second:
        pair = Pair(await node(first, **settings), await node(second, **settings))
        try:
            yield pair, first, second
        finally:
            for client in pair.clients:
                client.writer.transport.abort()
            for one in (pair.a, pair.b):
                for connection in list(one.connections):
                    connection.drop()
                await one.engine.close()
            await asyncio.sleep(0)


def body(tokens: int = 60, **more: Any) -> dict[str, Any]:
    return completion(tokens, prompt=PROMPT, model="fake", **more)


async def ask(pair: Pair, data: dict[str, Any], path: str = COMPLETION) -> Answer:
    client, _ = await pair.client()
    client.send(request(data, path))
    return await client.answer()


async def begin(
    pair: Pair, data: dict[str, Any], path: str = COMPLETION, events: int = 12
) -> tuple[Client, Connection]:
    """A stream of which the client has read some events."""
    client, connection = await pair.client()
    client.send(request(data, path))
    async with asyncio.timeout(20):
        while client.raw.count(b"\n\n") < events:
            client.raw += await client.reader.read(1 << 16)
    return client, connection


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def put_together(answer: Answer) -> dict[int, dict[str, str]]:
    """What a client makes of a stream: for each choice its texts, by kind."""
    whole: dict[int, dict[str, str]] = {}
    for event in answer.events():
        for choice in event["choices"]:
            parts = whole.setdefault(choice["index"], {})
            delta = choice.get("delta", {})
            (call,) = delta.get("tool_calls") or [{}]
            for kind, text in (
                ("text", choice.get("text")), ("content", delta.get("content")), ("reasoning", delta.get("reasoning")),
                ("role", delta.get("role")), ("call", call.get("id")), ("name", call.get("function", {}).get("name")),
                ("arguments", call.get("function", {}).get("arguments")), ("finish", choice.get("finish_reason")),
            ):  # fmt: skip
                parts[kind] = parts.get(kind, "") + (text or "")
    return whole


def test_an_answer_goes_on_by_its_ids() -> None:
    async def run() -> None:
        async with two_fakes() as (pair, _, second):
            wanted = await ask(pair, body())
            client, connection = await begin(pair, body())
            await pair.move(connection, pair.a, pair.b, kv=False)
            assert (await client.answer()).text() == wanted.text()
            (asked,) = second.asked
            assert len(asked["prompt"]) > len(PROMPT) + 10
            assert asked["max_tokens"] == 60 - (len(asked["prompt"]) - len(PROMPT))

    asyncio.run(run())


@pytest.mark.parametrize("more", [{"temperature": 0.7, "seed": 5}, {"presence_penalty": 0.5}], ids=["seed", "penalty"])
def test_an_answer_that_a_new_prompt_would_change_is_replayed(more: dict[str, Any]) -> None:
    async def run() -> None:
        async with two_fakes() as (pair, _, second):
            wanted = await ask(pair, body(**more))
            client, connection = await begin(pair, body(**more))
            await pair.move(connection, pair.a, pair.b, kv=False)
            assert (await client.answer()).text() == wanted.text()
            assert second.asked[0]["prompt"] == PROMPT and second.asked[0]["max_tokens"] == 60
            assert (await pair.b.engine.stats())["replays"] == 1

    asyncio.run(run())


def test_a_replay_that_diverges_goes_on_by_its_ids() -> None:
    async def run() -> None:
        async with two_fakes() as (pair, _, second):
            second.drift = 1
            data = body(temperature=0.7, seed=5)
            wanted = (await ask(pair, data)).text()
            client, connection = await begin(pair, data)
            await pair.move(connection, pair.a, pair.b, kv=False)
            got = (await client.answer()).text()
            assert len(got) == 60 and got[:10] == wanted[:10] and got != wanted
            assert (await pair.b.engine.stats())["diverged"] == 1
            assert len(second.asked[1]["prompt"]) > len(PROMPT) + 10

    asyncio.run(run())


REPLAYED = [
    ("tools", CHAT, chat(60, model="fake", tools=TOOLS)),
    ("choices", COMPLETION, body(n=3)),
    ("guided", COMPLETION, body(response_format={"type": "json_object"})),
    ("logprobs", COMPLETION, body(logprobs=2)),
    ("lora", COMPLETION, {**body(), "model": "lora"}),
    ("seed", CHAT, {**chat(60, model="fake", tools=TOOLS), "temperature": 1, "seed": 3}),
]


@pytest.mark.parametrize(("path", "data"), [r[1:] for r in REPLAYED], ids=[r[0] for r in REPLAYED])
def test_streams_that_only_the_server_can_shape_are_generated_again(path: str, data: dict[str, Any]) -> None:
    async def run() -> None:
        async with two_fakes() as (pair, _, second):
            wanted = await ask(pair, data, path)
            client, connection = await begin(pair, data, path)
            handler = cast(Stream, connection.handler)
            assert handler.movable().movable
            await pair.move(connection, pair.a, pair.b, kv=False)
            got = await client.answer()
            assert put_together(got) == put_together(wanted)
            assert len({event["id"] for event in got.events()}) == 1, "one answer has one id, on both nodes"
            assert second.asked[0] == data, "the request goes to the server as it came"

    asyncio.run(run())


def test_a_servers_reasoning_parser_shapes_chats_where_the_gateway_is_told_so() -> None:
    data = chat(60, model="fake")

    async def run() -> None:
        async with two_fakes(native_chat=True) as (pair, _, _second):
            wanted = put_together(await ask(pair, data, CHAT))
            assert len(wanted[0]["reasoning"]) == 4 and wanted[0]["content"]
            client, connection = await begin(pair, data, CHAT)
            await pair.move(connection, pair.a, pair.b, kv=False)
            assert put_together(await client.answer()) == wanted

    asyncio.run(run())


def test_a_stream_that_is_generated_again_and_differs_ends_with_an_error() -> None:
    async def run() -> None:
        async with two_fakes() as (pair, _, second):
            second.drift = 1
            client, connection = await begin(pair, chat(60, model="fake", tools=TOOLS), CHAT)
            await pair.move(connection, pair.a, pair.b, kv=False)
            rest = await client.rest()
            assert b"replay_diverged" in rest and b"[DONE]" not in rest

    asyncio.run(run())


SAMPLED = {"temperature": 1}
LET_FINISH = [
    ("Tools", CHAT, {**chat(60, model="fake", tools=TOOLS), **SAMPLED}),
    ("SeveralChoices", COMPLETION, {**body(n=2), **SAMPLED}),
    ("GuidedDecoding", COMPLETION, {**body(response_format={"type": "json_object"}), **SAMPLED}),
    ("TopLogprobs", COMPLETION, {**body(logprobs=3), **SAMPLED}),
]


@pytest.mark.parametrize(("reason", "path", "data"), LET_FINISH, ids=[r[0] for r in LET_FINISH])
def test_what_is_let_finish_says_so_before_the_freeze(reason: str, path: str, data: dict[str, Any]) -> None:
    async def run() -> None:
        async with two_fakes() as (pair, _, _second):
            client, connection = await begin(pair, data, path)
            handler = cast(Stream, connection.handler)
            assert handler.movable()[:2] == (False, reason)
            with pytest.raises(Final, match=f"stream_not_movable.*{reason}"):
                await pair.move(connection, pair.a, pair.b, kv=False)
            connection.thaw()
            await pair.a.gateway.resume([handler])
            assert put_together(await client.answer())[0]["finish"] == "length"
            assert handler.movable().movable, "when it has finished"

    asyncio.run(run())


def test_a_whole_answer_of_which_nothing_is_out_is_begun_again() -> None:
    data = body(n=2, stream=False) | SAMPLED

    async def run() -> None:
        async with two_fakes() as (pair, first, second):
            client, connection = await pair.client()
            client.send(request(data))
            await until(lambda: first.running == 1)
            assert cast(Stream, connection.handler).movable().movable
            await pair.move(connection, pair.a, pair.b, kv=False)
            answer = await client.answer()
            assert (answer.status, len(answer.json["choices"]), len(second.asked)) == (200, 2, 1)

    asyncio.run(run())


def test_other_paths_pass_through_unchanged() -> None:
    async def run() -> None:
        async with two_fakes() as (pair, first, _):
            client, _ = await pair.client()
            for method, path, data in (
                ("POST", "/v1/embeddings?x=1", b'{"input": "a"}'), ("GET", "/version", b""), ("GET", "/nowhere", b""),
            ):  # fmt: skip
                client.send(request(data, path, "x-key: 7", method=method))
                answer = await client.answer(method)
                assert (answer.status, answer.headers["x-fake"]) == (404 if path == "/nowhere" else 200, "yes")
                assert answer.json == {"path": path, "got": len(data)}
            assert first.other == [("POST", "/v1/embeddings?x=1"), ("GET", "/version"), ("GET", "/nowhere")]
            client.send(request(b"", "/metrics", method="GET"))
            assert b"midstream_engine_up 1.0" in (await client.answer("GET")).body

    asyncio.run(run())


def test_a_mistake_is_answered_in_the_servers_own_words() -> None:
    async def run() -> None:
        async with two_fakes() as (pair, _, _second):
            answer = await ask(pair, {**body(), "no_such_thing": 1})
            assert answer.status == 400 and "unknown fields" in answer.json["error"]["message"]
            answer = await ask(pair, body(5000))
            assert answer.status == 400 and "vLLM answered 400" in answer.json["error"]["message"]

    asyncio.run(run())


@pytest.mark.parametrize(("path", "data"), [(COMPLETION, body()), (CHAT, chat(60, model="fake", tools=TOOLS))])
def test_a_client_that_goes_away_aborts_its_answer(path: str, data: dict[str, Any]) -> None:
    async def run() -> None:
        async with two_fakes() as (pair, first, _):
            client, _ = await begin(pair, data, path, events=3)
            client.writer.transport.abort()
            await until(lambda: first.running == 0)
            assert first.aborted == 1

    asyncio.run(run())


@pytest.mark.parametrize(("path", "data"), [(COMPLETION, body()), (CHAT, chat(60, model="fake", tools=TOOLS))])
def test_answers_outlive_their_server(path: str, data: dict[str, Any]) -> None:
    async def run() -> None:
        async with two_fakes() as (pair, first, _):
            wanted = put_together(await ask(pair, data, path))
            client, _ = await begin(pair, data, path)
            await first.die()
            await asyncio.sleep(0.1)
            assert pair.a.gateway.page("/health")[0] == 503
            await first.listen()
            assert put_together(await client.answer()) == wanted

    asyncio.run(run())


def test_a_target_whose_server_restarts_is_waited_for() -> None:
    async def run() -> None:
        async with two_fakes() as (pair, _, second):
            wanted = (await ask(pair, body())).text()
            client, connection = await begin(pair, body())
            await second.die()
            await pair.move(connection, pair.a, pair.b, kv=False)
            await asyncio.sleep(0.1)
            await second.listen()
            assert (await client.answer()).text() == wanted

    asyncio.run(run())


def test_the_servers_load_is_told_to_whoever_chooses_a_target() -> None:
    async def run() -> None:
        async with two_fakes() as (pair, _, _second):
            await until(lambda: pair.a.gateway.load() is not None)
            assert pair.a.gateway.load() == {"kv_free": 0.75, "running": 3.0, "waiting": 2.0}

    asyncio.run(run())
