"""Two pods cross each other: one goes from A to B while the other goes from B to A, each with an address of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from midstream_testbed.machine import Host, Pod
from ownership_replay import established, wait_for
from remains import Remains
from world import HERE, PORT, V4, World

CROSSINGS = 50 if os.environ.get("LONG") else 4
CLIENTS_A_PLACE = 3
OTHER = "10.77.0.101"


class Pair:
    """A second pod, on node B at first, with its place on node A; the world's own pod is on A at first."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.at = "node-b"
        self.pods = {host.name: self._run(host) for host in (world.a, world.b)}
        for pod in self.pods.values():
            world.fleet.wait_ready(pod.name)
        world.fleet.attach(self.pods["node-b"], OTHER)

    def _run(self, host: Host) -> Pod:
        argv = [sys.executable, str(HERE / "bytes_pod.py"), str(PORT), str(self.world.vpc.mtu)]
        return self.world.fleet.run_pod(host.add_pod(f"cross-{host.name}"), argv, "bytes")

    def hop(self) -> dict[str, Any]:
        to = "node-a" if self.at == "node-b" else "node-b"
        report = self.world.fleet.migrate(self.pods[self.at].name, to, "--target-pod", self.pods[to].name)
        self.at = to
        return report

    def delete(self) -> None:
        """The routes go with the pods' links; two rules for the address stay on its node."""
        for pod in self.pods.values():
            del self.world.fleet.pods[pod.name]
            pod.delete()
        self.world.vpc.release(OTHER)


@pytest.fixture
def pair(steer_world: World) -> Iterator[Pair]:
    steer_world.settle_at("node-a")
    pair = Pair(steer_world)
    yield pair
    pair.delete()


@pytest.mark.parametrize("move_s", [0.0, 0.8])
def test_two_pods_cross_each_other(steer_world: World, pair: Pair, move_s: float) -> None:
    world = steer_world
    world.vpc.fabric.move_seconds = move_s
    options: dict[str, Any] = {"kind": "both", "size": 1_500_000, "seconds": CROSSINGS * (2 * move_s + 0.6)}
    groups = [
        world.clients(place, CLIENTS_A_PLACE, 31 * i + len(address), address=address, **options)
        for i, place in enumerate(world.places().values())
        for address in (V4, OTHER)
    ]
    wanted = 4 * CLIENTS_A_PLACE
    wait_for(lambda: established(pair.pods[pair.at], OTHER) == wanted == established(world.source, V4), "the clients")
    for _ in range(CROSSINGS):
        with ThreadPoolExecutor() as both:
            reports = [f.result() for f in (both.submit(world.hop), both.submit(pair.hop))]
        for report in reports:
            assert (report["phase"], report["switchover"]) == ("PHASE_SUCCEEDED", "Steer"), report["output"]
        assert {world.vpc.fabric.owner(V4), world.vpc.fabric.owner(OTHER)} == {"node-a", "node-b"}
    results = [g.finish() for g in groups]
    assert [e for r in results for e in r["errors"]] == []
    assert sum(r["ok"] for r in results) == 2 * wanted
    world.vpc.fabric.move_seconds = 0
    Remains.settled(world)
