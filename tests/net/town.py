"""Two hosts, a client, and pods that really serve: what tests with real clients live in."""

from __future__ import annotations

import subprocess
import time

from midstream_testbed.fleet import Fleet
from midstream_testbed.machine import Client, Pod
from midstream_testbed.namespace import Process
from midstream_testbed.vpc import Vpc

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

    def serve_llm(self, pace_ms: float = 4) -> None:
        """Gateway and engine on each host."""
        for host in self.hosts:
            options = ("--pace-ms", str(pace_ms), "--pool-slots", "1024")
            self.pods.append(self.fleet.start_gateway(host, f"llm-{host.name}", *options))
        for pod in self.pods:
            self.fleet.wait_ready(pod.name)
        self.fleet.attach(self.pods[0], ADDRESS)

    def curl(self, *arguments: str, name: str = "curl") -> Process:
        argv = ["curl", "-sS", "-N", "--max-time", "60", "-H", "content-type: application/json", *arguments]
        return self.client.popen(argv, stdout=subprocess.PIPE, name=name)

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
