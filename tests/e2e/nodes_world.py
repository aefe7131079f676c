"""Midstream as a user has it: real nodes of a real control plane, images of our Dockerfile, the chart by helm.

The testbed plays the network, as in the demo; kubelet, containerd, runc, API server, scheduler and helm are the real
ones, and everything of ours runs in a container that the kubelet has started, with the chart's own security contexts.
"""

from __future__ import annotations

import json
import subprocess
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
from traffic import PORT

Json = dict[str, Any]
T = TypeVar("T")
SYSTEM = "midstream-system"
POOL = "10.77.0.96/28"
ENGINE_SOCKET = "/run/midstream/engine.sock"
TOLD_TO_STOP = "told to stop"
CHART_PATIENCE_S = 240
STATE = "/var/lib/midstream"  # of agents, on their nodes
FAILPOINTS, FIRED = f"{STATE}/failpoints", f"{STATE}/fired"
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
        store = images.prepared(["pause", "operator", "agent", "runtime", "builtin"])
        for name in names:
            host = self.vpc.host(name)
            self.nodes[name] = KubeNode(self.plane, host, store, labels={"topology.kubernetes.io/zone": "zone-1"})
        for node in self.nodes.values():
            node.wait_ready()

    def install(self) -> None:
        """As a user would, with values for this network."""
        path = self.folder / "values.json"
        path.write_text(json.dumps(self.values()), encoding="utf-8")
        self.helm("install", "midstream", CHECKOUT / "charts/midstream", "-f", path, "--create-namespace", "--wait")

    def serve(self, replicas: int = 2) -> Place:
        """A Deployment's pods on both nodes, an address on one of them: Ready, all of it."""
        place = Place(self, "default", "")
        spec = {"replicas": replicas, "selector": {"matchLabels": {"app": "llm"}}, "strategy": STRATEGY}
        spec["template"] = serving_template()
        place.create({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "llm"}, "spec": spec})
        place.wait_ready(replicas)
        fip, service = yaml.safe_load_all((CHECKOUT / "examples/floatingip.yaml").read_text(encoding="utf-8"))
        place.create(fip, service)
        place.address = wait_for("an address", lambda: place.fip().get("status", {}).get("address"))
        # The network's owner lets the address in where the operator has put it; from then on agents announce it.
        node = wait_for("its node", lambda: place.fip()["status"].get("node"))
        self.vpc.allocate(place.address, self.nodes[node].host)
        place.wait_fip()
        return place

    def helm(self, *args: str | Path, check: bool = True) -> str:
        """What it says; where it shall fail (`check`), what it says to that."""
        every = ("--namespace", SYSTEM, f"--timeout={CHART_PATIENCE_S}s")
        done = self.plane.run("helm", *args, *every, timeout_s=CHART_PATIENCE_S + 30, check=check)
        assert check or done.returncode, f"helm {args} succeeded: {done.stdout}"
        return done.stdout if check else done.stderr

    def values(self) -> Json:
        eth1 = self.nodes["node-a"].host.eth1
        return {
            "image": {"registry": "localhost", "tag": "test", "pullPolicy": "Never"},
            "pools": [{"name": "default", "provider": "l2", "cidrs": [POOL]}],
            "agent": {
                "nic": eth1.name,
                "nicGatewayV4": eth1.gateway4,
                "nicGatewayV6": eth1.gateway6,
                "extraEnv": [
                    {"name": "MIDSTREAM_FAILPOINT_FILE", "value": FAILPOINTS},
                    {"name": "MIDSTREAM_FAILPOINT_LOG", "value": FIRED},
                ],
            },
            "webhook": {"enabled": True, "failurePolicy": "Fail"},
            "uninstall": {"waitSeconds": 2},
        }

    @contextmanager
    def stopped_at(self, node: str, failpoint: str) -> Iterator[Callable[[], None]]:
        """The node's agent waits at this failpoint when a job comes to it: what is called waits for that. It goes on
        when the block ends, if it still lives."""
        fired = len(self._fired(node))
        self.arm(node, f"{failpoint}=wait")

        def wait() -> None:
            wait_for(failpoint, lambda: failpoint in self._fired(node)[fired:])

        try:
            yield wait
        finally:
            self.arm(node, "")

    def arm(self, node: str, failpoints: str) -> None:
        """In the node's running agent: taken up when it passes the next one."""
        path = self._on_node(node, FAILPOINTS)
        path.with_suffix(".tmp").write_text(failpoints, encoding="ascii")
        path.with_suffix(".tmp").rename(path)

    def _fired(self, node: str) -> list[str]:
        path = self._on_node(node, FIRED)
        return path.read_text(encoding="ascii").split() if path.exists() else []

    def _on_node(self, node: str, path: str) -> Path:
        return self.nodes[node].disk / path.lstrip("/")

    def kill(self, part: str, node: str = "") -> None:
        """A pod of ours, without a word to it: the operator that leads, or a node's agent. Dead when it returns."""
        name = self._agent(node) if part == "agent" else self.leader()
        pod = self.plane.get("pod", "-n", SYSTEM, name)
        self.plane.kubectl("delete", "pod", "-n", SYSTEM, name, "--grace-period=0", "--force")
        self.nodes[pod["spec"]["nodeName"]].wait_dead(pod)

    def leader(self) -> str:
        lease = self.plane.get("leases", "-n", SYSTEM, "midstream-operator")
        return str(lease["spec"]["holderIdentity"]).rpartition("_")[0]

    def _agent(self, node: str) -> str:
        where = f"--field-selector=spec.nodeName={node}"
        (pod,) = self.plane.get("pods", "-n", SYSTEM, "-l", "app.kubernetes.io/component=agent", where)["items"]
        return str(pod["metadata"]["name"])

    def wait_whole(self) -> None:
        """All that the chart installs is Ready."""
        for what in ("daemonset/midstream-agent", "deployment/midstream-operator"):
            self.plane.kubectl("rollout", "status", "-n", SYSTEM, what, "--timeout=120s", timeout_s=130)

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

    def kubectl(self, *args: str, timeout_s: float = 180) -> str:
        return self.world.plane.kubectl("-n", self.name, *args, timeout_s=timeout_s).stdout

    @contextmanager
    def follow_log(self, pod: str, container: str) -> Iterator[Callable[[], list[str]]]:
        """``kubectl logs -f --timestamps`` until the container has ended: what it has said, once the block is left."""
        path = self.world.folder / f"{pod}-{container}.log"
        plane = self.world.plane
        argv = [str(plane.binaries / "kubectl"), "-n", self.name, "logs", "-f", "--timestamps", pod, "-c", container]
        with path.open("wb") as out:
            env = {"KUBECONFIG": str(plane.kubeconfig), "HOME": str(plane.folder)}
            process = subprocess.Popen(argv, stdout=out, env=env)
        try:
            yield lambda: path.read_text(encoding="utf-8").splitlines()
            process.wait(60)
        finally:
            process.kill()
            process.wait()

    def is_rolled_out(self, deployment: str) -> bool:
        """Of the newest template all, of older ones none, not even one that is going away."""
        found = self.get("deployment", deployment)
        status, wanted = found["status"], found["spec"]["replicas"]
        seen = status.get("observedGeneration", 0) >= found["metadata"]["generation"]
        new = {status.get(name, 0) for name in ("updatedReplicas", "replicas", "readyReplicas")}
        return bool(seen) and new == {wanted} and len(self.get("pods", "-l", "app=llm")["items"]) == wanted

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

    def spread(self) -> None:
        """Two Ready pods on two nodes again: a drain or a rollout may have left both on one."""
        pods, holder = self.wait_ready(2), self.holder()
        if len({p["spec"]["nodeName"] for p in pods}) == 1:
            (other,) = [p["metadata"]["name"] for p in pods if p["metadata"]["uid"] != holder["metadata"]["uid"]]
            self.kubectl("delete", "pod", other)
            self.wait_ready(2)

    def job(self, name: str) -> Json:
        return self.get("migrationjobs", name)

    def phase(self, name: str) -> str:
        return str(self.job(name).get("status", {}).get("phase", ""))

    def wait_ended(self, name: str) -> Json:
        """The status in which the job has ended."""

        def look() -> Json:
            status: Json = self.job(name).get("status", {})
            return status if "completionTime" in status else {}

        return wait_for(f"the end of job {name}", look, 90)

    def events(self, kind: str, name: str) -> list[str]:
        found = self.get("events", f"--field-selector=involvedObject.kind={kind},involvedObject.name={name}")["items"]
        return [e["reason"] for e in sorted(found, key=lambda e: int(e["metadata"]["resourceVersion"]))]

    def endpoint(self) -> Json:
        """The one of the Service's slice."""
        (endpoint,) = self.get("endpointslices", "midstream-llm")["endpoints"]
        return dict(endpoint)


def _is_ready(pod: Json) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))


def serving_template() -> Json:
    """Gateway and built-in engine, a container each, unprivileged; the webhook adds hook and grace."""
    labels = {"app": "llm", "midstream.dev/enabled": "true", "midstream.dev/model": "tiny"}
    spread = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": "llm"}}}
    wish = [{"weight": 100, "podAffinityTerm": spread}]
    spec = {
        "automountServiceAccountToken": False,
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": wish}},
        "containers": [_gateway(), _engine()],
        "volumes": [{"name": "midstream", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}}],
    }
    return {"metadata": {"labels": labels, "annotations": {"midstream.dev/gateway": "own"}}, "spec": spec}


def _gateway() -> Json:
    args = [f"--listen=[::]:{PORT}", "--path-mtu=9001", "--prestop-port=8002", f"--engine={ENGINE_SOCKET}"]
    probe = {"httpGet": {"path": "/health", "port": PORT}, "periodSeconds": 1}
    return {**_unprivileged("gateway"), "args": args, "readinessProbe": probe, "ports": [{"containerPort": PORT}]}


def _engine() -> Json:
    """Says in its log when it is told to stop."""
    run = "/usr/bin/python3 -m midstream_runtime.engine.builtin --model tiny --pool-slots 2048 --pace-ms 10"
    script = f"trap 'echo {TOLD_TO_STOP}; kill $!' TERM; {run} --device cpu --socket {ENGINE_SOCKET} & wait; wait"
    env = {"name": "PYTHONPATH", "value": "/opt/midstream/lib/python3.11/site-packages"}
    container = _unprivileged("engine")
    return {**container, "command": ["/bin/sh", "-c", script], "env": [*container["env"], env]}


def _unprivileged(name: str) -> Json:
    return {
        "name": name,
        "image": "localhost/midstream-builtin:test",
        "imagePullPolicy": "Never",
        "env": [{"name": "TMPDIR", "value": "/run/midstream"}],
        "volumeMounts": [{"name": "midstream", "mountPath": "/run/midstream"}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
