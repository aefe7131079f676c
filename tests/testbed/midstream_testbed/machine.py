"""Machines on the VPC's wires: interfaces (ENIs), hosts, pods and clients."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyroute2.netlink.exceptions import NetlinkError  # type: ignore[import-untyped,unused-ignore]

from midstream_testbed import kernel, state, strict
from midstream_testbed.namespace import Argument, Namespace, Process

if TYPE_CHECKING:
    from midstream_testbed.vpc import Vpc

IFA_F_NODAD = 0x02
NUD_PERMANENT = 0x80
RTNH_F_ONLINK = 4
TABLE_MAIN = 254
ETH_P_ALL = 3
INGRESS, EGRESS = "ffff:fff2", "ffff:fff3"
POD_GATEWAY4, LINK_GATEWAY6 = "169.254.1.1", "fe80::1"
RULE_TO_POD, RULE_CONNMARK = 512, 1024  # the VPC CNI's numbers; 513-1023 are free for others
CONNMARK = 0x80


@dataclass(frozen=True)
class Eni:
    """An elastic network interface as IMDS would describe it, and the router's end of its wire."""

    name: str  # in the host
    mac: str
    ipv4: str  # primary addresses
    ipv6: str
    subnet4: str
    subnet6: str
    gateway4: str  # subnet base + 1
    gateway6: str  # link-local
    mtu: int
    device_index: int
    router_ifname: str
    router_ifindex: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def prefix4(self) -> int:
        return int(self.subnet4.rpartition("/")[2])


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


class Client(Namespace):
    """An end system with one interface, eth0."""

    eth0: Eni

    def __init__(self, vpc: Vpc, name: str) -> None:
        super().__init__(name, f"{vpc.prefix}-{name}", vpc.cgroups(name), vpc.folder)
        self.vpc = vpc

    @property
    def ipv4(self) -> str:
        return self.eth0.ipv4

    @property
    def ipv6(self) -> str:
        return self.eth0.ipv6

    def configure(self, eni: Eni) -> None:
        self.eth0 = eni
        self.sysctl({"ipv6/conf/default/accept_ra": 0, "ipv6/conf/default/accept_dad": 0})
        self.netlink(lambda ip: configure_primary(ip, eni))

    def delete(self) -> None:
        if self.deleted:
            return
        self.vpc.unplug(self.eth0)
        super().delete()
        self.vpc.clients.pop(self.name, None)


def configure_primary(ip: Any, eni: Eni) -> None:
    """What DHCP and cloud-init do for a primary interface."""
    bring_up(ip, "lo")
    index = bring_up(ip, eni.name, eni.mtu)
    ip.addr("add", index=index, address=eni.ipv4, prefixlen=eni.prefix4)
    ip.addr("add", index=index, address=eni.ipv6, prefixlen=128, flags=IFA_F_NODAD)
    ip.route("add", dst="default", gateway=eni.gateway4, oif=index)
    ip.route("add", dst="default", gateway=eni.gateway6, oif=index, family=10)


class Host(Namespace):
    """A node: eth0 is its primary ENI; eth1, the secondary one for floating IPs, comes as EC2 hot-attaches
    it, down and without an address: what it needs is in `eth1`, and whoever uses it configures it
    (`configure_eni` for tests that run no agent)."""

    def __init__(self, vpc: Vpc, name: str, number: int) -> None:
        super().__init__(name, f"{vpc.prefix}-{name}", vpc.cgroups(name, "system"), vpc.folder)
        self.vpc = vpc
        self.number = number
        self.enis: list[Eni] = []
        self.pods: dict[str, Pod] = {}
        self._pod_numbers = iter(range(1, 255))

    @property
    def eth0(self) -> Eni:
        return self.enis[0]

    @property
    def eth1(self) -> Eni:
        return self.enis[1]

    @property
    def ipv4(self) -> str:
        return self.eth0.ipv4

    @property
    def ipv6(self) -> str:
        return self.eth0.ipv6

    # -- set-up

    def prepare(self) -> None:
        """Before any interface is there: what `default` says is what a new interface inherits."""
        self.sysctl(
            {
                "ipv4/ip_forward": 1,
                "ipv4/conf/all/rp_filter": 0,
                "ipv4/conf/default/rp_filter": 1 if self.vpc.strict else 0,
                "ipv6/conf/all/forwarding": 1,
                "ipv6/conf/default/forwarding": 1,
                "ipv6/conf/default/accept_ra": 0,
                "ipv6/conf/default/accept_dad": 0,  # a real host's own addresses have long been confirmed
            }
        )

    def configure(self, *, tx_checksums: bool = True) -> None:
        self.netlink(self._configure)
        self.sysctl({"ipv4/conf/eth0/rp_filter": 2})  # the VPC CNI does so at its start
        if self.vpc.strict:
            self.nft(strict.HOST_RULES % {"vpc4": self.vpc.subnet4, "node4": self.ipv4})
        if not tx_checksums:
            for eni in self.enis:
                self.software_checksums(eni)

    def _configure(self, ip: Any) -> None:
        configure_primary(ip, self.eth0)
        for family in (2, 10):
            ip.rule(
                "add",
                table=TABLE_MAIN,
                priority=RULE_CONNMARK,
                fwmark=CONNMARK,
                fwmask=CONNMARK,
                family=family,
            )

    def add_eni(self, *, tx_checksums: bool = True) -> Eni:
        """Hot-attach one more secondary interface, unconfigured."""
        eni = self.vpc.plug(self, f"eth{len(self.enis)}", len(self.enis))
        self.enis.append(eni)
        if not tx_checksums:
            self.software_checksums(eni)
        return eni

    def software_checksums(self, eni: Eni) -> None:
        """``ethtool -K IFNAME tx off``: the CPU sums what leaves by this interface, as some NICs want it."""
        self.inside(lambda: kernel.transmit_checksums(eni.name, False))

    def configure_eni(self, eni: Eni | None = None) -> None:
        """What an agent does once for the interface of the floating IPs: up, MTU, loose rp_filter, a table of
        its own."""
        eni = eni or self.eth1
        table = eni_table(eni)

        def body(ip: Any) -> None:
            index = bring_up(ip, eni.name, eni.mtu)
            ip.route(
                "replace", dst="default", gateway=eni.gateway4, oif=index, table=table, flags=RTNH_F_ONLINK
            )
            ip.route("replace", dst="default", gateway=eni.gateway6, oif=index, table=table, family=10)

        self.netlink(body)
        self.sysctl({f"ipv4/conf/{eni.name}/rp_filter": 2})

    def add_pod(self, name: str, *, may_connect: bool = False, ecn: int = 0, uid: str = "") -> Pod:
        """A pod as the VPC CNI places it. `may_connect` lifts the policy against connections it begins; `uid` is the
        API server's, where there is one."""
        pod = Pod(self, name, next(self._pod_numbers), uid)
        self.pods[name] = pod
        try:
            pod.plumb(ecn)
            if may_connect and self.vpc.strict:
                self.nft(f"add element inet ms_strict may_connect {{ {pod.host_ifname} }}")
        except BaseException:
            pod.delete()
            raise
        return pod

    # -- what tests ask

    def counters(self) -> dict[str, int]:
        """Packets that the host's rules dropped or rewrote: invalid, pod_first, snatted."""
        return strict.counters(self.run(["nft", "-j", "list", "counters"]).stdout)

    def delete(self) -> None:
        """The host is gone: off the network first, then every process killed, then the namespaces."""
        if self.deleted:
            return
        for eni in self.enis:
            self.vpc.unplug(eni)
        trees = [folder.parent for folder in self.cgroups]
        for tree in trees:
            state.kill_tree(tree)
        super().delete()
        for pod in list(self.pods.values()):
            pod.delete()
        for tree in trees:
            state.remove_tree(tree)
        self.vpc.hosts.pop(self.name, None)


def eni_table(eni: Eni) -> int:
    """Number of an interface's own routing table: device index + 1, as the VPC CNI counts."""
    return eni.device_index + 1


class Pod(Namespace):
    """A pod: namespace, veth pair, a pause process in one cgroup and its own processes in another, private
    /run.

    Processes run as root with a container's capabilities; `popen(privileged=True)` keeps all of them,
    `popen(uid=N)` drops to a user.
    """

    def __init__(self, host: Host, name: str, number: int, uid: str = "") -> None:
        self.host = host
        self.number = number
        self.uid = uid or str(uuid.uuid4())
        self.ipv4, self.ipv6 = host.vpc.pod_addresses(host.number, number)
        digest = hashlib.sha1(f"{host.vpc.prefix}.{host.name}.{name}".encode()).hexdigest()
        self.host_ifname = f"eni{digest[:11]}"
        base = ["kubepods", f"pod{self.uid}"]
        self._sandbox_cgroups = host.vpc.cgroups(host.name, *base, "sandbox")
        super().__init__(
            name, f"{host.netns_name}-{name}", host.vpc.cgroups(host.name, *base, "serving"), host.log_dir
        )
        for folder in self._sandbox_cgroups:
            folder.mkdir(parents=True)

    @property
    def cgroup(self) -> Path:
        """.../kubepods/pod<uid>; containers are below it."""
        return self.cgroups[0].parent

    # -- set-up

    def plumb(self, ecn: int) -> None:
        # Duplicate address detection stays on: whoever adds a floating IPv6 address must say "nodad". The
        # pod's own link-local address is added by hand, or it would be mute for its first two seconds.
        self.sysctl(
            {
                "ipv4/tcp_ecn": ecn,
                "ipv6/conf/default/accept_ra": 0,
                "ipv6/conf/default/addr_gen_mode": 1,
            }
        )
        host_mac = self.host.netlink(self._plumb_host_side)
        self.netlink(lambda ip: self._plumb_pod_side(ip, host_mac))
        null = subprocess.DEVNULL
        pause = ["/bin/sleep", "infinity"]
        self._start(pause, self._sandbox_cgroups, None, stdin=null, stdout=null, stderr=null)
        self.mntns_fd = kernel.new_mntns(self._private_mounts)

    def _plumb_host_side(self, ip: Any) -> str:
        vpc = self.host.vpc
        ip.link(
            "add",
            ifname=self.host_ifname,
            kind="veth",
            peer={"ifname": "eth0", "net_ns_fd": self.netns_fd},
        )
        index = bring_up(ip, self.host_ifname, vpc.mtu)
        for address, bits, family in ((self.ipv4, 32, 2), (self.ipv6, 128, 10)):
            ip.route(
                "add", dst=f"{address}/{bits}", oif=index, family=family, scope=253 if family == 2 else 0
            )
            ip.rule("add", dst=address, dst_len=bits, table=TABLE_MAIN, priority=RULE_TO_POD, family=family)
        self._attach_foreign_filter(ip, index)
        return str(ip.get_links(index)[0].get("address"))

    def _attach_foreign_filter(self, ip: Any, index: int) -> None:
        """The CNI's policy agent owns clsact, prio 1, handle 1 of every host-side veth."""
        program = kernel.load_pass_program()
        try:
            ip.tc("add", "clsact", index)
            for parent in (INGRESS, EGRESS):
                ip.tc(
                    "add-filter",
                    "bpf",
                    index,
                    handle=1,
                    fd=program,
                    name="foreign_pass",
                    parent=parent,
                    prio=1,
                    protocol=ETH_P_ALL,
                    direct_action=True,
                )
        finally:
            os.close(program)

    def _plumb_pod_side(self, ip: Any, host_mac: str) -> None:
        bring_up(ip, "lo")
        index = bring_up(ip, "eth0", self.host.vpc.mtu)
        ip.addr("add", index=index, address=self.ipv4, prefixlen=32)
        ip.addr("add", index=index, address=self.ipv6, prefixlen=128, flags=IFA_F_NODAD)
        ip.addr("add", index=index, address=f"fe80::{self.number + 1:x}", prefixlen=64, flags=IFA_F_NODAD)
        ip.route("add", dst=f"{POD_GATEWAY4}/32", oif=index, scope=253)
        ip.route("add", dst="default", gateway=POD_GATEWAY4, oif=index)
        ip.route("add", dst="default", gateway=LINK_GATEWAY6, oif=index, family=10)
        for gateway in (POD_GATEWAY4, LINK_GATEWAY6):
            ip.neigh("add", dst=gateway, lladdr=host_mac, ifindex=index, state=NUD_PERMANENT)

    @staticmethod
    def _private_mounts() -> None:
        kernel.mount("tmpfs", "/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=64m")
        Path("/run/midstream").mkdir(mode=0o1777)
        Path("/run/midstream").chmod(0o1777)
        Path("/run/tmp").mkdir()
        Path("/run/tmp").chmod(0o1777)

    # -- processes

    def popen(
        self,
        argv: Sequence[Argument],
        *,
        env: Mapping[str, str] | None = None,
        name: str | None = None,
        privileged: bool = False,
        **options: Any,
    ) -> Process:
        return super().popen(
            argv, env={"TMPDIR": "/run/tmp", **(env or {})}, name=name, privileged=privileged, **options
        )

    # -- the end

    def delete(self) -> None:
        """Kill the pod's processes and take its plumbing off the host, as the kubelet and the CNI do."""
        if self.deleted:
            return
        self.cgroups += self._sandbox_cgroups
        super().delete()
        for folder in {path.parent for path in self.cgroups}:
            if folder.is_dir():
                folder.rmdir()
        self.host.pods.pop(self.name, None)
        if not self.host.deleted:
            self.host.netlink(self._unplumb)

    def _unplumb(self, ip: Any) -> None:
        for index in ip.link_lookup(ifname=self.host_ifname):
            ip.link("del", index=index)
        for address, bits, family in ((self.ipv4, 32, 2), (self.ipv6, 128, 10)):
            with absent_is_fine():
                ip.rule("del", dst=address, dst_len=bits, priority=RULE_TO_POD, family=family)
