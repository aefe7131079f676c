"""Midstream on the testbed: an agent on each host, serving pods, floating IPs, and the CLI as the operator.

Everything here is the product's own entry points, started as processes in the namespaces where they would run:
`python -m midstream_agent`, `python -m midstream_runtime.serve`, `python -m midstream_cli.main`.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midstream_testbed.certs import OPERATOR, Authority
from midstream_testbed.machine import Client, Host, Pod
from midstream_testbed.namespace import Process
from midstream_testbed.vpc import Vpc

CHECKOUT = Path(__file__).resolve().parents[3]
AGENT_PORT = 9443
GATEWAY_PORT = 8000
ENGINE_PYTHON = os.environ.get("MIDSTREAM_ENGINE_PYTHON", "/usr/bin/python3")


def python_path() -> str:
    return os.pathsep.join(str(CHECKOUT / p) for p in ("operator", "agent", "runtime", "tests/testbed"))


@dataclass(slots=True)
class Agent:
    """One node's agent: its process and where its state lies. `restart` keeps journal and pins."""

    host: Host
    argv: list[str]
    bpffs: Path
    state_dir: Path
    process: Process
    env: dict[str, str]

    @property
    def failpoint_log(self) -> Path:
        return Path(self.env["MIDSTREAM_FAILPOINT_LOG"])

    def arm(self, failpoints: str) -> None:
        """Arm failpoints in the running agent: taken up when it passes the next one."""
        path = Path(self.env["MIDSTREAM_FAILPOINT_FILE"])
        tmp = path.with_suffix(".new")
        tmp.write_text(failpoints, encoding="ascii")
        tmp.rename(path)

    def fired(self) -> list[str]:
        """Failpoints that have fired so far, in order."""
        return self.failpoint_log.read_text().split() if self.failpoint_log.exists() else []

    @property
    def log(self) -> str:
        return self.process.output()

    @property
    def endpoint(self) -> str:
        return f"{self.host.ipv4}:{AGENT_PORT}"


@dataclass(slots=True)
class Serving:
    """A pod and the one process that a test started in it."""

    pod: Pod
    process: Process
    workload: str


@dataclass(slots=True)
class Fleet:
    """Owner of agents and serving pods of one Vpc; the Vpc's own clean-up ends their processes."""

    vpc: Vpc
    folder: Path
    without_hold: bool = False
    steer: bool = False
    """Agents with a tunnel, whose jobs steer by default; without, clients wait until an address has moved."""
    agents: dict[str, Agent] = field(default_factory=dict)
    pods: dict[str, Serving] = field(default_factory=dict)
    authority: Authority = field(init=False)
    operator: Client = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.authority = Authority(self.folder / "tls")
        self.authority.issue(OPERATOR)
        self.operator = self.vpc.client("operator", in_vpc=True)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc: object) -> None:
        """Unpin what the agents left: a real node's pins end with the node."""
        for agent in self.agents.values():
            unpin(agent.bpffs)

    # -- agents ----------------------------------------------------------------------------------------

    def env(self, **more: str) -> dict[str, str]:
        return {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1", **more}

    def start_agent(self, host: Host, *options: str, **env: str) -> Agent:
        """Load the BPF programs of this node, then start its agent; returns when it listens."""
        cert, key = self.authority.issue(host.name)
        bpffs = Path("/sys/fs/bpf") / f"{self.vpc.prefix}-{host.name}"
        state_dir = self.folder / "state" / host.name
        self.load_bpf(host, bpffs)
        eni = host.eth1
        argv = [
            sys.executable, "-m", "midstream_agent", "--node", host.name,
            "--listen", f"{host.ipv4}:{AGENT_PORT}", "--node-address", host.ipv4, "--node-address", host.ipv6,
            "--tls-ca", str(self.authority.ca), "--tls-cert", str(cert), "--tls-key", str(key),
            "--bpffs", str(bpffs), "--state-dir", str(state_dir), "--cgroup-root", str(host.cgroups[0].parent),
            "--nic", eni.name, "--nic-gateway-v4", eni.gateway4, "--nic-gateway-v6", eni.gateway6,
            "--mtu", str(self.vpc.mtu), "--boot-id", f"{self.vpc.prefix}-{host.name}-boot-1",
            *([] if self.steer else ["--no-tunnel"]), *options,
        ]  # fmt: skip
        env = {
            "MIDSTREAM_FAILPOINT_FILE": str(self.folder / f"{host.name}.failpoints"),
            "MIDSTREAM_FAILPOINT_LOG": str(self.folder / f"{host.name}.fired"),
            **env,
        }
        process = self._spawn_agent(host, argv, env)
        agent = Agent(host, argv, bpffs, state_dir, process, env)
        self.agents[host.name] = agent
        self._write_inventory()
        return agent

    def load_bpf(self, host: Host, bpffs: Path) -> None:
        options = ["--without-hold"] if self.without_hold else []
        argv = [sys.executable, "-m", "midstream_agent.hold", "load", "--bpffs", str(bpffs), *options]
        done = subprocess.run(argv, env={**os.environ, **self.env()}, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"loading BPF for {host.name} failed:\n{done.stdout}{done.stderr}")

    def _spawn_agent(self, host: Host, argv: list[str], env: dict[str, str]) -> Process:
        process = host.popen(argv, env=self.env(**env), name="agent")
        wait_for_line(process, rf"^ready {host.name}$", 20)
        return process

    def restart_agent(self, agent: Agent, *options: str, **env: str) -> None:
        """Start the agent again after it died or was killed: same journal, same pins, same boot."""
        agent.process = self._spawn_agent(agent.host, [*agent.argv, *options], {**agent.env, **env})

    # -- pods ------------------------------------------------------------------------------------------

    def start_gateway(
        self, host: Host, name: str, *options: str, workload: str = "llm", uid: str = "", **env: str
    ) -> Pod:
        """A serving pod: gateway and built-in engine. Returns at once; see wait_ready. `uid`: see Host.add_pod."""
        pod = host.add_pod(name, uid=uid)
        argv = [
            sys.executable, "-m", "midstream_runtime.serve", "--listen", f"[::]:{GATEWAY_PORT}",
            "--engine-python", ENGINE_PYTHON, "--path-mtu", str(self.vpc.mtu), *options,
        ]  # fmt: skip
        return self.run_pod(pod, argv, workload, **env)

    def run_pod(self, pod: Pod, argv: list[str], workload: str, **env: str) -> Pod:
        process = pod.popen(argv, env=self.env(**env), name="serve")
        self.pods[pod.name] = Serving(pod, process, workload)
        self._write_inventory()
        return pod

    def wait_ready(self, name: str, timeout_s: float = 60) -> None:
        wait_for_line(self.pods[name].process, r"^ready\b", timeout_s)

    def attach(self, pod: Pod, address: str) -> None:
        """What the FloatingIP controller does: assign the address to the pod's node and plumb it in."""
        self.vpc.allocate(address, host=pod.host)
        done = self.cli("attach", pod.name, address)
        if done.returncode:
            raise RuntimeError(f"attaching {address} to {pod.name} failed:\n{done.stderr}")

    @property
    def inventory(self) -> Path:
        return self.folder / "inventory.json"

    def _write_inventory(self) -> None:
        pods = {
            name: {"uid": s.pod.uid, "node": s.pod.host.name, "workload": s.workload} for name, s in self.pods.items()
        }
        tls = {"ca": "tls/ca.pem", "cert": f"tls/{OPERATOR}.pem", "key": f"tls/{OPERATOR}.key"}
        nodes = {name: {"endpoint": a.endpoint} for name, a in self.agents.items()}
        self.inventory.write_text(json.dumps({"tls": tls, "nodes": nodes, "pods": pods}), encoding="utf-8")

    def migrate(self, pod: str, to: str, *options: str, timeout_s: float = 120) -> dict[str, Any]:
        """`midstream migrate`; the job's report, whatever its outcome. RuntimeError when there is none."""
        report = self.folder / f"report-{secrets.token_hex(4)}.json"
        done = self.cli("migrate", pod, "--to", to, "--report", str(report), *options, timeout_s=timeout_s)
        if not report.exists():
            raise RuntimeError(f"no report of the migration:\n{done.stdout}\n{done.stderr}")
        return {"exit": done.returncode, "output": done.stdout, **json.loads(report.read_text(encoding="utf-8"))}

    # -- the operator's hand -----------------------------------------------------------------------------

    def cli_argv(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "midstream_cli.main", "--inventory", str(self.inventory), *args]

    def cli(self, *args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run the CLI on the operator's host and wait."""
        return self.operator.run(self.cli_argv(*args), env=self.env(), timeout_s=timeout_s, check=False)


def wait_for_line(process: Process, pattern: str, timeout_s: float) -> None:
    """Return when the process has written a line that matches; say what it wrote when it did not."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if re.search(pattern, process.output(), re.MULTILINE):
            return
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode} before it was ready:\n{process.output()[-4000:]}")
        time.sleep(0.02)
    raise TimeoutError(f"not ready after {timeout_s:g} s:\n{process.output()[-4000:]}")


def unpin(folder: Path) -> None:
    """Remove a node's pins from bpffs."""
    if folder.is_dir():
        for pin in folder.iterdir():
            unpin(pin) if pin.is_dir() else pin.unlink()
        folder.rmdir()
