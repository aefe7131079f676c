"""Addresses, routes and rules of floating IPs, by netlink only.

What makes a floating IP reach a pod (facts: the VPC CNI's own rule numbers leave 513-1023 free):

    host   rule   to   FIP  -> table main         priority 513    so that no ENI table catches it
           rule   from FIP  -> table of the NIC   priority 600    answers leave by the ENI that owns it
           route  FIP/32 dev eni*                 table main      the switch: only this one is set and
                                                                  removed while clients wait
    pod    address FIP/32 on eth0                                 no DNAT: the pod's tuple is the client's

pyroute2's synchronous API must not run inside the event loop's thread (0.9 refuses), so all of it runs in
one worker thread, in order; `NetWorker.run` awaits it. A namespace is entered by that thread alone.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from midstream_runtime.contract.errors import Final
from pyroute2 import DiagSocket, IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from midstream_agent import netns
from midstream_agent.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")
NUD_NONE, NTF_USE = 0x00, 0x01
TABLE_MAIN, TABLE_LOCAL, RTN_LOCAL = 254, 255, 2  # linux/rtnetlink.h
TCP_SYN_RECV = 3  # linux/tcp_states.h


@dataclass(frozen=True, slots=True)
class Link:
    """One end of a pod's veth pair, seen from the host."""

    index: int
    name: str
    mac: str
    pod_mac: str = ""


class NetWorker:
    """The agent's one netlink thread. Calls run in the order in which they were awaited."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="netlink")
        self._host: IPRoute | None = None

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, lambda: call(*args, **kwargs))

    def close(self) -> None:
        self._pool.submit(self._close_host).result()
        self._pool.shutdown()

    # -- everything below runs in the worker thread ---------------------------------------------------

    @property
    def host(self) -> IPRoute:
        if self._host is None:
            self._host = IPRoute()
        return self._host

    def _close_host(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None

    def setup_nic(self) -> int:
        """Configure the ENI of floating IPs as nobody else does on AL2023; returns its ifindex."""
        nic = self._settings.nic
        index = self.index_of(nic.name)
        self.host.link("set", index=index, state="up", mtu=nic.mtu_bytes)
        sysctl(f"net/ipv4/conf/{nic.name}/rp_filter", "2")
        for gateway, dst in ((nic.gateway_v4, "0.0.0.0/0"), (nic.gateway_v6, "::/0")):
            if gateway:
                self._replace_default(index, gateway, dst)
        return index

    def _replace_default(self, index: int, gateway: str, dst: str) -> None:
        # onlink: the gateway's address need not be in a subnet that the kernel knows on this ENI
        self.host.route(
            "replace",
            dst=dst,
            gateway=gateway,
            oif=index,
            table=self._settings.fip_table,
            flags=["onlink"],
            family=netns.family_of(gateway),
        )

    def index_of(self, name: str) -> int:
        try:
            return socket.if_nametoindex(name)
        except OSError as e:
            raise Final("no_interface", f"interface {name} is not on this node: set --nic to the ENI that carries "
                        "floating IPs (midstream doctor lists the interfaces)") from e  # fmt: skip

    def interface_of(self, address: str) -> str | None:
        """Name of the interface that owns one of this node's addresses; None for loopback."""
        for entry in self.host.get_addr(family=netns.family_of(address)):
            if address in (entry.get_attr("IFA_ADDRESS"), entry.get_attr("IFA_LOCAL")):
                name = socket.if_indextoname(entry["index"])
                return None if name == "lo" else name
        raise Final("node_address", f"{address} is on no interface of this node: check --node-address")

    def mac_of(self, index: int) -> str:
        return str(self.host.get_links(index)[0].get_attr("IFLA_ADDRESS"))

    def neighbour_mac(self, index: int, address: str) -> str | None:
        """Link-layer address of a neighbour, if the kernel has resolved it."""
        family = netns.family_of(address)
        for entry in self.host.get_neighbours(family=family, ifindex=index):
            if entry.get_attr("NDA_DST") == address and entry.get_attr("NDA_LLADDR"):
                return str(entry.get_attr("NDA_LLADDR"))
        return None

    def ask_neighbour(self, index: int, address: str) -> None:
        """Have the kernel resolve a neighbour (NUD_PROBE), as it would for a packet."""
        self.host.neigh(
            "replace", dst=address, ifindex=index, state=NUD_NONE, flags=NTF_USE, family=netns.family_of(address)
        )

    def pod_link(self, pod_netns: int) -> Link:
        """The host side of the pod's eth0."""
        with netns.inside(pod_netns):
            try:
                with IPRoute() as pod:
                    eth0 = pod.get_links(ifname="eth0")[0]
                    peer = eth0.get_attr("IFLA_LINK")
            except (NetlinkError, IndexError) as e:
                raise Final("no_pod_interface", "the pod has no eth0: a hostNetwork pod cannot be migrated") from e
        link = self.host.get_links(peer)[0]
        return Link(peer, link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_ADDRESS"), eth0.get_attr("IFLA_ADDRESS"))

    def add_pod_address(self, pod_netns: int, address: str) -> bool:
        """Put the floating IP on the pod's eth0; returns False when it was there."""
        with netns.inside(pod_netns), IPRoute() as pod:
            index = pod.link_lookup(ifname="eth0")[0]
            # nodad: a tentative IPv6 address would refuse sockets for 1.5 s (measured)
            extra: dict[str, Any] = {"flags": 0x02} if ":" in address else {}
            return unless_exists(pod.addr, "add", index=index, address=address, prefixlen=_bits(address), **extra)

    def del_pod_address(self, pod_netns: int, address: str) -> None:
        """The CNI may have taken the interface away, and the address with it: our fd keeps a dead pod's namespace."""
        with netns.inside(pod_netns), IPRoute() as pod:
            for index in pod.link_lookup(ifname="eth0"):
                unless_gone(pod.addr, "del", index=index, address=address, prefixlen=_bits(address))

    def pod_addresses(self, pod_netns: int) -> list[str]:
        """Global addresses of the pod's eth0."""
        with netns.inside(pod_netns), IPRoute() as pod:
            found = [e for index in pod.link_lookup(ifname="eth0") for e in pod.get_addr(index=index, scope=0)]
            return [str(e.get_attr("IFA_ADDRESS")) for e in found]

    def handshakes(self, pod_netns: int, addresses: list[str]) -> int:
        """Connections to these addresses whose SYN was answered and whose client has not said anything since."""
        wanted = {_plain(a) for a in addresses}
        count = 0
        with netns.inside(pod_netns), DiagSocket() as diag:
            for family in (socket.AF_INET, socket.AF_INET6):
                found = diag.get_sock_stats(family=family, states=1 << TCP_SYN_RECV)
                count += sum(_plain(s["idiag_src"]) in wanted for s in found)
        return count

    def add_rules(self, address: str) -> None:
        for args in self._rules(address):
            unless_exists(self.host.rule, "add", **args)

    def del_rules(self, address: str) -> None:
        for args in self._rules(address):
            unless_gone(self.host.rule, "del", **args)

    def _rules(self, address: str) -> list[dict[str, Any]]:
        s, bits, family = self._settings, _bits(address), netns.family_of(address)
        return [
            {"dst": address, "dst_len": bits, "table": 254, "priority": s.fip_rule_to, "family": family},
            {"src": address, "src_len": bits, "table": s.fip_table, "priority": s.fip_rule_from, "family": family},
        ]

    def routed_addresses(self) -> dict[str, int]:
        """Floating IPs that lead to a pod of this node, with the ifindex of the pod's host-side link."""
        found: dict[str, int] = {}
        for family in (socket.AF_INET, socket.AF_INET6):
            ours = {
                str(rule.get_attr("FRA_DST"))
                for rule in self.host.get_rules(family=family)
                if rule.get_attr("FRA_PRIORITY") == self._settings.fip_rule_to
            }
            for route in self.host.get_routes(family=family, table=254) if ours else ():
                if (dst := route.get_attr("RTA_DST")) in ours:
                    found[str(dst)] = int(route.get_attr("RTA_OIF"))
        return found

    def check_free(self, address: str, link_index: int) -> None:
        """Refuse an address that leads elsewhere on this node: its route would be replaced, and who had it cut off."""
        for route in self.host.get_routes(family=netns.family_of(address)):
            if route.get_attr("RTA_DST") != address or route["dst_len"] != _bits(address):
                continue
            index, table = route.get_attr("RTA_OIF"), route.get_attr("RTA_TABLE")
            if table == TABLE_LOCAL and route["type"] == RTN_LOCAL:
                raise Final(
                    "address_taken",
                    f"{address} is this node's own, on {_name(index)}: whatever configures the NIC must leave it alone",
                )
            if table == TABLE_MAIN and index != link_index:
                raise Final("address_taken", f"{address} is routed to {_name(index)} of this node: free it first")


def _name(ifindex: int | None) -> str:
    """Of an interface that may go away at any time; a blackhole route has none."""
    try:
        return socket.if_indextoname(ifindex or 0)
    except OSError:
        return f"interface {ifindex}" if ifindex else "nowhere"


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IPv4 address as such, also where a socket of IPv6 has it mapped."""
    ip = ipaddress.ip_address(address)
    return getattr(ip, "ipv4_mapped", None) or ip


def _bits(address: str) -> int:
    return 128 if ":" in address else 32


def unless_exists(call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    try:
        call(*args, **kwargs)
    except NetlinkError as e:
        if e.code != errno.EEXIST:
            raise
        return False
    return True


def unless_gone(call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        call(*args, **kwargs)
    except NetlinkError as e:
        if e.code not in (errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENODEV):
            raise


def sysctl_file(path: str) -> Path:
    """Container runtimes mount /proc/sys read-only: the chart brings the node's in at a place of its own. What
    net/ shows is the calling thread's namespace's there, too."""
    return Path(os.environ.get("MIDSTREAM_PROC_SYS", "/proc/sys"), path)


def sysctl(path: str, value: str) -> None:
    sysctl_file(path).write_text(value, encoding="ascii")


def open_netns(pid: int) -> int:
    return os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
