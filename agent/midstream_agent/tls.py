"""mTLS between agents, operator and CLI: who may call whom, by the DNS name in the certificate.

A node's certificate carries the node's name as DNS SAN, the operator's and the CLI's carry OPERATOR. The Peer
service takes calls from nodes, the Agent service from the operator only: a pod of the node has no certificate
of this authority and cannot command the agent, and neither can another node.
"""

from __future__ import annotations

import logging

import grpc
from grpc import aio
from midstream_runtime.contract.errors import Final

from midstream_agent.settings import TlsFiles

log = logging.getLogger(__name__)
OPERATOR = "midstream-operator"


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """The files are read again when they have changed: certificates are renewed under a running agent."""
    fetcher = _Fetcher(files)
    first = fetcher.configuration()
    # The stubs leave out what gRPC documents: None means no change.
    return grpc.dynamic_ssl_server_credentials(first, fetcher, require_client_authentication=True)  # type: ignore[arg-type]


class _Fetcher:
    """Called by gRPC at each handshake, in one of its threads."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._loaded: tuple[bytes, bytes, bytes] | None = None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        self._loaded = ca, cert, key = _read(self._files)
        return grpc.ssl_server_certificate_configuration([(key, cert)], root_certificates=ca)

    def __call__(self) -> grpc.ServerCertificateConfiguration | None:
        """None: go on with what there is, also while the files cannot be read."""
        try:
            return self.configuration() if _read(self._files) != self._loaded else None
        except Final as e:
            log.error("%s: the agent goes on with its old certificate", e)
            return None


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    ca, cert, key = _read(files)
    return grpc.ssl_channel_credentials(root_certificates=ca, private_key=key, certificate_chain=cert)


def names_of(context: aio.ServicerContext) -> set[str]:  # type: ignore[type-arg]
    """DNS names in the caller's certificate."""
    auth = context.auth_context()
    return {name.decode() for name in auth.get("x509_subject_alternative_name", [])}


def _read(files: TlsFiles) -> tuple[bytes, bytes, bytes]:
    try:
        return files.ca.read_bytes(), files.cert.read_bytes(), files.key.read_bytes()
    except OSError as e:
        raise Final(
            "tls_files", f"cannot read the agent's TLS material: {e}; see --tls-ca, --tls-cert, --tls-key"
        ) from e
