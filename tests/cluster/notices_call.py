"""The operator's `Notices` and `Metadata` by hand; JSON lines, the metadata last.

python notices_call.py INVENTORY NODE COUNT
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import grpc
from google.protobuf import json_format
from grpc import aio
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc
from midstream_cli.inventory import Inventory


async def main(inventory: Inventory, node: str, count: int) -> None:
    files = [path.read_bytes() for path in (inventory.ca, inventory.key, inventory.cert)]
    options = [("grpc.ssl_target_name_override", node)]
    endpoint = inventory.node(node).endpoint
    async with aio.secure_channel(endpoint, grpc.ssl_channel_credentials(*files), options) as channel:
        stub = rpc.AgentStub(channel)
        async for notice in stub.Notices(pb.NoticesRequest()):
            print(json_format.MessageToJson(notice, indent=None))
            count -= 1
            if not count:
                break
        print(json_format.MessageToJson(await stub.Metadata(pb.MetadataRequest()), indent=None))


if __name__ == "__main__":
    asyncio.run(main(Inventory.load(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])))
