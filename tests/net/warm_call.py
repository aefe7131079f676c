"""The operator's `Warm` by hand; prints the reply as JSON.

python warm_call.py INVENTORY POD TARGET_POD JOB [CANCEL_AFTER_S]
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import grpc
from google.protobuf import json_format
from grpc import aio
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import agent_pb2_grpc as rpc
from midstream_cli.inventory import Inventory


async def main(inventory: Inventory, pod: str, target: str, job: str, cancel_after_s: float) -> None:
    source, there = inventory.pod(pod), inventory.pod(target)
    files = [path.read_bytes() for path in (inventory.ca, inventory.key, inventory.cert)]
    options = [("grpc.ssl_target_name_override", source.node)]
    endpoint = inventory.node(source.node).endpoint
    async with aio.secure_channel(endpoint, grpc.ssl_channel_credentials(*files), options) as channel:
        to = inventory.node(there.node)
        epoch = int(time.time() * 1000)  # as the CLI's
        request = pb.WarmRequest(job_id=job, epoch=epoch, pod=source.ref, target_pod=there.ref, target_node=to)
        call = rpc.AgentStub(channel).Warm(request)
        if cancel_after_s:
            await asyncio.sleep(cancel_after_s)
            call.cancel()
        else:
            print(json_format.MessageToJson(await call))


if __name__ == "__main__":
    file, *names = sys.argv[1:]
    asyncio.run(main(Inventory.load(Path(file)), names[0], names[1], names[2], float(names[3]) if names[3:] else 0.0))
