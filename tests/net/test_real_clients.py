"""Clients that people use, unchanged, while the pod that serves them changes nodes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from midstream_testbed.fleet import Fleet
from midstream_testbed.machine import Client, Pod
from midstream_testbed.vpc import Vpc

HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples"
ADDRESS, PORT = "10.77.0.100", 8000


class Town:
    """Two hosts with an agent each, the pods of one workload on them, a client outside the VPC."""

    def __init__(self, vpc: Vpc, fleet: Fleet) -> None:
        self.vpc, self.fleet = vpc, fleet
        self.hosts = [vpc.host("node-a"), vpc.host("node-b")]
        self.client: Client = vpc.client("client")
        for host in self.hosts:
            fleet.start_agent(host, "--moved-linger-s", "1")
        self.pods: list[Pod] = []

    def serve(self, name: str, argv: list[str]) -> None:
        self.pods = [self.fleet.run_pod(h.add_pod(f"{name}-{h.name}"), argv, name) for h in self.hosts]
        for pod in self.pods:
            self.fleet.wait_ready(pod.name)
        self.fleet.attach(self.pods[0], ADDRESS)

    def wait_connections(self, wanted: int) -> None:
        """Return when the serving pod has that many established connections."""
        end = time.monotonic() + 20
        while (seen := sum(x.split()[3] == "01" for x in self.pods[0].proc_net("tcp6").splitlines()[1:])) < wanted:
            if time.monotonic() > end:
                raise TimeoutError(f"{seen} of {wanted} connections came")
            time.sleep(0.02)

    def hop(self) -> None:
        there = self.pods[1]
        report = self.fleet.migrate(self.pods[0].name, there.host.name)
        assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
        assert int(report["streams"]["migrated"]) >= 1
        self.pods.reverse()


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path) as fleet:
        yield Town(vpc, fleet)


def test_websockets_through_a_server_that_only_uses_the_handoff_library(town: Town) -> None:
    town.serve("echo", [sys.executable, str(EXAMPLES / "websocket_echo.py"), str(PORT)])
    clients = [
        town.client.popen(
            [sys.executable, str(HERE / "ws_client.py"), f"ws://{ADDRESS}:{PORT}/", str(seed), "5"],
            stdout=subprocess.PIPE,
            name=f"ws-{seed}",
        )
        for seed in range(8)
    ]
    capture = town.client.capture()
    town.wait_connections(8)
    for _ in range(4):
        town.hop()
    results = []
    for client in clients:
        out, _ = client.communicate(timeout=60)
        assert client.returncode == 0, client.output()[-2000:]
        results.append(json.loads(out))
    packets = capture.stop()
    assert all(r["echoed"] > 20 and r["close_code"] == 1000 for r in results), results
    assert [p for p in packets if p.rst] == []
