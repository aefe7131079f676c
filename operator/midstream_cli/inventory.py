"""Which pods and nodes there are, for a CLI without a Kubernetes API: one JSON file.

    {"tls":   {"ca": PATH, "cert": PATH, "key": PATH},
     "nodes": {"node-a": {"endpoint": "10.77.0.10:9443"}, ...},
     "pods":  {"llm-0": {"uid": "...", "node": "node-a", "namespace": "default", "workload": "llm"}, ...}}

Paths are relative to the file. A migration needs a source pod, and a target pod on another node: the one named,
or the only other pod of the same workload there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream_agent.contract import agent_pb2 as pb


class UsageError(Exception):
    """The user asked for something that cannot be; the message says what to do."""


@dataclass(frozen=True, slots=True)
class PodEntry:
    name: str
    uid: str
    node: str
    namespace: str
    workload: str

    @property
    def ref(self) -> pb.PodRef:
        return pb.PodRef(namespace=self.namespace, name=self.name, uid=self.uid)


@dataclass(frozen=True, slots=True)
class Inventory:
    endpoints: dict[str, str]
    pods: dict[str, PodEntry]
    ca: Path
    cert: Path
    key: Path

    @classmethod
    def load(cls, path: Path) -> Inventory:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls._parse(data, path.parent)
        except FileNotFoundError as e:
            raise UsageError(f"no inventory at {path}: give --inventory FILE or set MIDSTREAM_INVENTORY") from e
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UsageError(f"inventory {path} is malformed: {type(e).__name__}: {e}") from e

    @classmethod
    def _parse(cls, data: dict[str, Any], base: Path) -> Inventory:
        pods = {
            name: PodEntry(name, p["uid"], p["node"], p.get("namespace", "default"), p.get("workload", ""))
            for name, p in data["pods"].items()
        }
        files = {k: base / data["tls"][k] for k in ("ca", "cert", "key")}
        endpoints = {name: n["endpoint"] for name, n in data["nodes"].items()}
        return cls(endpoints, pods, files["ca"], files["cert"], files["key"])

    def pod(self, name: str) -> PodEntry:
        if name not in self.pods:
            raise UsageError(f"unknown pod {name!r}: the inventory has {', '.join(sorted(self.pods)) or 'none'}")
        return self.pods[name]

    def node(self, name: str) -> pb.NodeRef:
        if name not in self.endpoints:
            raise UsageError(f"unknown node {name!r}: the inventory has {', '.join(sorted(self.endpoints)) or 'none'}")
        return pb.NodeRef(name=name, endpoint=self.endpoints[name])

    def target(self, source: PodEntry, to: str, target_pod: str) -> PodEntry:
        """The pod that takes over: the one named, or the only one of the workload on node `to`."""
        if target_pod:
            return self._named_target(source, to, target_pod)
        self.node(to)
        if to == source.node:
            raise UsageError(f"{source.name} runs on {to} already: choose another node with --to")
        found = [p for p in self.pods.values() if p.node == to and p.workload == source.workload]
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise UsageError(
                f"node {to} has {len(found)} pods of workload {source.workload!r} ({names}): name one with --target-pod"
            )
        return found[0]

    def _named_target(self, source: PodEntry, to: str, target_pod: str) -> PodEntry:
        target = self.pod(target_pod)
        if to and target.node != to:
            raise UsageError(f"pod {target_pod} runs on {target.node}, not on {to}")
        if target.node == source.node:
            raise UsageError(f"{target_pod} runs on {source.node} like {source.name}: choose a pod of another node")
        return target
