"""Calls to an agent share one channel: real gRPC with mutual TLS against an agent that never ends a call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc
from midstream_operator.agents import Agents
from midstream_operator.errors import Retryable
from midstream_operator.settings import Settings, TlsFiles
from midstream_operator.view import Agent, View
from midstream_testbed.certs import OPERATOR, Authority

NODE = "node-a"
PATIENCE_S = 20.0


class Endless(rpc.AgentServicer):
    """Says one thing and then nothing more."""

    async def Migrate(self, request: pb.MigrateRequest, context: Any) -> AsyncIterator[pb.MigrateEvent]:
        yield pb.MigrateEvent(step="FOLLOW")
        await asyncio.Event().wait()

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.DescribeReply:
        await context.abort(grpc.StatusCode.INTERNAL, "something broke")
        raise AssertionError("aborted")


@asynccontextmanager
async def agents(folder: Path) -> AsyncIterator[Agents]:
    authority = Authority(folder)
    (cert, key), (own, own_key) = authority.issue(NODE), authority.issue(OPERATOR)
    pairs = [(key.read_bytes(), cert.read_bytes())]
    server = aio.server()
    rpc.add_AgentServicer_to_server(Endless(), server)  # type: ignore[abstract]  # the rest is not called
    credentials = grpc.ssl_server_credentials(pairs, authority.ca.read_bytes(), require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    view = View()
    view.put_agent("agent", Agent(NODE, f"127.0.0.1:{port}", True, "agent"))
    found = Agents(Settings(tls=TlsFiles(authority.ca, own, own_key)), view)
    try:
        yield found
    finally:
        await found.close()
        await server.stop(None)


def test_a_call_whose_channel_another_one_closes_can_be_made_again(tmp_path: Path) -> None:
    """It must not look like the cancellation of its own task: a job would never be looked at again."""

    async def body() -> None:
        async with agents(tmp_path) as calls, asyncio.timeout(PATIENCE_S):
            events = calls.migrate(NODE, pb.MigrateRequest(job_id="j"))
            assert (await anext(events)).step == "FOLLOW"
            waiting = asyncio.create_task(_next(events))
            await asyncio.sleep(0)
            with pytest.raises(Retryable, match="something broke"):
                await calls.describe(NODE)  # closes the channel
            with pytest.raises(Retryable, match="agent_unreachable"):
                await waiting
            again = calls.migrate(NODE, pb.MigrateRequest(job_id="j"))
            assert (await anext(again)).step == "FOLLOW"

    asyncio.run(body())


def test_a_task_that_is_cancelled_in_a_call_ends(tmp_path: Path) -> None:
    async def body() -> None:
        async with agents(tmp_path) as calls, asyncio.timeout(PATIENCE_S):
            events = calls.migrate(NODE, pb.MigrateRequest(job_id="j"))
            await anext(events)
            waiting = asyncio.create_task(_next(events))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(body())


async def _next(events: AsyncIterator[pb.MigrateEvent]) -> pb.MigrateEvent:
    return await anext(events)
