"""A pod's wire as the VPC CNI lays it: veth `eni*`, /32 route and rule on the host, a permanent neighbour in the pod.

Used for the testbed's own pods (machine.py) and, as a CNI plugin, for those of a kubelet (cni.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped,unused-ignore]

from midstream_testbed import kernel

IFA_F_NODAD = 0x02
NUD_PERMANENT = 0x80
TABLE_MAIN = 254
ETH_P_ALL = 3
INGRESS, EGRESS = "ffff:fff2", "ffff:fff3"
POD_GATEWAY4, LINK_GATEWAY6 = "169.254.1.1", "fe80::1"
RULE_TO_POD = 512  # the VPC CNI's number


@dataclass(frozen=True)
class PodWire:
    """`number` is the pod's on its host: of its link-local address."""

    host_ifname: str
    ipv4: str
    ipv6: str
    number: int
    mtu: int

    def addresses(self) -> tuple[tuple[str, int, int], ...]:
        """(address, prefix bits, family)"""
        return (self.ipv4, 32, 2), (self.ipv6, 128, 10)


@contextlib.contextmanager
def absent_is_fine() -> Iterator[None]:
    """Deleting what a crash or somebody else has already deleted."""
    try:
        yield
    except NetlinkError as error:
        if error.code not in (errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENODEV):
            raise


def bring_up(ip: Any, ifname: str, mtu: int | None = None) -> int:
    index = int(ip.link_lookup(ifname=ifname)[0])
    ip.link("set", index=index, state="up", **({"mtu": mtu} if mtu else {}))
    return index


def plumb_host_side(ip: Any, wire: PodWire, pod_netns_fd: int) -> str:
    """In the host's namespace; the MAC address of the host's end."""
    ip.link("add", ifname=wire.host_ifname, kind="veth", peer={"ifname": "eth0", "net_ns_fd": pod_netns_fd})
    index = bring_up(ip, wire.host_ifname, wire.mtu)
    for address, bits, family in wire.addresses():
        ip.route("add", dst=f"{address}/{bits}", oif=index, family=family, scope=253 if family == 2 else 0)
        ip.rule("add", dst=address, dst_len=bits, table=TABLE_MAIN, priority=RULE_TO_POD, family=family)
    _attach_foreign_filter(ip, index)
    return str(ip.get_links(index)[0].get("address"))


def _attach_foreign_filter(ip: Any, index: int) -> None:
    """The CNI's policy agent owns clsact, prio 1, handle 1 of every host-side veth."""
    program = kernel.load_pass_program()
    options = {"handle": 1, "fd": program, "name": "foreign_pass", "prio": 1, "protocol": ETH_P_ALL}
    try:
        ip.tc("add", "clsact", index)
        for parent in (INGRESS, EGRESS):
            ip.tc("add-filter", "bpf", index, parent=parent, direct_action=True, **options)
    finally:
        os.close(program)


def plumb_pod_side(ip: Any, wire: PodWire, host_mac: str) -> None:
    """In the pod's namespace."""
    bring_up(ip, "lo")
    index = bring_up(ip, "eth0", wire.mtu)
    ip.addr("add", index=index, address=wire.ipv4, prefixlen=32)
    ip.addr("add", index=index, address=wire.ipv6, prefixlen=128, flags=IFA_F_NODAD)
    ip.addr("add", index=index, address=f"fe80::{wire.number + 1:x}", prefixlen=64, flags=IFA_F_NODAD)
    ip.route("add", dst=f"{POD_GATEWAY4}/32", oif=index, scope=253)
    ip.route("add", dst="default", gateway=POD_GATEWAY4, oif=index)
    ip.route("add", dst="default", gateway=LINK_GATEWAY6, oif=index, family=10)
    for gateway in (POD_GATEWAY4, LINK_GATEWAY6):
        ip.neigh("add", dst=gateway, lladdr=host_mac, ifindex=index, state=NUD_PERMANENT)


def unplumb(ip: Any, wire: PodWire) -> None:
    """In the host's namespace; what is gone already is fine."""
    for index in ip.link_lookup(ifname=wire.host_ifname):
        ip.link("del", index=index)
    for address, bits, family in wire.addresses():
        with absent_is_fine():
            ip.rule("del", dst=address, dst_len=bits, priority=RULE_TO_POD, family=family)
