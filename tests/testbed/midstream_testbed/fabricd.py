"""EC2's network as one small process in the router's namespace: which address belongs to which interface.

The table is the router's routing table: a /32 or /128 route an address. Strict reverse-path matching (nft
``fib``, see strict.py) makes the same route the anti-spoofing rule, so that one atomic netlink message moves
an address: from that instant packets to it go to the new interface, and packets from it are dropped at the
old one.

Announcements (gratuitous ARP, unsolicited neighbour advertisements) from a host's interface ask for a move,
as the l2 provider does on bare metal; ``assign`` on the control socket asks for one as EC2's API would. It
takes effect after ``move_seconds``. A new request for an address supersedes a pending one.

A process of its own, so that neither a busy test nor its garbage collector delays a move: this delay is part
of every client's stall. Everything runs on one thread and one epoll loop: packets and requests in, one
netlink write a batch out. Standard library only and no imports from the package: it is started by path with
``python -I -S`` and ready in a few milliseconds. When the lifeline on stdin ends, the process that made the
testbed is gone and this one sets the clean-up going.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import gc
import heapq
import ipaddress
import json
import os
import select
import socket
import struct
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD
PACKET_OUTGOING = 4
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33
NEIGHBOUR_ADVERTISEMENT = 136
NA_SOLICITED = 0x40
READY = b"ready\n"

RTM_NEWROUTE, RTM_DELROUTE = 24, 25
NLM_F_REQUEST, NLM_F_REPLACE, NLM_F_CREATE = 1, 0x100, 0x400
NLMSG_ERROR = 2
RTA_DST, RTA_OIF, RTA_GATEWAY = 1, 4, 5
RT_TABLE_MAIN, RTPROT_STATIC, RTN_UNICAST, RTNH_F_ONLINK = 254, 4, 1, 4


@dataclass(eq=False)
class Port:
    """A router interface and what is behind it. Gateways are the interface's own primary addresses."""

    ifindex: int
    ifname: str
    host: str
    eni: str
    mac: str
    gateway4: str
    gateway6: str
    attached: bool = True


@dataclass
class Address:
    """A floating address: its owner by the table (`port` None: owned by nobody that is attached)."""

    ip: str
    port: Port | None
    previous: Port | None = None
    pending: Move | None = None


@dataclass
class Move:
    """One asked-for move and what came of it. Times are CLOCK_MONOTONIC and CLOCK_REALTIME, in ns."""

    ip: str
    source: str | None
    target: str
    outcome: str  # pending | moved | refused | lied | superseded
    asked_mono_ns: int
    asked_ns: int
    effective_mono_ns: int | None = None
    effective_ns: int | None = None
    repeats: int = 0
    port: Port | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        found = asdict(self)
        del found["port"]
        return found


def _attribute(kind: int, value: bytes) -> bytes:
    head = struct.pack("=HH", 4 + len(value), kind)
    return head + value + b"\0" * (-len(value) % 4)


@functools.cache
def route_message(ip: str, port: Port | None) -> bytes:
    """Netlink message that makes the address's route point to `port`, or that deletes it. Cached, and the
    cache is warm before the first move: the time from announcement to route is part of the clients' stall."""
    address = ipaddress.ip_address(ip)
    gateway = (port.gateway4 if address.version == 4 else port.gateway6) if port else ""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = struct.pack(
        "=BBBBBBBBI", family, address.max_prefixlen, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST,
        RTNH_F_ONLINK if port else 0,
    )  # fmt: skip
    body += _attribute(RTA_DST, address.packed)
    if port:
        body += _attribute(RTA_OIF, struct.pack("=I", port.ifindex))
        body += _attribute(RTA_GATEWAY, ipaddress.ip_address(gateway).packed)
        head = struct.pack(
            "=IHHII", 16 + len(body), RTM_NEWROUTE, NLM_F_REQUEST | NLM_F_REPLACE | NLM_F_CREATE, 1, 0
        )
    else:
        head = struct.pack("=IHHII", 16 + len(body), RTM_DELROUTE, NLM_F_REQUEST, 1, 0)
    return head + body


def announced(frame: bytes) -> tuple[str, str] | None:
    """(address, sender's MAC) that an ARP or ND frame announces; None for everything else."""
    mac = frame[6:12].hex(":")
    kind = int.from_bytes(frame[12:14], "big")
    if kind == ETH_P_ARP and len(frame) >= 42 and frame[28:32] == frame[38:42] != b"\0\0\0\0":
        return str(ipaddress.IPv4Address(frame[28:32])), mac
    if kind == ETH_P_IPV6 and len(frame) >= 78 and frame[20] == 58 and frame[54] == NEIGHBOUR_ADVERTISEMENT:
        if frame[58] & NA_SOLICITED:
            return None
        return str(ipaddress.IPv6Address(frame[62:78])), mac
    return None


def _filter_program() -> bytes:
    """Classic BPF: ARP, or IPv6 whose next header is ICMPv6 and whose type is a neighbour advertisement."""
    load_half, load_byte, jump_eq, ret = 0x28, 0x30, 0x15, 0x06
    code = [
        (load_half, 0, 0, 12),
        (jump_eq, 5, 0, ETH_P_ARP),
        (jump_eq, 0, 5, ETH_P_IPV6),
        (load_byte, 0, 0, 20),
        (jump_eq, 0, 3, 58),
        (load_byte, 0, 0, 54),
        (jump_eq, 0, 1, NEIGHBOUR_ADVERTISEMENT),
        (ret, 0, 0, 0xFFFF),
        (ret, 0, 0, 0),
    ]
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def listening_packet_socket(protocol: int) -> socket.socket:
    """Hears one Ethernet protocol on every interface, also on those that are plugged in later."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(protocol))
    program = _filter_program()
    code = ctypes.create_string_buffer(program)
    sock.setsockopt(
        socket.SOL_SOCKET,
        SO_ATTACH_FILTER,
        struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code)),
    )
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    return sock


class Fabric:
    """The table, its pending moves and the hooks that tests turn. Its only I/O is the write in `_apply`."""

    def __init__(self) -> None:
        self.ports: dict[str, Port] = {}  # by the router's name of the interface
        self.addresses: dict[str, Address] = {}
        self.moves: list[Move] = []
        self.hooks: dict[str, Any] = {"move_seconds": 0.0, "refuse": False, "lie": False, "deaf": False}
        self.ignored = 0
        self._due: list[tuple[float, int, Move]] = []
        self._netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        self._netlink.bind((0, 0))

    # -- asking for moves

    def announce(self, heard: list[tuple[str, str, str]]) -> None:
        """A batch of announcements: (router interface, address, sender's MAC)."""
        moves = []
        for ifname, ip, mac in heard:
            port, address = self.ports.get(ifname), self.addresses.get(ip)
            if self.hooks["deaf"] or port is None or address is None or port.mac != mac:
                self.ignored += 1
                continue
            moves += self.request(address, port)
        self._effect(moves)

    def request(self, address: Address, port: Port) -> list[Move]:
        """Book a move. What it returns takes effect now."""
        pending = address.pending
        if pending is not None and pending.port is port:
            pending.repeats += 1
            return []
        if pending is not None:
            pending.outcome = "superseded"
            address.pending = None
        if address.port is port:
            return []
        move = self._book(address, port)
        if move.outcome != "pending":
            return []
        address.pending = move
        if self.hooks["move_seconds"] <= 0:
            return [move]
        heapq.heappush(self._due, (time.monotonic() + self.hooks["move_seconds"], len(self.moves), move))
        return []

    def _book(self, address: Address, port: Port) -> Move:
        outcome = "refused" if self.hooks["refuse"] else "lied" if self.hooks["lie"] else "pending"
        last = self.moves[-1] if self.moves else None
        if (
            last
            and outcome != "pending"
            and (last.ip, last.port, last.outcome) == (address.ip, port, outcome)
        ):
            last.repeats += 1
            return last
        source = address.port.host if address.port else None
        move = Move(address.ip, source, port.host, outcome, time.monotonic_ns(), time.time_ns(), port=port)
        self.moves.append(move)
        return move

    # -- making them true

    def next_due_s(self) -> float | None:
        return max(0.0, self._due[0][0] - time.monotonic()) if self._due else None

    def tick(self) -> None:
        ready = []
        while self._due and self._due[0][0] <= time.monotonic():
            move = heapq.heappop(self._due)[2]
            if move.outcome == "pending":
                ready.append(move)
        self._effect(ready)

    def _effect(self, moves: list[Move]) -> None:
        moves = [move for move in moves if move.outcome == "pending" and move.port and move.port.attached]
        if not moves:
            return
        self._apply([(move.ip, move.port) for move in moves])
        mono_ns, now_ns = time.monotonic_ns(), time.time_ns()
        for move in moves:
            address = self.addresses[move.ip]
            address.previous, address.port, address.pending = address.port, move.port, None
            move.outcome, move.effective_mono_ns, move.effective_ns = "moved", mono_ns, now_ns

    def _apply(self, routes: list[tuple[str, Port | None]]) -> None:
        """One write for the whole batch: the kernel has carried it out when sendto returns."""
        messages = [route_message(ip, port) for ip, port in routes]
        for start in range(0, len(messages), 256):
            self._netlink.send(b"".join(messages[start : start + 256]))
        self._raise_netlink_errors()

    def _raise_netlink_errors(self) -> None:
        while True:
            try:
                answer = self._netlink.recv(65536)
            except BlockingIOError:
                return
            kind = struct.unpack_from("=H", answer, 4)[0]
            code = -struct.unpack_from("=i", answer, 16)[0] if kind == NLMSG_ERROR else 0
            if code and code != errno.ESRCH:  # a deleted route of a host that is gone
                raise OSError(code, f"fabric could not write a route: {os.strerror(code)}")

    # -- requests of the control socket

    def op_add_port(self, **given: Any) -> None:
        port = Port(**given)
        self.ports[port.ifname] = port
        for ip in self.addresses:
            route_message(ip, port)

    def op_remove_port(self, ifname: str) -> None:
        """The interface is gone: its addresses stay allocated and belong to nobody until somebody asks."""
        port = self.ports.pop(ifname)
        port.attached = False
        for address in self.addresses.values():
            if address.port is port:
                address.port = None

    def op_allocate(self, ip: str, ifname: str) -> None:
        if ip in self.addresses:
            raise ValueError(f"{ip} is allocated already")
        port = self.ports[ifname]
        self._apply([(ip, port)])
        self.addresses[ip] = Address(ip, port)
        for other in self.ports.values():
            route_message(ip, other)

    def op_release(self, ip: str) -> None:
        self._apply([(ip, None)])
        del self.addresses[ip]

    def op_assign(self, ip: str, ifname: str) -> None:
        self._effect(self.request(self.addresses[ip], self.ports[ifname]))

    def op_reverse(self, ip: str) -> None:
        """The move is undone at once and against the will of the new owner."""
        address = self.addresses[ip]
        if address.previous is None or not address.previous.attached:
            raise ValueError(f"{ip} has no earlier owner to go back to")
        if address.pending:
            address.pending.outcome = "superseded"
        back = Move(ip, address.port.host if address.port else None, address.previous.host, "pending",
                    time.monotonic_ns(), time.time_ns(), port=address.previous)  # fmt: skip
        self.moves.append(back)
        self._effect([back])

    def op_owner(self, ip: str) -> dict[str, str] | None:
        port = self.addresses[ip].port
        return {"host": port.host, "eni": port.eni} if port else None

    def op_set(self, **hooks: Any) -> None:
        unknown = set(hooks) - set(self.hooks)
        if unknown:
            raise ValueError(f"no such hook: {sorted(unknown)}")
        self.hooks.update(hooks)

    def op_get(self) -> dict[str, Any]:
        return {**self.hooks, "ignored": self.ignored}

    def op_moves(self) -> list[dict[str, Any]]:
        return [move.as_dict() for move in self.moves]


class Server:
    """The epoll loop around a Fabric: packets, control requests, the clock and the lifeline."""

    def __init__(self, control_path: str, on_orphaned: list[str]) -> None:
        self.fabric = Fabric()
        self.on_orphaned = on_orphaned
        self.packets = [listening_packet_socket(kind) for kind in (ETH_P_ARP, ETH_P_IPV6)]
        self.control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self.control.bind(control_path)
        self.control.listen(64)
        self.clients: dict[int, socket.socket] = {}
        self.waiting: list[tuple[float, str, str, socket.socket]] = []
        self.poll = select.epoll()
        for sock in (*self.packets, self.control):
            self.poll.register(sock, select.EPOLLIN)
        self.poll.register(0, select.EPOLLIN)

    def run(self) -> None:
        while True:
            for fd, _ in self.poll.poll(self._timeout_s()):
                if fd == 0:
                    return self._lifeline()
                if fd == self.control.fileno():
                    self._accept()
                elif fd in self.clients:
                    self._request(self.clients[fd])
                else:
                    self.fabric.announce(self._heard())
            self.fabric.tick()
            self._answer_waiting()

    def _timeout_s(self) -> float | None:
        times = [at - time.monotonic() for at, *_ in self.waiting]
        due = self.fabric.next_due_s()
        if due is not None:
            times.append(due)
        return max(0.0, min(times)) if times else None

    def _heard(self) -> list[tuple[str, str, str]]:
        heard = []
        for sock in self.packets:
            with contextlib.suppress(BlockingIOError):
                while True:
                    frame, (ifname, _, direction, *_) = sock.recvfrom(128)
                    found = announced(frame) if direction != PACKET_OUTGOING else None
                    if found:
                        heard.append((ifname, *found))
        return heard

    def _accept(self) -> None:
        sock, _ = self.control.accept()
        self.clients[sock.fileno()] = sock
        self.poll.register(sock, select.EPOLLIN)

    def _forget(self, sock: socket.socket) -> None:
        self.poll.unregister(sock)
        del self.clients[sock.fileno()]
        self.waiting = [entry for entry in self.waiting if entry[3] is not sock]
        sock.close()

    def _request(self, sock: socket.socket) -> None:
        data = sock.recv(1 << 20)
        if not data:
            return self._forget(sock)
        given = json.loads(data)
        name = given.pop("op")
        if name == "wait":
            self.waiting.append((time.monotonic() + given["timeout_s"], given["ip"], given["host"], sock))
            return self._answer_waiting()
        try:
            result = getattr(self.fabric, f"op_{name}")(**given)
            self._reply(sock, {"ok": True, "result": result})
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            self._reply(sock, {"ok": False, "error": f"{type(error).__name__}: {error}"})

    def _reply(self, sock: socket.socket, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        sock.setsockopt(socket.SOL_SOCKET, 32, 2 * len(data) + 65536)  # SO_SNDBUFFORCE: a long log of moves
        with contextlib.suppress(
            BrokenPipeError, ConnectionResetError
        ):  # the asker has gone: epoll says so next
            sock.send(data)

    def _answer_waiting(self) -> None:
        now = time.monotonic()
        for entry in list(self.waiting):
            at, ip, host, sock = entry
            port = self.fabric.addresses[ip].port if ip in self.fabric.addresses else None
            there = port is not None and port.host == host
            if there or at <= now:
                self.waiting.remove(entry)
                self._reply(sock, {"ok": True, "result": there})

    def _lifeline(self) -> None:
        """EOF on stdin. The owner's orderly end kills this process first; so this was a crash."""
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.execv(self.on_orphaned[0], self.on_orphaned)


def _real_time() -> None:
    """Ahead of everything that tests run, where the kernel lets us: the work is microseconds an event."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def main() -> None:
    config = json.loads(sys.argv[1])
    server = Server(config["control"], config["on_orphaned"])
    _real_time()
    gc.collect()
    gc.freeze()
    gc.disable()  # nothing here makes cycles
    os.write(1, READY)
    server.run()


if __name__ == "__main__":
    main()
