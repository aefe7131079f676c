"""Machines on the VPC's wires: interfaces (ENIs), hosts, pods and clients."""

from __future__ import annotations

import hashlib
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midstream_testbed import kernel, pod_net, state, strict
from midstream_testbed.namespace import Argument, Namespace, Process
from midstream_testbed.pod_net import IFA_F_NODAD, TABLE_MAIN, PodWire, bring_up

if TYPE_CHECKING:
    from midstream_testbed.vpc import Vpc

RTNH_F_ONLINK = 4
RULE_CONNMARK = 1024  # the VPC CNI's number
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
        self.wire = PodWire(self.host_ifname, self.ipv4, self.ipv6, number, host.vpc.mtu)
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
        self.sysctl({"ipv4/tcp_ecn": ecn, **pod_net.SYSCTLS})
        host_mac = self.host.netlink(lambda ip: pod_net.plumb_host_side(ip, self.wire, self.netns_fd))
        self.netlink(lambda ip: pod_net.plumb_pod_side(ip, self.wire, host_mac))
        null = subprocess.DEVNULL
        pause = ["/bin/sleep", "infinity"]
        self._start(pause, self._sandbox_cgroups, None, stdin=null, stdout=null, stderr=null)
        self.mntns_fd = kernel.new_mntns(self._private_mounts)

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
            self.host.netlink(lambda ip: pod_net.unplumb(ip, self.wire))
