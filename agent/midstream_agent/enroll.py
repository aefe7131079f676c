"""`python -m midstream_agent.enroll`: this node's certificate, from the operator's authority.

Makes a key, asks the API server with a CertificateSigningRequest as the pod's ServiceAccount, waits until the operator
has signed, writes tls.crt and tls.key beside each other. With --keep it goes on and renews well before the end: the
agent reads the files anew at each handshake (tls.py). The key never leaves the node.

It runs as an init container and as its sidecar, so that the agent itself holds no token of the API server.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import secrets
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

log = logging.getLogger(__name__)
SIGNER = "midstream.dev/agent"
REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
TOKEN_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ANSWER_S = 10.0  # one request to the API server
POLL_S = 0.5  # the operator signs within milliseconds once it leads
PATIENCE_S = 300.0  # no leader, no API server: then the kubelet starts this container again
LOOK_S = 3600.0  # how often --keep looks at the certificate's age


@dataclass(frozen=True, slots=True)
class ApiServer:
    url: str
    folder: Path

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """JSON in, JSON out, as the pod's ServiceAccount; the token is read anew since the kubelet renews it."""
        token = (self.folder / "token").read_text(encoding="ascii").strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        try:
            with urllib.request.urlopen(request, context=context, timeout=ANSWER_S) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as e:
            said = e.read()[:300].decode(errors="replace")
            if e.code in (401, 403, 422):
                raise Final("enroll_refused", f"{method} {path}: {e.code} {said}") from e
            raise Retryable("api_server", f"{method} {path}: {e.code} {said}") from e
        except OSError as e:
            raise Retryable("api_server", f"{method} {path}: {e}") from e


def in_cluster(folder: Path = TOKEN_FOLDER) -> ApiServer:
    host, port = os.environ.get("KUBERNETES_SERVICE_HOST", ""), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not folder.is_dir():
        raise Final("not_in_cluster", "no KUBERNETES_SERVICE_HOST and token: this runs in the agent's pod")
    return ApiServer(f"https://{f'[{host}]' if ':' in host else host}:{port}", folder)


def new_request(node: str) -> tuple[ec.EllipticCurvePrivateKey, bytes]:
    """A key, and the PEM request of a certificate whose only DNS name is the node's."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node[:64])]))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(node)]), critical=False)
    return key, builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def enroll(api: ApiServer, node: str, folder: Path) -> None:
    """Ask, wait, write. Retryable when nobody answers for PATIENCE_S, Final when the operator denies it."""
    key, request = new_request(node)
    name = f"midstream-{node}-{secrets.token_hex(4)}"
    usages = ["digital signature", "key encipherment", "server auth", "client auth"]
    spec = {"signerName": SIGNER, "usages": usages, "request": base64.b64encode(request).decode()}
    body = {"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest"}
    end = time.monotonic() + PATIENCE_S
    _until(end, lambda: api.call("POST", REQUESTS, {**body, "metadata": {"name": name}, "spec": spec}))
    certificate = _until(end, lambda: _signed(api.call("GET", f"{REQUESTS}/{name}")))
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_pair(folder, certificate, pem)
    log.info("%s has a certificate until %s", node, expires(folder).isoformat())


def _until(end: float, attempt: Any) -> Any:
    while True:
        try:
            return attempt()
        except Retryable:
            if time.monotonic() > end:
                raise
        time.sleep(POLL_S)


def _signed(csr: Any) -> bytes:
    status = csr.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition["type"] in ("Denied", "Failed"):
            raise Final("enroll_refused", f"{condition.get('reason')}: {condition.get('message')}")
    if not status.get("certificate"):
        raise Retryable("enroll_waits", "the request is not signed yet: does an operator lead?")
    return base64.b64decode(status["certificate"])


def write_pair(folder: Path, certificate: bytes, key: bytes) -> None:
    """One file with both, so that no reader sees a new one beside an old one; then the two that readers know."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = folder / f"..{secrets.token_hex(4)}"
    generation.mkdir(mode=0o700)
    for name, content in (("tls.crt", certificate), ("tls.key", key)):
        fd = os.open(generation / name, os.O_WRONLY | os.O_CREAT, 0o600)
        with os.fdopen(fd, "wb") as out:
            out.write(content)
    link = folder / "..new"
    link.unlink(missing_ok=True)
    link.symlink_to(generation.name)
    before = os.readlink(folder / "current") if (folder / "current").is_symlink() else None
    link.replace(folder / "current")
    if before is not None:
        for path in (folder / before).iterdir():
            path.unlink()
        (folder / before).rmdir()


def expires(folder: Path) -> datetime:
    return x509.load_pem_x509_certificate((folder / "current/tls.crt").read_bytes()).not_valid_after_utc


def renewal_due(folder: Path, now: datetime) -> bool:
    """In the last third of its time."""
    try:
        certificate = x509.load_pem_x509_certificate((folder / "current/tls.crt").read_bytes())
    except (OSError, ValueError):
        return True
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now > end - (end - begin) / 3


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    parser = argparse.ArgumentParser(prog="midstream-enroll", description="This node's certificate")
    parser.add_argument("--node", required=True, help="this node's name; the operator checks that it is true")
    parser.add_argument("--out", type=Path, required=True, help="folder; its current/ gets tls.crt and tls.key")
    parser.add_argument("--keep", action="store_true", help="go on, and renew in the last third of its time")
    args = parser.parse_args(argv)
    try:
        while True:
            if renewal_due(args.out, datetime.now(UTC)):
                enroll(in_cluster(), args.node, args.out)
            if not args.keep:
                return 0
            time.sleep(LOOK_S)
    except MidstreamError as e:
        print(f"midstream-enroll: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
