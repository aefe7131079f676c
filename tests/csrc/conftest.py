"""Three hosts for the socket tests: a client and two nodes that own the same service address.

Each host is a network namespace that lives in a thread: it has no name, so nothing can be left behind. The
client reaches a node through a link of its own; `lab.route(node)` is the address move. A Gate plays the BPF
hold of the agent, without its answers: it drops both directions of a node's link and notes what the client
sends, so that the library is tested with nothing but itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import pytest
from midstream_agent import tcp

T = TypeVar("T")
Socket = socket.socket
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

SERVICE = {4: "10.9.0.1", 6: "fd09::1"}
CLIENT = {4: "10.8.0.2", 6: "fd08::2"}
NOTE_SEG, NOTE_DATA, NOTE_RST, NOTE_FIN, NOTE_TS = 1, 2, 4, 8, 16
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


class Host:
    """A thread in a network namespace of its own; sockets made by run() belong to it for ever."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._calls: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue()
        self._sockets: list[Socket] = []
        self.tid = 0
        started: Future[int] = Future()
        self._thread = threading.Thread(target=self._loop, args=(started,), name=name, daemon=True)
        self._thread.start()
        self.tid = started.result()
        self.sh("ip link set lo up")
        self.sysctl("net/ipv4/conf/all/rp_filter", "0")
        self.sysctl("net/ipv6/conf/default/dad_transmits", "0")  # else no neighbour is asked for 2 s

    def _loop(self, started: Future[int]) -> None:
        if _libc.unshare(_CLONE_NEWNET):
            started.set_exception(OSError(ctypes.get_errno(), "unshare"))
            return
        started.set_result(threading.get_native_id())
        while (item := self._calls.get()) is not None:
            call, future = item
            try:
                future.set_result(call())
            except BaseException as e:  # handed to the caller
                future.set_exception(e)

    def run(self, call: Callable[..., T], *args: Any) -> T:
        future: Future[T] = Future()
        self._calls.put((lambda: call(*args), future))
        return future.result()

    def sh(self, command: str, stdin: str = "") -> str:
        def call() -> str:
            done = subprocess.run(command.split(), input=stdin, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{self.name}: {command}: {done.stderr}"
            return done.stdout

        return self.run(call)

    def sysctl(self, knob: str, value: str) -> None:
        self.run(_write, f"/proc/sys/{knob}", value)

    def socket(self, family: int, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> Socket:
        return self.keep(self.run(socket.socket, family, kind, protocol))

    def keep(self, sock: Socket) -> Socket:
        """Closed when the host is."""
        self._sockets.append(sock)
        return sock

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self._calls.put(None)
        self._thread.join()


def _write(path: str, value: str) -> None:
    with open(path, "w") as f:
        f.write(value)


class Gate:
    """Drops both directions of a node's link, and keeps what the client sends as a hold would.

    What the node sends is lost on the client's side: its stack must believe that it was sent.
    """

    def __init__(self, lab: Lab, i: int, node: Host) -> None:
        self._ends = ((lab.client, f"c{i}"), (node, "eth0"))
        self._tap = node.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self._tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 20)
        self._shut: set[Host] = set()
        self._listening = False

    def lose(self, *, to_client: bool = True, to_node: bool = True) -> None:
        """Lose packets of these directions until open()."""
        for wanted, (host, device) in zip((to_client, to_node), self._ends, strict=True):
            if wanted and host not in self._shut:
                self._shut.add(host)
                hook = f'type filter hook ingress device "{device}" priority 0;'
                host.sh("nft -f -", f"table netdev gate_{device} {{ chain in {{ {hook} meta l4proto tcp drop; }}\n }}")

    def listen(self) -> None:
        """Begin to keep what the client sends."""
        if not self._listening:
            self._tap.bind((self._ends[1][1], 0x0003))
        self._listening = True

    def shut(self) -> None:
        self.listen()
        self.lose()

    def open(self) -> None:
        for host, device in self._ends:
            if host in self._shut:
                host.sh(f"nft delete table netdev gate_{device}")
        self._shut.clear()

    def packets(self) -> list[Segment]:
        """What the client has sent since shut()."""
        found = []
        self._tap.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                frame, where = self._tap.recvfrom(70000)
                if where[2] != socket.PACKET_OUTGOING and (segment := parse(frame[14:])):
                    found.append(segment)
        return found


class Segment:
    """One TCP packet as it was on the wire."""

    def __init__(self, ports: tuple[int, int], tcp_header: bytes, payload: bytes) -> None:
        self.ports = ports
        self.seq, self.ack, _, self.flags, self.window = struct.unpack("!IIBBH", tcp_header[4:16])
        self.payload = payload
        self.ts: tuple[int, int] | None = None
        options = tcp_header[20:]
        while options and options[0]:
            if options[0] == 1:
                options = options[1:]
                continue
            if options[0] == 8:
                self.ts = struct.unpack("!II", options[2:10])
            options = options[max(options[1], 2) :]


def parse(packet: bytes) -> Segment | None:
    if packet[0] >> 4 == 4:
        header, protocol, total = (packet[0] & 15) * 4, packet[9], struct.unpack("!H", packet[2:4])[0]
    else:
        header, protocol, total = 40, packet[6], 40 + struct.unpack("!H", packet[4:6])[0]
    if protocol != socket.IPPROTO_TCP:
        return None
    body = packet[header:total] if total else packet[header:]
    offset = (body[12] >> 4) * 4
    return Segment(struct.unpack("!HH", body[:4]), body[:offset], body[offset:])


def after(a: int, b: int) -> bool:
    return 0 < (a - b) & 0xFFFFFFFF < 0x80000000


def note(segments: list[Segment], rcv_nxt: int, remote_port: int | None = None) -> bytes:
    """struct ms_flow_note as the hold would have written it for these packets of one client."""
    flags, newest, data = 0, None, b""
    for s in segments:
        if remote_port is not None and s.ports[0] != remote_port:
            continue
        if s.flags & RST:
            flags |= NOTE_RST if s.seq == rcv_nxt else 0
            continue
        if not s.flags & ACK or s.flags & SYN:
            continue
        if newest is None or not after(newest.ack, s.ack):
            newest = s
        if s.seq == rcv_nxt and len(s.payload) >= len(data):
            data = s.payload[:2048]
            flags = flags & ~NOTE_FIN
            if s.flags & FIN and len(s.payload) <= 2048:
                flags |= NOTE_FIN
    if data:
        flags |= NOTE_DATA
    if newest is None:
        head = struct.pack("=12I", 2, flags, *[0] * 10)
        return (head + bytes(2048)).ljust(tcp.NOTE_BYTES, b"\0")
    tsval, tsecr = newest.ts or (0, 0)
    flags |= NOTE_SEG | (NOTE_TS if newest.ts else 0)
    fields = (newest.seq, newest.ack, newest.window, tsval, tsecr, rcv_nxt, len(data), len(segments), 0, 0)
    return struct.pack("=12I", 2, flags, *fields) + data.ljust(2048, b"\0")


class Lab:
    """The three hosts and what a test does with them."""

    def __init__(self, mtu: int = 1500) -> None:
        self.client, self.a, self.b = Host("client"), Host("node-a"), Host("node-b")
        self.mtu = mtu
        self._out: dict[int, socket.socket] = {}
        for i, node in enumerate((self.a, self.b), start=1):
            self._link(i, node)
        for family in (4, 6):
            self.client.sh(f"ip addr add {CLIENT[family]}/{32 if family == 4 else 128} dev lo nodad")
        self.route(self.a)

    def _link(self, i: int, node: Host) -> None:
        self.client.sh(f"ip link add c{i} mtu {self.mtu} type veth peer name eth0 mtu {self.mtu} netns {node.tid}")
        for host, name, end in ((self.client, f"c{i}", 2), (node, "eth0", 1)):
            host.sh(f"ip link set {name} up")
            host.sh(f"ip addr add 10.{i}.0.{end}/24 dev {name}")
            host.sh(f"ip addr add fd0{i}::{end}/64 dev {name} nodad")
        for family, via in ((4, f"10.{i}.0.2"), (6, f"fd0{i}::2")):
            length = 32 if family == 4 else 128
            node.sh(f"ip addr add {SERVICE[family]}/{length} dev lo nodad")
            node.sh(f"ip -{family} route add {CLIENT[family]} via {via} src {SERVICE[family]}")
        node.mac = self._mac(node, "eth0")  # type: ignore[attr-defined]
        node.index = i  # type: ignore[attr-defined]

    @staticmethod
    def _mac(host: Host, name: str) -> bytes:
        text = host.sh(f"ip -br link show dev {name}").split()[2]
        return bytes.fromhex(text.replace(":", ""))

    def route(self, node: Host) -> None:
        """From now on clients reach the service at this node."""
        i = 1 if node is self.a else 2
        for family, via in ((4, f"10.{i}.0.1"), (6, f"fd0{i}::1")):
            self.client.sh(f"ip -{family} route replace {SERVICE[family]} via {via} src {CLIENT[family]}")

    def gate(self, node: Host) -> Gate:
        return Gate(self, 1 if node is self.a else 2, node)

    def injector(self, node: Host) -> Callable[[list[bytes]], None]:
        """Plays packets where the client's own arrive."""
        i = 1 if node is self.a else 2
        if i not in self._out:  # binding takes the kernel 20 ms
            self._out[i] = self.client.socket(socket.AF_PACKET, socket.SOCK_RAW)
            self._out[i].bind((f"c{i}", 0))
        header = self._mac_of[i] + self._mac_of[-i]

        def play(packets: list[bytes]) -> None:
            for p in packets:
                self._out[i].send(header + (b"\x08\x00" if p[0] >> 4 == 4 else b"\x86\xdd") + p)

        return play

    @property
    def _mac_of(self) -> dict[int, bytes]:
        if not hasattr(self, "_macs"):
            self._macs = {}
            for i, node in ((1, self.a), (2, self.b)):
                self._macs[i] = self._mac(node, "eth0")
                self._macs[-i] = self._mac(self.client, f"c{i}")
        return self._macs

    def listen(self, node: Host, family: int = 4, mapped: bool = False, port: int = 0) -> socket.socket:
        s = node.socket(socket.AF_INET6 if family == 6 or mapped else socket.AF_INET)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if mapped:
            s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        s.bind(("::" if mapped else SERVICE[family], port))
        s.listen(4096)
        return s

    def connect(self, listener: socket.socket, family: int = 4) -> tuple[socket.socket, socket.socket]:
        """(client's socket, server's socket) of a new connection."""
        client = self.client.socket(socket.AF_INET6 if family == 6 else socket.AF_INET)
        client.connect((SERVICE[family], listener.getsockname()[1]))
        server, _ = listener.accept()
        return client, self.client.keep(server)

    def blanks(self, node: Host, families: list[int]) -> list[socket.socket]:
        return [node.socket(socket.AF_INET6 if f == 6 else socket.AF_INET) for f in families]

    def close(self) -> None:
        for host in (self.a, self.b, self.client):
            host.close()


class Move:
    """One migration of sockets from a node to the other, step by step."""

    def __init__(self, lab: Lab, source: Host, servers: list[socket.socket]) -> None:
        self.lab, self.source = lab, source
        self.target = lab.b if source is lab.a else lab.a
        self.servers = servers
        self.gates = (lab.gate(source), lab.gate(self.target))
        self.batch: tcp.Batch | None = None
        self.live: list[socket.socket] = []

    def freeze(self) -> tcp.Batch:
        self.gates[0].shut()
        self.batch = tcp.Batch.checkpoint([s.fileno() for s in self.servers])
        assert not any(self.batch.errors), [tcp.strerror(e) for e in self.batch.errors]
        return self.batch

    def restore(self) -> None:
        assert self.batch is not None
        self.batch = tcp.Batch.decode(self.batch.encode())
        self.gates[1].shut()
        self.live = self.lab.blanks(self.target, self.batch.families())
        errors = self.batch.restore([s.fileno() for s in self.live])
        assert not any(errors), [tcp.strerror(e) for e in errors]

    def notes(self) -> bytes:
        assert self.batch is not None
        segments = self.gates[0].packets() + self.gates[1].packets()
        return b"".join(note(segments, i.rcv_nxt, i.remote[1]) for i in self.batch.infos())

    def activate(self, notes: bytes | None = None) -> list[socket.socket]:
        assert self.batch is not None
        self.lab.route(self.target)
        notes = self.notes() if notes is None else notes
        for s in self.servers:
            s.close()
        self._bring_up(self.target, self.live, notes, thaw=False)
        return self.live

    def thaw(self, notes: bytes | None = None) -> None:
        assert self.batch is not None
        notes = self.notes() if notes is None else notes
        for s in self.live:
            s.close()
        self._bring_up(self.source, self.servers, notes, thaw=True)

    def _bring_up(self, node: Host, sockets: list[socket.socket], notes: bytes, *, thaw: bool) -> None:
        assert self.batch is not None
        batch, fds = self.batch, [s.fileno() for s in sockets]
        begin, finish = (batch.thaw_begin, batch.thaw_finish) if thaw else (batch.activate_begin, batch.activate_finish)
        play = self.lab.injector(node)
        self.began = time.perf_counter()
        errors = begin(fds, notes)
        assert not any(errors), [tcp.strerror(e) for e in errors]
        for gate in self.gates:  # not earlier: a socket in repair would answer the client, see midstream_tcp.h
            gate.open()
        play(batch.client_packets(notes, tcp.PRIME))
        play(batch.client_packets(notes, tcp.PLAY))
        errors = finish(fds, notes)
        assert not any(errors), [tcp.strerror(e) for e in errors]

    def run(self, hold_s: float = 0.0) -> list[socket.socket]:
        self.freeze()
        self.restore()
        if hold_s:
            time.sleep(hold_s)
        return self.activate()


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def lab_of() -> Iterator[Callable[[int], Lab]]:
    """A lab with an MTU of the test's choice."""
    made: list[Lab] = []

    def make(mtu: int) -> Lab:
        made.append(Lab(mtu))
        return made[-1]

    try:
        yield make
    finally:
        for lab in made:
            lab.close()


@pytest.fixture
def move() -> type[Move]:
    return Move


def _may_make_namespaces() -> bool:
    return os.geteuid() == 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if _may_make_namespaces():
        return
    for item in items:
        if {"lab", "lab_of"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason="needs root, or unshare -rn: no namespaces can be made"))
