"""A Kubernetes control plane of this test run: etcd, kube-apiserver and the controllers a test asks for, on loopback.

The binaries are looked for in $KUBEBUILDER_ASSETS. Everything lies in one folder and goes away with the context.
Nodes are objects only: what a kubelet would report, a test writes.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from ssl import SSLContext, create_default_context
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [{"level": "Metadata"}],
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class ControlPlane:
    folder: Path
    assets: Path
    controllers: tuple[str, ...] = ("garbage-collector-controller", "serviceaccount-controller", "namespace-controller")
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    port: int = 0
    _ssl: SSLContext | None = None

    def __enter__(self) -> ControlPlane:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # -- start -------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._certificates()
        etcd, peer, self.port = free_port(), free_port(), free_port()
        self._run(
            "etcd", f"--data-dir={self.folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=error",
            f"--listen-client-urls=http://127.0.0.1:{etcd}", f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peer}", f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
            f"--initial-cluster=default=http://127.0.0.1:{peer}",
        )  # fmt: skip
        (self.folder / "audit.yaml").write_text(yaml.safe_dump(AUDIT_POLICY))
        at = self.folder
        self._run(
            "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd}", f"--secure-port={self.port}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none",
            f"--client-ca-file={at / 'ca.pem'}", f"--tls-cert-file={at / 'server.pem'}",
            f"--tls-private-key-file={at / 'server.key'}", "--authorization-mode=Node,RBAC",
            "--allow-privileged=true", "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={at / 'server.pem'}",
            f"--service-account-signing-key-file={at / 'server.key'}",
            "--disable-admission-plugins=ServiceAccount",  # nobody mounts tokens here
            f"--audit-policy-file={at / 'audit.yaml'}", f"--audit-log-path={at / 'audit.log'}",
        )  # fmt: skip
        self.write_kubeconfig(
            "admin", {"client-certificate": str(at / "admin.pem"), "client-key": str(at / "admin.key")}
        )
        self._wait_ready()
        self._run(
            "kube-controller-manager", f"--kubeconfig={self.kubeconfig('admin')}", "--bind-address=127.0.0.1",
            f"--secure-port={free_port()}", "--leader-elect=false", f"--controllers={','.join(self.controllers)}",
        )  # fmt: skip

    def _run(self, name: str, *options: str) -> None:
        log = (self.folder / f"{name}.log").open("wb")
        with log:
            process = subprocess.Popen([self.assets / name, *options], stdout=log, stderr=log, cwd=self.folder)
        self.processes.append(process)

    def _wait_ready(self, timeout_s: float = 60) -> None:
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for process in self.processes:
                if process.poll() is not None:
                    raise RuntimeError(f"{process.args!r} ended: {self._last_words()}")
            try:
                self.request("GET", "/readyz", timeout_s=2)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise TimeoutError(f"the API server is not ready after {timeout_s:g} s: {self._last_words()}")

    def _last_words(self) -> str:
        return "\n".join(f"{p.name}: {p.read_text(errors='replace')[-800:]}" for p in self.folder.glob("*.log"))

    # -- certificates and kubeconfigs ----------------------------------------------------------------------

    def _certificates(self) -> None:
        ca_key = self._key("ca")
        ca = self._sign("ca", "test CA", ca_key, None, ca_key)
        self._sign("server", "kube-apiserver", self._key("server"), ca, ca_key)
        self._sign("admin", "admin", self._key("admin"), ca, ca_key, organization="system:masters")

    def _key(self, name: str) -> rsa.RSAPrivateKey:
        key = rsa.generate_private_key(65537, 2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        (self.folder / f"{name}.key").write_bytes(pem)
        return key

    def _sign(
        self, name: str, cn: str, key: rsa.RSAPrivateKey, ca: x509.Certificate | None, ca_key: rsa.RSAPrivateKey,
        organization: str = "",
    ) -> x509.Certificate:  # fmt: skip
        names = [x509.NameAttribute(NameOID.COMMON_NAME, cn)]
        if organization:
            names.append(x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
        now = datetime.datetime.now(datetime.UTC)
        here = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("kubernetes.default.svc")]
        cert = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(names))
            .issuer_name(ca.subject if ca else x509.Name(names))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(here), critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        (self.folder / f"{name}.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        return cert

    def kubeconfig(self, user: str) -> Path:
        return self.folder / f"{user}.kubeconfig"

    def write_kubeconfig(self, user: str, credentials: dict[str, str], namespace: str = "default") -> Path:
        server = {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(self.folder / "ca.pem")}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": user, "user": credentials}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": user, "namespace": namespace}}],
            "current-context": "test",
        }
        self.kubeconfig(user).write_text(yaml.safe_dump(content))
        return self.kubeconfig(user)

    def service_account(self, namespace: str, name: str) -> Path:
        """A kubeconfig of this ServiceAccount, with a token as a pod would get it."""
        token = self.kubectl("create", "token", name, "-n", namespace, "--duration=12h").strip()
        return self.write_kubeconfig(f"{namespace}-{name}", {"token": token})

    # -- kubectl -------------------------------------------------------------------------------------------

    def try_kubectl(self, *args: str, stdin: str = "", user: str = "admin") -> subprocess.CompletedProcess[str]:
        argv = [str(self.assets / "kubectl"), f"--kubeconfig={self.kubeconfig(user)}", *args]
        env = {**os.environ, "HOME": str(self.folder)}
        return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=120, check=False, env=env)

    def kubectl(self, *args: str, stdin: str = "", user: str = "admin") -> str:
        done = self.try_kubectl(*args, stdin=stdin, user=user)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(args)}: {done.stderr}{done.stdout}")
        return done.stdout

    def apply(self, *objects: dict[str, Any]) -> None:
        """One kubectl for all: each costs a tenth of a second."""
        self.kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(objects))

    def get(self, *args: str) -> Any:
        return json.loads(self.kubectl("get", *args, "-o", "json"))

    def request(
        self, method: str, path: str, body: Any = None, content: str = "application/json", timeout_s: float = 30
    ) -> Any:
        """As the admin, without a process for each: JSON in, JSON out."""
        url = f"https://127.0.0.1:{self.port}{path}"
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(url, data, {"Content-Type": content}, method=method)
        with urllib.request.urlopen(asked, context=self.context(), timeout=timeout_s) as answer:
            text = answer.read()
        return json.loads(text) if text.startswith(b"{") else text

    def context(self) -> SSLContext:
        if self._ssl is None:
            self._ssl = create_default_context(cafile=str(self.folder / "ca.pem"))
            self._ssl.load_cert_chain(self.folder / "admin.pem", self.folder / "admin.key")
        return self._ssl

    def patch_status(self, path: str, status: dict[str, Any]) -> None:
        """What a kubelet reports."""
        self.request("PATCH", f"{path}/status", {"status": status}, "application/merge-patch+json")

    def audit(self, user: str) -> list[dict[str, Any]]:
        """What the audit log has of this user."""
        lines: Sequence[str] = (self.folder / "audit.log").read_text().splitlines()
        return [e for e in map(json.loads, lines) if e["user"]["username"] == user]
