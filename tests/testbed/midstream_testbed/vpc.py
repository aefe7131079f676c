"""The VPC: the router's namespace, its wires, the address plan and the fabric daemon.

        client (198.18.0.0/24) ---+               +--- eth0  node-a  eni... --- eth0  pod
                                  |    router     |--- eth1  node-a
        client-in (10.77.0.0/16) -+  (the fabric) +--- eth0  node-b ...
                                                  +--- eth1  node-b

The router forwards by /32 and /128 routes only, one an address, each via the primary address of the interface
that owns it with a permanent neighbour entry: nothing depends on ARP towards hosts. It answers ARP for
everything in the subnet, as EC2 does.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from midstream_testbed import fabricd, state, strict
from midstream_testbed.fabric import Fabric
from midstream_testbed.machine import RTNH_F_ONLINK, Client, Eni, Host
from midstream_testbed.namespace import Namespace, Process
from midstream_testbed.pod_net import IFA_F_NODAD, LINK_GATEWAY6, NUD_PERMANENT, bring_up

SUBNET4, SUBNET6 = "10.77.0.0/16", "fd77::/64"
INSIDE = (SUBNET4, SUBNET6)
OUTSIDE = ("198.18.0.0/24", "fdc1::/64")
FIRST_HOST, FIRST_INSIDE, FIRST_OUTSIDE = 10, 200, 10  # last octets
FIRST_POD_BLOCK = 16  # pods of host N are 10.77.(16+N).x


class Vpc:
    """Everything of one testbed. Use it as a context manager; `close` may be called again.

    `strict` gives the hosts EKS's firewall rules and rp_filter. `tracked_security_group` makes the group of
    the floating interfaces of the tracked kind. `cgroup_controllers` matters on cgroup v1 only.
    """

    subnet4, subnet6 = SUBNET4, SUBNET6
    gateway4 = str(next(ipaddress.ip_network(SUBNET4).hosts()))
    gateway6 = LINK_GATEWAY6

    def __init__(
        self,
        *,
        mtu: int = 9001,
        move_seconds: float = 0.0,
        strict: bool = True,
        tracked_security_group: bool = False,
        cgroup_controllers: tuple[str, ...] = ("pids",),
    ) -> None:
        self.mtu = mtu
        self.tracked_security_group = tracked_security_group
        self.strict = strict
        self.prefix, self.folder = state.claim()
        self._cgroup_bases = state.cgroup_bases(cgroup_controllers)
        self.hosts: dict[str, Host] = {}
        self.clients: dict[str, Client] = {}
        self._wires = itertools.count()
        self._host_numbers = itertools.count()
        self._client_numbers = itertools.count()
        self._lifeline = -1
        self._owner_pid = os.getpid()
        self.closed = False
        try:
            self.router = Namespace("router", f"{self.prefix}-router", self.cgroups("router"), self.folder)
            self._prepare_router()
            self.fabric = self._start_fabric()
            if move_seconds:
                self.fabric.move_seconds = move_seconds
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, **options: Any) -> Vpc:
        return cls(**options)

    def __enter__(self) -> Vpc:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cgroups(self, *path: str) -> list[Path]:
        return [base.joinpath(self.prefix, *path) for base in self._cgroup_bases]

    # -- the router

    def _prepare_router(self) -> None:
        self.router.sysctl(
            {
                "ipv4/ip_forward": 1,
                "ipv4/conf/all/rp_filter": 0,
                "ipv4/conf/default/rp_filter": 0,
                "ipv4/conf/all/send_redirects": 0,
                "ipv4/conf/default/send_redirects": 0,
                "ipv4/conf/default/proxy_arp": 1,
                "ipv4/conf/default/proxy_arp_pvlan": 1,
                "ipv6/conf/all/forwarding": 1,
                "ipv6/conf/default/forwarding": 1,
                "ipv6/conf/default/accept_ra": 0,
                "ipv6/conf/default/addr_gen_mode": 1,
            }
        )
        self.router.netlink(lambda ip: bring_up(ip, "lo"))
        self.router.nft(strict.ROUTER_RULES)
        if self.tracked_security_group:
            self.router.nft(strict.TRACKED_TABLE)
            self.router.sysctl({"netfilter/nf_conntrack_tcp_loose": 0})

    def _start_fabric(self) -> Fabric:
        control = self.folder / "fabric.sock"
        package = str(Path(__file__).parent.parent)
        orphaned = [sys.executable, "-m", "midstream_testbed", "clean", self.prefix]
        config = json.dumps({"control": str(control), "on_orphaned": orphaned})
        theirs, self._lifeline = os.pipe()
        try:
            daemon = self.router.popen(
                [sys.executable, "-I", "-S", fabricd.__file__, config],
                name="fabric",
                env={"PYTHONPATH": package},  # for the clean-up that the daemon may have to start
                stdin=theirs,
                stdout=subprocess.PIPE,
            )
        finally:
            os.close(theirs)
        self._daemon: Process = daemon
        assert daemon.stdout is not None
        if daemon.stdout.readline() != fabricd.READY:
            raise RuntimeError(f"the fabric did not start: {self._fabric_log()}")
        return Fabric(control)

    def _fabric_log(self) -> str:
        return "\n".join(path.read_text() for path in self.folder.glob("router.*.fabric.log"))

    def spoofed(self) -> dict[str, int]:
        """Packets dropped since their source was not their interface's: by host interface ("node-a/eth1")."""
        listing = self.router.run(["nft", "-j", "list", "set", "inet", "ms_router", "spoofed"]).stdout
        names = {eni.router_ifname: f"{owner.name}/{eni.name}" for owner, eni in self._plugged()}
        return {names.get(key, key): value for key, value in strict.set_counters(listing).items()}

    def _plugged(self) -> Iterator[tuple[Namespace, Eni]]:
        for host in self.hosts.values():
            yield from ((host, eni) for eni in host.enis)
        yield from ((client, client.eth0) for client in self.clients.values())

    # -- wires

    def plug(self, host: Host, name: str, device_index: int) -> Eni:
        """Attach a new, unconfigured interface to a host."""
        eni = self._wire(host, name, INSIDE, FIRST_HOST + 8 * host.number + device_index, device_index)
        if device_index == 0:
            self.router.netlink(lambda ip: _route_pods(ip, host.number, eni))
        router_end: dict[str, Any] = {"ifindex": eni.router_ifindex, "ifname": eni.router_ifname}
        host_end: dict[str, Any] = {"host": host.name, "eni": name, "mac": eni.mac}
        self.fabric.call("add_port", **router_end, **host_end, gateway4=eni.ipv4, gateway6=eni.ipv6)
        if self.tracked_security_group and device_index:
            self.router.nft(strict.TRACKED_PORT % {"port": eni.router_ifname, "zone": eni.router_ifindex})
        return eni

    def _wire(
        self, end: Namespace, name: str, subnets: tuple[str, str], octet: int, device_index: int = 0
    ) -> Eni:
        """A veth pair between the router and `end`, with what the router needs to know of it."""
        number = next(self._wires)
        ifname = f"w{number}"
        mac = f"02:77:{number >> 8:02x}:{number & 255:02x}:00:01"
        ipv4, ipv6 = (_nth(subnet, octet) for subnet in subnets)
        gateway4 = _nth(subnets[0], 1)

        def body(ip: Any) -> int:
            peer = {"ifname": name, "net_ns_fd": end.netns_fd, "address": mac, "mtu": self.mtu}
            ip.link("add", ifname=ifname, kind="veth", mtu=self.mtu, peer=peer)
            # Namespaces have no neigh/default. EC2 answers at once; Linux would wait up to 0.8 s.
            Path(f"/proc/sys/net/ipv4/neigh/{ifname}/proxy_delay").write_text("0")
            index = bring_up(ip, ifname)
            ip.addr("add", index=index, address=gateway4, prefixlen=32)
            ip.addr("add", index=index, address=self.gateway6, prefixlen=64, flags=IFA_F_NODAD)
            for address, bits, family in ((ipv4, 32, 2), (ipv6, 128, 10)):
                ip.neigh("add", dst=address, lladdr=mac, ifindex=index, state=NUD_PERMANENT)
                ip.route("add", dst=f"{address}/{bits}", oif=index, family=family)
            return index

        index = self.router.netlink(body)
        gateways = (gateway4, self.gateway6)
        return Eni(name, mac, ipv4, ipv6, *subnets, *gateways, self.mtu, device_index, ifname, index)

    def unplug(self, eni: Eni) -> None:
        """Take a wire away: both ends are gone when this returns."""
        if self.closed:
            return
        if any(eni in host.enis for host in self.hosts.values()):
            self.fabric.call("remove_port", ifname=eni.router_ifname)
        self.router.netlink(lambda ip: ip.link("del", index=eni.router_ifindex))

    # -- machines

    def host(self, name: str, *, tx_checksums: bool | None = None, configured: bool = False) -> Host:
        """Add a host. By default the second one computes checksums in software, as some NICs make it.
        `configured` also sets eth1 up, for tests without an agent."""
        number = next(self._host_numbers)
        checksums = number != 1 or not self.strict if tx_checksums is None else tx_checksums
        host = Host(self, name, number)
        self.hosts[name] = host
        host.prepare()
        host.enis += [self.plug(host, "eth0", 0), self.plug(host, "eth1", 1)]
        host.configure(tx_checksums=checksums)
        if configured:
            host.configure_eni()
        return host

    def client(self, name: str = "client", *, in_vpc: bool = False) -> Client:
        number = next(self._client_numbers)
        octet = (FIRST_INSIDE if in_vpc else FIRST_OUTSIDE) + number
        client = Client(self, name)
        self.clients[name] = client
        client.configure(self._wire(client, "eth0", INSIDE if in_vpc else OUTSIDE, octet))
        return client

    def pod_addresses(self, host_number: int, pod_number: int) -> tuple[str, str]:
        offset = _pod_block(host_number) + pod_number
        return _nth(SUBNET4, offset), _nth(SUBNET6, offset)

    # -- addresses

    def allocate(self, ip: str, host: Host, eni: Eni | None = None) -> str:
        """A floating IP of the VPC's subnet: it belongs to the host's eth1 (or `eni`) from now on."""
        address = ipaddress.ip_address(ip)
        if address not in ipaddress.ip_network(SUBNET4 if address.version == 4 else SUBNET6):
            raise ValueError(f"{ip} is not in the VPC's subnet")
        self.fabric.call("allocate", ip=str(address), ifname=(eni or host.eth1).router_ifname)
        return str(address)

    def release(self, ip: str) -> None:
        self.fabric.call("release", ip=str(ipaddress.ip_address(ip)))

    def assign(self, ip: str, host: Host, eni: Eni | None = None) -> None:
        """Ask for a move as EC2's API does (AssignPrivateIpAddresses); the hooks apply."""
        self.fabric.call("assign", ip=str(ipaddress.ip_address(ip)), ifname=(eni or host.eth1).router_ifname)

    # -- the end

    def close(self) -> None:
        if (
            self.closed or os.getpid() != self._owner_pid
        ):  # a forked child that leaves the context is no owner
            return
        self.closed = True
        machines: list[Namespace] = [*self.hosts.values(), *self.clients.values()]
        if hasattr(self, "router"):
            machines.append(self.router)
        try:
            for tree in state.cgroup_trees(self.prefix):
                state.kill_tree(tree)
            for machine in machines:
                machine.delete()
        finally:
            if self._lifeline >= 0:
                os.close(self._lifeline)
            state.sweep(self.prefix)


def _nth(subnet: str, offset: int) -> str:
    return str(ipaddress.ip_network(subnet)[offset])


def _pod_block(host_number: int) -> int:
    return (FIRST_POD_BLOCK + host_number) * 256


def _route_pods(ip: Any, host_number: int, eni: Eni) -> None:
    """A host's pod addresses belong to its primary interface as one prefix, as EKS delegates prefixes."""
    index = eni.router_ifindex
    for subnet, bits, gateway, family in ((SUBNET4, 24, eni.ipv4, 2), (SUBNET6, 120, eni.ipv6, 10)):
        block = f"{_nth(subnet, _pod_block(host_number))}/{bits}"
        ip.route("add", dst=block, gateway=gateway, oif=index, family=family, flags=RTNH_F_ONLINK)
