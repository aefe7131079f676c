"""What the net tests share: a VPC with two hosts, an agent on each, byte pods, clients everywhere.

One world serves a whole test session; pods and agents keep running, and streams go back and forth between the hosts.
A test that kills an agent starts it again.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midstream_agent.hold import Hold
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
                host.add_pod(f"bytes-{host.name}"),
                [sys.executable, str(HERE / "bytes_pod.py"), str(PORT), str(vpc.mtu)],
                "bytes",
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

    def set_congestion_control(self, name: str) -> None:
        """Of the pods' new connections."""
        for pod in self.pods.values():
            pod.set_congestion_control(name)

    def clients(self, where: Namespace, count: int, seed: int, **options: Any) -> Clients:
        body = {"address": V4, "port": PORT, "count": count, "seed": seed, **options}
        process = where.popen(
            [sys.executable, str(HERE / "bytes_client.py"), json.dumps(body)],
            env=self.fleet.env(), name="bytes_client", stdout=subprocess.PIPE,
        )  # fmt: skip
        return Clients(process, count)

    def hop(self, *options: str) -> dict[str, Any]:
        """Migrate to the other host; follows where the streams are when it succeeded."""
        report = self.fleet.migrate(self.source.name, self.away, "--target-pod", self.pods[self.away].name, *options)
        if report["phase"] == "PHASE_SUCCEEDED":
            self.at = self.away
        return report

    def settle_at(self, node: str) -> None:
        """Have the streams, if there are any, and their addresses on `node`."""
        self.at = self.vpc.fabric.owner(V4) or self.at
        if self.at != node:
            report = self.hop()
            if report["phase"] != "PHASE_SUCCEEDED":
                raise RuntimeError(report["output"])

    def hop_in_background(self) -> str:
        """Start a migration to the other host; returns its job id without waiting."""
        job = f"job-{secrets.token_hex(4)}"
        target = self.pods[self.away].name
        argv = self.fleet.cli_argv("migrate", self.source.name, "--target-pod", target, "--job", job)
        self.fleet.operator.popen(argv, env=self.fleet.env(), name="migrate")
        return job

    def job_phase(self, job: str) -> str:
        """The job's phase by `midstream status`; empty when no agent knows it (yet)."""
        for line in self.fleet.cli("status").stdout.splitlines():
            if line.startswith(job):
                return line.split()[1]
        return ""

    def wait_job(self, job: str, timeout_s: float = 40) -> str:
        end = time.monotonic() + timeout_s
        while (phase := self.job_phase(job)) not in ("Succeeded", "RolledBack", "Failed", "Aborted"):
            if time.monotonic() > end:
                logs = "".join(f"--- {n}\n{a.log[-3000:]}" for n, a in self.fleet.agents.items())
                raise TimeoutError(f"job {job} is {phase!r} after {timeout_s:g} s\n{logs}")
            time.sleep(0.1)
        return phase

    def wait_fired(self, agent: str, failpoint: str, timeout_s: float = 20) -> None:
        end = time.monotonic() + timeout_s
        while failpoint not in self.agent(agent).fired():
            if time.monotonic() > end:
                raise TimeoutError(f"{failpoint} did not fire within {timeout_s:g} s")
            time.sleep(0.02)

    def held(self, agent: str) -> dict[str, int]:
        """What the node's maps hold: entries by map, without those that are zero."""
        with Hold.open(self.agent(agent).bpffs) as hold:
            found = {"flows": len(hold.flow_keys()), "notes": len(hold.note_keys()), "addrs": len(hold.addr_keys())}
        return {k: v for k, v in found.items() if v}

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """Agents cannot reach each other: the router drops what goes from one node's own address to the other's."""
        a, b = self.a.ipv4, self.b.ipv4
        rules = f"ip saddr {a} ip daddr {b} drop\nip saddr {b} ip daddr {a} drop"
        self.vpc.router.nft(
            f"table inet ms_cut {{\nchain c {{\ntype filter hook forward priority -10;\n{rules}\n}}\n}}"
        )
        try:
            yield
        finally:
            self.vpc.router.nft("delete table inet ms_cut")

    def wait_streams(self, address: str, wanted: int, timeout_s: float = 20) -> None:
        """Return when the pod's namespace has that many established connections on `address`."""
        end = time.monotonic() + timeout_s
        while (seen := self.established(address)) < wanted:
            if time.monotonic() > end:
                raise TimeoutError(f"{seen} of {wanted} connections came within {timeout_s:g} s")
            time.sleep(0.02)

    def established(self, address: str) -> int:
        """Established sockets of the serving pod whose local address is `address`, by /proc/net/tcp6."""
        packed = ipaddress.ip_address(address).packed
        v6 = packed if len(packed) == 16 else bytes(10) + b"\xff\xff" + packed
        wanted = "".join(v6[i : i + 4][::-1].hex() for i in range(0, 16, 4)).upper()
        lines = [x.split() for x in self.source.proc_net("tcp6").splitlines()[1:]]
        v4 = packed[::-1].hex().upper() if len(packed) == 4 else "-"
        lines += [x.split() for x in self.source.proc_net("tcp").splitlines()[1:]]
        return sum(x[3] == "01" and x[1].split(":")[0] in (wanted, v4) for x in lines)

    def restart_if_dead(self) -> list[str]:
        """Start agents again that a failpoint killed; returns their names."""
        dead = [name for name, agent in self.fleet.agents.items() if agent.process.poll() is not None]
        for name in dead:
            self.fleet.restart_agent(self.fleet.agents[name])
        return dead
