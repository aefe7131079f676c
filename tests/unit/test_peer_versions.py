"""Agents of another protocol are refused when a session begins: nothing is frozen yet."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.peer import MIN_PROTOCOL, PROTOCOL, Handler, PeerService
from midstream_agent.settings import Settings, TlsFiles
from midstream_runtime.contract.errors import Final

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
