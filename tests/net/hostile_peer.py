"""A source agent that prepares one thing and ships another, for test_hostile_pod.py: `hostile_peer.py JSON`, on a node.

{"tls": [CA, CERT, KEY], "endpoint": "10.77.0.18:9443", "pod": UID, "prepared": "10.77.0.122", "local": "10.77.0.122",
 "port": 8000, "streams": 1, "harm": "none" | "damage" | "truncate" | "empty"}

The checkpoint is one of a real connection of this process to itself. Prints the code of the refusal.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import sys
from pathlib import Path
from typing import Any

from midstream_agent import tcp
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.peer import PeerSession
from midstream_agent.settings import Settings, TlsFiles
from midstream_runtime.contract.errors import MidstreamError


def checkpoint(local: str, port: int) -> bytes:
    with socket.create_server((local, port)) as listener, socket.create_connection((local, port)):
        server, _ = listener.accept()
        with server:
            batch = tcp.Batch.checkpoint([server.fileno()])
            assert batch.errors == [0]
            return batch.encode()


def harmed(data: bytes, harm: str) -> bytes:
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    return {"none": data, "damage": flipped, "truncate": data[:-1], "empty": b""}[harm]


async def main(plan: dict[str, Any]) -> str:
    settings = Settings(node="node-a", listen="", tls=TlsFiles(*map(Path, plan["tls"])))
    session = PeerSession(settings, "node-b", plan["endpoint"], f"hostile-{secrets.token_hex(4)}", 1, "boot")
    pod = pb.PodRef(name="hostile-target", uid=plan["pod"])
    prepare = pb.PeerPrepare(pod=pod, addresses=[plan["prepared"]], families=[4], ports=[8000], pod_kind="lines")
    shipped = harmed(checkpoint(plan["local"], plan["port"]), plan["harm"])
    try:
        await session.open()
        await session.ask(pb.PeerRequest(prepare=prepare))
        await session.ask(pb.PeerRequest(ship=pb.PeerShip(checkpoints=shipped, streams=plan["streams"])))
    except MidstreamError as e:
        return e.code
    finally:
        await session.close()
    return "taken"


if __name__ == "__main__":
    print(asyncio.run(main(json.loads(sys.argv[1]))))
