"""IMDS as the agent hears it and hands it on: real HTTP, real gRPC, the testbed's own metadata server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from grpc import aio
from midstream_agent import notices
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc
from midstream_agent.imds import Imds
from midstream_agent.notices import Board, NoticesMixin, watch
from midstream_agent.settings import ImdsSettings
from midstream_agent.witness import AddressWitness
from midstream_operator.errors import Retryable
from midstream_operator.notices.agents import AgentSource
from midstream_operator.notices.base import Notice, NoticeKind
from midstream_operator.view import Agent, View
from midstream_runtime.contract import errors
from midstream_testbed.imds import ImdsServer, Metadata

NODE = "i-0123456789abcdef0"
PATIENCE_S = 10.0


@pytest.fixture
def metadata() -> Metadata:
    return Metadata(NODE)


@pytest.fixture
def server(metadata: Metadata) -> Iterator[ImdsServer]:
    with ImdsServer(metadata) as server:
        yield server


def settings_of(server: ImdsServer) -> ImdsSettings:
    return ImdsSettings(server.host, server.port, timeout_s=0.5, poll_s=0.02, retry_max_s=0.1, absent_max_s=0.2)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


def with_watch(server: ImdsServer, body: Callable[[Board], Awaitable[None]]) -> None:
    async def run() -> None:
        board = Board()
        task = asyncio.create_task(watch(settings_of(server), board))
        try:
            await body(board)
            assert not task.done()
        finally:
            task.cancel()

    asyncio.run(run())


# -- the answers


def test_what_the_answers_say() -> None:
    at = datetime(2026, 11, 25, 10, 2, tzinfo=UTC)
    assert notices.spot('{"action": "terminate", "time": "2026-11-25T10:02:00Z"}')[0].deadline == at
    assert notices.spot('{"action": "none"}') == []
    assert notices.rebalance('{"noticeTime": "2026-11-25T10:02:00Z"}')[0].issued == at
    event = {"NotBefore": "25 Nov 2026 10:02:00 GMT", "Code": "system-reboot", "EventId": "e", "State": "active"}
    for text in (json.dumps([event]), json.dumps(event)):
        assert notices.maintenance(text)[0].deadline == at
    assert notices.maintenance(json.dumps([{**event, "State": "completed"}])) == notices.maintenance("[]") == []
    assert notices.lifecycle("InService") == notices.lifecycle("Warmed:Running") == []
    assert notices.lifecycle("Terminated\n")[0].kind == "Lifecycle"


def test_the_kinds_are_the_operators() -> None:
    assert {notices.SPOT, notices.REBALANCE, notices.MAINTENANCE, notices.LIFECYCLE} <= set(NoticeKind)


# -- the interface's addresses

MAC = "0a:00:00:00:00:01"


def seen(settings: ImdsSettings, mac: str = MAC) -> pb.MetadataReply:
    return asyncio.run(AddressWitness(settings, mac).ask())


def test_the_interfaces_addresses_of_both_families(server: ImdsServer, metadata: Metadata) -> None:
    metadata.addresses = lambda: {MAC: ["10.0.0.5", "10.0.0.97", "fd00::101"], "0a:00:00:00:00:02": ["10.0.0.9"]}
    assert list(seen(settings_of(server)).addresses) == ["10.0.0.5", "10.0.0.97", "fd00::101"]
    metadata.addresses = lambda: {MAC: ["10.0.0.5"]}
    reply = seen(settings_of(server))
    assert (list(reply.addresses), reply.absent) == (["10.0.0.5"], ""), "it left, or has not come yet"


def test_a_witness_that_cannot_say_says_why(server: ImdsServer, metadata: Metadata) -> None:
    assert "--imds-host is not set" in seen(ImdsSettings()).absent
    assert seen(settings_of(server)).absent == f"IMDS knows no interface {MAC}"
    metadata.status = 500
    assert seen(settings_of(server)).absent.startswith("imds_unavailable: ")
    metadata.silent = True
    assert seen(settings_of(server)).absent.startswith("imds_unavailable: ")


# -- asking


def test_a_token_is_fetched_once_and_anew_when_it_is_refused(server: ImdsServer, metadata: Metadata) -> None:
    async def body() -> None:
        imds = Imds(settings_of(server))
        assert [await imds.get("instance-id") for _ in range(3)] == [NODE] * 3
        assert await imds.get("spot/instance-action") is None
        metadata.expire_tokens()
        assert await imds.get("instance-id") == NODE

    asyncio.run(body())
    assert metadata.asked.count("PUT /latest/api/token") == 2


def test_without_a_token_nothing_is_told(server: ImdsServer) -> None:
    async def body() -> int:
        return (await Imds(settings_of(server))._ask("GET", "/latest/meta-data/instance-id", {}))[0]

    assert asyncio.run(body()) == 401


@pytest.mark.parametrize(
    "answer",
    [b"", b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", b"x" * 99_999,
     b"HTTP/1.1 200 OK\r\n\r\n" * 9000, b"HTTP/1.1 200 OK\r\n\r\ntoken\r\nX-Evil: 1",
     b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", b"HTTP/1.1 x OK\r\n\r\n", b"HTTP/1.1 500 No\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -4\r\n\r\n"],
    ids=lambda answer: repr(answer[:60]),
)  # fmt: skip
def test_what_is_no_imds_is_an_error_by_name(answer: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async def body() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        async with server:
            host, port = server.sockets[0].getsockname()
            await Imds(ImdsSettings(host, port, timeout_s=0.5)).get("instance-id")

    with pytest.raises(errors.Retryable) as caught:
        asyncio.run(body())
    assert caught.value.code == "imds_unavailable"


# -- watching


def test_notices_come_change_and_are_withdrawn(server: ImdsServer, metadata: Metadata) -> None:
    async def body(board: Board) -> None:
        heard: list[pb.Notice] = []

        async def listen() -> None:
            async for notice in board.listen():
                heard.append(notice)

        listener = asyncio.create_task(listen())
        await until(lambda: board.instance_id)
        metadata.rebalance()
        await until(lambda: len(heard) == 1)
        end = metadata.interrupt(120)
        await until(lambda: len(heard) == 2)
        metadata.maintain(3600, array=False)
        await until(lambda: len(heard) == 3)
        metadata.withdraw("events/maintenance/scheduled")
        await until(lambda: len(heard) == 4)
        assert [(n.kind, n.withdrawn) for n in heard] == [
            ("Rebalance", False), ("SpotInterruption", False), ("Maintenance", False), ("Maintenance", True),
        ]  # fmt: skip
        assert heard[1].deadline_unix_ms == int(end.replace(microsecond=0).timestamp() * 1000)
        assert heard[1].instance_id == NODE
        listener.cancel()

    with_watch(server, body)


@pytest.mark.parametrize("trouble", ["status", "silent"])
def test_imds_that_is_away_is_named_and_comes_back(server: ImdsServer, metadata: Metadata, trouble: str) -> None:
    async def body(board: Board) -> None:
        await until(lambda: board.instance_id)
        setattr(metadata, trouble, 500 if trouble == "status" else True)
        await until(lambda: "imds" in board.health)
        metadata.interrupt(100)
        metadata.status, metadata.silent = 0, False
        await until(lambda: board.standing.get("spot/instance-action"))
        await until(lambda: not board.health)

    with_watch(server, body)


def test_nonsense_at_one_path_is_named_and_the_others_are_heard(server: ImdsServer, metadata: Metadata) -> None:
    metadata.paths["events/recommendations/rebalance"] = "[[["
    metadata.paths["events/maintenance/scheduled"] = '{"NotBefore": "soon"}'
    metadata.paths["spot/instance-action"] = '{"action": "terminate"}'
    metadata.end_lifecycle()

    async def body(board: Board) -> None:
        await until(lambda: board.standing.get("autoscaling/target-lifecycle-state"))
        assert set(board.health) == set(notices.PATHS) - {"autoscaling/target-lifecycle-state"}
        metadata.interrupt(100)
        await until(lambda: board.standing.get("spot/instance-action"))

    with_watch(server, body)


def test_a_listener_that_does_not_listen_is_let_go() -> None:
    async def body() -> None:
        board = Board(NODE)
        stream = board.listen()
        board.put("spot/instance-action", [notices.Said("SpotInterruption")])
        assert (await anext(stream)).kind == "SpotInterruption"
        for n in range(200):
            end = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=n)
            board.put("spot/instance-action", [notices.Said("SpotInterruption", deadline=end)])
        assert len([notice async for notice in stream]) == 64, "then the call ends, and it comes again"

    asyncio.run(body())


# -- to the operator


class Service(NoticesMixin, rpc.AgentServicer):
    """The agent's service as far as notices go."""

    def __init__(self, board: Board) -> None:
        self._node = SimpleNamespace(notices=board)

    async def _admit(self, context: Any) -> None:
        return None


class Agents:
    """Agents of the test and the operator's way to them, over real gRPC without TLS."""

    def __init__(self) -> None:
        self.servers: list[aio.Server] = []
        self.view = View()

    async def start(self, node: str, board: Board, port: int = 0) -> int:
        server = aio.server()
        rpc.add_AgentServicer_to_server(Service(board), server)  # type: ignore[abstract]
        port = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        self.servers.append(server)
        self.view.put_agent(node, Agent(node, f"127.0.0.1:{port}", True, f"agent-{node}"))
        return port

    async def stop(self) -> None:
        for server in self.servers:
            await server.stop(None)
        self.servers.clear()

    async def listen(self, node: str) -> AsyncIterator[pb.Notice]:
        agent = self.view.agent(node)
        assert agent is not None
        async with aio.insecure_channel(agent.endpoint, options=[("grpc.enable_http_proxy", 0)]) as channel:
            try:
                async for notice in rpc.AgentStub(channel).Notices(pb.NoticesRequest()):
                    yield notice
            except aio.AioRpcError as e:
                raise Retryable("agent_unreachable", e.details() or "") from e


def source_of(agents: Agents) -> AgentSource:
    return AgentSource(agents.view, agents.listen, retry_s=0.02, retry_max_s=0.1, resync_s=0.02)


def test_an_interruption_reaches_the_operator_with_its_deadline(server: ImdsServer, metadata: Metadata) -> None:
    async def body(board: Board) -> None:
        agents, taken = Agents(), list[Notice]()
        await agents.start("node-a", board)

        async def handle(notice: Notice) -> None:
            taken.append(notice)

        task = asyncio.create_task(source_of(agents).run(handle))
        end = metadata.interrupt(120)
        await until(lambda: taken)
        notice = taken[0]
        assert (notice.kind, notice.node, notice.instance_id) == (NoticeKind.SPOT_INTERRUPTION, "node-a", NODE)
        assert notice.deadline == end.replace(microsecond=0) and notice.details == {"action": "terminate"}
        task.cancel()
        await agents.stop()

    with_watch(server, body)


def test_what_was_not_recorded_is_told_again_and_an_agent_that_comes_back_is_heard() -> None:
    async def body() -> None:
        agents, taken = Agents(), list[str]()
        board = Board(NODE, {"spot/instance-action": [notices.Said("SpotInterruption")]})
        port = await agents.start("node-a", board)

        async def handle(notice: Notice) -> None:
            taken.append(notice.id)
            if len(taken) < 3:
                raise RuntimeError("the API server does not answer")

        source = source_of(agents)
        task = asyncio.create_task(source.run(handle))
        await until(lambda: len(taken) == 3)
        assert len(set(taken)) == 1
        await agents.stop()
        await until(lambda: "node-a" in source.unheard)
        await agents.start("node-a", board, port)
        await until(lambda: len(taken) == 4)
        assert source.unheard == {}
        task.cancel()
        await agents.stop()

    asyncio.run(body())


def test_agents_that_come_and_go_are_followed_and_unknown_kinds_are_skipped() -> None:
    async def body() -> None:
        agents, taken = Agents(), list[Notice]()

        async def handle(notice: Notice) -> None:
            taken.append(notice)

        source = source_of(agents)
        task = asyncio.create_task(source.run(handle))
        new = [notices.Said("FlyingPigs"), notices.Said("Rebalance")]
        await agents.start("node-b", Board("i-0b", {"spot/instance-action": new}))
        await until(lambda: taken)
        assert [notice.kind for notice in taken] == [NoticeKind.REBALANCE]
        agents.view.agent_pods.clear()
        await until(lambda: not [t for t in asyncio.all_tasks() if t.get_name() == "notices of node-b"])
        task.cancel()
        await agents.stop()

    asyncio.run(body())


def test_settings_are_off_until_somebody_asks_for_them() -> None:
    assert ImdsSettings().host == "" and replace(ImdsSettings(), host="169.254.169.254").port == 80
