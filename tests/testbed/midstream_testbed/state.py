"""What a testbed leaves on the machine while it lives, and how it is taken away after a crash.

Everything carries one prefix (``ms`` + four hex digits): network namespaces under /run/netns, cgroups under
every controller in use, and a folder under /run/midstream-testbed that names the owner. Links, routes and
firewall rules are inside the namespaces and end with them; so do the processes' private mounts.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import time
from pathlib import Path

from midstream_testbed import kernel

ROOT = Path("/run/midstream-testbed")
CGROUP_ROOT = Path("/sys/fs/cgroup")
BPFFS = Path("/sys/fs/bpf")
DISK = Path("/var/tmp/midstream-testbed")
KILL_PATIENCE_S = 10.0


def _start_time(pid: int) -> str | None:
    """Field 22 of /proc/PID/stat: with the pid it names a process for as long as the machine is up. None when it
    has ended, also while nobody has reaped it."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def is_running(pid: int) -> bool:
    return _start_time(pid) is not None


def claim() -> tuple[str, Path]:
    """Reserve a prefix for this process: (prefix, folder)."""
    ROOT.mkdir(parents=True, exist_ok=True)
    while True:
        prefix = f"ms{secrets.token_hex(2)}"
        folder = ROOT / prefix
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        owner = {"pid": os.getpid(), "start": _start_time(os.getpid())}
        (folder / "owner.json").write_text(json.dumps(owner))
        return prefix, folder


def owner_lives(folder: Path) -> bool:
    try:
        owner = json.loads((folder / "owner.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        # Between mkdir and write of a testbed that is being made just now; a crash there left nothing else.
        return time.time() - folder.stat().st_mtime < 5
    return owner["start"] is not None and _start_time(owner["pid"]) == owner["start"]


def cgroup_bases(controllers: tuple[str, ...]) -> list[Path]:
    """Folders below which a testbed makes its cgroups: one a v1 controller, or the one v2 tree."""
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        return [CGROUP_ROOT]
    return [CGROUP_ROOT / name for name in controllers if (CGROUP_ROOT / name).is_dir()]


def all_cgroup_bases() -> list[Path]:
    """The same for a kubelet, which has its folders in every controller that is mounted."""
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        return [CGROUP_ROOT]
    return [folder for folder in CGROUP_ROOT.iterdir() if (folder / "cgroup.clone_children").exists()]


def disk(prefix: str) -> Path:
    """Where a testbed keeps gigabytes: container images. /run is memory on many machines."""
    return DISK / prefix


def cgroup_trees(prefix: str) -> list[Path]:
    """Top folders of this prefix that exist, whatever controllers the owner chose."""
    if (CGROUP_ROOT / "cgroup.controllers").exists():
        candidates = [CGROUP_ROOT / prefix]
    else:
        candidates = [folder / prefix for folder in CGROUP_ROOT.iterdir() if folder.is_dir()]
    return [folder for folder in candidates if folder.is_dir()]


def members(tree: Path) -> list[int]:
    """Processes of a cgroup and of all below it."""
    found: list[int] = []
    for folder, _, _ in os.walk(tree, topdown=False):
        with contextlib.suppress(FileNotFoundError, OSError):
            found += [int(pid) for pid in (Path(folder) / "cgroup.procs").read_text().split()]
    return found


def kill_tree(tree: Path) -> None:
    """SIGKILL until the cgroups are empty: a process that forks meanwhile is caught by the next round."""
    deadline = time.monotonic() + KILL_PATIENCE_S
    while pids := [pid for pid in members(tree) if pid != os.getpid()]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} under {tree} outlived SIGKILL by {KILL_PATIENCE_S} s")
        watched = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                watched.append(os.pidfd_open(pid))
                signal.pidfd_send_signal(watched[-1], signal.SIGKILL)
        _wait_ended(watched, deadline)


def _wait_ended(pidfds: list[int], deadline: float) -> None:
    poll = select.poll()
    for fd in pidfds:
        poll.register(fd, select.POLLIN)
    waiting = set(pidfds)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            waiting.discard(fd)
            poll.unregister(fd)
    for fd in pidfds:
        os.close(fd)


def remove_tree(tree: Path) -> None:
    """Remove empty cgroups, children first. A task that is just being reaped keeps its cgroup busy for a
    moment."""
    deadline = time.monotonic() + KILL_PATIENCE_S
    for folder, _, _ in os.walk(tree, topdown=False):
        while True:
            try:
                os.rmdir(folder)
                break
            except FileNotFoundError:
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)  # a zombie has no event to wait for but its parent's wait()


def sweep(prefix: str) -> None:
    """Take away everything that carries this prefix, processes first."""
    for tree in cgroup_trees(prefix):
        if os.getpid() in members(tree):
            (tree.parent / "cgroup.procs").write_text(str(os.getpid()))
    for tree in cgroup_trees(prefix):
        kill_tree(tree)
    if kernel.NETNS_DIR.is_dir():
        for path in kernel.NETNS_DIR.iterdir():
            if path.name == prefix or path.name.startswith(f"{prefix}-"):
                kernel.drop_netns(path.name)
    for tree in cgroup_trees(prefix):
        remove_tree(tree)
    for pins in BPFFS.glob(f"{prefix}-*"):  # programs and maps that agents pinned
        _unpin(pins)
    shutil.rmtree(disk(prefix), ignore_errors=True)
    shutil.rmtree(ROOT / prefix, ignore_errors=True)


def _unpin(folder: Path) -> None:
    for pin in folder.iterdir():
        if pin.is_dir():
            _unpin(pin)
        else:
            pin.unlink()
    folder.rmdir()


def leftovers() -> list[str]:
    """Prefixes whose owner is gone."""
    if not ROOT.is_dir():
        return []
    return sorted(folder.name for folder in ROOT.iterdir() if folder.is_dir() and not owner_lives(folder))
