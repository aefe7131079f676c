"""Midstream as a user has it: real nodes of a real control plane, images of our Dockerfile, the chart by helm.

The testbed plays the network, as in the demo; kubelet, containerd, runc, API server, scheduler and helm are the real
ones, and everything of ours runs in a container that the kubelet has started, with the chart's own security contexts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from midstream_testbed import images
from midstream_testbed.cluster import CHECKOUT, ControlPlane
from midstream_testbed.machine import Client
from midstream_testbed.node import KubeNode
from midstream_testbed.vpc import Vpc

Json = dict[str, Any]
T = TypeVar("T")
SYSTEM = "midstream-system"
POOL = "10.77.0.96/28"
MODEL_PORT, PRESTOP_PORT = 8000, 8002
CHART_PATIENCE_S = 240
STRATEGY = {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


def wait_for(what: str, look: Callable[[], T], timeout_s: float = 60) -> T:
    """The first true answer; says what was waited for, and what there was instead."""
    end, found = time.monotonic() + timeout_s, None
    while time.monotonic() < end:
        if found := look():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"waited {timeout_s:g} s for {what}; last seen: {found!r}")


@dataclass
class World:
    vpc: Vpc
    plane: ControlPlane
    folder: Path
    client: Client
    nodes: dict[str, KubeNode] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def create(cls, folder: Path) -> Iterator[World]:
        with Vpc.create() as vpc, ControlPlane(vpc) as plane:
            world = cls(vpc, plane, folder, vpc.client("client"))
            try:
                world.add_nodes("node-a", "node-b")
                world.install()
                yield world
            except BaseException:
                world.tell()
                raise

    def add_nodes(self, *names: str) -> None:
        store = images.prepared(["pause", "operator", "agent", "builtin"])
        for name in names:
            host = self.vpc.host(name)
            self.nodes[name] = KubeNode(self.plane, host, store, labels={"topology.kubernetes.io/zone": "zone-1"})
        for node in self.nodes.values():
            node.wait_ready()

    def install(self) -> None:
        """As a user would, with values for this network."""
        eth1 = self.nodes["node-a"].host.eth1
        values = {
            "image": {"registry": "localhost", "tag": "test", "pullPolicy": "Never"},
            "pools": [{"name": "default", "provider": "l2", "cidrs": [POOL]}],
            "agent": {"nic": eth1.name, "nicGatewayV4": eth1.gateway4, "nicGatewayV6": eth1.gateway6},
            "webhook": {"enabled": True, "failurePolicy": "Fail"},
        }
        path = self.folder / "values.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        self.helm("install", "midstream", CHECKOUT / "charts/midstream", "-f", path, "--create-namespace", "--wait")

    def serve(self, replicas: int = 2) -> Place:
        """Pods on both nodes, an address on one of them: Ready, all of it."""
        place = Place(self, "default", "")
        deployment = {"replicas": replicas, "selector": {"matchLabels": {"app": "llm"}}, "strategy": STRATEGY}
        deployment["template"] = {"metadata": serving_metadata(), "spec": serving_spec()}
        meta = {"name": "llm"}
        place.create({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": deployment})
        place.wait_ready(replicas)
        fip, service = yaml.safe_load_all((CHECKOUT / "examples/floatingip.yaml").read_text(encoding="utf-8"))
        place.create(fip, service)
        place.address = wait_for("an address", lambda: place.fip().get("status", {}).get("address"))
        # The network's owner lets the address in where the operator has put it; from then on agents announce it.
        node = wait_for("its node", lambda: place.fip()["status"].get("node"))
        self.vpc.allocate(place.address, self.nodes[node].host)
        place.wait_fip()
        return place

    def helm(self, *args: str | Path) -> str:
        every = ("--namespace", SYSTEM, f"--timeout={CHART_PATIENCE_S}s")
        return self.plane.run("helm", *args, *every, timeout_s=CHART_PATIENCE_S + 30).stdout

    def tell(self) -> None:
        """What a person would look at first, into the test's output."""
        for args in (
            ("get", "nodes,pods,mj,floatingips", "-A", "-o", "wide"),
            ("get", "events", "-A", "--sort-by=.metadata.creationTimestamp"),
            ("describe", "mj,floatingips", "-A"),
            *(
                ("logs", "-n", SYSTEM, "-l", f"app.kubernetes.io/component={part}", "--all-containers", "--tail=60")
                for part in ("operator", "agent")
            ),
        ):
            done = self.plane.kubectl(*args, check=False)
            print(f"--- kubectl {' '.join(args)}\n{done.stdout[-8000:]}{done.stderr[-2000:]}")


@dataclass
class Place:
    """A namespace with a Deployment of serving pods, a floating address on one of them, and its Service."""

    world: World
    name: str
    address: str

    def create(self, *objects: Json) -> str:
        """``kubectl create``: the name of the last one, which the API server may have made."""
        items = {"apiVersion": "v1", "kind": "List", "items": objects}
        done = self.world.plane.kubectl("create", "-n", self.name, "-o", "name", "-f", "-", input=json.dumps(items))
        return done.stdout.split()[-1].rpartition("/")[2]

    def get(self, *args: str) -> Json:
        found: Json = self.world.plane.get("-n", self.name, *args)
        return found

    def pods(self) -> list[Json]:
        """Those that can take over: Ready and not going away."""
        found = self.get("pods", "-l", "app=llm")["items"]
        return [p for p in found if "deletionTimestamp" not in p["metadata"] and _is_ready(p)]

    def wait_ready(self, count: int) -> list[Json]:
        def look() -> list[Json]:
            pods = self.pods()
            return pods if len(pods) == count else []

        return wait_for(f"{count} Ready pods", look, 120)

    def fip(self) -> Json:
        return self.get("floatingips", "llm")

    def wait_fip(self) -> Json:
        def look() -> Json:
            conditions = self.fip().get("status", {}).get("conditions", [])
            return self.fip() if any(c["type"] == "Ready" and c["status"] == "True" for c in conditions) else {}

        return wait_for("the floating IP", look)

    def holder(self) -> Json:
        """The pod that has the address, as the FloatingIP says."""
        return self.get("pods", self.fip()["status"]["pod"])

    def spare(self) -> Json:
        """A Ready pod on another node than the holder's."""
        node = self.holder()["spec"]["nodeName"]
        return next(p for p in self.pods() if p["spec"]["nodeName"] != node)

    def job(self, name: str) -> Json:
        return self.get("migrationjobs", name)

    def events(self, kind: str, name: str) -> list[str]:
        found = self.get("events", f"--field-selector=involvedObject.kind={kind},involvedObject.name={name}")["items"]
        return [e["reason"] for e in sorted(found, key=lambda e: int(e["metadata"]["resourceVersion"]))]

    def endpoint(self) -> Json:
        """The one of the Service's slice."""
        (endpoint,) = self.get("endpointslices", "midstream-llm")["endpoints"]
        return dict(endpoint)


def _is_ready(pod: Json) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))


def serving_metadata() -> Json:
    labels = {"app": "llm", "midstream.dev/enabled": "true", "midstream.dev/model": "tiny"}
    return {"labels": labels, "annotations": {"midstream.dev/gateway": "own"}}


def serving_spec() -> Json:
    restricted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    spread = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "llm"}}}
    return {
        "automountServiceAccountToken": False,
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 100, "podAffinityTerm": spread}
        ]}},
        "containers": [{
            "name": "llm",
            "image": "localhost/midstream-builtin:test",
            "imagePullPolicy": "Never",
            "args": [f"--listen=[::]:{MODEL_PORT}", "--engine-python=/usr/bin/python3", "--path-mtu=9001",
                     f"--prestop-port={PRESTOP_PORT}", "--pace-ms=10", "--pool-slots=1024"],
            "ports": [{"name": "http", "containerPort": MODEL_PORT}],
            "readinessProbe": {"httpGet": {"path": "/health", "port": MODEL_PORT}, "periodSeconds": 1},
            "env": [{"name": "TMPDIR", "value": "/run/midstream"}],
            "volumeMounts": [{"name": "midstream", "mountPath": "/run/midstream"}],
            "securityContext": restricted,
        }],
        "volumes": [{"name": "midstream", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}],
    }  # fmt: skip
