"""What one EC2 account holds: subnets, reservations, instances, interfaces and the table of who owns which address.

The table is the control plane's word. What packets do is the network's (ec2_network.py), and the two differ for as long
as a move takes, or for ever when a hook says that a yes does not happen.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from midstream_testbed.ec2_network import Network
from midstream_testbed.ec2_wire import Ec2Error

# (interfaces, IPv4 addresses an interface, IPv6 the same number): AWS' own table of instance types.
INSTANCE_TYPES = {
    "t3.small": (3, 4), "g4dn.xlarge": (3, 10), "g5.xlarge": (4, 15), "g6.xlarge": (4, 15), "p4d.24xlarge": (15, 50),
}  # fmt: skip
FIRST_FREE = 4  # a subnet's first four addresses and its last are AWS' own


@dataclass
class Subnet:
    id: str
    cidr: str
    zone: str
    vpc: str = "vpc-0a"
    cidr6: str = ""
    reservations: dict[str, tuple[str, str, dict[str, str]]] = field(default_factory=dict)  # id: cidr, kind, tags

    def __contains__(self, address: str) -> bool:
        found = ipaddress.ip_address(address)
        cidr = self.cidr if found.version == 4 else self.cidr6
        return bool(cidr) and found in ipaddress.ip_network(cidr)

    def is_reserved_by_aws(self, address: str) -> bool:
        network = ipaddress.ip_network(self.cidr if ":" not in address else self.cidr6)
        offset = int(ipaddress.ip_address(address)) - int(network.network_address)
        return offset < FIRST_FREE or offset == network.num_addresses - 1


@dataclass
class Attachment:
    id: str
    instance: str
    device_index: int
    delete_on_termination: bool = False


@dataclass
class Interface:
    id: str
    subnet: Subnet
    primary: str
    mac: str = ""
    groups: tuple[str, ...] = ("sg-0default",)
    description: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    attachment: Attachment | None = None
    source_dest_check: bool = True
    instance_type: str = ""

    @property
    def status(self) -> str:
        return "in-use" if self.attachment else "available"


@dataclass
class Instance:
    id: str
    subnet: Subnet
    kind: str
    lifecycle: str = "spot"
    state: str = "running"
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Ownership:
    """One address of the table. `previous` is what a late reader of the control plane still sees."""

    interface: str
    previous: str | None = None
    changed_at: float = float("-inf")


@dataclass
class Account:
    network: Network
    clock: Callable[[], float] = time.monotonic
    subnets: dict[str, Subnet] = field(default_factory=dict)
    instances: dict[str, Instance] = field(default_factory=dict)
    interfaces: dict[str, Interface] = field(default_factory=dict)
    addresses: dict[str, Ownership] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)  # ClientToken -> what it made
    describe_lag_s: float = 0.0  # eventual consistency: Describe tells the owner of so long ago
    imds_lag_s: float = 0.0
    lie: bool = False  # a yes that does not happen: neither the table nor the network changes
    lie_to_packets: bool = False  # EC2 says it has moved, the network has not
    lock: threading.RLock = field(default_factory=threading.RLock)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _index: dict[str, list[str]] | None = None  # interface -> addresses that are or were its; None: not up to date

    def new_id(self, kind: str) -> str:
        return f"{kind}-{next(self._numbers):017x}"

    # -- making the world, as Terraform and the cluster's autoscaler would

    def add_subnet(self, cidr: str, zone: str = "eu-west-1a", cidr6: str = "") -> Subnet:
        subnet = Subnet(self.new_id("subnet"), cidr, zone, cidr6=cidr6)
        self.subnets[subnet.id] = subnet
        return subnet

    def add_instance(
        self,
        subnet: Subnet,
        kind: str = "g5.xlarge",
        *,
        primary: str = "",
        id: str = "",
        tags: dict[str, str] | None = None,
    ) -> Instance:
        """A running instance with its primary interface, device index 0, as RunInstances makes it."""
        with self.lock:
            instance = Instance(id or self.new_id("i"), subnet, kind, tags=dict(tags or {}))
            self.instances[instance.id] = instance
            interface = self.new_interface(subnet, primary or self.free_address(subnet))
            interface.attachment = Attachment(self.new_id("eni-attach"), instance.id, 0, True)
            interface.instance_type = kind
            interface.mac = self.network.attach(interface.id, instance.id, 0)
            return instance

    def end_instance(self, instance: str, state: str = "terminated") -> None:
        """What a terminated or stopped instance leaves: interfaces go with it, or stay, as they were attached."""
        with self.lock:
            self.instances[instance].state = state
            for interface in self.of_instance(instance):
                if state == "terminated" and interface.attachment:
                    ends = interface.attachment.delete_on_termination
                    self.network.detach(interface.id)
                    interface.attachment = None
                    if ends:
                        self.delete_interface(interface)

    def imds_addresses(self, interface: str) -> list[str]:
        """`local-ipv4s` of the interface as IMDS tells it: the table, later."""
        found = self.interfaces[interface]
        return [found.primary, *self.secondaries(interface, lag_s=self.imds_lag_s)]

    # -- the table

    def free_address(self, subnet: Subnet) -> str:
        """What EC2 would take by itself: never out of a reservation of type explicit."""
        explicit = [ipaddress.ip_network(cidr) for cidr, kind, _ in subnet.reservations.values() if kind == "explicit"]
        for address in list(ipaddress.ip_network(subnet.cidr).hosts())[FIRST_FREE - 1 :]:
            if str(address) not in self.addresses and not any(address in cidr for cidr in explicit):
                return str(address)
        raise Ec2Error("InsufficientFreeAddressesInSubnet", "The specified subnet does not have enough free addresses.")

    def new_interface(self, subnet: Subnet, primary: str) -> Interface:
        interface = Interface(self.new_id("eni"), subnet, primary)
        self.interfaces[interface.id] = interface
        self.addresses[primary] = Ownership(interface.id)
        self._index = None
        return interface

    def delete_interface(self, interface: Interface) -> None:
        del self.interfaces[interface.id]
        for address in [ip for ip, owned in self.addresses.items() if owned.interface == interface.id]:
            del self.addresses[address]
            self._index = None
            if address != interface.primary:
                self.network.release(address)

    def of_instance(self, instance: str) -> list[Interface]:
        return [i for i in self.interfaces.values() if i.attachment and i.attachment.instance == instance]

    def secondaries(self, interface: str, *, lag_s: float = 0.0, version: int = 4) -> list[str]:
        primary = self.interfaces[interface].primary
        now = self.clock()
        found = []
        for address in self._held().get(interface, ()):
            owned = self.addresses[address]
            seen = owned.previous if now < owned.changed_at + lag_s else owned.interface
            if seen == interface and address != primary and (":" in address) == (version == 6):
                found.append(address)
        return sorted(found, key=ipaddress.ip_address)

    def _held(self) -> dict[str, list[str]]:
        """A fleet asks for a thousand interfaces at once."""
        if self._index is None:
            self._index = {}
            for address, owned in self.addresses.items():
                for holder in {owned.interface, owned.previous} - {None}:
                    self._index.setdefault(str(holder), []).append(address)
        return self._index

    def own(self, address: str, interface: str) -> None:
        """A yes to an assignment, and what comes of it."""
        if self.lie:
            return
        self._index = None
        owned = self.addresses.get(address)
        if owned is None:
            self.addresses[address] = Ownership(interface, None, self.clock())
        elif owned.interface != interface:
            self.addresses[address] = Ownership(interface, owned.interface, self.clock())
        if not self.lie_to_packets:
            self.network.place(address, interface)

    def disown(self, address: str) -> None:
        if not self.lie:
            self._index = None
            del self.addresses[address]
            self.network.release(address)

    # -- finding, or the error by name

    def interface(self, id: str) -> Interface:
        with contextlib.suppress(KeyError):
            return self.interfaces[id]
        raise Ec2Error("InvalidNetworkInterfaceID.NotFound", f"The networkInterface ID '{id}' does not exist")

    def subnet(self, id: str) -> Subnet:
        with contextlib.suppress(KeyError):
            return self.subnets[id]
        raise Ec2Error("InvalidSubnetID.NotFound", f"The subnet ID '{id}' does not exist")

    def instance(self, id: str) -> Instance:
        with contextlib.suppress(KeyError):
            return self.instances[id]
        raise Ec2Error("InvalidInstanceID.NotFound", f"The instance ID '{id}' does not exist")

    def check_assignable(self, subnet: Subnet, address: str) -> None:
        if address not in subnet:
            raise Ec2Error(
                "InvalidParameterValue", f"Address {address} does not fall within the subnet's address range"
            )
        if subnet.is_reserved_by_aws(address):
            raise Ec2Error("InvalidParameterValue", f"Address {address} is in subnet's reserved address range")
