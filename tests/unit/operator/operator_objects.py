"""Objects as the API server would give them, with what a test cares about."""

from __future__ import annotations

from typing import Any

from midstream_operator.view import Node, Pod

Json = dict[str, Any]


def pod_object(name: str, node: str = "a", *, ready: bool = True, **more: Any) -> Json:
    labels = {"midstream.dev/enabled": "true", "app": "llm", **more.pop("labels", {})}
    meta = {"name": name, "namespace": "default", "uid": f"uid-{name}", "labels": labels, **more.pop("metadata", {})}
    conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
    return {
        "metadata": meta,
        "spec": {"nodeName": node, **more.pop("spec", {})},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": conditions, **more},
    }


def pod(name: str, node: str = "a", **more: Any) -> Pod:
    return Pod.of(pod_object(name, node, **more))


def node_object(name: str, *, ready: bool = True, zone: str = "z1", **spec: Any) -> Json:
    return {
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "spec": {"providerID": f"aws:///{zone}/i-{name}", **spec},
        "status": {"conditions": [{"type": "Ready", "status": "True" if ready else "False"}]},
    }


def node(name: str, **more: Any) -> Node:
    return Node.of(node_object(name, **more))


def job_object(name: str = "j", **spec: Any) -> Json:
    meta = {
        "name": name,
        "namespace": "default",
        "uid": f"uid-{name}",
        "generation": 1,
        "resourceVersion": "1",
        "creationTimestamp": "2026-01-01T00:00:00Z",
    }
    return {"metadata": meta, "spec": {"source": {"podName": "llm-0"}, **spec}}
