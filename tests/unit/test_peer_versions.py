"""Agents of another protocol are refused when a session begins: nothing is frozen yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import aio
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc
from midstream_agent.peer import MIN_PROTOCOL, PROTOCOL, Handler, PeerService, PeerSession
from midstream_agent.settings import Settings, TlsFiles
from midstream_runtime.contract.errors import Final
from midstream_testbed.certs import Authority

SETTINGS = Settings("node-b", "[::1]:0", TlsFiles(Path("ca"), Path("cert"), Path("key")))


def greet(protocol: int, min_protocol: int) -> pb.PeerReply:
    async def handler(_: pb.PeerHello) -> Handler:
        return Handler()

    reply = pb.PeerReply()
    hello = pb.PeerHello(protocol=protocol, min_protocol=min_protocol, node="node-a")
    asyncio.run(PeerService(SETTINGS, "boot", handler)._greet(hello, reply))
    return reply


@pytest.mark.parametrize(
    ("protocol", "min_protocol"), [(MIN_PROTOCOL - 1, 1), (PROTOCOL + 1, PROTOCOL + 1)], ids=["older", "newer"]
)
def test_another_protocol_is_refused_by_name(protocol: int, min_protocol: int) -> None:
    with pytest.raises(Final, match=r"peer_protocol: agent on node-a speaks protocol .*: upgrade the older one first"):
        greet(protocol, min_protocol)


def test_a_newer_agent_that_still_speaks_ours_is_welcome() -> None:
    assert greet(PROTOCOL + 1, PROTOCOL).hello.protocol == PROTOCOL


class OtherVersion(rpc.PeerServicer):
    """An agent that answers a greeting, and says of itself what a test wants."""

    def __init__(self, protocol: int, min_protocol: int) -> None:
        self.says = pb.PeerHelloReply(protocol=protocol, min_protocol=min_protocol, node="node-b", boot_id="boot")
        self.asked: list[str] = []

    async def Session(self, requests: AsyncIterator[pb.PeerRequest], context: Any) -> AsyncIterator[pb.PeerReply]:
        async for request in requests:
            self.asked.append(str(request.WhichOneof("body")))
            yield pb.PeerReply(id=request.id, hello=self.says)


async def open_session(folder: Path, other: OtherVersion) -> None:
    """As a source does before anything else: over TLS, to a server of this machine."""
    authority = Authority(folder)
    (cert, key), mine = authority.issue("node-b"), authority.issue("node-a")
    server = aio.server()
    rpc.add_PeerServicer_to_server(other, server)
    pair = key.read_bytes(), cert.read_bytes()
    credentials = grpc.ssl_server_credentials([pair], authority.ca.read_bytes(), True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    settings = Settings("node-a", "[::1]:0", TlsFiles(authority.ca, *mine))
    session = PeerSession(settings, "node-b", f"127.0.0.1:{port}", "job", 1, "boot")
    try:
        await session.open()
    finally:
        await session.close()
        await server.stop(None)


@pytest.mark.parametrize(
    ("protocol", "min_protocol"), [(MIN_PROTOCOL - 1, 1), (PROTOCOL + 1, PROTOCOL + 1)], ids=["older", "newer"]
)
def test_a_target_of_another_protocol_is_refused_before_it_is_asked_for_anything(
    tmp_path: Path, protocol: int, min_protocol: int
) -> None:
    other = OtherVersion(protocol, min_protocol)
    with pytest.raises(Final, match=r"peer_protocol: agent on node-b speaks protocol .*: upgrade the older one first"):
        asyncio.run(open_session(tmp_path, other))
    assert other.asked == ["hello"]


def test_a_newer_target_that_still_speaks_ours_is_taken(tmp_path: Path) -> None:
    asyncio.run(open_session(tmp_path, OtherVersion(PROTOCOL + 1, PROTOCOL)))
