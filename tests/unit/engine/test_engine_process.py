"""The engine as a process: what a gateway meets on its socket."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from midstream_runtime.contract.errors import Final, MidstreamError, Retryable
from midstream_runtime.engine import ipc
from midstream_runtime.engine.client import EngineClient, StartRequest
from midstream_runtime.engine.protocol import SamplingParams, TokenEvent

Batch = list[tuple[str, TokenEvent]]
LONG = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 50))


def requests(prompt: list[int], count: int, params: SamplingParams = LONG) -> list[StartRequest]:
    return [StartRequest(str(index), prompt, params) for index in range(count)]


def test_pause_does_not_wait_for_the_pace(start_engine: Callable[..., str]) -> None:
    """At ten minutes a token, a pause that waited for the next step would run into the test's limit."""
    path = start_engine("--pace-ms", "600000")

    async def scenario() -> None:
        client = await EngineClient.connect(path)
        tokens: Batch = []
        first = asyncio.Event()

        def sink(events: Batch) -> None:
            tokens.extend(events)
            first.set()

        await client.start(requests(await client.tokenize("Emma"), 1), sink)
        await first.wait()
        state = (await client.pause(["0"]))["0"]
        assert state.generated_ids == [event.token_id for _, event in tokens]
        await client.close()

    run(scenario())


def test_every_token_up_to_the_boundary_is_there_when_pause_returns(start_engine: Callable[..., str]) -> None:
    path = start_engine("--pace-ms", "0", "--pool-slots", "4096")

    async def scenario() -> None:
        client = await EngineClient.connect(path)
        seen: dict[str, list[int]] = {str(index): [] for index in range(64)}

        def sink(events: Batch) -> None:
            for name, event in events:
                seen[name].append(event.token_id)

        await client.start(requests(await client.tokenize("Emma"), 64), sink)
        for _ in range(20):
            states = await client.pause(list(seen))
            before = {name: list(ids) for name, ids in seen.items()}
            assert {name: state.generated_ids for name, state in states.items()} == before
            await client.stats()
            assert seen == before, "a paused request went on"
            await client.resume(list(seen))
            await client.stats()
        await client.close()

    run(scenario())


def test_states_load_paused_and_start_together(start_engine: Callable[..., str]) -> None:
    paths = [start_engine("--pace-ms", "1") for _ in range(2)]

    async def scenario() -> None:
        source, target = [await EngineClient.connect(path) for path in paths]
        enough = asyncio.Event()
        heads: Batch = []
        tails: Batch = []

        def sink(events: Batch) -> None:
            heads.extend(events)
            if len(heads) > 100:
                enough.set()

        params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
        await source.start(requests(await source.tokenize("Emma"), 8, params), sink)
        await enough.wait()
        states = await source.pause([str(index) for index in range(8)])
        done = asyncio.Event()

        def target_sink(events: Batch) -> None:
            tails.extend(events)
            if sum(event.finish_reason is not None for _, event in tails) == len(states):
                done.set()

        items = [
            StartRequest(name, state=state.with_slots([None] * len(state.kv)), paused=True)
            for name, state in states.items()
        ]
        assert await target.start(items, target_sink) == {}
        assert (await target.stats())["paused"] == len(states)
        assert not tails
        await target.resume(list(states))
        await done.wait()
        assert len(heads) + len(tails) == 8 * 60
        await source.close()
        await target.close()

    run(scenario())


def test_one_bad_request_of_a_batch_is_refused_alone(start_engine: Callable[..., str]) -> None:
    path = start_engine("--pace-ms", "0")

    async def scenario() -> None:
        client = await EngineClient.connect(path)
        done = asyncio.Event()

        def sink(events: Batch) -> None:
            if events[-1][1].finish_reason:
                done.set()

        good = StartRequest("good", [1, 2, 3], SamplingParams(max_tokens=3))
        errors = await client.start([StartRequest("bad", [], SamplingParams()), good], sink)
        assert {name: error.code for name, error in errors.items()} == {"bad": "empty_prompt"}
        await done.wait()
        with pytest.raises(Final, match="bad_params"):
            await anext(client.generate("worse", [1], SamplingParams(temperature=-1)))
        with pytest.raises(Final, match="bad_messages"):
            await client.render_chat([])
        with pytest.raises(Retryable, match="pool_full"):
            await client.reserve(1 << 20)
        await client.close()

    run(scenario())


async def until_free(client: EngineClient) -> None:
    """The engine notices a closed connection in its own time."""
    while True:
        stats = await client.stats()
        if stats["free_slots"] == stats["slots"] and not stats["requests"]:
            return


def test_requests_and_reservations_go_with_their_connection(start_engine: Callable[..., str]) -> None:
    path = start_engine("--pace-ms", "1")

    async def scenario() -> None:
        watcher = await EngineClient.connect(path)
        client = await EngineClient.connect(path)
        first = asyncio.Event()
        await client.start(requests([1, 2, 3], 4), lambda events: first.set())
        await first.wait()
        await client.reserve(10)
        assert (await watcher.stats())["free_slots"] <= 8192 - 14
        await client.close()
        await until_free(watcher)
        await watcher.close()

    run(scenario())


def test_closed_iterator_drops_its_request(start_engine: Callable[..., str]) -> None:
    path = start_engine("--pace-ms", "1")

    async def scenario() -> None:
        client = await EngineClient.connect(path)
        answer = client.generate("a", [1, 2, 3], LONG)
        await anext(answer)
        await answer.aclose()  # type: ignore[attr-defined]
        await until_free(client)
        await client.close()

    run(scenario())


def test_death_of_the_engine_is_told_to_everyone(start_engine: Any) -> None:
    path = start_engine("--pace-ms", "1")

    async def scenario() -> None:
        client = await EngineClient.connect(path)
        lost: list[MidstreamError] = []
        client.on_lost = lost.append
        answer = client.generate("a", [1, 2, 3], LONG)
        await anext(answer)
        start_engine.processes[0].kill()
        with pytest.raises(Retryable, match="engine_lost"):
            async for _ in answer:
                pass
        with pytest.raises(Retryable, match="engine_lost"):
            await client.stats()
        assert [error.code for error in lost] == ["engine_lost"]
        await client.close()
        start_engine.processes[0].wait(timeout=60)  # its listener may be closed after the connection
        with pytest.raises(Retryable, match="engine_unreachable"):
            await EngineClient.connect(path)

    run(scenario())


def test_garbage_on_the_socket_closes_that_connection_only(start_engine: Callable[..., str]) -> None:
    path = start_engine("--pace-ms", "1")

    async def scenario() -> None:
        client = await EngineClient.connect(path)
        answer = client.generate("a", [1, 2, 3], LONG)
        await anext(answer)
        for garbage in (b"\xff" * 64, os.urandom(4096) + b"\xff" * 8):
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(path)
                peer.sendall(garbage)
                peer.setblocking(False)
                assert await asyncio.get_running_loop().sock_recv(peer, 1) == b""
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(path)
            peer.sendall(ipc.encode({"kind": "dance", "id": 1}) + ipc.encode({"kind": "pause", "id": 2}))
            peer.setblocking(False)
            parser = ipc.FrameParser()
            frames: list[ipc.Frame] = []
            while len(frames) < 2:
                frames += parser.feed(await asyncio.get_running_loop().sock_recv(peer, 65536))
            assert [header["error"]["code"] for header, _ in frames] == ["unknown_request", "bad_request"]
        await anext(answer)
        await client.close()

    run(scenario())


def test_pool_fd_is_sealed_and_matches_info(start_engine: Callable[..., str]) -> None:
    path = start_engine("--pool-slots", "64", "--block-tokens", "32")

    async def scenario() -> None:
        client = await EngineClient.connect(path)
        info = await client.info()
        fd = client.pool_fd()
        assert fd is not None
        assert info.pool is not None
        assert (info.pool.slots, info.pool.block_tokens, info.pool.slot_bytes) == (64, 32, 16384)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        await client.close()

    run(scenario())
