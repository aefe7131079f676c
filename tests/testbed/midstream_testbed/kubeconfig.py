"""Kubeconfig files, the API server's audit policy, and the command lines of a control plane's four processes."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path

from midstream_testbed.certs import Authority

API_PORT = 6443
SERVICE_RANGE, KUBERNETES_SERVICE = "10.100.0.0/16", "10.100.0.1"  # as EKS has it
ISSUER = "https://kubernetes.default.svc"
MASTERS = "system:masters"

# One line a finished request, without bodies; nothing of watches' beginnings and of the health checks.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*", "/openapi*"]},
        {"level": "Metadata"},
    ],
}


def encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def write(path: Path, server: str, ca: Path, user: dict[str, str], namespace: str = "default") -> Path:
    """A kubeconfig of one cluster and one user; JSON is YAML."""
    cluster = {"server": server, "certificate-authority-data": encode(ca.read_bytes())}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "testbed",
        "clusters": [{"name": "testbed", "cluster": cluster}],
        "users": [{"name": "user", "user": user}],
        "contexts": [{"name": "testbed", "context": {"cluster": "testbed", "user": "user", "namespace": namespace}}],
    }
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    path.chmod(0o600)
    return path


def certificate_user(cert: Path, key: Path) -> dict[str, str]:
    return {"client-certificate-data": encode(cert.read_bytes()), "client-key-data": encode(key.read_bytes())}


@dataclass(frozen=True)
class Commands:
    """What the four processes are started with. Everything lies under `folder`; `address` is the API server's."""

    binaries: Path
    folder: Path
    authority: Authority
    address: str

    def _pem(self, name: str) -> str:
        return str(self.authority.folder / name)

    def etcd(self) -> list[str]:
        return [
            str(self.binaries / "etcd"), "--name=testbed", f"--data-dir={self.folder / 'etcd'}", "--unsafe-no-fsync",
            "--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            "--initial-cluster=testbed=http://127.0.0.1:2380", "--quota-backend-bytes=4294967296", "--log-level=warn",
        ]  # fmt: skip

    def api_server(self) -> list[str]:
        """Aggregator routing: webhooks are called at their endpoints, since no kube-proxy serves cluster IPs here."""
        policy = self.folder / "audit-policy.json"
        policy.write_text(json.dumps(AUDIT_POLICY), encoding="utf-8")
        return [
            str(self.binaries / "kube-apiserver"), "--etcd-servers=http://127.0.0.1:2379", f"--secure-port={API_PORT}",
            f"--advertise-address={self.address}", f"--service-cluster-ip-range={SERVICE_RANGE}",
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
            f"--client-ca-file={self.authority.ca}", "--enable-aggregator-routing=true", "--profiling=false",
            f"--tls-cert-file={self._pem('apiserver.pem')}", f"--tls-private-key-file={self._pem('apiserver.key')}",
            f"--kubelet-certificate-authority={self.authority.ca}",
            f"--kubelet-client-certificate={self._pem('kubelet-client.pem')}",
            f"--kubelet-client-key={self._pem('kubelet-client.key')}", "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer={ISSUER}", f"--service-account-key-file={self._pem('service-account.pub')}",
            f"--service-account-signing-key-file={self._pem('service-account.key')}",
            f"--audit-policy-file={policy}", f"--audit-log-path={self.folder / 'audit.log'}",
        ]  # fmt: skip

    def controller_manager(self) -> list[str]:
        config = self.folder / "kube-controller-manager.inside"
        return [
            str(self.binaries / "kube-controller-manager"), f"--kubeconfig={config}", "--leader-elect=false",
            "--bind-address=127.0.0.1", "--use-service-account-credentials=true", f"--root-ca-file={self.authority.ca}",
            f"--service-account-private-key-file={self._pem('service-account.key')}",
            f"--authentication-kubeconfig={config}", f"--authorization-kubeconfig={config}",
        ]  # fmt: skip

    def scheduler(self) -> list[str]:
        config = self.folder / "kube-scheduler.inside"
        return [
            str(self.binaries / "kube-scheduler"), f"--kubeconfig={config}", "--leader-elect=false",
            "--bind-address=127.0.0.1", f"--authentication-kubeconfig={config}",
            f"--authorization-kubeconfig={config}",
        ]  # fmt: skip
