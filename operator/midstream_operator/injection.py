"""What a labelled pod gets when it is created: the gateway beside its engine, and a preStop hook that waits for the
migration. A pure function from the pod to a JSON patch; webhook.py carries it to the API server.

    container midstream-gateway     owns the clients' sockets, asks the engine in the pod by HTTP
    init container midstream-lib    copies the vLLM connector into a volume, for the engine to import
    volume midstream                memory; the sockets of handoff and pool, between gateway and engine
    every container                 preStop.httpGet to the gateway: nothing is needed in its image for that
    terminationGracePeriodSeconds   at least settings.webhook.grace_s

The pod stays unprivileged and mounts nothing of the host. A second call on the same pod adds what is still missing,
such as the hook of a sidecar that another webhook has added.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from midstream_operator.errors import Final
from midstream_operator.model import Json
from midstream_operator.settings import Webhook

GATEWAY, LIBRARY = "midstream-gateway", "midstream-lib"
VOLUME, MOUNT = "midstream", "/run/midstream"
LIBRARY_MOUNT = "/opt/midstream-lib"
ENGINE = "midstream.dev/engine-container"  # annotation: which container is the engine; else the first one
OWN_GATEWAY = "midstream.dev/gateway"  # annotation "own": the pod brings its gateway, only hook and grace are added
PRESTOP = "midstream.dev/prestop"  # annotation "chained": containers with a preStop of their own call ours in it
ANSWER_MARGIN_S = 10  # the hook answers this long before the grace is over: SIGTERM must still be heard
CONNECTOR = {
    "kv_connector": "MidstreamConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "midstream_runtime.vllm_connector",
    "kv_load_failure_policy": "recompute",
}


@dataclass(slots=True)
class Injection:
    patch: list[Json] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def inject(pod: Json, settings: Webhook) -> Injection:
    """Final, with the reason by name, for a pod that cannot be served this way."""
    spec, annotations = pod["spec"], (pod.get("metadata") or {}).get("annotations") or {}
    _refuse(spec)
    done = Injection(warnings=_warnings(spec))
    grace = max(int(spec.get("terminationGracePeriodSeconds") or 0), settings.grace_s)
    if spec.get("terminationGracePeriodSeconds") != grace:
        done.patch.append(_set("/spec/terminationGracePeriodSeconds", grace))
    hook = _hook(settings, grace)
    names = [c["name"] for c in spec["containers"]]
    if GATEWAY not in names and annotations.get(OWN_GATEWAY) != "own":
        _add_gateway(done.patch, spec, annotations, settings, hook)
    for kind in ("containers", "initContainers"):
        for i, container in enumerate(spec.get(kind) or []):
            if kind == "containers" or container.get("restartPolicy") == "Always":
                done.patch += _add_hook(f"/spec/{kind}/{i}", container, annotations, hook)
    return done


def _refuse(spec: Json) -> None:
    if spec.get("hostNetwork"):
        raise Final("host_network", "hostNetwork: its sockets are the node's, and floating addresses need a pod's own")
    if (spec.get("os") or {}).get("name") == "windows":
        raise Final("not_linux", "Midstream moves Linux sockets")
    for volume in spec.get("volumes") or []:
        if volume["name"] == VOLUME and "emptyDir" not in volume:
            raise Final("volume_taken", f"the pod has a volume {VOLUME!r} of another kind: rename it")


def _warnings(spec: Json) -> list[str]:
    """Karpenter never waits for pods that tolerate its taint: then nobody waits for the migration."""
    for toleration in spec.get("tolerations") or []:
        if toleration.get("operator") == "Exists" and not toleration.get("key"):
            return ["tolerates every taint: node drains do not wait for this pod; name the taints instead"]
    return []


def _hook(settings: Webhook, grace_s: int) -> Json:
    path = f"/prestop?seconds={grace_s - ANSWER_MARGIN_S}"
    return {"httpGet": {"path": path, "port": settings.prestop_port}}


def _add_hook(at: str, container: Json, annotations: Json, hook: Json) -> list[Json]:
    lifecycle = container.get("lifecycle") or {}
    own = lifecycle.get("preStop")
    if own is None:
        return [_set(f"{at}/lifecycle", {**lifecycle, "preStop": hook})]
    if own == hook or annotations.get(PRESTOP) == "chained":
        return []
    if "/prestop" in (own.get("httpGet") or {}).get("path", ""):  # ours, for another grace
        return [_set(f"{at}/lifecycle", {**lifecycle, "preStop": hook})]
    port = hook["httpGet"]["port"]
    raise Final(
        "own_prestop",
        f"container {container['name']} has a preStop hook of its own: have it ask http://127.0.0.1:{port}/prestop "
        f"first, then say so with the annotation {PRESTOP}: chained",
    )


def _add_gateway(patch: list[Json], spec: Json, annotations: Json, settings: Webhook, hook: Json) -> None:
    engine = _engine_index(spec, annotations)
    container = spec["containers"][engine]
    for name, volume in ((VOLUME, {"medium": "Memory", "sizeLimit": "16Mi"}), (LIBRARY, {"sizeLimit": "256Mi"})):
        if name not in [v["name"] for v in spec.get("volumes") or []]:
            _append(patch, spec, "/spec", "volumes", {"name": name, "emptyDir": volume})
    mounts = [{"name": VOLUME, "mountPath": MOUNT}, {"name": LIBRARY, "mountPath": LIBRARY_MOUNT, "readOnly": True}]
    at = f"/spec/containers/{engine}"
    for mount in mounts:
        _append(patch, container, at, "volumeMounts", mount)
    _append(patch, container, at, "env", {"name": "PYTHONPATH", "value": LIBRARY_MOUNT})
    for argument in _engine_arguments(container, settings):
        _append(patch, container, at, "args", argument)
    _append(patch, spec, "/spec", "initContainers", _library(settings))
    patch.append(_set("/spec/containers/-", _gateway(settings, hook)))


def _engine_index(spec: Json, annotations: Json) -> int:
    names = [c["name"] for c in spec["containers"]]
    wanted = annotations.get(ENGINE, names[0])
    if wanted not in names:
        have = ", ".join(names)
        raise Final("no_engine_container", f"annotation {ENGINE}: no container {wanted!r}; there are: {have}")
    container = spec["containers"][names.index(wanted)]
    if any(e["name"] == "PYTHONPATH" for e in container.get("env") or []):
        raise Final("own_pythonpath", f"container {wanted} sets PYTHONPATH: add {LIBRARY_MOUNT} to it and bring the "
                    f"gateway yourself (docs/injection.md), with the annotation {OWN_GATEWAY}: own")  # fmt: skip
    return names.index(wanted)


def _engine_arguments(container: Json, settings: Webhook) -> list[str]:
    """The connector, and a port beside the gateway's; what the pod says itself stands."""
    given = container.get("args") or []
    found = []
    if not any(a.split("=")[0] == "--port" for a in given):
        found.append(f"--port={settings.engine_port}")
    if not any(a.split("=")[0] == "--kv-transfer-config" for a in given):
        found.append(f"--kv-transfer-config={json.dumps(CONNECTOR, separators=(',', ':'))}")
    return found


def _unprivileged() -> Json:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _gateway(settings: Webhook, hook: Json) -> Json:
    return {
        "name": GATEWAY,
        "image": settings.image,
        "args": [
            f"--listen=[::]:{settings.gateway_port}",
            "--engine=vllm",
            f"--engine-url=http://127.0.0.1:{settings.engine_port}",
            f"--prestop-port={settings.prestop_port}",
        ],
        "ports": [{"name": "midstream", "containerPort": settings.gateway_port}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": settings.gateway_port}, "periodSeconds": 5},
        "lifecycle": {"preStop": hook},
        "resources": {"requests": {"cpu": "250m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
        "securityContext": _unprivileged(),
        "env": [{"name": "TMPDIR", "value": MOUNT}],
        "volumeMounts": [{"name": VOLUME, "mountPath": MOUNT}],
    }


def _library(settings: Webhook) -> Json:
    copy = "import shutil,midstream_runtime as m;shutil.copytree(m.__path__[0],'/lib-out/midstream_runtime')"
    return {
        "name": LIBRARY,
        "image": settings.image,
        "command": ["python", "-c", copy],
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}},
        "securityContext": _unprivileged(),
        "volumeMounts": [{"name": LIBRARY, "mountPath": "/lib-out"}],
    }


def _set(path: str, value: Any) -> Json:
    return {"op": "add", "path": path, "value": value}  # on a member that exists, RFC 6902's add replaces


def _append(patch: list[Json], parent: Json, at: str, name: str, value: Any) -> None:
    """To a list that may not be there yet."""
    if not parent.get(name) and not any(p["path"] == f"{at}/{name}" for p in patch):
        patch.append(_set(f"{at}/{name}", [value]))
    else:
        patch.append(_set(f"{at}/{name}/-", value))
