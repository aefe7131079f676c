"""The agents of a whole fleet as far as a plan asks them: `python survey_agents.py TLS_FOLDER`, one gRPC server.

Real gRPC with mutual TLS, in a process of its own. The operator opens a channel for each node, which checks the node's
name in the certificate: one wildcard stands for all. Says on which port it listens.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import grpc
from grpc import aio
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc

STREAMS, TOKENS, KV_BYTES, POOL_BYTES = 8, 4000, 200 << 20, 40 << 30
SUFFIX = ".fleet.test"


class Agents(rpc.AgentServicer):
    async def Survey(self, request: pb.SurveyRequest, context: Any) -> pb.SurveyReply:
        """A source serves eight streams; a target, by its name, none."""
        streams = [
            pb.StreamFigures(id=str(n), address="10.0.32.1", movable=True, tokens=TOKENS, kv_bytes=KV_BYTES)
            for n in range(STREAMS if request.pod.name.startswith("pod-") else 0)
        ]
        return pb.SurveyReply(
            streams=streams, pool_bytes=POOL_BYTES, pool_free_bytes=POOL_BYTES, kv_bytes_per_s=600e6, load_known=False
        )


async def main(tls: Path) -> None:
    key, cert = (tls / f"agents.{kind}" for kind in ("key", "pem"))
    pair = (key.read_bytes(), cert.read_bytes())
    server = aio.server()
    rpc.add_AgentServicer_to_server(Agents(), server)  # type: ignore[abstract]  # the rest is not called
    credentials = grpc.ssl_server_credentials([pair], (tls / "ca.pem").read_bytes(), require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
