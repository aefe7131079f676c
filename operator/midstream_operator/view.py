"""Pods, nodes and agents as the operator keeps them: small digests, filled by watch.py, read by everybody.

A cluster has thousands of pods; only labelled ones get here, and of those only what a decision needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime

from midstream_operator.model import ANNOTATION_REBALANCE, LABEL_MODEL, LABEL_RUNTIME, LABEL_WORKLOAD, Json, parse_time

ZONE = "topology.kubernetes.io/zone"
# The admin's word that a node is down and will not come back as it was: what ran there may be started elsewhere.
# https://kubernetes.io/docs/concepts/cluster-administration/node-shutdown/#non-graceful-node-shutdown
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
# Taints that say a node is about to go; whoever set them.
LEAVING_TAINTS = (
    "midstream.dev/",
    "karpenter.sh/disrupted",
    "karpenter.sh/disruption",
    "aws-node-termination-handler/",
    "ToBeDeletedByClusterAutoscaler",
    "DeletionCandidateOfClusterAutoscaler",
    OUT_OF_SERVICE,
)
DELETED = "being deleted"


@dataclass(frozen=True, slots=True)
class Pod:
    namespace: str
    name: str
    uid: str
    node: str
    labels: dict[str, str]
    ready: bool
    deletion: datetime | None  # when the kubelet may kill it
    host_network: bool
    workload: str
    phase: str
    rebalance: str = ""  # the annotation midstream.dev/rebalance: Ignore, Prepare or Migrate

    @property
    def model(self) -> str:
        """What has to be equal for a pod to take over: the model, or else the workload."""
        return self.labels.get(LABEL_MODEL, "") or f"workload {self.workload}"

    @property
    def runtime(self) -> str:
        return self.labels.get(LABEL_RUNTIME, "")

    @property
    def running(self) -> bool:
        return self.phase == "Running"

    @classmethod
    def of(cls, obj: Json) -> Pod:
        meta, spec, status = obj["metadata"], obj["spec"], obj.get("status") or {}
        deletion = meta.get("deletionTimestamp")
        conditions = status.get("conditions") or []
        return cls(
            namespace=meta["namespace"],
            name=meta["name"],
            uid=meta["uid"],
            node=spec.get("nodeName", ""),
            labels=meta.get("labels") or {},
            ready=any(c["type"] == "Ready" and c["status"] == "True" for c in conditions),
            deletion=parse_time(deletion) if deletion else None,
            host_network=bool(spec.get("hostNetwork")),
            workload=workload_of(obj),
            phase=status.get("phase", ""),
            rebalance=(meta.get("annotations") or {}).get(ANNOTATION_REBALANCE, ""),
        )


def workload_of(pod: Json) -> str:
    """The pod's Deployment, StatefulSet, ...: by label, by its controller, by the usual labels, or its own name."""
    meta = pod["metadata"]
    labels = meta.get("labels") or {}
    if LABEL_WORKLOAD in labels:
        return str(labels[LABEL_WORKLOAD])
    for owner in meta.get("ownerReferences") or []:
        if owner.get("controller"):
            suffix = f"-{labels['pod-template-hash']}" if "pod-template-hash" in labels else ""
            return str(owner["name"]).removesuffix(suffix)
    for key in ("app.kubernetes.io/name", "app"):
        if key in labels:
            return str(labels[key])
    return str(meta["name"])


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    provider_id: str
    zone: str
    ready: bool
    leaving: str  # why it takes nothing new: a taint's key, or "cordoned"; empty: it stays

    @classmethod
    def of(cls, obj: Json) -> Node:
        meta, spec = obj["metadata"], obj.get("spec") or {}
        conditions = (obj.get("status") or {}).get("conditions") or []
        keys = [t["key"] for t in spec.get("taints") or []]
        leaving = next((k for k in keys if k.startswith(LEAVING_TAINTS)), "")
        leaving = OUT_OF_SERVICE if OUT_OF_SERVICE in keys else leaving
        leaving = leaving or (DELETED if meta.get("deletionTimestamp") else "")
        return cls(
            name=meta["name"],
            provider_id=spec.get("providerID", ""),
            zone=(meta.get("labels") or {}).get(ZONE, ""),
            ready=any(c["type"] == "Ready" and c["status"] == "True" for c in conditions),
            leaving=leaving or ("cordoned" if spec.get("unschedulable") else ""),
        )


@dataclass(frozen=True, slots=True)
class Agent:
    node: str
    endpoint: str
    ready: bool
    pod: str

    @classmethod
    def of(cls, obj: Json, port: int) -> Agent:
        pod = Pod.of(obj)
        address = (obj.get("status") or {}).get("podIP", "")
        host = f"[{address}]" if ":" in address else address
        return cls(pod.node, f"{host}:{port}" if address else "", pod.ready and pod.deletion is None, pod.name)


Changed = Callable[[Pod], None]


@dataclass(slots=True)
class View:
    """What the watchers have seen. Listeners are called in the event loop and must not block."""

    pods: dict[str, Pod] = field(default_factory=dict)  # by uid
    nodes: dict[str, Node] = field(default_factory=dict)
    agent_pods: dict[str, Agent] = field(default_factory=dict)  # by the agent pod's uid
    pod_listeners: list[Changed] = field(default_factory=list)
    node_listeners: list[Callable[[Node], None]] = field(default_factory=list)
    _by_name: dict[tuple[str, str], str] = field(default_factory=dict)
    _agents_of: dict[str, set[str]] = field(default_factory=dict)  # node -> uids of agent pods

    def put_pod(self, pod: Pod) -> None:
        if self.pods.get(pod.uid) == pod:
            return
        self.pods[pod.uid] = pod
        self._by_name[pod.namespace, pod.name] = pod.uid
        for listener in self.pod_listeners:
            listener(pod)

    def drop_pod(self, uid: str) -> None:
        pod = self.pods.pop(uid, None)
        if pod is None:
            return
        if self._by_name.get((pod.namespace, pod.name)) == uid:
            del self._by_name[pod.namespace, pod.name]
        for listener in self.pod_listeners:
            listener(pod)

    def put_node(self, node: Node) -> None:
        if self.nodes.get(node.name) == node:
            return
        self.nodes[node.name] = node
        for listener in self.node_listeners:
            listener(node)

    def drop_node(self, name: str) -> None:
        self.nodes.pop(name, None)

    def put_agent(self, uid: str, agent: Agent) -> None:
        self.drop_agent(uid)  # it had no node before it was scheduled
        self.agent_pods[uid] = agent
        self._agents_of.setdefault(agent.node, set()).add(uid)

    def drop_agent(self, uid: str) -> None:
        if (old := self.agent_pods.pop(uid, None)) is not None:
            here = self._agents_of[old.node]
            here.discard(uid)
            if not here:
                del self._agents_of[old.node]

    def pod(self, namespace: str, name: str) -> Pod | None:
        return self.pods.get(self._by_name.get((namespace, name), ""))

    def pods_of(self, namespace: str) -> Iterator[Pod]:
        return (p for p in self.pods.values() if p.namespace == namespace)

    def agent(self, node: str) -> Agent | None:
        """The node's agent: a ready one if there is one (during a rolling update there may be two pods)."""
        found = [a for uid in self._agents_of.get(node, ()) if (a := self.agent_pods[uid]).endpoint]
        return max(found, key=lambda a: a.ready, default=None)
