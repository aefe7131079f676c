"""What EC2 knows of our interfaces and of instances, asked once for many who want to know.

A thousand nodes that go at the same second must not make a thousand Describe calls: one listing of the cluster's
interfaces serves everybody who asks within `inventory_s`, and questions about instances that come together are one
call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream_operator.errors import Final
from midstream_operator.providers.ec2_calls import Ec2Calls
from midstream_operator.together import Together

CLUSTER_TAG = "midstream.dev/cluster"
INSTANCE_TAG = "midstream.dev/instance"  # for whom it was made: found again before it is attached
NO_MANAGE_TAG = "node.k8s.amazonaws.com/no_manage"  # the VPC CNI keeps its hands off (its source: the value "true")


@dataclass(frozen=True, slots=True)
class Interface:
    id: str
    subnet: str
    zone: str
    mac: str
    instance: str  # empty: attached to nothing
    attachment: str
    device_index: int
    delete_on_termination: bool
    addresses: frozenset[str]  # secondary ones, both families
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_unmanaged(self) -> bool:
        return self.tags.get(NO_MANAGE_TAG) == "true"


@dataclass(frozen=True, slots=True)
class Instance:
    id: str
    state: str
    kind: str
    subnet: str
    zone: str
    groups: tuple[str, ...]  # of the primary interface
    indices: frozenset[int]  # device indices in use


@dataclass(frozen=True, slots=True)
class TypeLimits:
    interfaces: int
    ipv4: int  # an interface, its primary address included
    ipv6: int


class Inventory:
    def __init__(self, calls: Ec2Calls) -> None:
        self._calls = calls
        self._settings = calls.settings
        self._listing: asyncio.Task[dict[str, Interface]] | None = None
        self._listed_at_s = float("-inf")
        self._dirty = False
        self.unsure: set[str] = set()
        self._instances = Together("ec2-instances", self._settings.batch_s, self._ask_instances)
        self._holders = Together("ec2-holders", self._settings.batch_s, self._ask_holders)
        self._limits: dict[str, TypeLimits] = {}
        self._asking_limits = asyncio.Lock()

    # -- interfaces

    def changed(self) -> None:
        """We made or changed an interface: the next question is asked anew."""
        self._dirty = True

    def moved(self, addresses: Iterable[str]) -> None:
        """We asked for a move, and EC2 may have said yes or nothing: until the next listing nobody knows where they
        are (`unsure`), and nothing is taken for done."""
        self.unsure.update(addresses)

    async def interfaces(self) -> dict[str, Interface]:
        """All interfaces of this cluster, by id."""
        while self._dirty and self._listing is not None and not self._listing.done():
            await asyncio.wait([self._listing])  # it was asked before the change
        now_s = asyncio.get_running_loop().time()
        stale = self._dirty or now_s - self._listed_at_s > self._settings.inventory_s
        if self._listing is None or (stale and self._listing.done()):
            self._dirty, self._listed_at_s = False, now_s
            self._listing = asyncio.create_task(self._list(), name="ec2-inventory")
        return await asyncio.shield(self._listing)

    async def _list(self) -> dict[str, Interface]:
        wanted = [{"Name": f"tag:{CLUSTER_TAG}", "Values": [self._settings.cluster]}]
        before = set(self.unsure)
        found = await self._calls.pages("describe_network_interfaces", "NetworkInterfaces", Filters=wanted)
        self.unsure -= before
        return {entry["NetworkInterfaceId"]: interface_of(entry) for entry in found}

    async def holders(self, addresses: Iterable[str]) -> dict[str, Interface]:
        """Who holds these addresses now, whoever that is. Its addresses include its primary one."""
        wanted = sorted(addresses)
        found = await asyncio.gather(*(self._holders.get(address) for address in wanted))
        return {address: holder for address, holder in zip(wanted, found, strict=True) if holder}

    async def _ask_holders(self, addresses: list[str]) -> dict[str, Interface]:
        found: dict[str, Interface] = {}
        for filter_name, chosen in _by_family(addresses):
            for values in _chunks(chosen, self._settings.values_per_filter):
                wanted = [{"Name": filter_name, "Values": values}]
                answer = await self._calls.pages("describe_network_interfaces", "NetworkInterfaces", Filters=wanted)
                for entry in answer:
                    holder = interface_of(entry, primary=True)
                    found.update({address: holder for address in holder.addresses & set(values)})
        return found

    async def in_subnet(self, subnet: str) -> list[Interface]:
        """Everybody's interfaces there, primary addresses included."""
        wanted = [{"Name": "subnet-id", "Values": [subnet]}]
        found = await self._calls.pages("describe_network_interfaces", "NetworkInterfaces", Filters=wanted)
        return [interface_of(entry, primary=True) for entry in found]

    # -- instances

    async def instance(self, id: str) -> Instance | None:
        """None: EC2 does not know it (any more)."""
        return await self._instances.get(id)

    async def _ask_instances(self, ids: list[str]) -> dict[str, Instance]:
        """By filter: an unknown id is then no error for the others."""
        known: dict[str, Instance] = {}
        for values in _chunks(ids, self._settings.values_per_filter):
            wanted = [{"Name": "instance-id", "Values": values}]
            for reservation in await self._calls.pages("describe_instances", "Reservations", Filters=wanted):
                known |= {entry["InstanceId"]: instance_of(entry) for entry in reservation["Instances"]}
        return known

    async def limits(self, kind: str) -> TypeLimits:
        """What AWS says of an instance type; asked once."""
        async with self._asking_limits:
            if kind not in self._limits:
                answer = await self._calls.read("describe_instance_types", InstanceTypes=[kind])
                info = answer["InstanceTypes"][0]["NetworkInfo"]
                names = ("MaximumNetworkInterfaces", "Ipv4AddressesPerInterface", "Ipv6AddressesPerInterface")
                self._limits[kind] = TypeLimits(*(info[name] for name in names))
            return self._limits[kind]


def _by_family(addresses: Iterable[str]) -> list[tuple[str, list[str]]]:
    wanted = sorted(addresses)
    names = {"addresses.private-ip-address": False, "ipv6-addresses.ipv6-address": True}
    return [(name, [a for a in wanted if (":" in a) is six]) for name, six in names.items()]


def _chunks(values: Sequence[str], size: int) -> list[list[str]]:
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


def interface_of(entry: Mapping[str, Any], *, primary: bool = False) -> Interface:
    """EC2's description of an interface; with `primary`, its primary address counts among its addresses."""
    fours = [a["PrivateIpAddress"] for a in entry.get("PrivateIpAddresses", []) if primary or not a.get("Primary")]
    sixes = [a["Ipv6Address"] for a in entry.get("Ipv6Addresses", [])]
    attachment = entry.get("Attachment") or {}
    return Interface(
        id=entry["NetworkInterfaceId"],
        subnet=entry["SubnetId"],
        zone=entry.get("AvailabilityZone", ""),
        mac=entry.get("MacAddress", ""),
        instance=attachment.get("InstanceId", ""),
        attachment=attachment.get("AttachmentId", ""),
        device_index=attachment.get("DeviceIndex", -1),
        delete_on_termination=attachment.get("DeleteOnTermination", False),
        addresses=frozenset([*fours, *sixes]),
        tags={tag["Key"]: tag["Value"] for tag in entry.get("TagSet", [])},
    )


def instance_of(entry: Mapping[str, Any]) -> Instance:
    attached = entry.get("NetworkInterfaces", [])
    indices = [i["Attachment"]["DeviceIndex"] for i in attached if i.get("Attachment")]
    primaries = [i for i in attached if i.get("Attachment", {}).get("DeviceIndex") == 0]
    return Instance(
        id=entry["InstanceId"],
        state=entry["State"]["Name"],
        kind=entry["InstanceType"],
        subnet=entry.get("SubnetId", ""),
        zone=entry.get("Placement", {}).get("AvailabilityZone", ""),
        groups=tuple(group["GroupId"] for i in primaries for group in i["Groups"]),
        indices=frozenset(indices),
    )


def instance_id(provider_id: str) -> str:
    """aws:///eu-west-1a/i-0123 -> i-0123."""
    head, _, tail = provider_id.rpartition("/")
    if not head.startswith("aws:") or not tail.startswith("i-"):
        raise Final("no_provider_id", f"{provider_id!r} names no EC2 instance: the ec2 provider needs nodes of EC2")
    return tail
