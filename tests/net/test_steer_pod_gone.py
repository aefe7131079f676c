"""The target's pod goes away after streams have moved to it, before their address has: the job ends all the same, the
address can be served again, and nothing is left on either node.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from midstream_testbed.fleet import Fleet
from midstream_testbed.machine import Host, Pod
from midstream_testbed.vpc import Vpc
from ownership_replay import wait_for
from remains import entries
from world import HERE, PORT, V4, V6, World

CLIENTS = 3


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path, steer=True) as fleet:
        yield World.build(vpc, fleet, "--peer-reply-s", "2", "--address-confirm-s", "2")


def new_pod(world: World, host: Host) -> Pod:
    argv = [sys.executable, str(HERE / "bytes_pod.py"), str(PORT), str(world.vpc.mtu)]
    pod = world.fleet.run_pod(host.add_pod("bytes-again"), argv, "bytes")
    world.fleet.wait_ready(pod.name)
    return pod


def served(world: World) -> int:
    """New clients that are served, of eight: from outside and from the node of the pod that has gone."""
    places = (world.outside, world.b)
    groups = [world.clients(p, 2, 90, address=a, seconds=0.2, size_log10=(3, 4)) for p in places for a in (V4, V6)]
    return sum(int(g.finish()["ok"]) for g in groups)


@pytest.mark.parametrize("restarted", [False, True], ids=["agent-stays", "agent-restarts"])
def test_the_job_ends(world: World, restarted: bool) -> None:
    world.vpc.fabric.refuse = True
    clients = world.clients(world.outside, CLIENTS, 5, kind="both", size=5_000_000, seconds=8.0, idle_s=10)
    world.wait_streams(V4, CLIENTS)
    world.agent("node-b").arm("target.MOVE_ADDRESS.do.before=delay:0")
    with ThreadPoolExecutor() as pool:
        ends = pool.submit(world.hop)
        wait_for(lambda: "target.MOVE_ADDRESS.do.before" in world.agent("node-b").fired(), "the address move")
        world.pods["node-b"].delete()
        if restarted:
            agent = world.agent("node-b")
            agent.process.kill()
            agent.process.wait(10)
            world.fleet.restart_agent(agent)
        world.vpc.fabric.refuse = False
        report = ends.result()
    assert clients.finish()["ok"] == 0
    wait_for(lambda: not any(n for a in world.fleet.agents.values() for n in entries(a.bpffs).values()), "the entries")
    if restarted:
        assert (report["phase"], report["reason"]) == ("PHASE_FAILED", "target_lost"), report["output"]
        assert served(world) == 8  # by the source
    else:
        assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
        pod = new_pod(world, world.b)  # as a controller would
        for address in (V4, V6):
            assert world.fleet.cli("attach", pod.name, address).returncode == 0
        assert served(world) == 8
