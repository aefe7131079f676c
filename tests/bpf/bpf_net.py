"""Three namespaces for live tests: client -- node (a router) -- pod, made and removed by the test.

One process uses sockets in all of them: a socket belongs to the namespace in which its thread was when it
made it, so nothing has to be started inside.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from midstream_agent import netns
from midstream_agent.hold_layout import CTL, CTL_TIMESTAMPS

CLIENT4, FIP4 = "198.51.100.7", "10.77.0.100"
CLIENT6, FIP6 = "2001:db8:c::7", "2001:db8:77::100"
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_TIMESTAMP = 19, 20, 21, 24
REPAIR_ON, REPAIR_OFF_NO_WP, RECV_QUEUE, SEND_QUEUE, NO_QUEUE = 1, -1, 1, 2, 0
ETH_P_ALL = 3


class Net:
    """`path(who)` is a namespace's path, `inside(who)` enters it for a block."""

    def __init__(self, mtu: int = 9001) -> None:
        self._prefix = f"ms{os.getpid()}"
        self._stack = ExitStack()
        self._mtu = mtu
        self._fds: dict[str, int] = {}

    def __enter__(self) -> Net:
        with self._stack as stack:
            for who in ("client", "node", "pod"):
                ip("netns", "add", self.name(who))
                stack.callback(ip, "netns", "del", self.name(who))
                self._fds[who] = os.open(self.path(who), os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, self._fds[who])
            self._links()
            self._addresses()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def name(self, who: str) -> str:
        return f"{self._prefix}-{who}"

    def path(self, who: str) -> str:
        return f"/run/netns/{self.name(who)}"

    @contextmanager
    def inside(self, who: str) -> Iterator[None]:
        with netns.inside(self._fds[who]):
            yield

    def exec(self, who: str, *argv: str) -> str:
        return subprocess.run(
            ["nsenter", f"--net={self.path(who)}", *argv], check=True, capture_output=True, text=True
        ).stdout

    def _links(self) -> None:
        for left, a, right, b in (("client", "eth0", "node", "eth0"), ("pod", "eth0", "node", "eni0")):
            ip("link", "add", a, "mtu", str(self._mtu), "netns", self.name(left), "type", "veth",
               "peer", "name", b, "mtu", str(self._mtu), "netns", self.name(right))  # fmt: skip
        for who in self._fds:
            for link in ("lo", "eth0", "eni0"):
                if who == "node" or link != "eni0":
                    self.exec(who, "ip", "link", "set", link, "up")

    def _addresses(self) -> None:
        for who, device, address in (
            ("client", "eth0", f"{CLIENT4}/32"), ("client", "eth0", f"{CLIENT6}/128"),
            ("pod", "eth0", f"{FIP4}/32"), ("pod", "eth0", f"{FIP6}/128"),
        ):  # fmt: skip
            nodad = ["nodad"] if ":" in address else []
            self.exec(who, "ip", "addr", "add", address, "dev", device, *nodad)
        macs = {who: self._mac(who, dev) for who, dev in (("client", "eth0"), ("pod", "eth0"))}
        self.exec("node", "sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for who, device in (("client", "eth0"), ("pod", "eni0")):
            router = self._mac("node", device)
            for gateway in ("169.254.1.1", "fe80::1"):
                self.exec(
                    who, "ip", "neigh", "add", gateway, "lladdr", router, "dev", "eth0", "nud", "permanent"
                )
                default = "default" if "." in gateway else "::/0"
                self.exec(who, "ip", "route", "add", default, "via", gateway, "dev", "eth0", "onlink")
            for address in {"client": (CLIENT4, CLIENT6), "pod": (FIP4, FIP6)}[who]:
                self.exec("node", "ip", "route", "add", address, "dev", device)
                self.exec(
                    "node",
                    "ip",
                    "neigh",
                    "add",
                    address,
                    "lladdr",
                    macs[who],
                    "dev",
                    device,
                    "nud",
                    "permanent",
                )

    def _mac(self, who: str, device: str) -> str:
        with self.inside(who):
            return _mac_of(device)

    def connect(self, v6: bool = False) -> tuple[socket.socket, socket.socket]:
        """(client's socket, pod's socket), ESTABLISHED."""
        family, fip = (socket.AF_INET6, FIP6) if v6 else (socket.AF_INET, FIP4)
        with self.inside("pod"):
            listener = socket.create_server((fip, 443), family=family)
        with self.inside("client"):
            client = socket.socket(family)
        client.settimeout(10)
        client.connect((fip, 443))
        server, _ = listener.accept()
        listener.close()
        return client, server

    def sniff(self, who: str) -> socket.socket:
        """All packets of the namespace's eth0, both directions."""
        with self.inside(who):
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            sock.bind(("eth0", ETH_P_ALL))
        sock.settimeout(10)
        return sock

    def counter(self, who: str, name: str) -> int:
        """One of the kernel's TCP counters."""
        with self.inside(who):
            # of the thread: /proc/net is the process's first thread's
            lines = "".join(
                Path("/proc/thread-self/net", f).read_text() for f in ("snmp", "netstat")
            ).splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            table = dict(zip(names.split()[1:], values.split()[1:], strict=True))
            if name in table and names.split()[0] in ("Tcp:", "TcpExt:"):
                return int(table[name])
        raise KeyError(name)


def ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True)


def _mac_of(device: str) -> str:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((device, 0))
        return ":".join(f"{b:02x}" for b in sock.getsockname()[4])


def key_of(server: socket.socket) -> bytes:
    """struct ms_flow_key of an accepted socket."""
    local, remote = server.getsockname(), server.getpeername()
    return _packed(local[0]) + _packed(remote[0]) + struct.pack("!HH", local[1], remote[1])


def _packed(address: str) -> bytes:
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return bytes(10) + b"\xff\xff" + socket.inet_aton(address)


def freeze(server: socket.socket) -> tuple[int, int, int]:
    """Put the socket into repair; (snd_nxt, rcv_nxt, TSval)."""
    server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)
    seqs = []
    for queue in (SEND_QUEUE, RECV_QUEUE):
        server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        seqs.append(server.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF)
    server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)
    return seqs[0], seqs[1], server.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & 0xFFFFFFFF


def thaw(server: socket.socket) -> None:
    server.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_NO_WP)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # which repair mode cleared


def ctl(state: int, snd_nxt: int = 0, rcv_nxt: int = 0, tsval: int = 0) -> bytes:
    return CTL.pack(state, CTL_TIMESTAMPS, snd_nxt, rcv_nxt, tsval, 0, 0, 0)
