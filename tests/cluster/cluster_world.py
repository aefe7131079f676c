"""The cluster that the tests act on: a control plane, nodes and pods as objects, simulated agents, operators.

Each test works in a namespace of its own; nodes, agents and the operator are shared. `Operators` starts the real
entry point as a process with the ServiceAccount's token, and can kill it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from control_plane import ControlPlane, free_port
from midstream_testbed.certs import OPERATOR, Authority

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
NAMESPACE = "midstream-system"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:midstream-operator"
POOL = "10.99.0.0/24"
MERGE = "application/merge-patch+json"
T = TypeVar("T")
Json = dict[str, Any]


def wait_for(what: str, look: Callable[[], T], timeout_s: float = 30) -> T:
    """The first true answer; says what was waited for, and what there was instead."""
    end, found = time.monotonic() + timeout_s, None
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"waited {timeout_s:g} s for {what}; last seen: {found!r}")


@dataclass
class Agents:
    """The process of simulated agents; every command is answered before the next one is said."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, tls: Path) -> Agents:
        argv = [sys.executable, str(HERE / "simulated_agents.py"), str(tls)]
        env = {**os.environ, "PYTHONPATH": python_path()}
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return cls(process)

    def do(self, command: str, **more: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": command, **more}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())["ok"]

    def stop(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()

    @contextlib.contextmanager
    def stopped_at(self, *steps: str) -> Iterator[None]:
        """Jobs wait before these steps; they go on when the block ends."""
        self.do("stop-at", steps=steps)
        try:
            yield
        finally:
            self.do("stop-at", steps=[])


def chart_rights(assets: Path) -> str:
    """Accounts and roles that the chart grants where others make certificates, no webhook is served and workloads may
    be scaled, as here."""
    argv = [
        str(assets / "helm"), "template", "midstream", str(CHECKOUT / "charts/midstream"), "-n", NAMESPACE,
        "--set", "tls.issuer=files", "--set", "webhook.enabled=false", "--set", "rebalance.capacity=Scale",
        "--show-only", "templates/rbac.yaml", "--show-only", "templates/serviceaccounts.yaml",
    ]  # fmt: skip
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout


def python_path() -> str:
    return os.pathsep.join(str(CHECKOUT / p) for p in ("operator", "agent", "runtime", "tests/testbed"))


@dataclass
class Operators:
    """Replicas of the operator, by name."""

    kubeconfig: Path
    folder: Path
    config: Json
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)

    def start(self, name: str) -> None:
        path = self.folder / "operator.yaml"
        path.write_text(yaml.safe_dump(self.config))
        self.ports[name] = free_port()
        argv = [
            sys.executable, "-m", "midstream_operator.main", "--config", str(path), "--identity", name,
            "--http-port", str(self.ports[name]),
        ]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": python_path(), "KUBECONFIG": str(self.kubeconfig)}
        with self.log(name).open("ab") as log:
            self.running[name] = subprocess.Popen(argv, stdout=log, stderr=log, env=env)

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def kill(self, name: str) -> None:
        """As a node does when it dies."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def stop(self, name: str) -> int:
        process = self.running.pop(name)
        process.terminate()
        return process.wait(20)

    def stop_all(self) -> None:
        for name in list(self.running):
            self.stop(name)

    def fetch(self, name: str, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[name]}{path}", timeout=15) as answer:
            return str(answer.read().decode())

    def leads(self, name: str) -> bool:
        try:
            return "midstream_operator_leader 1.0" in self.fetch(name, "/metrics")
        except (urllib.error.URLError, OSError):
            return False

    def ensure(self) -> None:
        """One replica runs and leads."""
        if not any(p.poll() is None for p in self.running.values()):
            self.running.clear()
            self.start("op")
        wait_for("a leader", lambda: any(self.leads(n) for n in self.running), 30)


@dataclass
class World:
    plane: ControlPlane
    agents: Agents
    operators: Operators
    authority: Authority
    nodes: list[str] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def create(cls, folder: Path, assets: Path) -> Iterator[World]:
        authority = Authority(folder / "tls")
        cert, key = authority.issue(OPERATOR)
        with ControlPlane(folder / "plane", assets) as plane:
            plane.kubectl("create", "namespace", NAMESPACE)
            plane.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin=chart_rights(assets))
            plane.kubectl(
                "apply", *(x for n in ("migrationjob", "floatingip") for x in ("-f", f"{CHECKOUT}/crds/{n}.yaml"))
            )
            kubeconfig = plane.service_account(NAMESPACE, "midstream-operator")
            agents = Agents.start(folder / "tls")
            config = configuration(authority.ca, cert, key)
            world = cls(plane, agents, Operators(kubeconfig, folder, config), authority)
            try:
                for name in ("a", "b", "c", "sick"):
                    world.add_node(name)
                yield world
            finally:
                world.operators.stop_all()
                agents.stop()

    # -- nodes and agents --------------------------------------------------------------------------------

    def add_node(self, name: str, zone: str = "z1", instance: str = "") -> None:
        """A Ready node with its agent's pod, and the agent itself. `instance`: its EC2 id."""
        self.authority.issue(name)
        self.nodes.append(name)
        address = f"127.{64 + os.getpid() // 250 % 128}.{os.getpid() % 250}.{len(self.nodes)}"  # of this test run alone
        self.agents.do("agent", node=name, address=address)
        meta = {"name": name, "labels": {"topology.kubernetes.io/zone": zone}}
        spec = {"providerID": f"aws:///{zone}/{instance or f'i-{name}'}"}
        self.plane.request(
            "POST", "/api/v1/nodes", {"kind": "Node", "apiVersion": "v1", "metadata": meta, "spec": spec}
        )
        self.node_ready(name, True)
        labels = {"app.kubernetes.io/name": "midstream", "app.kubernetes.io/component": "agent"}
        self.add_pod(NAMESPACE, f"agent-{name}", name, labels, address)

    def node_ready(self, name: str, ready: bool) -> None:
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        self.plane.patch_status(f"/api/v1/nodes/{name}", {"conditions": conditions})

    def cordon(self, name: str, cordoned: bool = True) -> None:
        self.plane.request("PATCH", f"/api/v1/nodes/{name}", {"spec": {"unschedulable": cordoned}}, MERGE)

    def add_pod(self, namespace: str, name: str, node: str, labels: Json, ip: str, **spec: Any) -> str:
        containers = [{"name": "c", "image": "none"}]
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": labels},
            "spec": {"nodeName": node, "containers": containers, **spec},
        }
        made = self.plane.request("POST", f"/api/v1/namespaces/{namespace}/pods", body)
        self.pod_ready(namespace, name, ip=ip)
        return str(made["metadata"]["uid"])

    def pod_ready(self, namespace: str, name: str, ready: bool = True, ip: str = "10.1.0.1") -> None:
        status = {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        }
        self.plane.patch_status(f"/api/v1/namespaces/{namespace}/pods/{name}", status)

    @contextlib.contextmanager
    def namespace(self) -> Iterator[Place]:
        """For one test; what it made there is deleted afterwards."""
        name = f"t-{secrets.token_hex(4)}"
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
        self.plane.request("POST", "/api/v1/namespaces", body)
        place = Place(self, name)
        try:
            yield place
        finally:
            place.clear()


@dataclass
class Place:
    """A namespace with serving pods, jobs and floating IPs."""

    world: World
    name: str
    uids: dict[str, tuple[str, str]] = field(default_factory=dict)  # pod -> (node, uid)

    def path(self, plural: str, name: str = "", group: str = "midstream.dev/v1alpha1") -> str:
        base = f"/apis/{group}" if "/" in group else f"/api/{group}"
        return f"{base}/namespaces/{self.name}/{plural}{f'/{name}' if name else ''}"

    def add_pod(self, name: str, node: str, *, enabled: bool = True, bare: bool = False, **spec: Any) -> str:
        labels = {"app": "llm", **({"midstream.dev/enabled": "true"} if enabled else {}), **spec.pop("labels", {})}
        uid = self.world.add_pod(self.name, name, node, labels, "10.1.0.1", **spec)
        if node in self.world.nodes:
            self.world.agents.do("pod", node=node, uid=uid, bare=bare)
        self.uids[name] = node, uid
        return uid

    def kill_pod(self, name: str) -> None:
        """Gone from its node and from the API."""
        node, uid = self.uids.pop(name)
        self.world.agents.do("pod-gone", node=node, uid=uid)
        self.world.plane.request("DELETE", f"{self.path('pods', name, 'v1')}?gracePeriodSeconds=0")

    def add_fip(self, name: str = "llm", **spec: Any) -> Json:
        """Made, and waited for until it is Ready."""
        return self.wait_fip(self.make_fip(name, **spec), "True")

    def make_fip(self, name: str, **spec: Any) -> str:
        body = {
            "apiVersion": "midstream.dev/v1alpha1",
            "kind": "FloatingIP",
            "metadata": {"name": name},
            "spec": {"pool": "default", "provider": "l2", "podSelector": {"matchLabels": {"app": "llm"}}, **spec},
        }
        self.world.plane.request("POST", self.path("floatingips"), body)
        return name

    def wait_fip(self, name: str, ready: str, reason: str = "", timeout_s: float = 30) -> Json:
        def look() -> Json:
            obj: Json = self.world.plane.request("GET", self.path("floatingips", name))
            conditions: list[Json] = obj.get("status", {}).get("conditions", [])
            good = [c for c in conditions if c["status"] == ready and reason in ("", c["reason"])]
            return obj if good else {}

        return wait_for(f"FloatingIP {name} Ready={ready} {reason}", look, timeout_s)

    def serving(self) -> Json:
        """A pod on a with a floating address, and one on b that could take over."""
        self.add_pod("llm-0", "a")
        fip = self.add_fip()
        self.add_pod("llm-1", "b")
        return fip

    def add_job(self, pod: str = "llm-0", name: str = "", **spec: Any) -> str:
        meta = {"name": name} if name else {"generateName": f"{pod}-"}
        body = {
            "apiVersion": "midstream.dev/v1alpha1",
            "kind": "MigrationJob",
            "metadata": meta,
            "spec": {"source": {"podName": pod}, **spec},
        }
        made = self.world.plane.request("POST", self.path("migrationjobs"), body)
        return str(made["metadata"]["name"])

    def job(self, name: str) -> Json:
        found: Json = self.world.plane.request("GET", self.path("migrationjobs", name))
        return found

    def jobs(self) -> list[Json]:
        found: list[Json] = self.world.plane.request("GET", self.path("migrationjobs"))["items"]
        return sorted(found, key=lambda job: str(job["metadata"]["name"]))

    def one_job(self) -> str:
        (job,) = wait_for("a job", self.jobs)
        return str(job["metadata"]["name"])

    def status(self, name: str) -> Json:
        found: Json = self.job(name).get("status", {})
        return found

    def wait_job(self, name: str, *phases: str, timeout_s: float = 30) -> Json:
        def look() -> Json:
            status = self.status(name)
            return status if status.get("phase") in phases else {}

        try:
            return wait_for(f"job {name} in {phases}", look, timeout_s)
        except TimeoutError as e:
            raise TimeoutError(f"{e}; its status: {self.status(name)}") from e

    def patch_job(self, name: str, body: Json) -> None:
        self.world.plane.request("PATCH", self.path("migrationjobs", name), body, MERGE)

    def events(self, kind: str, name: str) -> list[str]:
        found = self.world.plane.request("GET", self.path("events", "", "v1"))
        mine = [
            e for e in found["items"] if e["involvedObject"]["name"] == name and e["involvedObject"]["kind"] == kind
        ]
        return [e["reason"] for e in sorted(mine, key=lambda e: e["metadata"]["resourceVersion"])]

    def slice(self, fip: str = "llm") -> Json:
        found: Json = self.world.plane.request(
            "GET", self.path("endpointslices", f"midstream-{fip}", "discovery.k8s.io/v1")
        )
        return found

    def clear(self) -> None:
        plane = self.world.plane
        for plural in ("migrationjobs", "floatingips"):
            plane.request("DELETE", self.path(plural))
        if any(p.poll() is None for p in self.world.operators.running.values()):
            wait_for("floating ips gone", lambda: not plane.request("GET", self.path("floatingips"))["items"], 40)
        plane.request("DELETE", f"{self.path('pods', '', 'v1')}?gracePeriodSeconds=0")
        for node, uid in self.uids.values():
            if node in self.world.nodes:
                self.world.agents.do("pod-gone", node=node, uid=uid)


def configuration(ca: Path, cert: Path, key: Path) -> Json:
    """As the chart would write it, with shorter waits."""
    return {
        "namespace": NAMESPACE,
        "tls": {"ca": str(ca), "cert": str(cert), "key": str(key)},
        "pools": [
            {"name": "default", "provider": "l2", "cidrs": [POOL]},
            {"name": "tiny", "provider": "l2", "cidrs": ["10.98.0.1/32"]},
        ],
        "timeouts": {
            "resyncS": 1,
            "retryS": 0.1,
            "retryMaxS": 0.5,
            "leaseS": 3,
            "leaseRenewS": 0.5,
            "leaseGiveUpS": 2,
            "statusEveryS": 0.2,
            "addressReleaseS": 2,
            "agentPatienceS": 3,
            "evictionMarginS": 5,
        },
        "limits": {"jobsPerNode": 3},
    }
