"""A network namespace that processes run in: what hosts, pods, clients and the router have in common."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from pyroute2 import IPRoute  # type: ignore[import-untyped,unused-ignore]

from midstream_testbed import kernel, state

if TYPE_CHECKING:
    from midstream_testbed.capture import Capture

T = TypeVar("T")
Argument = str | os.PathLike[str]

# Joins the cgroups before the program starts, so that no child of it is ever outside of them.
_JOIN = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo $$ >"$1" || exit 125; shift; n=$((n-1)); done; exec "$@"'

# What container runtimes leave to root in a container that is not privileged.
CONTAINER_CAPABILITIES = """chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service
net_raw sys_chroot mknod audit_write setfcap""".split()  # noqa: SIM905


def family_of(ip: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in ip else socket.AF_INET


def confinement(privileged: bool, uid: int | None) -> list[str]:
    """Command prefix that takes away what a container would not have."""
    user = [] if uid is None else [f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    if privileged:
        return ["setpriv", *user] if user else []
    caps = "-all" + "".join(f",+{name}" for name in CONTAINER_CAPABILITIES)
    return ["setpriv", f"--bounding-set={caps}", "--inh-caps=-all", "--ambient-caps=-all", *user]


class Process(subprocess.Popen[bytes]):
    """A process of the testbed. `log` is the file that took its stdout and stderr, None when they were
    redirected."""

    log: Path | None = None

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log else ""


def _route_congestion_control(ip: Any, name: str) -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        for route in ip.get_default_routes(family=family):
            ip.route(
                "replace",
                dst="default",
                gateway=route.get("gateway"),
                oif=route.get("oif"),
                priority=route.get("priority"),
                family=family,
                metrics={"cc_algo": name},
            )


class Namespace:
    """Owns one network namespace, the cgroups of its processes and the log files of what it started."""

    def __init__(self, name: str, netns_name: str, cgroups: list[Path], log_dir: Path) -> None:
        self.name = name
        self.netns_name = netns_name
        self.log_dir = log_dir
        self.cgroups = cgroups
        self.processes: list[Process] = []
        self.deleted = False
        self.mntns_fd: int | None = None
        self._counter = itertools.count()
        for folder in cgroups:
            folder.mkdir(parents=True)
        self.netns_fd = kernel.new_netns(netns_name)

    # -- what it is

    @property
    def netns_path(self) -> str:
        """For ``nsenter --net=`` and ``ip netns``."""
        return str(kernel.NETNS_DIR / self.netns_name)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} ({self.netns_name})>"

    # -- configuration

    def inside(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread that has joined the namespace; sockets opened there stay in it."""
        return kernel.in_namespaces(work, self.netns_fd)

    def netlink(self, work: Callable[[Any], T]) -> T:
        """Run `work` with an IPRoute of this namespace."""

        def body() -> T:
            with IPRoute() as ip:
                return work(ip)

        return self.inside(body)

    def sysctl(self, values: Mapping[str, int | str]) -> None:
        """Write ``net.`` sysctls of the namespace, named by path: {"ipv4/ip_forward": 1}."""

        def body() -> None:
            for name, value in values.items():
                Path("/proc/sys/net", name).write_text(str(value))

        self.inside(body)

    def read_sysctl(self, name: str) -> str:
        return self.inside(lambda: Path("/proc/sys/net", name).read_text().strip())

    def proc_net(self, name: str) -> str:
        """A file of the namespace's /proc/net."""
        return self.inside(lambda: Path("/proc/thread-self/net", name).read_text())

    def new_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, proto: int = 0
    ) -> socket.socket:
        """A socket of this namespace, for use in the calling process."""
        return self.inside(lambda: socket.socket(family, kind, proto))

    def listen(self, ip: str, port: int = 0) -> socket.socket:
        """A TCP listener in this namespace."""
        sock = self.new_socket(family_of(ip))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((ip, port))
        sock.listen(128)
        return sock

    def connect(self, ip: str, port: int, timeout_s: float = 5.0) -> socket.socket:
        """A TCP connection from this namespace; its timeout is off again when this returns."""
        sock = self.new_socket(family_of(ip))
        try:
            sock.settimeout(timeout_s)
            sock.connect((ip, port))
        except BaseException:
            sock.close()
            raise
        sock.settimeout(None)
        return sock

    def send_frame(self, interface: str, frame: bytes) -> None:
        """One Ethernet frame out of an interface, as it is."""
        with self.new_socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
            sock.bind((interface, 0))
            sock.send(frame)

    def nft(self, rules: str) -> None:
        self.run(["nft", "-f", "-"], input=rules, privileged=True)

    def set_congestion_control(self, name: str) -> None:
        """Default of new connections. By route as well, since an algorithm that the machine does not list in
        tcp_allowed_congestion_control can be set no other way: sockets have it once they are connected."""
        self.netlink(lambda ip: _route_congestion_control(ip, name))
        with contextlib.suppress(PermissionError):
            self.sysctl({"ipv4/tcp_congestion_control": name})

    # -- processes

    def _start(
        self, argv: Sequence[Argument], cgroups: list[Path], mntns_fd: int | None, **options: Any
    ) -> Process:
        """Start a process that is in its cgroups before it runs, and before this returns."""
        files = [folder / "cgroup.procs" for folder in cgroups]
        command: list[Argument] = ["/bin/sh", "-c", _JOIN, "sh", str(len(files)), *files, *argv]
        process = kernel.in_namespaces(
            lambda: Process(command, start_new_session=True, **options), self.netns_fd, mntns_fd
        )
        self.processes.append(process)
        for file in files:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                file.write_text(str(process.pid))
        return process

    def popen(
        self,
        argv: Sequence[Argument],
        *,
        env: Mapping[str, str] | None = None,
        name: str | None = None,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        cwd: Argument | None = None,
        pass_fds: Sequence[int] = (),
        private_mounts: bool = True,
        privileged: bool = True,
        uid: int | None = None,
    ) -> Process:
        """Start a process in the namespace. `env` is added to this process's; output goes to a log file by
        default."""
        log = self.log_dir / f"{self.name}.{next(self._counter)}.{name or Path(argv[0]).name}.log"
        command = [*confinement(privileged, uid), *argv]
        mntns_fd = self.mntns_fd if private_mounts else None
        merged = {**os.environ, **(env or {})}
        with open(log, "ab") as log_file:  # here and not in the thread: a pod has a /run of its own
            process = self._start(
                command,
                self.cgroups,
                mntns_fd,
                env=merged,
                stdin=stdin,
                cwd=cwd or os.getcwd(),
                pass_fds=pass_fds,
                stdout=log_file if stdout is None else stdout,
                stderr=log_file if stderr is None else stderr,
            )
        process.log = log if stdout is None or stderr is None else None
        return process

    def run(
        self,
        argv: Sequence[Argument],
        *,
        input: str | None = None,
        timeout_s: float = 30.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run a short command to its end; stdout and stderr come back as text."""
        process = self.popen(
            argv,
            env=env,
            stdin=subprocess.PIPE if input is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **options,
        )
        try:
            out, err = process.communicate(input.encode() if input is not None else None, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        self.processes.remove(process)
        done = subprocess.CompletedProcess(
            list(argv), process.returncode, out.decode(errors="replace"), err.decode(errors="replace")
        )
        if check and done.returncode:
            raise RuntimeError(
                f"{self.name}: {list(argv)} exited with {done.returncode}: {done.stderr.strip()}"
            )
        return done

    def capture(self, interface: str = "eth0", **options: Any) -> Capture:
        """Start tcpdump on an interface; see capture.Capture."""
        from midstream_testbed.capture import Capture

        path = self.log_dir / f"{self.name}.{next(self._counter)}.{interface}.pcap"
        return Capture(self, interface, path, **options)

    # -- the end

    def delete(self) -> None:
        """SIGKILL every process of the namespace (its descendants too) and take its name away."""
        if self.deleted:
            return
        self.deleted = True
        for process in self.processes:
            process.kill()  # one that is on its way into its cgroup would be missed there
        for folder in self.cgroups:
            if folder.is_dir():
                state.kill_tree(folder)
        for process in self.processes:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        kernel.drop_netns(self.netns_name)
        os.close(self.netns_fd)
        if self.mntns_fd is not None:
            os.close(self.mntns_fd)
        for folder in self.cgroups:
            if folder.is_dir():
                state.remove_tree(folder)
