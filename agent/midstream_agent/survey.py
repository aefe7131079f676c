"""What a pod serves at this moment, for the operator's planner: asked over a handoff connection of its own, nothing is
attached, prepared or held. What nobody measured stays 0 or unset: the planner names what it assumes then."""

from __future__ import annotations

from typing import Any

from midstream_runtime.contract.errors import Final

from midstream_agent import pods
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.greeting import greet
from midstream_agent.handoff import HandoffClient
from midstream_agent.kv import Geometry, PoolView
from midstream_agent.node import Node


async def survey(node: Node, uid: str) -> pb.SurveyReply:
    """The pod's streams on floating IPs, its KV pool, its engine's load."""
    pod = pods.find_pod(node.settings.cgroup_root, uid)
    try:
        routed = await node.net.run(node.net.routed_addresses)
        addresses = [a for a in await node.net.run(node.net.pod_addresses, pod.netns_fd) if a in routed]
        sock = pods.connect_handoff(pod, node.settings.handoff_path)
        async with HandoffClient(sock, node.settings.timeouts.handoff_s) as handoff:
            reply = await _capacity(handoff, node.settings.node)
            if addresses:
                listed = (await handoff.ask("streams", {"addresses": addresses})).header["streams"]
                reply.streams.extend(_figures(stream) for stream in listed)
    finally:
        pod.close()
    reply.kv_bytes_per_s = node.kv_bytes_per_s
    return reply


async def _capacity(handoff: HandoffClient, node: str) -> pb.SurveyReply:
    hello = await greet(handoff, node)
    reply = pb.SurveyReply()
    try:
        if described := hello.header.get("pool"):
            geometry = Geometry.parse(described)
            view = PoolView(hello.fds.pop(0), geometry, writable=False)
            reply.pool_bytes = geometry.slots * geometry.slot_bytes
            try:
                reply.pool_free_bytes = view.free_slots() * geometry.slot_bytes
            finally:
                view.close()
        if load := hello.header.get("load"):
            reply.load_known = True
            reply.kv_free_share = min(1.0, max(0.0, float(load["kv_free"])))
            reply.running, reply.waiting = int(load["running"]), int(load["waiting"])
    except (KeyError, TypeError, ValueError) as e:
        raise Final("handoff_protocol", f"the pod describes its load badly: {e!r}") from e
    finally:
        hello.close()
    return reply


def _figures(stream: dict[str, Any]) -> pb.StreamFigures:
    """The handoff has checked id, ends and `movable`."""
    return pb.StreamFigures(
        id=str(stream["id"]),
        address=str(stream["local"][0]).removeprefix("::ffff:"),
        movable=bool(stream["movable"]),
        reason=str(stream.get("reason") or ""),
        tokens=_count(stream.get("tokens")),
        kv_bytes=_count(stream.get("kv_bytes")),
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value < 1 << 63 else 0
