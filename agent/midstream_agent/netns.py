"""Network namespaces by file descriptor.

`setns` belongs to a thread. Everything here is for the one thread that does the agent's netlink work
(`net.NetWorker`); the event loop's thread never leaves the host's namespace.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000
SIOCGSKNS = 0x894C  # linux/sockios.h: a new fd of the socket's network namespace

_libc = ctypes.CDLL(None, use_errno=True)


def setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        err = ctypes.get_errno()
        raise OSError(err, f"setns: {os.strerror(err)} (the agent needs CAP_SYS_ADMIN)")


@contextmanager
def inside(netns_fd: int) -> Iterator[None]:
    """Run the block in another network namespace, in this thread only."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(netns_fd)
        try:
            yield
        finally:
            setns(home)
    finally:
        os.close(home)


def identity(netns_fd: int) -> tuple[int, int]:
    """(device, inode) of a namespace: equal for equal namespaces."""
    stat = os.fstat(netns_fd)
    return stat.st_dev, stat.st_ino


def of_socket(sock_fd: int) -> tuple[int, int]:
    """Identity of the namespace that a socket lives in. Needs CAP_NET_ADMIN there."""
    fd = fcntl.ioctl(sock_fd, SIOCGSKNS)
    try:
        return identity(fd)
    finally:
        os.close(fd)


def family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
