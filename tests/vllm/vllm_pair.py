"""Two gateways in front of two vLLM servers, in one process: gateway_pair's steps of a migration with another
engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from gateway_pair import LIMIT_S, Answer, Node, Pair, request
from midstream_runtime.engine.protocol import TokenEvent
from midstream_runtime.engine.vllm.client import Settings, VllmEngine
from midstream_runtime.gateway.app import Gateway
from midstream_runtime.gateway.app import Settings as GatewaySettings
from midstream_runtime.gateway.metrics import Metrics
from midstream_runtime.gateway.stream import Stream
from midstream_runtime.handoff import Connection
from vllm_servers import BLOCK_TOKENS, VllmServer

Servers = tuple[VllmServer, VllmServer]
PROMPT_TOKENS = 70
TRIES = 5
PATIENCE_S = 120.0

FAST = Settings(outage_s=280, retry_s=0.1, watch_s=0.2)


async def start_node(server: VllmServer, *, pool: bool = True, **settings: Any) -> Node:
    engine = await VllmEngine.connect(server.url, server.pool if pool else None, FAST)
    chosen = GatewaySettings(**{"max_body_bytes": 1 << 20, "idle_s": 60.0, **settings})
    gateway = Gateway(await engine.info(), chosen, Metrics())
    gateway.attach(engine)
    return Node(gateway, engine)  # type: ignore[arg-type]  # all of it that the pair uses is there


@asynccontextmanager
async def two_vllm_nodes(servers: tuple[VllmServer, VllmServer], **settings: Any) -> AsyncIterator[Pair]:
    pair = Pair(await start_node(servers[0], **settings), await start_node(servers[1], **settings))
    try:
        yield pair
        async with asyncio.timeout(LIMIT_S):
            for node in (pair.a, pair.b):
                while node.gateway.answers or (await node.engine.stats())["running"]:
                    await asyncio.sleep(0.01)
                assert (await node.engine.stats()).get("pinned", 0) == 0, "a block that nobody reads is pinned"
    finally:
        for client in pair.clients:
            client.writer.transport.abort()
        for node in (pair.a, pair.b):
            for connection in list(node.connections):
                connection.drop()
            await node.engine.close()
        await asyncio.sleep(0)  # aborted transports close their sockets in the next turn of the loop


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
    """The answer to a request that is moved from a to b when it has so many tokens. A busy server may send the last
    tokens all at once, and then there is nothing left to move: it is asked again."""
    for _ in range(TRIES):
        client, connection = await pair.client()
        stopped = asyncio.create_task(stop_at(pair.a, connection, tokens).wait())
        client.send(request(body, path))
        answer = asyncio.create_task(client.answer())
        await asyncio.wait({stopped, answer}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            await pair.move(connection, pair.a, pair.b, **how)
            return await answer
        stopped.cancel()
        if not answer.done():
            answer.cancel()
            raise TimeoutError(f"neither {tokens} tokens nor an end within {PATIENCE_S:g} s")
    raise AssertionError(f"{TRIES} answers ended before they could be stopped at {tokens} tokens")


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
