"""What a client may ask and what it is told: shapes of answers, refusals, limits, the engine's loss."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from gateway_pair import MODEL, PYTHON, ROOT, Client, Node, Pair, chat, completion, request, two_nodes
from hypothesis import given, settings
from hypothesis import strategies as st
from midstream_runtime.gateway.http import HttpError, RequestReader
from midstream_runtime.gateway.openai import parse

Engines = tuple[str, str]


async def ask(engines: Engines, data: bytes, **options: Any) -> Any:
    async with two_nodes(engines, **options) as pair:
        client, _ = await pair.client()
        client.send(data)
        return await client.answer()


def test_a_whole_completion_has_openais_fields(engines: Engines) -> None:
    answer = asyncio.run(ask(engines, request(completion(12, stream=False, logprobs=0))))
    body = answer.json
    assert (answer.status, body["object"], body["model"]) == (200, "text_completion", MODEL)
    assert body["id"].startswith("cmpl-") and answer.headers["x-request-id"] == body["id"]
    choice = body["choices"][0]
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    assert choice["text"] == "".join(choice["logprobs"]["tokens"])
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])
    assert body["usage"]["completion_tokens"] == 12
    assert body["usage"]["total_tokens"] == 12 + body["usage"]["prompt_tokens"]


def test_a_chat_stream_begins_with_the_role_and_ends_with_usage(engines: Engines) -> None:
    data = request(chat(8, stream_options={"include_usage": True}, logprobs=True), "/v1/chat/completions")
    first, *middle, last, usage = asyncio.run(ask(engines, data)).events()
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(e["object"] == "chat.completion.chunk" and e["usage"] is None for e in (first, *middle, last))
    assert all(e["choices"][0]["logprobs"]["content"] for e in middle)
    assert last["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 8)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(engines: Engines) -> None:
    whole = asyncio.run(ask(engines, request(completion(40, stream=False)))).text()
    word = whole.split()[5]
    answer = asyncio.run(ask(engines, request(completion(40, stop=[word])))).events()
    text = "".join(event["choices"][0]["text"] for event in answer)
    assert text == whole[: whole.index(word)]
    assert answer[-1]["choices"][0]["finish_reason"] == "stop"


def test_token_ids_are_a_prompt(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            ids = await pair.a.engine.tokenize("The license grants you")
            texts = []
            for prompt in ("The license grants you", ids, [ids]):
                client, _ = await pair.client()
                client.send(request(completion(8, prompt=prompt)))
                texts.append((await client.answer()).text())
            assert len(set(texts)) == 1

    asyncio.run(run())


def test_http_1_0_gets_no_chunks_and_the_connection_ends(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            client, _ = await pair.client()
            client.send(request(completion(8)).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
            head, _, body = (await client.rest()).partition(b"\r\n\r\n")
            assert b"transfer-encoding" not in head and b"connection: close" in head
            assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")

    asyncio.run(run())


PAGES = [("/health", "status"), ("/v1/models", "data"), (f"/v1/models/{MODEL}", "max_model_len")]


@pytest.mark.parametrize(("path", "key"), PAGES)
def test_pages(engines: Engines, path: str, key: str) -> None:
    assert key in asyncio.run(ask(engines, request(b"", path, method="GET"))).json


def test_metrics_are_prometheus_text(engines: Engines) -> None:
    body = asyncio.run(ask(engines, request(b"", "/metrics", method="GET"))).body.decode()
    assert "midstream_connections_total 1.0" in body.splitlines()


REFUSALS: list[tuple[str, bytes, int, str | None]] = [
    ("no JSON", request(b"{"), 400, None),
    ("no object", request(b"[]"), 400, None),
    ("other model", request(completion(model="gpt-9")), 404, "model"),
    ("no prompt", request({"model": MODEL}), 400, "prompt"),
    ("empty prompt", request(completion(prompt="")), 400, "prompt"),
    ("two prompts", request(completion(prompt=["a", "b"])), 400, "prompt"),
    ("several choices", request(completion(n=2)), 400, "n"),
    ("unknown", request(completion(tempreature=1)), 400, "tempreature"),
    ("hot", request(completion(temperature=3)), 400, "temperature"),
    ("not a number", request(completion(temperature=True)), 400, "temperature"),
    ("no tokens", request(completion(0)), 400, "max_tokens"),
    ("empty stop", request(completion(stop=[""])), 400, "stop"),
    (
        "options of no stream",
        request(completion(stream=False, stream_options={"include_usage": True})),
        400,
        "stream_options",
    ),
    ("tools", request(chat(tools=[{"type": "function"}]), "/v1/chat/completions"), 400, "tools"),
    ("no messages", request(chat(messages=[]), "/v1/chat/completions"), 400, "messages"),
    ("unknown role", request(chat(messages=[{"role": "x", "content": "y"}]), "/v1/chat/completions"), 400, None),
    ("longer than the context", request(completion(prompt=[1] * 9000)), 400, None),
    ("token that is none", request(completion(prompt=[1 << 20])), 400, None),
    ("no such page", request(b"", "/v2", method="GET"), 404, None),
    ("wrong method", request(b"", "/v1/completions", method="GET"), 405, None),
]


@pytest.mark.parametrize(("data", "status", "param"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_a_bad_request_is_refused_by_name_and_the_connection_goes_on(
    engines: Engines, data: bytes, status: int, param: str | None
) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            client, _ = await pair.client()
            client.send(data)
            answer = await client.answer()
            error = answer.json["error"]
            assert (answer.status, error["param"], error["type"]) == (status, param, "invalid_request_error")
            assert error["message"] and error["code"]
            client.send(request(completion(4)))
            assert (await client.answer()).status == 200

    asyncio.run(run())


BROKEN = [
    (b"\0\1\2\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
    (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n", 400),
    (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
    (b"GET / HTTP/1.1\r\nhost: x\r\nbig: " + b"x" * (70 << 10), 431),
    (request(b" " * 2000), 413),
    (b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n7d0\r\n" + b" " * 2000, 413),
]


@pytest.mark.parametrize(("data", "status"), BROKEN)
def test_bytes_that_are_no_request_end_the_connection(engines: Engines, data: bytes, status: int) -> None:
    async def run() -> None:
        async with two_nodes(engines, max_body_bytes=1000) as pair:
            client, _ = await pair.client()
            client.send(data)
            answer = await client.answer()
            assert (answer.status, answer.headers["connection"]) == (status, "close")
            assert await client.rest() == b""

    asyncio.run(run())


def test_a_client_that_goes_away_stops_its_answer(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines) as pair:
            client, connection = await pair.client()
            client.send(request(completion(2000)))
            await client.reader.read(1)
            client.writer.transport.abort()
            async with asyncio.timeout(30):
                while connection in pair.a.connections or pair.a.gateway.answers:
                    await asyncio.sleep(0.01)
            assert pair.a.metric("midstream_connections_lost_total") == 1

    asyncio.run(run())


def test_idle_connections_are_closed(engines: Engines) -> None:
    async def run() -> None:
        async with two_nodes(engines, idle_s=0.0) as pair:
            idle, _ = await pair.client()
            half, connection = await pair.client()
            half.send(b"POST /v1/completions HTTP/1.1\r\n")
            while connection.handler is not None and connection.handler.reader.empty:  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
            busy, _ = await pair.client()
            busy.send(request(completion(50)))
            while not pair.a.gateway.answers:
                await asyncio.sleep(0.01)
            pair.a.gateway.close_idle()
            assert await idle.rest() == b""
            assert (await half.answer()).status == 408
            assert (await busy.answer()).status == 200

    asyncio.run(run())


def test_when_the_engine_dies_answers_end_with_an_error_that_no_client_takes_for_whole(tmp_path: Path) -> None:
    async def run(path: str, engine: subprocess.Popen[bytes]) -> None:
        node = await Node.start(path)
        async with one(node) as client:
            client.send(request(completion(2000)))
            await client.reader.readuntil(b"data: ")
            engine.send_signal(signal.SIGKILL)
            rest = await client.rest()
            assert b'"code":"engine_lost"' in rest
            assert b"[DONE]" not in rest and not rest.endswith(b"0\r\n\r\n")
        async with one(node) as client:
            client.send(request(b"", "/health", method="GET"))
            assert (await client.answer("GET")).status == 503
            client.send(request(completion(4)))
            answer = await client.answer()
            assert (answer.status, answer.json["error"]["code"]) == (503, "engine_lost")

    path = str(tmp_path / "engine.sock")
    argv = [PYTHON, "-m", "midstream_runtime.engine.builtin", "--pool-slots", "256", "--pace-ms", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
    engine = subprocess.Popen([*argv, "--socket", path], env=env)
    try:
        asyncio.run(run(path, engine))
    finally:
        engine.kill()
        engine.wait()


@asynccontextmanager
async def one(node: Node) -> AsyncIterator[Client]:
    """A client of a lone node."""
    client, _ = await Pair(node, node).client()
    try:
        yield client
    finally:
        client.writer.transport.abort()
        await asyncio.sleep(0)


WHOLE = request(b'{"a": 1}') + request(b"", "/health", method="GET") + request(b"x" * 300, "/p", "expect: 100-continue")


@given(cuts=st.lists(st.integers(0, len(WHOLE)), max_size=8), moves=st.sets(st.integers(0, 8)))
@settings(max_examples=200, deadline=None)
def test_requests_are_the_same_however_their_bytes_come_and_wherever_they_are_moved(
    cuts: list[int], moves: set[int]
) -> None:
    reader, taken = RequestReader(1000), []
    for i, (start, end) in enumerate(zip([0, *sorted(cuts)], [*sorted(cuts), len(WHOLE)], strict=True)):
        if end > start:
            reader.feed(WHOLE[start:end])
        while got := reader.take():
            taken.append(got)
        if i in moves:
            reader = RequestReader(1000, reader.raw, reader.continued)
    assert [r.path for r, _ in taken] == ["/v1/completions", "/health", "/p"]
    assert [r.body for r, _ in taken] == [b'{"a": 1}', b"", b"x" * 300]
    assert b"".join(raw for _, raw in taken) == WHOLE
    assert reader.empty


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_no_bytes_break_the_reader(data: bytes) -> None:
    reader = RequestReader(100)
    if data:
        reader.feed(data)
    try:
        while reader.take():
            pass
    except HttpError as error:
        assert 400 <= error.status < 600


NAMES = st.sampled_from(["model", "prompt", "n", "stop", "seed", "stream", "top_p", "x", "logprobs"])
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.dictionaries(NAMES, PLAIN | st.lists(st.integers() | st.text())))
@settings(max_examples=300, deadline=None)
def test_any_json_object_is_taken_or_refused_with_a_status(body: dict[str, Any]) -> None:
    try:
        parse("completion", json.dumps(body).encode(), MODEL)
    except HttpError as error:
        assert error.status in (400, 404) and error.message
