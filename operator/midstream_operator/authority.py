"""The certificate authority of one installation: what it signs, and for whom. Pure functions over PEM.

Keys are EC P-256. An agent makes its own key, which never leaves the node, and asks with a CertificateSigningRequest;
the API server vouches for who asks (the ServiceAccount, and the node that its token is bound to), so a stolen token of
one node's agent cannot become another node's certificate, and no other pod gets any.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from midstream_operator.errors import Final
from midstream_operator.model import Json

SIGNER = "midstream.dev/agent"
OPERATOR_NAME = "midstream-operator"
NODE_CLAIM = "authentication.kubernetes.io/node-name"  # Kubernetes >= 1.32; before, the pod's uid says it
POD_CLAIM = "authentication.kubernetes.io/pod-uid"
USAGES = {"digital signature", "key encipherment", "server auth", "client auth"}
CLOCKS_MAY_DIFFER = timedelta(hours=1)
AUTHORITY_DAYS = 3650  # its key never leaves the Secret; a new one is made by deleting that


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, PEM."""

    cert: bytes
    key: bytes


def new_authority() -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("midstream authority")
    builder = _builder(name, name, key.public_key(), AUTHORITY_DAYS)
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return Pair(_pem(builder.add_extension(usage, critical=True).sign(key, hashes.SHA256())), _key_pem(key))


def issue(authority: Pair, names: list[str], days: float) -> Pair:
    """A key and certificate of our own: the operator's, for agents and for its webhook."""
    key = ec.generate_private_key(ec.SECP256R1())
    return Pair(_sign(authority, key.public_key(), names, days), _key_pem(key))


def sign_request(authority: Pair, request: x509.CertificateSigningRequest, node: str, days: float) -> bytes:
    """The certificate for a request that `examine` has passed. Only its public key is taken from it."""
    key = request.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    return _sign(authority, key, [node], days)


def examine(csr: Json, account: str, node_of_pod: dict[str, str]) -> tuple[x509.CertificateSigningRequest, str]:
    """The request and the node that it is for; Final with the reason why it must be denied."""
    spec = csr["spec"]
    if spec.get("username") != account:
        raise Final("csr_wrong_account", f"{spec.get('username')} asked: only {account} may")
    node = _node_of(spec.get("extra") or {}, node_of_pod)
    if not set(spec.get("usages") or []) <= USAGES:
        raise Final("csr_wrong_usage", f"usages {spec.get('usages')} are not all of: {', '.join(sorted(USAGES))}")
    request = _parsed(base64.b64decode(spec["request"]))
    names = _names(request)
    if names != [node]:
        raise Final("csr_wrong_node", f"it names {names}, but the agent that asks runs on {node}")
    return request, node


def expires(cert: bytes) -> datetime:
    return x509.load_pem_x509_certificate(cert).not_valid_after_utc


def _node_of(extra: Json, node_of_pod: dict[str, str]) -> str:
    """By the token's binding, which the API server checked."""
    for node in extra.get(NODE_CLAIM) or [node_of_pod.get(uid, "") for uid in extra.get(POD_CLAIM) or []]:
        if node:
            return str(node)
    raise Final("csr_no_node", "the token that asked is not bound to a pod of a node: mount a projected token")


def _parsed(pem: bytes) -> x509.CertificateSigningRequest:
    try:
        request = x509.load_pem_x509_csr(pem)
        sound = request.is_signature_valid and isinstance(request.public_key(), ec.EllipticCurvePublicKey)
    except (ValueError, InvalidSignature) as e:
        raise Final("csr_damaged", f"it cannot be read: {e}") from e
    if not sound:
        raise Final("csr_damaged", "its signature or its key is not an elliptic curve's")
    return request


def _names(request: x509.CertificateSigningRequest) -> list[str]:
    try:
        sans = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in sans]


def _sign(authority: Pair, public: ec.EllipticCurvePublicKey, names: list[str], days: float) -> bytes:
    ca = x509.load_pem_x509_certificate(authority.cert)
    ca_key = serialization.load_pem_private_key(authority.key, None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = _builder(_name(names[0]), ca.subject, public, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(n) for n in names]), critical=False)
    return _pem(builder.add_extension(both, critical=False).sign(ca_key, hashes.SHA256()))


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return x509.CertificateBuilder(
        issuer, subject, public, x509.random_serial_number(), now - CLOCKS_MAY_DIFFER, now + timedelta(days=days)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
