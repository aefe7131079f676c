"""A world whose tests are themselves the clients: pods of `hold_pod.py` in pairs, one floating address each family.

A test holds both ends of a connection: the client's socket is its own, and `server_end` borrows the pod's. Jobs of
different pairs run at the same time, so that long holds cost their length once. Failpoints make a job wait where the
test wants it to; `Job.wait` returns when it is there.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import json
import os
import secrets
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midstream_agent import tcp
from midstream_agent.bpf import Map
from midstream_agent.hold_layout import CTL
from midstream_testbed import pcap
from midstream_testbed.capture import HEADERS_SNAPLEN, Capture
from midstream_testbed.fleet import Agent, Fleet
from midstream_testbed.machine import Client, Host, Pod
from midstream_testbed.namespace import Namespace, Process
from midstream_testbed.pcap import Packet
from midstream_testbed.vpc import Vpc

HERE = Path(__file__).parent
PORT = 8000
PATIENCE_S = 30.0
TCP_INFO_BYTES = 248
KEY_PORT = struct.Struct("!H")
SO_RCVBUFFORCE = 33
_PIDFD_GETFD = 438
_libc = ctypes.CDLL(None, use_errno=True)


def until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
    """What `condition` returned once it was true; for the kernel's and the agents' doings, not for a time."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.0005)
    return found


@dataclass(slots=True)
class Pair:
    """Two pods of one workload, one a host, and the addresses that are at `at`."""

    name: str
    pods: dict[str, Pod]
    v4: str
    v6: str
    at: str = "node-a"

    @property
    def away(self) -> str:
        return "node-b" if self.at == "node-a" else "node-a"

    @property
    def pod(self) -> Pod:
        return self.pods[self.at]

    def address(self, family: int) -> str:
        return self.v4 if family == 4 else self.v6


@dataclass(slots=True)
class Job:
    """A migration under way, by the CLI in a process of its own."""

    pair: Pair
    job_id: str
    process: Process
    report_path: Path
    source: Agent
    target: Agent
    fired_before: list[str]

    def wait(self, failpoint: str) -> None:
        """Return when the source's agent has come to `failpoint` since this job began."""
        until(lambda: failpoint in self.source.fired()[len(self.fired_before) :], failpoint)

    def checkpoints(self) -> dict[int, tcp.Info]:
        """What was shipped, by the client's port: from the target's journal, while the job is held there."""
        path = next(self.target.state_dir.glob(f"journal/*/target-{self.job_id}.checkpoints"))
        return {i.remote[1]: i for i in tcp.Batch.decode(path.read_bytes()).infos()}

    def answers_with(self) -> dict[int, int]:
        """The rcv_nxt with which the source's hold answers for each flow of this pair, by the client's port."""
        ours = {tcp.mapped(a) for a in (self.pair.v4, self.pair.v6)}
        with Map.pinned(self.source.bpffs / "ms_flows") as flows:
            keys = flows.keys()
            held = {key: flows.lookup(key) for key in keys if key[:16] in ours}
        return {KEY_PORT.unpack_from(key, 34)[0]: CTL.unpack(ctl)[3] for key, ctl in held.items() if ctl}

    def finish(self, timeout_s: float = 120) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=timeout_s)
        text = out.decode(errors="replace")
        if not self.report_path.exists():
            raise AssertionError(f"no report of the job:\n{text}\n{self.source.log[-3000:]}\n{self.target.log[-3000:]}")
        report: dict[str, Any] = json.loads(self.report_path.read_text())
        if report["phase"] == "PHASE_SUCCEEDED":
            self.pair.at = self.pair.away
        return {**report, "output": text}

    def succeed(self, timeout_s: float = 120) -> dict[str, Any]:
        report = self.finish(timeout_s)
        assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
        return report


@dataclass(slots=True)
class HoldWorld:
    vpc: Vpc
    fleet: Fleet
    a: Host
    b: Host
    outside: Client
    inside: Client
    pairs: dict[str, Pair] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)

    @classmethod
    @contextlib.contextmanager
    def build(cls, folder: Path, names: list[str], mtu: int = 9001, steer: bool = False) -> Iterator[HoldWorld]:
        """Two hosts with agents, and a pair of pods with its addresses for each name ("name@node-b": they begin
        there)."""
        with Vpc.create(mtu=mtu) as vpc, Fleet(vpc, folder, steer=steer) as fleet:
            a, b = vpc.host("node-a"), vpc.host("node-b")
            world = cls(vpc, fleet, a, b, vpc.client("client"), vpc.client("client-in", in_vpc=True))
            for host in (a, b):
                fleet.start_agent(host, "--moved-linger-s", "1")
            for i, entry in enumerate(names):
                name, _, at = entry.partition("@")
                world.pairs[name] = world._pair(name, f"10.77.0.{110 + i}", f"fd77::{110 + i}", at or "node-a")
            for pair in world.pairs.values():
                for pod in pair.pods.values():
                    fleet.wait_ready(pod.name)
                fleet.attach(pair.pod, pair.v4)
                fleet.attach(pair.pod, pair.v6)
            try:
                yield world
            finally:
                for stream in world.streams:
                    stream.close()

    def _pair(self, name: str, v4: str, v6: str, at: str) -> Pair:
        argv = [sys.executable, str(HERE / "hold_pod.py"), str(PORT), str(self.vpc.mtu)]
        pods = {h.name: self.fleet.run_pod(h.add_pod(f"{name}-{h.name}"), argv, name) for h in (self.a, self.b)}
        return Pair(name, pods, v4, v6, at)

    def agent(self, name: str) -> Agent:
        return self.fleet.agents[name]

    def places(self) -> dict[str, Namespace]:
        return {"outside": self.outside, "inside": self.inside, "node-a": self.a, "node-b": self.b}

    def hop(self, pair: Pair, failpoints: str = "", *options: str) -> Job:
        """Start a migration to the other host, whose source passes `failpoints`; returns at once."""
        source, job_id = self.agent(pair.at), f"{pair.name}-{secrets.token_hex(3)}"
        report = self.fleet.folder / f"{job_id}.json"
        argv = self.fleet.cli_argv(
            "migrate", pair.pod.name, "--to", pair.away, "--job", job_id, "--report", str(report), *options
        )  # fmt: skip
        fired = source.fired()
        if failpoints:
            source.arm(failpoints)
        process = self.fleet.operator.popen(
            argv, env=self.fleet.env(), name="migrate", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return Job(pair, job_id, process, report, source, self.agent(pair.away), fired)

    def hop_twice(self, pair: Pair, failpoints: str) -> Job:
        """There and back without a pause in between. The job is the second one; `failpoints` are its source's."""
        jobs, reports = [], []
        argv = [sys.executable, str(HERE / "two_hops.py"), str(self.fleet.inventory)]
        for here, there in ((pair.at, pair.away), (pair.away, pair.at)):
            jobs.append(f"{pair.name}-{secrets.token_hex(3)}")
            reports.append(self.fleet.folder / f"{jobs[-1]}.json")
            argv += [pair.pods[here].name, there, jobs[-1], str(reports[-1])]
        source, target = self.agent(pair.away), self.agent(pair.at)
        fired = source.fired()
        source.arm(failpoints)
        process = self.fleet.operator.popen(
            argv, env=self.fleet.env(), name="two-hops", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return Job(pair, jobs[1], process, reports[1], source, target, fired)

    def connect(
        self, pair: Pair, family: int = 4, where: Namespace | None = None, *, rcvbuf: int = 0, maxseg: int = 0
    ) -> Stream:
        """A client's connection to the pair, known to the pod; `rcvbuf` and `maxseg` are its socket's."""
        sock = (where or self.outside).new_socket(socket.AF_INET if family == 4 else socket.AF_INET6)
        if rcvbuf:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, rcvbuf)
        if maxseg:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, maxseg)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as HTTP clients do
        sock.settimeout(PATIENCE_S)
        sock.connect((pair.address(family), PORT))
        stream = Stream(sock, pair, self)
        self.streams.append(stream)
        stream.echo("hello")
        return stream

    def serving(self, pod: Pod) -> int:
        """Process id of the pod's server."""
        return self.fleet.pods[pod.name].process.pid

    def capture(self, where: Namespace, interface: str = "eth0") -> Capture:
        return where.capture(interface, snaplen=HEADERS_SNAPLEN, expression="tcp port 8000")


class Stream:
    """A client's end of one connection to a hold_pod."""

    def __init__(self, sock: socket.socket, pair: Pair, world: HoldWorld) -> None:
        self.sock = sock
        self.pair = pair
        self.client, self.port = sock.getsockname()[:2]
        self.family = 4 if sock.family == socket.AF_INET else 6
        self._world = world

    @property
    def address(self) -> str:
        return self.pair.address(self.family)

    def say(self, do: str, **fields: Any) -> None:
        self.sock.sendall(json.dumps({"do": do, **fields}).encode() + b"\n")

    def echo(self, text: str) -> None:
        """There and back."""
        self.say("echo", text=text)
        self.expect_echo(text)

    def expect_echo(self, text: str) -> None:
        wanted = json.dumps({"do": "echo", "text": text}).encode() + b"\n"
        got = self.read(len(wanted))
        assert got == wanted, (got, wanted)

    def read(self, count: int) -> bytes:
        got = bytearray()
        while len(got) < count:
            part = self.sock.recv(min(count - len(got), 1 << 20))
            if not part:
                raise AssertionError(f"end of stream after {len(got)} of {count} bytes")
            got += part
        return bytes(got)

    def read_to_end(self) -> bytes:
        got = bytearray()
        while part := self.sock.recv(1 << 20):
            got += part
        return bytes(got)

    def borrow(self) -> socket.socket:
        """The pod's own socket of this connection. Close it before the pod closes its own."""
        return borrow(self._world.serving(self.pair.pod), self.address, self.port)

    @contextlib.contextmanager
    def server_end(self) -> Iterator[socket.socket]:
        sock = self.borrow()
        try:
            yield sock
        finally:
            sock.close()

    def close(self) -> None:
        self.sock.close()


def borrow(pid: int, local: str, remote_port: int) -> socket.socket:
    """A duplicate of the connected TCP socket with these ends out of a process (pidfd_getfd)."""
    pidfd = os.pidfd_open(pid)
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    sock = _duplicate(pidfd, int(name), local, remote_port)
                    if sock is not None:
                        return sock
    finally:
        os.close(pidfd)
    raise LookupError(f"process {pid} has no socket {local} <- :{remote_port}")


def _duplicate(pidfd: int, number: int, local: str, remote_port: int) -> socket.socket | None:
    fd = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    if fd < 0:
        if ctypes.get_errno() == errno.EBADF:  # closed meanwhile
            return None
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    sock = socket.socket(fileno=fd)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):  # not connected
            if sock.getpeername()[1] == remote_port and sock.getsockname()[0].removeprefix("::ffff:") == local:
                return sock
    sock.close()
    return None


@dataclass(frozen=True, slots=True)
class Info:
    """What TCP_INFO says, as far as tests ask. Times in microseconds."""

    state: int
    options: int
    wscale: int
    rto_us: int
    snd_mss: int
    rcv_mss: int
    unacked: int
    rtt_us: int
    total_retrans: int
    segs_out: int
    total_rto: int

    @classmethod
    def of(cls, sock: socket.socket) -> Info:
        raw = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        words = struct.unpack_from("=24I", raw, 8)
        return cls(
            state=raw[0], options=raw[5] & 7, wscale=raw[6], rto_us=words[0], snd_mss=words[2], rcv_mss=words[3],
            unacked=words[4], rtt_us=words[15], total_retrans=words[23],
            segs_out=struct.unpack_from("=I", raw, 136)[0], total_rto=struct.unpack_from("=H", raw, 240)[0],
        )  # fmt: skip


class Withhold:
    """Packets of a client that are late: stopped where they enter the router, let go when the test says so."""

    def __init__(self, world: HoldWorld, client: Client) -> None:
        self._router, self._client, self._ifname = world.vpc.router, client, client.eth0.router_ifname
        self._ports: set[int] = set()
        self._tap = self._router.new_socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._tap.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)  # all clients' uploads pass here
        self._frames: dict[int, bytes] = {}

    def stop(self, ports: list[int]) -> None:
        """From now on the client's packets from these ports go nowhere. A tap sees them before they are dropped."""
        self._tap.bind((self._ifname, 0x0003))
        sport = f"tcp sport {{ {', '.join(map(str, ports))} }}"
        rules = "".join(f"{sport} {first_hop} drop\n" for first_hop in ("ip ttl 64", "ip6 hoplimit 64"))
        hook = f'type filter hook ingress device "{self._ifname}" priority 0;'
        self._router.nft(f"table netdev ms_withhold {{\nchain c {{\n{hook}\n{rules}}}\n}}\n")
        self._ports = set(ports)

    def seen(self) -> set[int]:
        """Ports whose packets are being withheld by now."""
        self._tap.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, where = self._tap.recvfrom(70_000)
                packet = pcap.parse(0, len(frame), frame)
                if where[2] != socket.PACKET_OUTGOING and packet and packet.sport in self._ports:
                    self._frames[packet.sport] = frame
        return set(self._frames)

    def release(self) -> None:
        """The newest packet of each port arrives now; later ones are stopped until `close`: nft takes some 50 ms."""
        self.seen()
        for frame in self._frames.values():
            self._client.send_frame("eth0", as_sent(frame))
        self._frames.clear()

    def close(self) -> None:
        """Everything passes again."""
        self._tap.close()
        if self._ports:
            self._router.nft("delete table netdev ms_withhold")
        self._ports.clear()


def as_sent(frame: bytes) -> bytes:
    """A captured frame with its checksum, as the NIC would have sent it (CHECKSUM_PARTIAL), and one hop less to go."""
    v4 = frame[12:14] == b"\x08\x00"
    head, tcp_at = bytearray(frame), 14 + ((frame[14] & 15) * 4 if v4 else 40)
    end = 14 + int.from_bytes(frame[16:18], "big") if v4 else tcp_at + int.from_bytes(frame[18:20], "big")
    head[22 if v4 else 21] -= 1
    if v4:
        head[24:26] = b"\0\0"
        head[24:26] = internet_checksum(bytes(head[14:tcp_at]))
    head[tcp_at + 16 : tcp_at + 18] = b"\0\0"
    pseudo = frame[26:34] if v4 else frame[22:54]
    pseudo += struct.pack("!IHH", end - tcp_at, 0, socket.IPPROTO_TCP)
    head[tcp_at + 16 : tcp_at + 18] = internet_checksum(pseudo + bytes(head[tcp_at:end]))
    return bytes(head)


def internet_checksum(data: bytes) -> bytes:
    """RFC 1071."""
    total = sum(array.array("H", data + bytes(len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("=H", ~total & 0xFFFF)


@dataclass(slots=True)
class Trace:
    """One connection as its client's interface saw it, and the moment its socket became live (PRIME)."""

    ours: list[Packet]  # from the server
    theirs: list[Packet]  # from the client
    live_ns: int

    @classmethod
    def of(cls, stream: Stream, at_client: list[Packet], injected: list[Packet], after_ns: int = 0) -> Trace:
        """`injected`: what the agent of the node on which it went live played in; its first packet is PRIME."""
        client = stream.client
        primes = pcap.select(injected, src=client, sport=stream.port, dst=stream.address, after_ns=after_ns)
        assert primes, f"no packet was played for {stream.address} {stream.port}"
        ours = pcap.select(at_client, src=stream.address, dst=client, dport=stream.port)
        theirs = pcap.select(at_client, src=client, sport=stream.port, dst=stream.address)
        # where client and pod share a node, what was played in is seen as well
        played = {same(p): p.ts_ns for p in primes}
        theirs = [p for p in theirs if p.ts_ns < played.get(same(p), p.ts_ns + 1)]
        return cls(ours, theirs, primes[0].ts_ns)

    def known_end(self) -> int:
        """End of the server's payload that had come to the client before it went live."""
        return _highest(p.end for p in self.ours if p.ts_ns < self.live_ns)

    def acked(self) -> int:
        """What the server had acknowledged before it went live."""
        return _highest(p.ack for p in self.ours if p.ts_ns < self.live_ns)

    def after(self) -> list[Packet]:
        """The server's packets since it went live."""
        return [p for p in self.ours if p.ts_ns >= self.live_ns]

    def by_timer(self, until_ns: int, from_ns: int = 0) -> list[Packet]:
        """Packets of the client that only a timer of its own explains, from PRIME (or `from_ns`) to `until_ns`:
        retransmissions, window probes, keepalives. All of them begin before the end of what it had sent."""
        from_ns = from_ns or self.live_ns
        found: list[Packet] = []
        end: int | None = None
        for p in self.theirs:
            old = end is not None and pcap.before(p.seq, end)
            if old and from_ns <= p.ts_ns <= until_ns:
                found.append(p)
            if end is None or pcap.before(end, p.end):
                end = p.end
        return found


def same(packet: Packet) -> tuple[int | None, ...]:
    """What makes a packet of a flow the same packet at another place; a retransmission has a newer timestamp."""
    return (packet.seq, packet.ack, packet.flags, packet.length, packet.tsval, packet.tsecr)


def _highest(numbers: Iterator[int] | Any) -> int:
    highest: int | None = None
    for n in numbers:
        if highest is None or pcap.before(highest, n):
            highest = n
    assert highest is not None, "the capture has nothing from before"
    return highest
