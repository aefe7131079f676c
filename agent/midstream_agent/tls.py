"""mTLS between agents, operator and CLI: who may call whom, by the DNS name in the certificate.

A node's certificate carries the node's name as DNS SAN, the operator's and the CLI's carry OPERATOR. The Peer
service takes calls from nodes, the Agent service from the operator only: a pod of the node has no certificate
of this authority and cannot command the agent, and neither can another node. KV streams between agents use the same
files over plain TLS sockets.
"""

from __future__ import annotations

import logging
import socket
import ssl
import struct

import grpc
from grpc import aio
from midstream_runtime.contract.errors import Final

from midstream_agent.settings import TlsFiles

log = logging.getLogger(__name__)
OPERATOR = "midstream-operator"
_OP_ENABLE_KTLS = 1 << 3  # openssl/ssl.h; Python names it from 3.12 on
_SOL_TLS, _TLS_TX = 282, 1  # linux/tls.h, linux/socket.h


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


def stream_context(files: TlsFiles, *, server: bool) -> ssl.SSLContext:
    """TLS 1.3 with certificates on both sides; in the kernel where OpenSSL and the kernel can."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= _OP_ENABLE_KTLS
    if server:
        context.num_tickets = 0  # nobody resumes, and a client that only writes would never read them
    try:
        context.load_verify_locations(files.ca)
        context.load_cert_chain(files.cert, files.key)
    except (OSError, ssl.SSLError) as e:
        raise Final(
            "tls_files", f"cannot use the agent's TLS material: {e}; see --tls-ca, --tls-cert, --tls-key"
        ) from e
    return context


def peer_names(sock: ssl.SSLSocket) -> set[str]:
    """DNS names in the other side's certificate, which the handshake has verified."""
    certificate = sock.getpeercert() or {}
    alternatives = certificate.get("subjectAltName", ())
    return {str(entry[1]) for entry in alternatives if entry[0] == "DNS"}


def kernel_encrypts(sock: socket.socket) -> bool:
    """Does the kernel make the records of what is written to this socket, so that sendfile may write to it?"""
    try:
        info = sock.getsockopt(_SOL_TLS, _TLS_TX, 64)
    except OSError:
        return False
    return len(info) >= 4 and struct.unpack_from("=H", info)[0] != 0


def _read(files: TlsFiles) -> tuple[bytes, bytes, bytes]:
    try:
        return files.ca.read_bytes(), files.cert.read_bytes(), files.key.read_bytes()
    except OSError as e:
        raise Final(
            "tls_files", f"cannot read the agent's TLS material: {e}; see --tls-ca, --tls-cert, --tls-key"
        ) from e
