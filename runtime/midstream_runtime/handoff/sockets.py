"""The sockets of a pod: those it listens on, blank ones for streams that come, and the one that agents ask."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from typing import Any

from midstream_runtime.contract.errors import Final

log = logging.getLogger(__name__)

TUNNEL_BYTES = 100
"""Room that every segment leaves for a tunnel between nodes (VXLAN over IPv6: 70, and options). TCP's MSS is fixed
when a connection is made, so it must leave this room from the first day."""
BACKLOG = 4096


def listen(host: str, port: int, path_mtu_bytes: int) -> socket.socket:
    """Listen for clients; an IPv6 wildcard takes IPv4 too. Plain TCP: MPTCP sockets cannot be repaired."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    headers = 60 if family == socket.AF_INET6 and host != "::" else 40
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, path_mtu_bytes - headers - TUNNEL_BYTES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # accepted sockets inherit it
    sock.bind((host, port))
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock


def accept(listener: socket.socket) -> socket.socket | None:
    while True:
        try:
            return listener.accept()[0]
        except BlockingIOError:
            return None
        except ConnectionAbortedError:
            continue  # reset while it waited
        except OSError as e:
            log.warning("handoff: accept: %s", e)
            return None


def control_socket(path: str) -> socket.socket:
    """Listen on `path`, taking the place of a socket that a dead process left."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)  # connecting needs write permission: this user's, and root's
    try:
        sock.bind(path)
    finally:
        os.umask(mask)
    sock.listen()
    sock.setblocking(False)
    return sock


def is_here(address: str) -> bool:
    """Whether an interface of this network namespace has the address."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError as e:
            if e.errno != errno.EADDRNOTAVAIL:
                raise
            return False
    return True


def blank(family: int) -> socket.socket:
    if family not in (4, 6):
        raise Final("handoff_protocol", f"family {family!r} is neither 4 nor 6")
    sock = socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setblocking(False)
    return sock


def listener(sock: socket.socket) -> dict[str, Any]:
    name = sock.getsockname()
    return {"address": name[0], "port": name[1], "family": 6 if sock.family == socket.AF_INET6 else 4}
