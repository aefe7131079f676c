"""A client's connection is moved in every state of a request; what it reads is what it reads without a migration."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from gateway_pair import Answer, Client, Pair, chat, completion, request, two_nodes
from midstream_runtime.gateway.stream import MAX_WAITING_BYTES, Stream
from midstream_runtime.handoff import Connection

Engines = tuple[str, str]
SHAPES: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "completion": ("/v1/completions", completion),
    "chat": ("/v1/chat/completions", chat),
}


async def wait_for_tokens(connection: Connection, tokens: int) -> None:
    """Until the engine has given so many (prompt included) to the answer under way."""
    handler = connection.handler
    assert isinstance(handler, Stream)
    async with asyncio.timeout(30):
        while handler.answer is None or handler.answer.tokens < tokens:
            await asyncio.sleep(0.001)


async def unmoved(pair: Pair, data: bytes) -> Answer:
    client, _ = await pair.client()
    client.send(data)
    return await client.answer()


def assert_same(got: Answer, wanted: Answer) -> None:
    """The same but for id and time."""
    assert got.status == wanted.status == 200
    assert set(got.headers) == set(wanted.headers)

    def plain(answer: Answer) -> list[dict[str, Any]]:
        whole = answer.events() if answer.headers["content-type"].startswith("text/event-stream") else [answer.json]
        ids = {(e["id"], e["created"]) for e in whole}
        assert len(ids) == 1, "one answer has one id, on both nodes"
        return [{k: v for k, v in e.items() if k not in ("id", "created")} for e in whole]

    assert plain(got) == plain(wanted)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_an_answer_is_moved_between_two_tokens(engines: Engines, shape: str, stream: bool) -> None:
    path, body = SHAPES[shape]
    options = {"stream_options": {"include_usage": True}} if stream else {}
    data = request(body(60, stream=stream, **options), path)

    async def run() -> None:
        async with two_nodes(engines) as pair:
            wanted = await unmoved(pair, data)
            client, connection = await pair.client()
            client.send(data)
            await wait_for_tokens(connection, 40)
            connection = await pair.move(connection, pair.a, pair.b)
            await wait_for_tokens(connection, 60)
            await pair.move(connection, pair.b, pair.a)
            assert_same(await client.answer(), wanted)
            assert pair.a.metric("midstream_adopted_prefill_tokens_total") == 0
            assert pair.a.metric("midstream_adopted_kv_tokens_total") > 40

    asyncio.run(run())


def test_without_its_kv_an_answer_is_computed_again(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            wanted = await unmoved(pair, request(completion(60)))
            client, connection = await pair.client()
            client.send(request(completion(60)))
            await wait_for_tokens(connection, 40)
            await pair.move(connection, pair.a, pair.b, kv=False)
            assert_same(await client.answer(), wanted)
            assert pair.b.metric("midstream_adopted_kv_tokens_total") == 0
            assert pair.b.metric("midstream_adopted_prefill_tokens_total") > 38

    asyncio.run(run())


def test_wiped_kv_changes_the_answer(engines: Engines) -> None:
    """Negative control of the two above."""

    async def run() -> None:
        async with two_nodes(engines, zero_kv=True) as pair:
            wanted = await unmoved(pair, request(completion(60)))
            client, connection = await pair.client()
            client.send(request(completion(60)))
            await wait_for_tokens(connection, 40)
            await pair.move(connection, pair.a, pair.b)
            assert (await client.answer()).text() != wanted.text()

    asyncio.run(run())


def test_a_seeded_answer_goes_on_with_its_random_numbers(engines: Engines) -> None:
    data = request(completion(60, temperature=0.9, seed=7, stop=["no such words"], presence_penalty=0.2))

    async def run() -> None:
        async with two_nodes(engines) as pair:
            wanted = await unmoved(pair, data)
            client, connection = await pair.client()
            client.send(data)
            await wait_for_tokens(connection, 30)
            await pair.move(connection, pair.a, pair.b)
            assert_same(await client.answer(), wanted)

    asyncio.run(run())


def chunked(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    parts = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(p), p) for p in (data[:50], data[50:51], data[51:]))
    return b"POST /v1/completions HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "data", [request(completion(6, stream=False)), chunked(completion(6, stream=False))], ids=["length", "chunked"]
)
def test_a_request_is_moved_at_any_of_its_bytes(engines: Engines, data: bytes) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            wanted = await unmoved(pair, data)
            client, connection = await pair.client()
            here, there = pair.a, pair.b
            for cut in range(1, len(data), 5):
                client.send(data[:cut])
                await _received(connection, cut)
                connection = await pair.move(connection, here, there)
                here, there = there, here
                client.send(data[cut:])
                assert_same(await client.answer(), wanted)

    asyncio.run(run())


async def _received(connection: Connection, count: int) -> None:
    handler = connection.handler
    assert isinstance(handler, Stream)
    async with asyncio.timeout(30):
        while handler.reader.waiting_bytes < count:
            await asyncio.sleep(0)


def test_a_request_that_has_just_come_is_begun_at_the_target(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            data = request(completion(10))
            wanted = await unmoved(pair, data)
            client, connection = await pair.client()
            assert connection.handler is not None
            connection.handler.received(data)  # taken, and the engine has not been asked for its ids yet
            await pair.move(connection, pair.a, pair.b)
            assert_same(await client.answer(), wanted)
            assert pair.b.metric("midstream_adopted_kv_tokens_total") == 0

    asyncio.run(run())


def test_the_next_requests_wait_in_the_buffer_and_are_moved(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            first, second = request(completion(40)), request(chat(8), "/v1/chat/completions")
            health = request(b"", "/health", method="GET")
            wanted = await unmoved(pair, first), await unmoved(pair, second)
            client, connection = await pair.client()
            client.send(first + second + health[:9])
            await wait_for_tokens(connection, 20)
            await pair.move(connection, pair.a, pair.b)
            client.send(health[9:])
            assert_same(await client.answer(), wanted[0])
            assert_same(await client.answer(), wanted[1])
            assert (await client.answer("GET")).json == {"status": "ok"}

    asyncio.run(run())


def test_a_connection_between_two_requests_is_moved(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            wanted = await unmoved(pair, request(completion(8)))
            client, connection = await pair.client()
            client.send(request(completion(8)))
            assert_same(await client.answer(), wanted)
            connection = await pair.move(connection, pair.a, pair.b)
            client.send(request(completion(8)))
            assert_same(await client.answer(), wanted)
            await pair.move(connection, pair.b, pair.a)
            client.send(request(completion(8)))
            assert_same(await client.answer(), wanted)

    asyncio.run(run())


def test_continue_is_said_once(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            data = request(completion(8), "/v1/completions", "expect: 100-continue")
            split = data.index(b"\r\n\r\n") + 4
            client, connection = await pair.client()
            client.send(data[:split])
            await _received(connection, split)
            connection = await pair.move(connection, pair.a, pair.b)
            await pair.move(connection, pair.b, pair.a)
            client.send(data[split:])
            answer = await client.answer()
            assert (answer.status, answer.informational) == (200, [100])

    asyncio.run(run())


def test_after_a_rollback_the_answer_goes_on(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            wanted = await unmoved(pair, request(completion(60)))
            client, connection = await pair.client()
            client.send(request(completion(60)))
            for tokens in (10, 20, 30):
                await wait_for_tokens(connection, tokens)
                await pair.roll_back(connection, pair.a)
            assert_same(await client.answer(), wanted)

    asyncio.run(run())


def test_a_request_put_back_by_a_rollback_is_begun_again(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            wanted = await unmoved(pair, request(completion(10)))
            client, connection = await pair.client()
            assert connection.handler is not None
            connection.handler.received(request(completion(10)))
            await pair.roll_back(connection, pair.a)
            assert_same(await client.answer(), wanted)

    asyncio.run(run())


def test_a_client_that_has_finished_sending_gets_its_answer(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            wanted = await unmoved(pair, request(completion(40)))
            client, connection = await pair.client()
            client.send(request(completion(40)))
            client.writer.write_eof()
            await wait_for_tokens(connection, 20)
            await pair.move(connection, pair.a, pair.b)
            assert_same(await client.answer(), wanted)
            assert await client.rest() == b""

    asyncio.run(run())


def test_an_answer_that_ends_while_it_is_paused_is_whole(engines: Engines) -> None:
    """The last tokens come between the freeze and the engine's boundary: they are in the send buffer that moves."""

    async def run() -> None:
        async with two_nodes(engines) as pair:
            data = request(completion(30), "/v1/completions", "connection: close")
            wanted = await unmoved(pair, data)
            for early in range(6):
                client, connection = await pair.client()
                client.send(data)
                await wait_for_tokens(connection, wanted_tokens(wanted) - early)
                if connection.handler is None:
                    continue  # ended already
                await pair.move(connection, pair.a, pair.b)
                assert_same(await client.answer(), wanted)
                assert await client.rest() == b""

    asyncio.run(run())


def wanted_tokens(answer: Answer) -> int:
    return 30 + 4  # max_tokens, and some of the prompt


def test_a_client_that_sends_without_end_is_slowed_down(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            client, connection = await pair.client()
            client.send(request(completion(400)))
            await wait_for_tokens(connection, 10)
            client.send(bytes(8 << 20))
            handler = connection.handler
            assert isinstance(handler, Stream)
            async with asyncio.timeout(30):
                while handler.reader.waiting_bytes < MAX_WAITING_BYTES:
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            assert handler.reader.waiting_bytes < MAX_WAITING_BYTES + (128 << 10)
            connection = await pair.move(connection, pair.a, pair.b)
            assert (await client.answer()).status == 200
            assert (await client.answer()).status == 400  # the zeroes are no request
            assert isinstance(client, Client)

    asyncio.run(run())
