"""What would keep streams from being steered is found by the doctor, and refused by name before anything is frozen."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import endless
import pytest
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.node import Node
from midstream_agent.tunnel_check import Answerer
from midstream_runtime.contract.errors import Final
from remains import Remains
from world import V4, World

STREAMS = 2


def findings(world: World) -> dict[str, str]:
    """What the doctor says of the tunnel, by node and check."""
    lines = (line.split(": ", 2) for line in world.fleet.cli("doctor").stdout.splitlines())
    parts = [(node, *rest.split(None, 1), text) for node, rest, text in lines]
    return {f"{node} {check}": f"{severity}: {text}" for node, severity, check, text in parts if "tunnel" in check}


@contextmanager
def router_drops(world: World, rule: str) -> Iterator[None]:
    world.vpc.router.nft(f"table inet ms_no {{\nchain c {{\ntype filter hook forward priority -10;\n{rule}\n}}\n}}")
    try:
        yield
    finally:
        world.vpc.router.nft("delete table inet ms_no")


@contextmanager
def other_options(world: World, node: str, *options: str) -> Iterator[None]:
    """The node's agent runs with these."""
    agent = world.agent(node)
    stop(agent.process)
    world.fleet.restart_agent(agent, *options)
    try:
        yield
    finally:
        stop(agent.process)
        world.fleet.restart_agent(agent)


def stop(process: Any) -> None:
    process.terminate()
    process.wait(10)


@pytest.fixture
def world(steer_world: World) -> Iterator[World]:
    steer_world.settle_at("node-a")
    yield steer_world
    Remains.settled(steer_world)


def test_a_tunnel_that_works_is_measured(world: World) -> None:
    said = findings(world)
    assert said["node-a tunnel to node-b"].startswith("ok: a full-size packet there and back in ")
    assert said["node-b tunnel"].startswith("ok: ")


@pytest.mark.parametrize(
    ("rule", "reason"),
    [("udp dport 9445 drop", "tunnel_silent"), ("udp dport 9445 meta length > 2000 drop", "tunnel_mtu")],
)
def test_a_tunnel_that_does_not_work_is_found(world: World, rule: str, reason: str) -> None:
    with router_drops(world, rule):
        assert findings(world)["node-a tunnel to node-b"].startswith(f"warning: {reason}: ")


def test_a_peer_without_a_tunnel_is_found(world: World) -> None:
    with other_options(world, "node-b", "--no-tunnel"):
        assert findings(world)["node-a tunnel to node-b"].startswith("warning: no_tunnel: node-b has no VXLAN")


def test_a_peer_that_does_not_answer_is_found(world: World) -> None:
    with router_drops(world, f"ip saddr {world.a.ipv4} tcp dport 9443 drop"):
        assert findings(world)["node-a tunnel to node-b"].startswith("error: peer_")


@pytest.mark.parametrize("switchover", ["auto", "wait"])
def test_a_target_with_a_smaller_mtu_is_found_and_refused(world: World, switchover: str) -> None:
    with other_options(world, "node-b", "--mtu", "1500"), endless.streams(world, STREAMS, 3, V4):
        assert findings(world)["node-a tunnel to node-b"].startswith("warning: mtu_differs: ")
        report = world.hop("--switchover", switchover)
        assert (report["phase"], report["reason"]) == ("PHASE_FAILED", "mtu_smaller"), report["output"]
        assert "PAUSE" not in {step["name"] for step in report["steps"]}


def test_a_peer_cannot_have_a_floating_address_probed() -> None:
    """Its packets would be taken for the address's."""
    probe = pb.PeerProbe(address=V4, tunnel=pb.PeerTunnel(address="10.77.0.10", vni=1))
    with pytest.raises(Final, match="no address of a doctor's probe"):
        asyncio.run(Answerer(cast(Node, None)).handle(pb.PeerRequest(probe=probe), pb.PeerReply()))
