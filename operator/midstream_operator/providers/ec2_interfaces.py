"""The interface of a node that carries floating IPs: found, or made so that the VPC CNI leaves it alone.

The VPC CNI takes any secondary address of an interface it manages for its pods, within a minute. So ours is tagged
`no_manage` in the very call that makes it (a tag that comes later is too late), and an interface of ours that lost the
tag is refused. It does not end with its instance (DeleteOnTermination=false): after a sudden death the addresses stay
where AllowReassignment can take them from. What hangs on nothing for a while and holds nothing is collected.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging

from midstream_operator.errors import Final, Retryable
from midstream_operator.providers.ec2_calls import Ec2Calls, Ec2Refusal
from midstream_operator.providers.ec2_inventory import (
    CLUSTER_TAG,
    INSTANCE_TAG,
    NO_MANAGE_TAG,
    Instance,
    Interface,
    Inventory,
)

log = logging.getLogger(__name__)

ALIVE = ("pending", "running")


class Interfaces:
    def __init__(self, calls: Ec2Calls, inventory: Inventory) -> None:
        self._calls = calls
        self._inventory = inventory
        self._settings = calls.settings
        self._locks: dict[str, asyncio.Lock] = {}  # one at a time makes the interface of an instance
        self._idle_since_s: dict[str, float] = {}

    async def of(self, instance_id: str, subnet: str) -> Interface:
        """The node's interface in that subnet; made and attached when there is none."""
        found = await self._find(instance_id, subnet)
        if found is not None:
            return _checked(found)
        lock = self._locks.setdefault(instance_id, asyncio.Lock())
        try:
            async with lock:
                self._inventory.changed()
                found = await self._find(instance_id, subnet)
                return _checked(found or await self._make(instance_id, subnet))
        finally:
            if not lock.locked():
                self._locks.pop(instance_id, None)

    async def _find(self, instance_id: str, subnet: str) -> Interface | None:
        ours = (await self._inventory.interfaces()).values()
        mine = [i for i in ours if i.instance == instance_id and i.subnet == subnet]
        return min(mine, key=lambda i: i.id, default=None)

    async def _make(self, instance_id: str, subnet: str) -> Interface:
        instance = await self.living(instance_id)
        await self._check_room(instance)
        made = await self._unattached(instance_id, subnet) or await self._create(instance, subnet)
        await self._attach(made, instance)
        self._inventory.changed()
        found = (await self._inventory.interfaces()).get(made)
        if found is None or not found.instance:
            raise Retryable("eni_not_ready", f"EC2 does not list {made} on {instance_id} yet")
        if found.delete_on_termination:
            change = {"AttachmentId": found.attachment, "DeleteOnTermination": False}
            await self._calls.mutate("modify_network_interface_attribute", NetworkInterfaceId=made, Attachment=change)
            self._inventory.changed()
        return found

    async def living(self, instance_id: str) -> Instance:
        instance = await self._inventory.instance(instance_id)
        if instance is None:
            raise Retryable("unknown_instance", f"EC2 does not know {instance_id} (region, account or a very new one?)")
        if instance.state not in ALIVE:
            raise Final("instance_not_running", f"{instance_id} is {instance.state}: no address can go there")
        return instance

    async def _check_room(self, instance: Instance) -> None:
        limits = await self._inventory.limits(instance.kind)
        if len(instance.indices) >= limits.interfaces:
            raise Final(
                "eni_limit",
                f"{instance.id} ({instance.kind}) has {limits.interfaces} interfaces, as many as it can hold: keep one "
                "free for Midstream (VPC CNI: MAX_ENI, Karpenter: RESERVED_ENIS=1)",
            )

    async def _unattached(self, instance_id: str, subnet: str) -> str | None:
        """One that a predecessor of this process made and did not live to attach."""
        for interface in (await self._inventory.interfaces()).values():
            made_for = interface.tags.get(INSTANCE_TAG)
            if not interface.instance and made_for == instance_id and interface.subnet == subnet:
                return interface.id
        return None

    async def _create(self, instance: Instance, subnet: str) -> str:
        tags = {CLUSTER_TAG: self._settings.cluster, INSTANCE_TAG: instance.id, NO_MANAGE_TAG: "true"}
        tags["Name"] = f"midstream-{instance.id}"
        answer = await self._calls.mutate(
            "create_network_interface",
            SubnetId=subnet,
            Groups=list(self._settings.security_groups or instance.groups),
            Description=f"midstream: floating IPs of {instance.id}",
            ClientToken=_token(self._settings.cluster, instance.id, subnet),
            TagSpecifications=[
                {"ResourceType": "network-interface", "Tags": [{"Key": k, "Value": v} for k, v in tags.items()]}
            ],
        )
        made = str(answer["NetworkInterface"]["NetworkInterfaceId"])
        log.info("made %s for the floating IPs of %s", made, instance.id)
        return made

    async def _attach(self, interface: str, instance: Instance) -> None:
        """At the lowest free device index. The VPC CNI looks for one in the same way, at the same time."""
        limits = await self._inventory.limits(instance.kind)
        indices = [n for n in range(1, limits.interfaces) if n not in instance.indices]
        for index in indices:
            try:
                await self._calls.mutate(
                    "attach_network_interface", NetworkInterfaceId=interface, InstanceId=instance.id, DeviceIndex=index
                )
                return
            except Ec2Refusal as e:
                if e.aws_code == "InvalidNetworkInterface.InUse":
                    return  # an earlier try of ours that was answered too late
                if e.aws_code == "AttachmentLimitExceeded":
                    raise Final("eni_limit", f"{instance.id} can hold no more interfaces: {e.message}") from e
                if e.aws_code != "InvalidParameterValue" or index == indices[-1]:
                    raise

    async def collect(self) -> list[str]:
        """Delete what is left over: ours, hanging on nothing and holding nothing for `leftover_s`. Call it now and
        then; what it deleted."""
        self._inventory.changed()  # what is deleted is looked at anew
        now_s = asyncio.get_running_loop().time()
        idle = {i.id for i in (await self._inventory.interfaces()).values() if not i.instance and not i.addresses}
        self._idle_since_s = {id: self._idle_since_s.get(id, now_s) for id in idle}
        due = [id for id, since_s in self._idle_since_s.items() if now_s - since_s >= self._settings.leftover_s]
        for id in due:
            try:
                await self._calls.mutate("delete_network_interface", NetworkInterfaceId=id)
            except Ec2Refusal as e:
                if e.aws_code != "InvalidNetworkInterfaceID.NotFound":
                    raise
            self._idle_since_s.pop(id)
        if due:
            self._inventory.changed()
        return due


def _checked(interface: Interface) -> Interface:
    if not interface.is_unmanaged:
        raise Final(
            "cni_conflict",
            f"{interface.id} of {interface.instance} lacks the tag {NO_MANAGE_TAG}=true: the VPC CNI would give its "
            "addresses to pods. Set the tag, or delete the interface and let Midstream make its own",
        )
    return interface


def _token(*parts: str) -> str:
    """The same interface for the same node, also when the operator died before it read EC2's answer."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
