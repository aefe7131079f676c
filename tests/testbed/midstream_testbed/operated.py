"""A fleet that the operator runs: real control plane, real operator process, real agents; Node and Pod objects by hand.

    machine                        control-plane (a client of the VPC)      node-a, node-b
    test or demo --relay-->        kube-apiserver, etcd, controllers  <---  agents (IMDS inside their host)
    moto's SQS   --expose-->       midstream_operator.main  --- gRPC --->   serving pods
                                   EC2 API on its loopback

There is no kubelet: what one would report (its lease, its node's and pods' readiness) is written here, for as long as
the host lives. So a host that is killed stops reporting, and Kubernetes finds out in its own time.
"""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
import urllib.error
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from midstream_testbed.certs import OPERATOR
from midstream_testbed.cluster import CHECKOUT, ControlPlane
from midstream_testbed.fleet import Fleet, wait_for_line
from midstream_testbed.instances import IMDS, KIND, REGION, ZONE, Instances
from midstream_testbed.machine import Host, Pod
from midstream_testbed.namespace import Process

OURS, SERVING = "midstream-system", "llms"  # namespaces of the API
POOL = "spot"
MERGE = "application/merge-patch+json"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
ENDED = ("Succeeded", "RolledBack", "Failed", "Aborted")
HEARTBEAT_S = 5.0
AGENT_LABELS = {"app.kubernetes.io/name": "midstream", "app.kubernetes.io/component": "agent"}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTBED", "AWS_SECRET_ACCESS_KEY": "testbed", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
Json = dict[str, Any]
T = TypeVar("T")


class Operated:
    """Owner of the control plane and the operator beside a Fleet. A context manager.

    `pool`: the floating IPs' range. `kind`: the instances' type. `settings` goes over the operator's configuration,
    which has the product's own timeouts.
    """

    def __init__(self, fleet: Fleet, pool: str, *, settings: Json | None = None, kind: str = KIND) -> None:
        self.fleet, self.vpc = fleet, fleet.vpc
        self.settings = settings or {}
        self.instances = Instances(self.vpc, pool, kind)
        self.plane = ControlPlane(self.vpc)
        self.hosts: dict[str, Host] = {}
        self.operator: Process | None = None
        self._stop = threading.Event()
        self._kubelets = threading.Thread(target=self._report, name="kubelets", daemon=True)
        try:
            self._install()
            self._ec2_url = self.instances.serve_api(self.plane.place)
            self._kubelets.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Operated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._stop.set()
        if self._kubelets.is_alive():
            self._kubelets.join()
        self.instances.__exit__(None, None, None)
        self.plane.close()

    # -- what an installation has

    def _install(self) -> None:
        """CRDs, namespaces, and the rights that the chart gives the operator where certificates are files."""
        for namespace in (OURS, SERVING):
            self.plane.kubectl("create", "namespace", namespace)
        values = ("--set", "tls.issuer=files", "--set", "webhook.enabled=false")
        parts = [x for part in ("rbac", "serviceaccounts") for x in ("--show-only", f"templates/{part}.yaml")]
        rights = self.plane.run(
            "helm", "template", "midstream", CHECKOUT / "charts/midstream", "-n", OURS, *values, *parts
        ).stdout
        self.plane.kubectl("apply", "-n", OURS, "-f", "-", input=rights)
        for crd in ("migrationjob", "floatingip"):
            self.plane.kubectl("apply", "-f", CHECKOUT / "crds" / f"{crd}.yaml")

    def start_operator(self, queue_url: str = "") -> None:
        """The real entry point with its ServiceAccount's token; returns when it leads. `queue_url`: of SQS, as a
        process beside the API server reaches it (notice_queue.py)."""
        config = {
            "namespace": OURS,
            "tls": {"ca": str(self.fleet.authority.ca), **self._operator_files()},
            "pools": [{"name": POOL, "provider": "ec2", "cidrs": [str(self.instances.pool)], "zone": ZONE,
                       "subnet": self.instances.subnet.id}],
            "aws": {"ec2": {"cluster": "testbed", "region": REGION, "endpoint": self._ec2_url},
                    "sqs": {"queueUrl": queue_url, "region": REGION, "endpoint": _origin(queue_url)}},
            **self.settings,
        }  # fmt: skip
        path = self.fleet.folder / "operator.yaml"
        path.write_text(json.dumps(config), encoding="utf-8")
        kubeconfig = self.plane.inside(self.plane.kubeconfig_for(OURS, "midstream-operator"))
        argv = [sys.executable, "-m", "midstream_operator.main", "--config", str(path), "--http-port", "8080"]
        env = self.fleet.env(KUBECONFIG=str(kubeconfig), **CREDENTIALS)
        self.operator = self.plane.place.popen(argv, env=env, name="operator")
        wait_until("the operator leads", self._leads, 60, self.operator_log)

    def _operator_files(self) -> dict[str, str]:
        folder: Path = self.fleet.authority.folder
        return {"cert": str(folder / f"{OPERATOR}.pem"), "key": str(folder / f"{OPERATOR}.key")}

    def _leads(self) -> bool:
        if self.operator is not None and self.operator.poll() is not None:
            raise RuntimeError(f"the operator ended with {self.operator.returncode}:\n{self.operator_log()}")
        return "midstream_operator_leader 1.0" in self.metrics()

    def metrics(self) -> str:
        """The operator's own, as text; empty while it does not answer."""
        argv = ["curl", "-sS", "--max-time", "5", "http://127.0.0.1:8080/metrics"]
        return self.plane.place.run(argv, check=False).stdout

    def operator_log(self) -> str:
        return self.operator.output()[-6000:] if self.operator is not None else ""

    # -- nodes and pods

    def add_node(self, name: str, *options: str, hears: bool = True, **env: str) -> Host:
        """A host that is an EC2 instance and a Ready Node, with an agent that listens to its metadata (`hears`)."""
        host = self.vpc.host(name)
        instance = self.instances.add(host)
        self.hosts[name] = host
        meta = {"name": name, "labels": {"topology.kubernetes.io/zone": ZONE}}
        self._create("/api/v1/nodes", "Node", meta, {"providerID": f"aws:///{ZONE}/{instance}"})
        self._renew(name)
        ready = [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "the testbed says so"}]
        self._status("/api/v1/nodes", name, {"conditions": ready})
        self.fleet.start_agent(host, *(IMDS if hears else ()), *options, **env)
        self._add_pod(OURS, f"agent-{name}", host, AGENT_LABELS, hostNetwork=True)
        self._pod_ready(OURS, f"agent-{name}", host.ipv4)
        return host

    def add_serving_pod(self, name: str, host: Host, *options: str, **env: str) -> Pod:
        """Gateway and built-in engine under a Pod object that is Ready when the gateway is."""
        pod = self.place(name, host, lambda uid: self.fleet.start_gateway(host, name, *options, uid=uid, **env))
        self.wait_ready(name)
        return pod

    def place(self, name: str, host: Host, start: Callable[[str], Pod]) -> Pod:
        """A Pod object on that node, and what `start` runs there under its UID."""
        labels = {"app": "llm", "pod": name, "midstream.dev/enabled": "true"}
        return start(self._add_pod(SERVING, name, host, labels))

    def wait_ready(self, name: str, timeout_s: float = 60) -> None:
        """Its gateway says so, and then its Pod object does."""
        serving = self.fleet.pods[name]
        wait_for_line(serving.process, r"^ready\b", timeout_s)
        self._pod_ready(SERVING, name, serving.pod.ipv4)

    def _add_pod(self, namespace: str, name: str, host: Host, labels: Json, **spec: Any) -> str:
        container: Json = {"name": "main", "image": "none"}
        if spec.get("hostNetwork"):
            container["ports"] = [{"containerPort": 9443, "hostPort": 9443}]
        whole = {"nodeName": host.name, "containers": [container], **spec}
        made = self._create(_pods(namespace), "Pod", {"name": name, "labels": labels}, whole)
        return str(made["metadata"]["uid"])

    def _pod_ready(self, namespace: str, name: str, ip: str) -> None:
        conditions = [{"type": "Ready", "status": "True"}]
        status = {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": conditions}
        self._status(_pods(namespace), name, status)

    def _create(self, path: str, kind: str, meta: Json, spec: Json, version: str = "v1") -> Json:
        body = {"apiVersion": version, "kind": kind, "metadata": meta, "spec": spec}
        made: Json = self.plane.request("POST", path, body)
        return made

    def _status(self, path: str, name: str, status: Json) -> None:
        self.plane.request("PATCH", f"{path}/{name}/status", {"status": status}, MERGE)

    def terminate(self, host: Host) -> None:
        """The instance ends, and what the cloud's controller does when it has seen that: its Node and pods go."""
        self.instances.terminate(host)
        for pods in (_pods(OURS), _pods(SERVING)):
            for pod in self.plane.request("GET", f"{pods}?fieldSelector=spec.nodeName={host.name}")["items"]:
                self.plane.request("DELETE", f"{pods}/{pod['metadata']['name']}?gracePeriodSeconds=0")
        self.plane.request("DELETE", f"/api/v1/nodes/{host.name}")

    # -- what kubelets do

    def _report(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            for name, host in list(self.hosts.items()):
                if not host.deleted:
                    self._renew(name)

    def _renew(self, name: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now}
        try:
            self.plane.request("PATCH", f"{LEASES}/{name}", {"spec": spec}, MERGE)
        except urllib.error.HTTPError as e:
            if e.code != 404:
                raise
            self._create(LEASES, "Lease", {"name": name}, spec, "coordination.k8s.io/v1")

    # -- floating IPs and jobs

    def add_floating_ip(self, name: str = "llm", **labels: str) -> str:
        """Made, and waited for: the operator has EC2 assign the address and the agent bring it to a pod with these
        labels, or to any serving pod."""
        spec = {"pool": POOL, "provider": "ec2", "podSelector": {"matchLabels": labels or {"app": "llm"}}}
        self._create(_ours("floatingips"), "FloatingIP", {"name": name}, spec, "midstream.dev/v1alpha1")
        status = wait_until(f"FloatingIP {name} is Ready", lambda: self._fip_if_ready(name), 60, self.operator_log)
        return str(status["address"])

    def _fip_if_ready(self, name: str) -> Json:
        found: Json = self.plane.request("GET", f"{_ours('floatingips')}/{name}").get("status") or {}
        ready = [c for c in found.get("conditions", []) if c["type"] == "Ready" and c["status"] == "True"]
        return found if ready else {}

    def migrate(self, pod: str, to: Host) -> str:
        """A MigrationJob, as a user makes one; its name."""
        spec = {"source": {"podName": pod}, "target": {"nodeName": to.name}}
        made = self._create(_ours("migrationjobs"), "MigrationJob", {"generateName": f"{pod}-"}, spec,
                            "midstream.dev/v1alpha1")  # fmt: skip
        return str(made["metadata"]["name"])

    def job(self, name: str) -> Json:
        found: Json = self.plane.request("GET", f"{_ours('migrationjobs')}/{name}")
        return found

    def ended(self, name: str, timeout_s: float = 120) -> Json:
        """The job in the phase in which it ended."""
        what = f"MigrationJob {name} has ended"
        return wait_until(what, lambda: self._if_ended(name), timeout_s, self.operator_log)

    def _if_ended(self, name: str) -> Json:
        job = self.job(name)
        return job if job.get("status", {}).get("phase") in ENDED else {}

    def jobs(self) -> list[Json]:
        found: list[Json] = self.plane.request("GET", _ours("migrationjobs"))["items"]
        return sorted(found, key=lambda job: str(job["metadata"]["name"]))

    def report_of(self, job: Json) -> Json:
        """The agent's report of a job that it knows, its events in `output`: asking for the same job again follows
        it."""
        status = job["status"]
        path = self.fleet.folder / f"report-{secrets.token_hex(4)}.json"
        where = ("--to", status["target"]["nodeName"], "--job", status["agentJob"], "--report", str(path))
        done = self.fleet.cli("migrate", job["spec"]["source"]["podName"], *where)
        if not path.exists():
            raise RuntimeError(f"no report of {status['agentJob']}:\n{done.stdout}{done.stderr}")
        report: Json = json.loads(path.read_text(encoding="utf-8"))
        return {"output": done.stdout, **report}


def wait_until(what: str, look: Callable[[], T], timeout_s: float, said: Callable[[], str] = str) -> T:
    """The first true answer; `said` tells what else is known when there is none."""
    end = time.monotonic() + timeout_s
    while not (found := look()):
        if time.monotonic() > end:
            raise TimeoutError(f"not so after {timeout_s:g} s: {what}\n{said()}")
        time.sleep(0.1)
    return found


def _pods(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods"


def _ours(plural: str) -> str:
    return f"/apis/midstream.dev/v1alpha1/namespaces/{SERVING}/{plural}"


def _origin(url: str) -> str:
    """http://host:port of a queue's URL."""
    return "/".join(url.split("/")[:3])
