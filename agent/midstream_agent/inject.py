"""Packets that the agent plays into the host's forwarding path, as if the client had sent them.

A veth pair of our own in the host's namespace: what is written to one end arrives at the other and takes
the whole way of a packet from outside: conntrack, SNAT chains, policy filters, then the route to the pod.
That is what PRIME and the kept segment of ACTIVATE need; a raw IP socket would pass the local output hooks
instead, and conntrack would see a connection of the host's own.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

from pyroute2 import IPRoute

from midstream_agent.net import sysctl, unless_exists

OUT, IN = "msinj0", "msinj1"
ADDRESS = "169.254.77.1"  # link-local, on no wire
_ETH_P = {4: b"\x08\x00", 6: b"\x86\xdd"}


class Injector:
    """Owner of the veth pair and of one packet socket on it."""

    def __init__(self, sock: socket.socket, header: bytes) -> None:
        self._sock = sock
        self._header = header

    @classmethod
    def create(cls, ipr: IPRoute, mtu_bytes: int) -> Injector:
        """Make (or take over) the pair. Runs in the netlink thread."""
        unless_exists(ipr.link, "add", ifname=OUT, kind="veth", peer={"ifname": IN})
        for name in (OUT, IN):
            # a client of this very node has a source address that is local here
            for knob, value in (("rp_filter", "2"), ("accept_local", "1")):
                sysctl(f"net/ipv4/conf/{name}/{knob}", value)
            sysctl(f"net/ipv6/conf/{name}/accept_ra", "0")
            ipr.link("set", ifname=name, state="up", mtu=max(mtu_bytes, 1500))
        sysctl(f"net/ipv4/conf/{IN}/forwarding", "1")
        # even loose rp_filter drops all that arrives on an interface without an address (fib_validate_source)
        unless_exists(ipr.addr, "add", index=ipr.link_lookup(ifname=IN)[0], address=ADDRESS, prefixlen=32)
        mac = {
            n: bytes.fromhex(ipr.get_links(ifname=n)[0].get_attr("IFLA_ADDRESS").replace(":", "")) for n in (OUT, IN)
        }
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # protocol 0: receives nothing
        sock.bind((OUT, 0))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        return cls(sock, mac[IN] + mac[OUT])

    def play(self, packets: Iterable[bytes]) -> int:
        """Send L3 packets into the host's forwarding path; returns how many."""
        sent = 0
        for packet in packets:
            self._sock.send(self._header + _ETH_P[packet[0] >> 4] + packet)
            sent += 1
        return sent

    def close(self, ipr: IPRoute | None = None) -> None:
        self._sock.close()
        if ipr is not None:
            ipr.link("del", ifname=OUT)
