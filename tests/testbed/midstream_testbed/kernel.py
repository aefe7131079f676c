"""The few system calls that Python lacks, and how a thread visits a namespace.

Namespaces are entered by short-lived threads and never by the main thread: a network namespace belongs to a
thread, so the test's own thread never leaves home, whatever fails. A child that such a thread starts inherits
the thread's namespaces, which spares every process of the testbed a ``preexec_fn`` (unsafe in threaded
programs) and an ``nsenter``. Opening a netlink socket or writing ``/proc/sys/net`` also acts on the calling
thread's namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import platform
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNS = 0x00020000
CLONE_FS = 0x00000200
CLONE_NEWNET = 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = 0x1000, 0x4000, 1 << 18, 1 << 20
MS_NOSUID, MS_NODEV = 0x2, 0x4
MNT_DETACH = 2

NETNS_DIR = Path("/run/netns")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    _check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    done = _libc.mount(
        source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode() or None
    )
    _check(done, f"mount {target}")


def umount(target: str, flags: int = MNT_DETACH) -> None:
    _check(_libc.umount2(target.encode(), flags), f"umount {target}")


def in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a new thread and hand back its result or raise its exception."""
    results: list[T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:  # it is raised again below, in the caller's thread
            failures.append(error)

    thread = threading.Thread(target=body, name="testbed-namespace")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def in_namespaces(work: Callable[[], T], net: int, mnt: int | None = None) -> T:
    """Run `work` in a new thread that has joined the network (and mount) namespace of these fds."""

    def body() -> T:
        setns(net, CLONE_NEWNET)
        if mnt is not None:
            unshare(CLONE_FS)  # joining a mount namespace asks for a root and cwd of one's own
            setns(mnt, CLONE_NEWNS)
        return work()

    return in_thread(body)


def is_mount_point(folder: Path) -> bool:
    """`os.path.ismount` does not see a bind mount of a folder on itself."""
    lines = Path("/proc/thread-self/mountinfo").read_text().splitlines()
    return any(line.split(" ", 5)[4] == str(folder) for line in lines)


def _own_mount_point(folder: Path) -> None:
    """Make /run/netns a shared mount of its own, as iproute2 does, so that one umount leaves all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_mount_point(folder):
        mount(str(folder), str(folder), flags=MS_BIND)
        mount("", str(folder), flags=MS_SHARED)


def new_netns(name: str) -> int:
    """Create a network namespace, name it for iproute2, and hand back an open fd of it."""
    _own_mount_point(NETNS_DIR)

    def body() -> int:
        unshare(CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    fd = in_thread(body)
    path = NETNS_DIR / name
    path.touch(mode=0o444, exist_ok=False)
    mount(f"/proc/self/fd/{fd}", str(path), flags=MS_BIND)
    return fd


def drop_netns(name: str) -> None:
    """Take the name away; the namespace ends with its last process and fd."""
    path = NETNS_DIR / name
    with contextlib.suppress(OSError):  # a crash between touch and mount leaves a plain file
        umount(str(path))
    path.unlink(missing_ok=True)


def new_mntns(setup: Callable[[], None]) -> int:
    """A mount namespace without the machine's named network namespaces, after `setup` ran in it: an fd."""

    def body() -> int:
        unshare(CLONE_FS | CLONE_NEWNS)
        mount("", "/", flags=MS_PRIVATE | MS_REC)
        # Copies of the mounts under /run/netns would keep deleted hosts alive; there may be a stack.
        while is_mount_point(NETNS_DIR):
            umount(str(NETNS_DIR))
        setup()
        return os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    return in_thread(body)


SIOCETHTOOL = 0x8946
ETHTOOL_STXCSUM = 0x17


def transmit_checksums(ifname: str, on: bool) -> None:
    """``ethtool -K IFNAME tx on|off`` in the calling thread's namespace."""
    value = ctypes.create_string_buffer(struct.pack("=II", ETHTOOL_STXCSUM, int(on)))
    request = struct.pack("16sP", ifname.encode(), ctypes.addressof(value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCETHTOOL, request)


_BPF_SYSCALL = {"x86_64": 321, "aarch64": 280}
_BPF_PROG_LOAD = 5
_BPF_PROG_TYPE_SCHED_CLS = 3


def load_pass_program() -> int:
    """Load a TC program that returns TC_ACT_OK for every packet: an fd."""
    code = struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0)  # r0 = 0; exit
    insns, license_ = ctypes.create_string_buffer(code), ctypes.create_string_buffer(b"GPL")
    attr = struct.pack(
        "=IIQQIIQII16s", _BPF_PROG_TYPE_SCHED_CLS, 2, ctypes.addressof(insns), ctypes.addressof(license_),
        0, 0, 0, 0, 0, b"foreign_pass",
    )  # fmt: skip
    buffer = ctypes.create_string_buffer(attr, 128)
    number = _BPF_SYSCALL[platform.machine()]
    return _check(_libc.syscall(number, _BPF_PROG_LOAD, buffer, 128), "bpf(BPF_PROG_LOAD)")
