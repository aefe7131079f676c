"""A world of line pods (line_pod.py) and of clients that are sockets of the test's own.

`pytest_plugins = ["lines_plugin"]` in a test file gives it the fixture `lines`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import secrets
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from line_pod import pattern
from midstream_agent.hold import Hold
from midstream_testbed.capture import Capture
from midstream_testbed.fleet import Fleet
from midstream_testbed.machine import Client, Host, Pod
from midstream_testbed.namespace import Namespace, Process
from midstream_testbed.pcap import Packet
from midstream_testbed.vpc import Vpc

HERE = Path(__file__).parent
V4, V6 = "10.77.0.110", "fd77::110"
PORT = 8000
PATIENCE_S = 30.0  # a socket that says nothing for so long hangs
_names = itertools.count(1)


class Line:
    """A client's connection to a line pod, named in the pod's log."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.settimeout(PATIENCE_S)
        self.sock, self.name = sock, name

    @property
    def port(self) -> int:
        return int(self.sock.getsockname()[1])

    def say(self, text: str) -> None:
        self.sock.sendall(text.encode() + b"\n")

    def read(self, length: int) -> bytes:
        got = bytearray()
        while len(got) < length:
            part = self.sock.recv(min(length - len(got), 1 << 20))
            if not part:
                raise EOFError(f"{self.name}: the stream ended after {len(got)} of {length} bytes")
            got += part
        return bytes(got)

    def expect(self, wanted: bytes) -> None:
        got = self.read(len(wanted))
        assert got == wanted, f"{self.name}: the stream differs"

    def greet(self) -> Line:
        self.say(f"hello {self.name}")
        self.expect(f"hello {self.name}\n".encode())
        return self

    def is_alive(self) -> None:
        word = secrets.token_hex(8)
        self.say(f"echo {word}")
        self.expect(word.encode() + b"\n")

    def expect_flood(self, length: int) -> None:
        self.expect(pattern(length))

    def expect_end(self) -> None:
        assert self.sock.recv(1) == b"", f"{self.name}: bytes where the end should be"

    def reset(self) -> None:
        """Close with an RST, as a client that crashed."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


@dataclass
class Job:
    """A migration under way. `held_at`: the node whose hold answers while it waits at the failpoint."""

    name: str
    held_at: str
    process: Process
    report: Path

    def migrated(self) -> int:
        """Streams, by the report of the job that has ended."""
        return int(json.loads(self.report.read_text(encoding="utf-8"))["streams"]["migrated"])


@dataclass
class Lines:
    vpc: Vpc
    fleet: Fleet
    a: Host
    b: Host
    outside: Client
    inside: Client
    pods: dict[str, Pod] = field(default_factory=dict)  # by host name
    at: str = "node-a"
    sockets: list[socket.socket] = field(default_factory=list)

    @classmethod
    def build(cls, vpc: Vpc, fleet: Fleet) -> Lines:
        a, b = vpc.host("node-a"), vpc.host("node-b")
        lines = cls(vpc, fleet, a, b, vpc.client("client"), vpc.client("client-in", in_vpc=True))
        for host in (a, b):
            fleet.start_agent(host, "--moved-linger-s", "2")
            lines.pods[host.name] = lines.start_pod(host, f"lines-{host.name}")
        for pod in lines.pods.values():
            fleet.wait_ready(pod.name)
        for address in (V4, V6):
            fleet.attach(lines.source, address)
        return lines

    def start_pod(self, host: Host, name: str, program: str = "line_pod.py", port: int = PORT, **env: str) -> Pod:
        argv = [sys.executable, str(HERE / program), str(port)]
        return self.fleet.run_pod(host.add_pod(name), argv, name.split("-")[0], PATH_MTU=str(self.vpc.mtu), **env)

    @property
    def source(self) -> Pod:
        return self.pods[self.at]

    @property
    def away(self) -> str:
        return "node-b" if self.at == "node-a" else "node-a"

    @property
    def places(self) -> list[Namespace]:
        return [self.outside, self.inside, self.a, self.b]

    # -- clients -------------------------------------------------------------------------------------------

    def dial(self, where: Namespace, address: str = V4, port: int = 0, rcvbuf: int = 0) -> socket.socket:
        """A socket that has begun to connect, from `port` if one is given; it does not block."""
        sock = where.new_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.sockets.append(sock)
        if rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, rcvbuf)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if port:
            sock.bind(("", port))
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            sock.connect((address, PORT))
        return sock

    def dial_again(self, where: Namespace, address: str, port: int) -> socket.socket:
        """The same from a port whose last connection is in TIME_WAIT here: the kernel grants it after a second."""
        where.sysctl({"ipv4/tcp_tw_reuse": 1})
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self.dial(where, address, port)
            except OSError as e:
                if e.errno != errno.EADDRNOTAVAIL or time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def established(self, sock: socket.socket) -> Line:
        """Wait until that socket is connected; its error, or a hang, fails the test."""
        ready = select.select([], [sock], [], PATIENCE_S)[1]
        assert ready, "the connection was neither made nor refused"
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        assert error == 0, f"connect: {os.strerror(error)}"
        return Line(sock, f"c{next(_names)}")

    def line(self, where: Namespace | None = None, address: str = V4, **options: int) -> Line:
        """A connection that has been accepted and greeted."""
        return self.established(self.dial(where or self.outside, address, **options)).greet()

    def hang_up(self) -> None:
        """Close all sockets that a test has dialled."""
        for sock in self.sockets:
            sock.close()
        self.sockets.clear()

    def bystanders(self) -> list[Line]:
        """Streams from everywhere that nothing may happen to."""
        return [self.line(place, address) for place in self.places for address in (V4, V6)]

    def wait_log(self, pattern: str) -> None:
        """Return when a pod has written a line that is `pattern`."""
        end = time.monotonic() + PATIENCE_S
        while not any(re.search(f"^{pattern}$", self.log(name), re.MULTILINE) for name in self.pods):
            if time.monotonic() > end:
                logs = "".join(f"--- {name}\n{self.log(name)[-1500:]}" for name in self.pods)
                raise TimeoutError(f"no pod said {pattern!r}\n{logs}")
            time.sleep(0.02)

    def log(self, node: str) -> str:
        return self.fleet.pods[self.pods[node].name].process.output()

    # -- migrations ----------------------------------------------------------------------------------------

    def hop(self, *options: str) -> dict[str, Any]:
        report = self.fleet.migrate(self.source.name, self.away, *options)
        if report["phase"] == "PHASE_SUCCEEDED":
            self.at = self.away
        return report

    def moved(self) -> dict[str, Any]:
        report = self.hop()
        assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
        return report

    def counters(self, node: str) -> dict[str, int]:
        with Hold.open(self.fleet.agents[node].bpffs) as hold:
            return hold.counters()

    @contextlib.contextmanager
    def during(self, failpoint: str, delay_ms: int = 700, then: str = "") -> Iterator[Job]:
        """The block runs while a migration waits at `failpoint`; afterwards the job has succeeded.

        `then`: failpoints to make it fail after that; afterwards it was rolled back.
        """
        side = self.at if failpoint.startswith("source") else self.away
        agent = self.fleet.agents[side]
        seen = len(agent.fired())
        agent.arm(f"{failpoint}=delay:{delay_ms}" + (f",{then}" if then else ""))
        job = self._start_hop(side)
        end = time.monotonic() + PATIENCE_S
        while failpoint not in agent.fired()[seen:]:
            if time.monotonic() > end:
                raise TimeoutError(f"{failpoint} did not fire:\n{job.process.output()}\n{agent.log[-2000:]}")
            time.sleep(0.005)
        try:
            yield job
        finally:
            failed = job.process.wait(60)
            if not failed:
                self.at = self.away
        assert failed == (1 if then else 0), job.process.output() + agent.log[-3000:]

    def _start_hop(self, side: str) -> Job:
        name = f"job-{secrets.token_hex(4)}"
        report = self.fleet.folder / f"{name}.json"
        argv = self.fleet.cli_argv(
            "migrate", self.source.name, "--to", self.away, "--job", name, "--report", str(report)
        )
        return Job(name, side, self.fleet.operator.popen(argv, env=self.fleet.env(), name="migrate"), report)

    @contextlib.contextmanager
    def meets(self, node: str, reasons: str, at_least: int = 1) -> Iterator[None]:
        """What the block sends must meet the hold of `node`: its counters `reasons`, by name, tell."""

        def count() -> int:
            counters = self.counters(node)
            return sum(counters[reason] for reason in reasons.split())

        before = count()
        yield
        end = time.monotonic() + PATIENCE_S
        while count() < before + at_least:
            if time.monotonic() > end:
                raise TimeoutError(f"nothing met the hold of {node}: {self.counters(node)}")
            time.sleep(0.005)

    @contextlib.contextmanager
    def no_reset(self, where: Namespace | None = None) -> Iterator[Capture]:
        """No RST of the server's side reaches the clients there while the block runs."""
        with (where or self.outside).capture(expression=f"tcp port {PORT}", snaplen=160) as capture:
            yield capture
        assert capture.dropped == 0
        for reset in resets(capture.packets):
            flow = [
                p for p in capture.packets if reset.sport in (p.sport, p.dport) and reset.dport in (p.sport, p.dport)
            ]
            raise AssertionError("a reset came from the server's side:\n" + "\n".join(map(_told, flow[-30:])))


def _told(p: Packet) -> str:
    """A packet as one line, for a person."""
    flags = "".join(letter for bit, letter in ((2, "S"), (1, "F"), (4, "R"), (8, "P"), (16, ".")) if p.flags & bit)
    return f"{p.ts_ns / 1e9:.6f} {p.sport}>{p.dport} {flags} seq {p.seq} ack {p.ack} win {p.win} length {p.length}"


def resets(packets: list[Packet]) -> list[Packet]:
    """RSTs of the server's side, to clients that had not reset the connection themselves before."""
    dead: set[tuple[str, int]] = set()
    found = []
    for p in packets:
        client = (p.src, p.sport) if p.dport == PORT else (p.dst, p.dport)
        if p.dport == PORT and p.syn:
            dead.discard(client)
        elif p.dport == PORT and p.rst:
            dead.add(client)
        elif p.rst and client not in dead:
            found.append(p)
    return found
