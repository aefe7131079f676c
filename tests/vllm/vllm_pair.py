"""Two gateways in front of two vLLM servers, in one process: gateway_pair's steps of a migration with another
engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from gateway_pair import LIMIT_S, Node, Pair
from midstream_runtime.engine.vllm.client import Settings, VllmEngine
from midstream_runtime.gateway.app import Gateway
from midstream_runtime.gateway.app import Settings as GatewaySettings
from midstream_runtime.gateway.metrics import Metrics
from vllm_servers import VllmServer

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
