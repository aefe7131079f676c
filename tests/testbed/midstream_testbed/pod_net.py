"""How the VPC CNI wires a pod to its host: what the testbed's own pods and those of a kubelet (cni.py) have in common.

    host   veth eni*, /32 and /128 routes to it, rules at 512 so that no ENI table catches them, a foreign TC filter
    pod    eth0 with its addresses, default routes to addresses that are nobody's, permanent neighbours for those
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
RULE_TO_POD = 512  # the VPC CNI's number; 513-1023 are free for others

# Duplicate address detection stays on: whoever adds a floating IPv6 address must say "nodad". The pod's own
# link-local address is added by hand, or it would be mute for its first two seconds.
SYSCTLS: dict[str, int | str] = {"ipv6/conf/default/accept_ra": 0, "ipv6/conf/default/addr_gen_mode": 1}


@dataclass(frozen=True)
class PodWire:
    """One pod's veth pair and addresses; `number` tells the pods of a host apart."""

    host_ifname: str
    ipv4: str
    ipv6: str
    number: int
    mtu: int

    @property
    def addresses(self) -> tuple[tuple[str, int, int], ...]:
        """(address, bits, family) of both."""
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
    """MAC of the host's end, which the pod needs."""
    peer = {"ifname": "eth0", "net_ns_fd": pod_netns_fd}
    ip.link("add", ifname=wire.host_ifname, kind="veth", peer=peer)
    index = bring_up(ip, wire.host_ifname, wire.mtu)
    for address, bits, family in wire.addresses:
        ip.route("add", dst=f"{address}/{bits}", oif=index, family=family, scope=253 if family == 2 else 0)
        ip.rule("add", dst=address, dst_len=bits, table=TABLE_MAIN, priority=RULE_TO_POD, family=family)
    _attach_foreign_filter(ip, index)
    return str(ip.get_links(index)[0].get("address"))


def _attach_foreign_filter(ip: Any, index: int) -> None:
    """The CNI's policy agent owns clsact, prio 1, handle 1 of every host-side veth."""
    program = kernel.load_pass_program()
    try:
        ip.tc("add", "clsact", index)
        for parent in (INGRESS, EGRESS):
            ip.tc(
                "add-filter", "bpf", index, handle=1, fd=program, name="foreign_pass", parent=parent, prio=1,
                protocol=ETH_P_ALL, direct_action=True,
            )  # fmt: skip
    finally:
        os.close(program)


def plumb_pod_side(ip: Any, wire: PodWire, host_mac: str) -> None:
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
    for index in ip.link_lookup(ifname=wire.host_ifname):
        ip.link("del", index=index)
    for address, bits, family in wire.addresses:
        with absent_is_fine():
            ip.rule("del", dst=address, dst_len=bits, priority=RULE_TO_POD, family=family)
