"""What the webhook makes of a pod: applied as the API server applies it, then looked at."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from midstream_operator.errors import Final
from midstream_operator.injection import GATEWAY, inject
from midstream_operator.settings import Webhook
from midstream_operator.webhook import review

Json = dict[str, Any]
SETTINGS = Webhook(port=9444, image="midstream-runtime:1")


def pod(annotations: Json | None = None, **spec: Any) -> Json:
    engine = {"name": "vllm", "image": "vllm", "args": ["--model=m"]}
    return {"metadata": {"annotations": annotations or {}}, "spec": {"containers": [engine], **spec}}


def applied(patch: list[Json], to: Json) -> Json:
    """RFC 6902's `add`, the only operation that is used: a parent that is not there is an error, as it is there."""
    result = copy.deepcopy(to)
    for step in patch:
        assert step["op"] == "add"
        *way, last = step["path"].split("/")[1:]
        at: Any = result
        for part in way:
            at = at[int(part)] if isinstance(at, list) else at[part]
        if isinstance(at, list):
            at.append(step["value"]) if last == "-" else at.insert(int(last), step["value"])
        else:
            at[last] = step["value"]
    return result


def injected(of: Json) -> Json:
    result: Json = applied(inject(of, SETTINGS).patch, of)["spec"]
    return result


def hook(spec: Json, name: str) -> Any:
    (container,) = [c for c in spec["containers"] if c["name"] == name]
    return container["lifecycle"]["preStop"]["httpGet"]


def test_a_pod_gets_gateway_volumes_connector_hook_and_grace() -> None:
    spec = injected(pod())
    engine, gateway = spec["containers"]
    assert gateway["name"] == GATEWAY and gateway["image"] == SETTINGS.image
    assert spec["terminationGracePeriodSeconds"] == 150
    assert {v["name"] for v in spec["volumes"]} == {"midstream", "midstream-lib"}
    assert all("emptyDir" in v for v in spec["volumes"])
    assert {m["name"] for m in engine["volumeMounts"]} == {"midstream", "midstream-lib"}
    assert engine["args"][:2] == ["--model=m", "--port=8001"]
    transfer = json.loads(engine["args"][2].removeprefix("--kv-transfer-config="))
    assert transfer["kv_connector_module_path"] == "midstream_runtime.vllm_connector"
    for name in ("vllm", GATEWAY):
        assert hook(spec, name) == {"path": "/prestop?seconds=140", "port": 8002}


def test_what_is_added_needs_no_privilege_and_nothing_of_the_host() -> None:
    spec = injected(pod())
    for container in [spec["containers"][1], *spec["initContainers"]]:
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["runAsNonRoot"] and not context["allowPrivilegeEscalation"]
    assert "hostPath" not in json.dumps(spec)


def test_a_second_call_changes_nothing() -> None:
    first = pod()
    first = applied(inject(first, SETTINGS).patch, first)
    assert inject(first, SETTINGS).patch == []


def test_a_sidecar_that_came_later_gets_the_hook() -> None:
    first = pod()
    first = applied(inject(first, SETTINGS).patch, first)
    first["spec"]["containers"].append({"name": "proxy", "image": "p"})
    (step,) = inject(first, SETTINGS).patch
    assert step["path"] == "/spec/containers/2/lifecycle"


def test_native_sidecars_get_the_hook_and_plain_init_containers_do_not() -> None:
    inits = [{"name": "once", "image": "i"}, {"name": "stays", "image": "s", "restartPolicy": "Always"}]
    spec = injected(pod(initContainers=inits))
    assert "lifecycle" not in spec["initContainers"][0]
    assert "preStop" in spec["initContainers"][1]["lifecycle"]


def test_a_longer_grace_stays_and_the_hook_uses_it() -> None:
    spec = injected(pod(terminationGracePeriodSeconds=600))
    assert spec["terminationGracePeriodSeconds"] == 600
    assert hook(spec, "vllm")["path"] == "/prestop?seconds=590"


def test_own_arguments_of_the_engine_stand() -> None:
    first = pod()
    first["spec"]["containers"][0]["args"] = ["--port=9000", "--kv-transfer-config={}"]
    assert injected(first)["containers"][0]["args"] == ["--port=9000", "--kv-transfer-config={}"]


def test_another_lifecycle_hook_stays() -> None:
    first = pod()
    first["spec"]["containers"][0]["lifecycle"] = {"postStart": {"exec": {"command": ["true"]}}}
    assert set(injected(first)["containers"][0]["lifecycle"]) == {"postStart", "preStop"}


def test_a_chained_preStop_is_left_alone() -> None:
    own = {"exec": {"command": ["sh", "-c", "curl -s 127.0.0.1:8002/prestop; sync"]}}
    first = pod({"midstream.dev/prestop": "chained"})
    first["spec"]["containers"][0]["lifecycle"] = {"preStop": own}
    assert injected(first)["containers"][0]["lifecycle"] == {"preStop": own}


def test_a_pod_with_its_own_gateway_gets_hook_and_grace_only() -> None:
    spec = injected(pod({"midstream.dev/gateway": "own"}))
    assert [c["name"] for c in spec["containers"]] == ["vllm"] and "volumes" not in spec
    assert hook(spec, "vllm")["port"] == 8002


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"hostNetwork": True}, "host_network"),
        ({"os": {"name": "windows"}}, "not_linux"),
        ({"volumes": [{"name": "midstream", "hostPath": {"path": "/"}}]}, "volume_taken"),
        ({"containers": [{"name": "a", "lifecycle": {"preStop": {"sleep": {"seconds": 5}}}}]}, "own_prestop"),
        ({"containers": [{"name": "a", "env": [{"name": "PYTHONPATH", "value": "/x"}]}]}, "own_pythonpath"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(change: Json, code: str) -> None:
    of = pod(**change)
    with pytest.raises(Final) as refused:
        inject(of, SETTINGS)
    assert refused.value.code == code
    answer = review({"request": {"uid": "u", "object": of}}, SETTINGS)["response"]
    assert answer["allowed"] is False and code in answer["status"]["message"]


def test_an_unknown_engine_container_is_refused() -> None:
    with pytest.raises(Final, match=r"no_engine_container.*there are: vllm"):
        inject(pod({"midstream.dev/engine-container": "sglang"}), SETTINGS)


def test_a_blanket_toleration_is_warned_about() -> None:
    of = pod(tolerations=[{"operator": "Exists"}])
    answer = review({"request": {"uid": "u", "object": of}}, SETTINGS)["response"]
    assert answer["allowed"] and "tolerates every taint" in answer["warnings"][0]
    assert not inject(pod(tolerations=[{"operator": "Exists", "key": "nvidia.com/gpu"}]), SETTINGS).warnings
