"""What the net tests share: a VPC with two hosts, an agent on each, byte pods, clients everywhere.

One world serves a whole test session; pods and agents keep running, and streams go back and forth between the hosts.
A test that kills an agent starts it again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midstream_testbed.fleet import Agent, Fleet
from midstream_testbed.machine import Client, Host, Pod
from midstream_testbed.namespace import Namespace, Process
from midstream_testbed.vpc import Vpc

HERE = Path(__file__).parent
V4, V6 = "10.77.0.100", "fd77::100"
PORT = 8000


@dataclass
class Clients:
    """A running bytes_client: `finish` waits and says what became of its connections."""

    process: Process
    count: int

    def finish(self, timeout_s: float = 180) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=timeout_s)
        if self.process.returncode:
            raise AssertionError(f"the clients crashed:\n{self.process.output()[-3000:]}")
        result: dict[str, Any] = json.loads(out)
        return result


@dataclass
class World:
    vpc: Vpc
    fleet: Fleet
    a: Host
    b: Host
    outside: Client
    inside: Client
    pods: dict[str, Pod] = field(default_factory=dict)  # by host name
    at: str = "node-a"

    @classmethod
    def build(cls, vpc: Vpc, fleet: Fleet, *agent_options: str) -> World:
        a, b = vpc.host("node-a"), vpc.host("node-b")
        world = cls(vpc, fleet, a, b, vpc.client("client"), vpc.client("client-in", in_vpc=True))
        for host in (a, b):
            fleet.start_agent(host, "--moved-linger-s", "2", *agent_options)
            world.pods[host.name] = fleet.run_pod(
                host.add_pod(f"bytes-{host.name}"), [sys.executable, str(HERE / "bytes_pod.py"), str(PORT)], "bytes"
            )
        for pod in world.pods.values():
            fleet.wait_ready(pod.name)
        for address in (V4, V6):
            fleet.attach(world.pods["node-a"], address)
        return world

    @property
    def source(self) -> Pod:
        return self.pods[self.at]

    @property
    def away(self) -> str:
        return "node-b" if self.at == "node-a" else "node-a"

    def agent(self, name: str) -> Agent:
        return self.fleet.agents[name]

    def places(self) -> dict[str, Namespace]:
        """Where a client can sit."""
        return {"outside": self.outside, "inside": self.inside, "node-a": self.a, "node-b": self.b}

    def clients(self, where: Namespace, count: int, seed: int, **options: Any) -> Clients:
        body = {"address": V4, "port": PORT, "count": count, "seed": seed, **options}
        process = where.popen(
            [sys.executable, str(HERE / "bytes_client.py"), json.dumps(body)],
            env=self.fleet.env(), name="bytes_client", stdout=subprocess.PIPE,
        )  # fmt: skip
        return Clients(process, count)

    def hop(self, *options: str) -> dict[str, Any]:
        """Migrate to the other host; follows where the streams are when it succeeded."""
        report = self.fleet.migrate(self.source.name, self.away, *options)
        if report["phase"] == "PHASE_SUCCEEDED":
            self.at = self.away
        return report

    def restart_if_dead(self) -> list[str]:
        """Start agents again that a failpoint killed; returns their names."""
        dead = [name for name, agent in self.fleet.agents.items() if agent.process.poll() is not None]
        for name in dead:
            self.fleet.restart_agent(self.fleet.agents[name])
        return dead
