"""Finding a pod's processes and its handoff socket, without trusting either.

A pod is known by its uid: the kubelet puts its processes in a cgroup called `pod<uid>`. The handoff socket is
looked up inside the process's own root, through openat2 with RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS |
RESOLVE_NO_MAGICLINKS: a symlink in a pod's root would otherwise resolve to the agent's own files (tried). Then
type and owner are checked, and after connecting the peer's pid must be in the pod's cgroup.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from midstream_runtime.contract.errors import Final, Retryable

from midstream_agent import netns

RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_IN_ROOT = 0x02, 0x04, 0x10
SYS_OPENAT2 = 437
TCP_CLOSE = 7  # net/tcp_states.h
_UID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Pod:
    """A pod of this node: one of its processes, its namespace (owned fd), its place in the cgroup tree."""

    uid: str
    pid: int
    cgroup: Path
    netns_fd: int

    def close(self) -> None:
        os.close(self.netns_fd)

    def pids(self) -> set[int]:
        return _pids(self.cgroup)


def find_pod(cgroup_root: Path, uid: str) -> Pod:
    """The pod with this uid; Final("unknown_pod") when no process of it runs on this node."""
    if not _UID.match(uid):
        raise Final("bad_pod_uid", f"pod uid {uid!r} is not one: take it from metadata.uid")
    for folder in _pod_folders(cgroup_root, uid):
        for pid in sorted(_pids(folder)):
            try:
                return Pod(uid, pid, folder, os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
            except FileNotFoundError:
                continue  # that process has just ended; the pod may have others
    raise Final("unknown_pod", f"no process of pod {uid} runs on this node: is the pod Running, and here?")


def _pod_folders(root: Path, uid: str) -> list[Path]:
    """cgroupfs calls it pod<uid>, the systemd driver kubepods-...-pod<uid with underscores>.slice."""
    names = "|".join(re.escape(x) for x in {uid, uid.replace("-", "_")})
    pattern = re.compile(rf"(?:.*-)?pod(?:{names})(?:\.slice)?")
    found = []
    for folder, below, _ in os.walk(root):
        found += [Path(folder, name) for name in below if pattern.fullmatch(name)]
    return found


def _pids(folder: Path) -> set[int]:
    pids: set[int] = set()
    for procs in [folder / "cgroup.procs", *folder.glob("**/cgroup.procs")]:
        try:
            pids.update(int(x) for x in procs.read_text(encoding="ascii").split())
        except (FileNotFoundError, OSError):
            continue  # a cgroup may go away while it is read; its processes are then gone too
    return pids


def openat2(dirfd: int, path: str, flags: int, resolve: int) -> int:
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
    fd: int = _libc.syscall(SYS_OPENAT2, dirfd, path.encode(), how, ctypes.c_size_t(len(how)))
    if fd < 0:
        err = ctypes.get_errno()
        raise OSError(err, os.strerror(err), path)
    return fd


def connect_handoff(pod: Pod, path: str) -> socket.socket:
    """Connect to the pod's handoff socket after checking that it is one, and the pod's own."""
    last: Exception | None = None
    for pid in sorted(pod.pids()):
        try:
            return _connect_in_root(pod, pid, path)
        except FileNotFoundError as e:
            last = e
        except ConnectionRefusedError as e:
            last = e
    if isinstance(last, ConnectionRefusedError):
        raise Retryable("handoff_refused", f"pod {pod.uid}: nobody listens on {path}; is the gateway up?") from last
    raise Final(
        "no_handoff", f"pod {pod.uid} has no handoff socket at {path}: it runs no Midstream gateway or library"
    ) from last


def _connect_in_root(pod: Pod, pid: int, path: str) -> socket.socket:
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = _open_checked(root, pid, path)
    finally:
        os.close(root)
    try:
        return _connect_fd(pod, fd)
    finally:
        os.close(fd)


def _open_checked(root: int, pid: int, path: str) -> int:
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
    try:
        fd = openat2(root, path, os.O_PATH, resolve)
    except OSError as e:
        if e.errno == 40:  # ELOOP
            raise Final("handoff_symlink", f"{path} of process {pid} goes through a symlink: refused") from e
        raise
    info = os.fstat(fd)
    owner = os.stat(f"/proc/{pid}").st_uid
    if not stat.S_ISSOCK(info.st_mode) or info.st_uid not in (owner, 0):
        os.close(fd)
        raise Final("handoff_not_a_socket", f"{path} of process {pid} is no socket of the pod's own user: refused")
    return fd


def _connect_fd(pod: Pod, fd: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(f"/proc/self/fd/{fd}")
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if pid not in pod.pids():
            raise Final("handoff_foreign", f"process {pid} behind the handoff socket is not of pod {pod.uid}: refused")
    except BaseException:
        sock.close()
        raise
    return sock


def check_stream_fds(pod: Pod, fds: list[int], addresses: set[str]) -> list[str | None]:
    """For each fd that a pod handed over: None, or the name of the reason why it is refused.

    A fd must be a TCP socket in the pod's namespace whose local address is a floating IP of that pod.
    """
    home = netns.identity(pod.netns_fd)
    return [twice or _stream_refusal(fd, home, addresses) for fd, twice in zip(fds, _twice(fds), strict=True)]


def _twice(fds: list[int]) -> list[str | None]:
    """A name for each fd whose socket came before in the list already."""
    seen: set[tuple[int, int]] = set()
    found: list[str | None] = []
    for fd in fds:
        info = os.fstat(fd)
        found.append("SameSocketTwice" if (info.st_dev, info.st_ino) in seen else None)
        seen.add((info.st_dev, info.st_ino))
    return found


def _stream_refusal(fd: int, home: tuple[int, int], addresses: set[str]) -> str | None:
    refusal = _socket_refusal(fd, home)
    if refusal is not None:
        return refusal
    return None if local_address(fd) in addresses else "NotOnFloatingIP"


def check_blank_fds(pod: Pod, fds: list[int]) -> list[str | None]:
    """The same for blank sockets: TCP, in the pod's namespace, not connected."""
    home = netns.identity(pod.netns_fd)
    return [twice or _blank_refusal(fd, home) for fd, twice in zip(fds, _twice(fds), strict=True)]


def _blank_refusal(fd: int, home: tuple[int, int]) -> str | None:
    refusal = _socket_refusal(fd, home)
    if refusal is not None:
        return refusal
    sock = socket.socket(fileno=os.dup(fd))
    try:
        state = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    finally:
        sock.close()
    return None if state == TCP_CLOSE else "NotBlank"


def _socket_refusal(fd: int, home: tuple[int, int]) -> str | None:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return "NotASocket"
    sock = socket.socket(fileno=os.dup(fd))
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            return "NotTcp"
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) != socket.IPPROTO_TCP:
            return "NotTcp"
        if netns.of_socket(fd) != home:
            return "ForeignNamespace"
        return None
    finally:
        sock.close()


def local_address(fd: int) -> str:
    """The socket's local address, v4-mapped ones as IPv4."""
    sock = socket.socket(fileno=os.dup(fd))
    try:
        return str(sock.getsockname()[0]).removeprefix("::ffff:")
    finally:
        sock.close()
