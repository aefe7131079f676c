"""Who does not take part must not notice: a stock nginx on the node where holds come and go.

Traffic of the nginx pod passes the same programs, on the node's NIC and on its own eth0, as that of pods that move.
Windows with them, and with 256 flows of others held and let go five times a second, alternate with windows without
any program, so that whatever else the machine does meets both alike. On a busy machine 60 pairs of windows do not tell
0.94 from 0.97: there the measurement goes on, with all windows counted.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lines import HERE, PORT, Lines
from midstream_agent.hold import Hold
from midstream_testbed.machine import Host, Pod
from midstream_testbed.namespace import Process

pytest_plugins = ["lines_plugin"]

ADDRESS = "10.77.0.140"
FILE_BYTES = 64 << 20
WINDOW_S, PAIRS, MOST_PAIRS = 0.2, 60, 240
WANTED = 0.95
CONF = """
daemon off; master_process off; worker_processes 1; pid %(folder)s/pid; error_log stderr warn; user root;
events { worker_connections 64; }
http {
  access_log off; sendfile on; keepalive_requests 1000000;
  client_body_temp_path %(folder)s; proxy_temp_path %(folder)s; fastcgi_temp_path %(folder)s;
  uwsgi_temp_path %(folder)s; scgi_temp_path %(folder)s;
  server { listen %(port)d; root %(folder)s; }
}
"""


@pytest.fixture
def nginx(lines: Lines, tmp_path: Path) -> Iterator[Pod]:
    """The server, in a pod of its own with a floating IP; it has never heard of Midstream."""
    (tmp_path / "large").write_bytes(os.urandom(1 << 20) * (FILE_BYTES >> 20))
    (tmp_path / "nginx.conf").write_text(CONF % {"folder": tmp_path, "port": PORT})
    tmp_path.chmod(0o755)
    pod = lines.a.add_pod("nginx")
    lines.fleet.run_pod(pod, ["/usr/sbin/nginx", "-c", str(tmp_path / "nginx.conf")], "nginx")
    lines.fleet.attach(pod, ADDRESS)
    yield pod
    del lines.fleet.pods[pod.name]
    pod.delete()


class Download:
    """GETs of the file, one after another on one connection, for ever."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(1 << 20))
        self._left = 0

    def run(self, seconds: float) -> float:
        """Bytes a second of about that time."""
        began, got = time.perf_counter(), 0
        while (now := time.perf_counter()) < began + seconds:
            if not self._left:
                self._ask()
            count = self._sock.recv_into(self._buffer[: self._left])
            assert count, "nginx closed the connection"
            self._left -= count
            got += count
        return got / (now - began)

    def window(self) -> float:
        """One measurement, after the stream has got going again."""
        self.run(WINDOW_S / 4)
        return self.run(WINDOW_S)

    def _ask(self) -> None:
        self._sock.sendall(f"GET /large HTTP/1.1\r\nHost: {ADDRESS}\r\n\r\n".encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._sock.recv(1)
        assert b" 200 " in head and f"Content-Length: {FILE_BYTES}".encode() in head
        self._left = FILE_BYTES


@pytest.fixture
def traffic(lines: Lines) -> Iterator[Process]:
    """hold_traffic.py on the node; its own process, as the agent is one."""
    agent = lines.fleet.agents["node-a"]
    process = lines.a.popen(
        [sys.executable, str(HERE / "hold_traffic.py"), str(agent.bpffs)],
        env=lines.fleet.env(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    yield process
    process.kill()
    process.communicate(timeout=10)


def order(traffic: Process) -> int:
    """Begin or end the holds; how many rounds there were so far."""
    assert traffic.stdin and traffic.stdout
    traffic.stdin.write(b"\n")
    traffic.stdin.flush()
    return int(traffic.stdout.readline())


@contextlib.contextmanager
def holds_come_and_go(traffic: Process) -> Iterator[None]:
    before = order(traffic)
    try:
        yield
    finally:
        after = order(traffic)
    assert after > before


@contextlib.contextmanager
def attached(hold: Hold, host: Host, pod: Pod) -> Iterator[None]:
    """The programs on the node's NIC and on the pod's eth0; the agent had put them there, this takes turns."""
    hold.attach(host.netns_path, host.eth1.name, "nic")
    hold.attach(f"/proc/self/fd/{pod.netns_fd}", "eth0", "pod")
    try:
        yield
    finally:
        hold.detach(host.netns_path, host.eth1.name, "nic")
        hold.detach(f"/proc/self/fd/{pod.netns_fd}", "eth0", "pod")


def test_an_unwitting_server_keeps_its_throughput_while_holds_come_and_go(
    lines: Lines, nginx: Pod, traffic: Process
) -> None:
    with_holds: list[float] = []
    without: list[float] = []
    with Hold.open(lines.fleet.agents["node-a"].bpffs) as hold, lines.outside.connect(ADDRESS, PORT) as sock:
        download = Download(sock)
        try:
            with attached(hold, lines.a, nginx):
                passed = hold.counters()["pass_unknown"]
                download.run(0.5)
                assert hold.counters()["pass_unknown"] > passed + 100, "its packets do not meet the programs"
            while len(without) < PAIRS or (len(without) < MOST_PAIRS and share(with_holds, without) < WANTED):
                with attached(hold, lines.a, nginx), holds_come_and_go(traffic):
                    with_holds.append(download.window())
                without.append(download.window())
        finally:
            hold.attach(lines.a.netns_path, lines.a.eth1.name, "nic")
    ratio = share(with_holds, without)
    print(f"\n{statistics.median(without) * 8e-9:.1f} Gb/s without, {ratio:.3f} of it with holds, {len(without)} pairs")
    assert ratio >= WANTED


def share(with_holds: list[float], without: list[float]) -> float:
    return statistics.median(with_holds) / statistics.median(without)
