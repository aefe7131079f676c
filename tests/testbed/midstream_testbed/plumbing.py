"""The floating IP's plumbing in a node and a pod, as the agent does it: for tests that run no agent.

The numbers are those of the design: `to FIP` looks up main at 513, `from FIP` the interface's own table at
600, a /32 route to the pod's host-side veth, the address on the pod's eth0, never on an interface of the
host.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from typing import Any

from midstream_testbed.machine import Eni, Host, Pod, eni_table
from midstream_testbed.pod_net import IFA_F_NODAD, TABLE_MAIN, absent_is_fine

RULE_TO_FLOATING, RULE_FROM_FLOATING = 513, 600


def _bits_family(ip: str) -> tuple[int, int]:
    address = ipaddress.ip_address(ip)
    return address.max_prefixlen, socket.AF_INET if address.version == 4 else socket.AF_INET6


def plumb(pod: Pod, ip: str, eni: Eni | None = None) -> None:
    """Lead `ip` through the host's floating interface into the pod."""
    host, eni = pod.host, eni or pod.host.eth1
    bits, family = _bits_family(ip)

    def on_host(link: Any) -> None:
        veth = link.link_lookup(ifname=pod.host_ifname)[0]
        link.route(
            "replace",
            dst=f"{ip}/{bits}",
            oif=veth,
            family=family,
            scope=253 if family == socket.AF_INET else 0,
        )
        link.rule("add", dst=ip, dst_len=bits, table=TABLE_MAIN, priority=RULE_TO_FLOATING, family=family)
        link.rule(
            "add", src=ip, src_len=bits, table=eni_table(eni), priority=RULE_FROM_FLOATING, family=family
        )

    def in_pod(link: Any) -> None:
        index = link.link_lookup(ifname="eth0")[0]
        flags = {"flags": IFA_F_NODAD} if family == socket.AF_INET6 else {}
        link.addr("add", index=index, address=ip, prefixlen=bits, **flags)

    pod.netlink(in_pod)
    host.netlink(on_host)


def unplumb(pod: Pod, ip: str) -> None:
    """Take away what `plumb` made; what is not there is no error."""
    bits, family = _bits_family(ip)

    def on_host(link: Any) -> None:
        with absent_is_fine():
            link.rule("del", dst=ip, dst_len=bits, priority=RULE_TO_FLOATING, family=family)
        with absent_is_fine():
            link.rule("del", src=ip, src_len=bits, priority=RULE_FROM_FLOATING, family=family)
        with absent_is_fine():
            link.route("del", dst=f"{ip}/{bits}", family=family, scope=253 if family == socket.AF_INET else 0)

    def in_pod(link: Any) -> None:
        with absent_is_fine():
            link.addr("del", index=link.link_lookup(ifname="eth0")[0], address=ip, prefixlen=bits)

    pod.host.netlink(on_host)
    pod.netlink(in_pod)


def announce(host: Host, ip: str, eni: Eni | None = None) -> None:
    """Say on the wire that `ip` is at this host's interface: gratuitous ARP, or an unsolicited NA for v6."""
    eni = eni or host.eth1
    host.send_frame(eni.name, announcement(ip, bytes.fromhex(eni.mac.replace(":", ""))))


def announcement(ip: str, mac: bytes) -> bytes:
    address = ipaddress.ip_address(ip)
    if address.version == 4:
        arp = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac + address.packed + b"\0" * 6 + address.packed
        return b"\xff" * 6 + mac + struct.pack("!H", 0x0806) + arp
    everyone = ipaddress.IPv6Address("ff02::1").packed
    body = struct.pack("!BBHI", 136, 0, 0, 0x20000000) + address.packed + b"\x02\x01" + mac
    pseudo = address.packed + everyone + struct.pack("!II", len(body), 58)
    total = sum(struct.unpack(f"!{len(pseudo + body) // 2}H", pseudo + body))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    body = body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:]
    head = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + address.packed + everyone
    return b"\x33\x33\0\0\0\x01" + mac + struct.pack("!H", 0x86DD) + head + body
