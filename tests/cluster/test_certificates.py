"""Certificates and webhook on a real API server: the operator with the chart's rights, agents with pods' tokens."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from midstream_agent import enroll
from midstream_agent.enroll import ApiServer
from midstream_operator.authority import OPERATOR_NAME
from midstream_runtime.contract.errors import Final
from midstream_testbed.cluster import CHECKOUT, ControlPlane

CHART = CHECKOUT / "charts/midstream"
NAMESPACE = "midstream-certificates"
Json = dict[str, Any]
RIGHTS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "MutatingWebhookConfiguration")
OPTIONS = ["--set", "webhook.enabled=true,webhook.failurePolicy=Fail,crds.upgrade=false"]


@pytest.fixture(scope="module")
def installed(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """CRDs, the chart's rights, one node with an agent's pod, and an operator that leads. Its certificate's folder."""
    folder = tmp_path_factory.mktemp("operator")
    crds = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (CHART / "crds").glob("*.yaml")]
    plane.apply(*crds, server_side=True)
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    done = plane.run("helm", "template", "m", CHART, "-n", NAMESPACE, *OPTIONS)
    objects = [o for o in yaml.safe_load_all(done.stdout) if o and o["kind"] in RIGHTS]
    for o in objects:
        if o["kind"] in ("ServiceAccount", "Role", "RoleBinding"):
            o["metadata"]["namespace"] = NAMESPACE
        if o["kind"] == "MutatingWebhookConfiguration":  # the operator runs on this machine, not in a pod
            port = plane.expose(WEBHOOK_PORT)
            client = {"url": f"https://localhost:{port}/inject"}
            o["webhooks"][0]["clientConfig"] = client
    plane.apply(*objects)
    plane.apply({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}}, agent_pod("agent-a", "node-a"))
    config = {
        "namespace": NAMESPACE, "certificates": "operator",
        "tls": {"ca": f"{folder}/ca.crt", "cert": f"{folder}/tls.crt", "key": f"{folder}/tls.key"},
        "webhook": {"port": WEBHOOK_PORT, "image": "midstream-runtime:test"},
    }  # fmt: skip
    (folder / "operator.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    account = plane.kubeconfig_for(NAMESPACE, "midstream-operator")
    argv = [sys.executable, "-m", "midstream_operator.main", "--config", f"{folder}/operator.yaml", "--http-port", "0"]
    env = {**os.environ, "KUBECONFIG": str(account), "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log, env=env) as operator:
        try:
            wait_for_leader(operator, folder / "log")
            yield folder
        finally:
            operator.terminate()
            operator.wait(20)
    for o in objects:
        if "namespace" not in o["metadata"]:
            plane.kubectl("delete", o["kind"], o["metadata"]["name"])
    plane.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


WEBHOOK_PORT = 19444


def wait_for_leader(operator: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while " leads, with epochs" not in log.read_text(encoding="utf-8"):
        assert operator.poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8")
        time.sleep(0.1)


def agent_pod(name: str, node: str, namespace: str = NAMESPACE, account: str = "midstream-agent") -> Json:
    spec = {"nodeName": node, "serviceAccountName": account, "containers": [{"name": "agent", "image": "none"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec}


def api_of(plane: ControlPlane, folder: Path, account: str, pod: str | None) -> ApiServer:
    """What a container of this pod would find under /var/run/secrets."""
    bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod}"] if pod else []
    token = plane.kubectl("create", "token", "-n", NAMESPACE, account, *bound).stdout
    (folder / "token").write_text(token, encoding="ascii")
    (folder / "ca.crt").write_bytes(plane.authority.ca.read_bytes())
    return ApiServer(f"https://127.0.0.1:{plane.port}", folder)


def sans(pem: bytes) -> list[str]:
    cert = x509.load_pem_x509_certificate(pem)
    return [n.value for n in cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value]


def test_an_agent_gets_its_nodes_certificate(plane: ControlPlane, installed: Path, tmp_path: Path) -> None:
    enroll.enroll(api_of(plane, tmp_path, "midstream-agent", "agent-a"), "node-a", tmp_path / "tls")
    cert = (tmp_path / "tls/current/tls.crt").read_bytes()
    assert sans(cert) == ["node-a"]
    published = plane.get("configmap", "midstream-authority", "-n", NAMESPACE)["data"]["ca.crt"].encode()
    assert published == (installed / "ca.crt").read_bytes()
    x509.load_pem_x509_certificate(cert).verify_directly_issued_by(x509.load_pem_x509_certificate(published))
    assert sans((installed / "tls.crt").read_bytes())[0] == OPERATOR_NAME
    before = set((tmp_path / "tls").iterdir())
    enroll.enroll(api_of(plane, tmp_path, "midstream-agent", "agent-a"), "node-a", tmp_path / "tls")
    assert len(set((tmp_path / "tls").iterdir())) == len(before)  # the old pair is gone


def test_an_agent_does_not_get_another_nodes(plane: ControlPlane, installed: Path, tmp_path: Path) -> None:
    with pytest.raises(Final, match=r"csr_wrong_node.*\['node-b'\].*runs on node-a"):
        enroll.enroll(api_of(plane, tmp_path, "midstream-agent", "agent-a"), "node-b", tmp_path / "tls")


def test_a_token_without_a_pod_gets_none(plane: ControlPlane, installed: Path, tmp_path: Path) -> None:
    with pytest.raises(Final, match="csr_no_node"):
        enroll.enroll(api_of(plane, tmp_path, "midstream-agent", None), "node-a", tmp_path / "tls")


def test_another_account_gets_none(plane: ControlPlane, installed: Path, tmp_path: Path) -> None:
    """One that may ask, as the cluster's own components may; and one that may not."""
    plane.kubectl("create", "serviceaccount", "stranger", "-n", NAMESPACE)
    plane.apply(agent_pod("stranger", "node-a", account="stranger"))
    with pytest.raises(Final, match=r"enroll_refused.*403"):
        enroll.enroll(api_of(plane, tmp_path, "stranger", "stranger"), "node-a", tmp_path / "tls")
    plane.kubectl("create", "clusterrolebinding", "stranger", "--clusterrole=midstream-agent",
                  f"--serviceaccount={NAMESPACE}:stranger")  # fmt: skip
    try:
        with pytest.raises(Final, match="csr_wrong_account"):
            enroll.enroll(api_of(plane, tmp_path, "stranger", "stranger"), "node-a", tmp_path / "tls")
    finally:
        plane.kubectl("delete", "clusterrolebinding", "stranger")


def test_a_labelled_pod_is_injected_and_others_are_not(plane: ControlPlane, installed: Path) -> None:
    wait_for_trust(plane)
    created = plane.kubectl("create", "-o", "json", "-f", "-", input=json.dumps(serving("llm-0"))).stdout
    spec = json.loads(created)["spec"]
    assert [c["name"] for c in spec["containers"]] == ["vllm", "midstream-gateway"]
    assert spec["terminationGracePeriodSeconds"] == 150
    plain = serving("plain")
    del plain["metadata"]["labels"]
    spec = json.loads(plane.kubectl("create", "-o", "json", "-f", "-", input=json.dumps(plain)).stdout)["spec"]
    assert [c["name"] for c in spec["containers"]] == ["vllm"]


def test_a_pod_that_cannot_be_served_is_refused_by_name(plane: ControlPlane, installed: Path) -> None:
    wait_for_trust(plane)
    bad = serving("llm-1")
    bad["spec"]["hostNetwork"] = True
    done = plane.kubectl("create", "-f", "-", input=json.dumps(bad), check=False)
    assert done.returncode and "host_network" in done.stderr


def serving(name: str) -> Json:
    meta = {"name": name, "namespace": NAMESPACE, "labels": {"midstream.dev/enabled": "true"}}
    spec = {"containers": [{"name": "vllm", "image": "vllm"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def wait_for_trust(plane: ControlPlane) -> None:
    """The API server takes up a changed webhook configuration within a second or so."""
    end = time.monotonic() + 30
    while True:
        done = plane.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(serving("probe")), check=False)
        if done.returncode == 0:
            return
        assert time.monotonic() < end, done.stderr
        time.sleep(0.2)


def test_the_authority_is_kept_in_a_secret(plane: ControlPlane, installed: Path) -> None:
    data = plane.get("secret", "midstream-authority", "-n", NAMESPACE)["data"]
    assert base64.b64decode(data["tls.crt"]) == (installed / "ca.crt").read_bytes()
