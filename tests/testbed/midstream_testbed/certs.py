"""A certificate authority for one testbed: nodes' certificates carry the node's name, the CLI's the operator's.

Keys are EC P-256, valid for a day, written with mode 0600 into the testbed's own folder. A control plane has one too:
Kubernetes takes a user's name from the common name and the groups from the organizations.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

OPERATOR = "midstream-operator"


class Authority:
    """Makes certificates into `folder`: ca.pem, and NAME.pem with NAME.key for each name."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "midstream testbed CA")])
        self._ca = self._sign(self._name, self._key.public_key(), [])
        (folder / "ca.pem").write_bytes(self._ca.public_bytes(serialization.Encoding.PEM))

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def issue(
        self, name: str, *, file: str | None = None, groups: Sequence[str] = (), also: Sequence[str] = ()
    ) -> tuple[Path, Path]:
        """Certificate and key for `name` as common name and DNS SAN; `also` are more SANs, names or addresses,
        `groups` its organizations, `file` what the two files are called where the name would not do."""
        subject = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
        subject += [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        key = ec.generate_private_key(ec.SECP256R1())
        cert = self._sign(x509.Name(subject), key.public_key(), [name, *also])
        cert_path, key_path = self.folder / f"{file or name}.pem", self.folder / f"{file or name}.key"
        cert_path.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
        write_key(key_path, key)
        return cert_path, key_path

    def _sign(self, subject: x509.Name, public: ec.EllipticCurvePublicKey, sans: Sequence[str]) -> x509.Certificate:
        """A leaf for its SANs; without any, the authority itself."""
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=not sans, path_length=None), critical=True)
        )
        if sans:
            names = x509.SubjectAlternativeName([_general_name(san) for san in sans])
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as out:
        out.write(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )


def _general_name(san: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(san))
    except ValueError:
        return x509.DNSName(san)
