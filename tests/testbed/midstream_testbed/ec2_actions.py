"""The EC2 actions that the product uses, one function each: parsed parameters in, the answer's members out."""

from __future__ import annotations

import fnmatch
import ipaddress
from collections.abc import Callable, Mapping
from typing import Any

from midstream_testbed.ec2_account import INSTANCE_TYPES, Account, Attachment, Instance, Interface, Subnet
from midstream_testbed.ec2_wire import Ec2Error

Parameters = Mapping[str, Any]


def assign_private_ip_addresses(account: Account, given: Parameters) -> dict[str, Any]:
    interface = account.interface(given["NetworkInterfaceId"])
    wanted = given.get("PrivateIpAddresses")
    if not wanted or "SecondaryPrivateIpAddressCount" in given:
        raise Ec2Error("InvalidParameterCombination", "The testbed takes explicit PrivateIpAddresses and nothing else")
    for address in wanted:
        account.check_assignable(interface.subnet, address)
        _check_takeable(account, interface, address, bool(given.get("AllowReassignment")))
    _check_limit(account, interface, wanted, 4)
    for address in wanted:
        account.own(address, interface.id)
    return {
        "NetworkInterfaceId": interface.id,
        "AssignedPrivateIpAddresses": [{"PrivateIpAddress": address} for address in wanted],
    }


def _check_takeable(account: Account, interface: Interface, address: str, reassign: bool) -> None:
    owned = account.addresses.get(address)
    if owned is None or owned.interface == interface.id:
        return
    holder = account.interfaces[owned.interface]
    if holder.primary == address:
        raise Ec2Error("InvalidParameterValue", f"[{address}] is the primary address of {holder.id}")
    if not reassign:
        raise Ec2Error("InvalidParameterValue", f"Some of [{address}] addresses are already assigned")


def _check_limit(account: Account, interface: Interface, wanted: list[str], version: int) -> None:
    if not interface.instance_type:
        return
    limit = INSTANCE_TYPES[interface.instance_type][1] - (1 if version == 4 else 0)
    if len({*account.secondaries(interface.id, version=version), *wanted}) > limit:
        raise Ec2Error("PrivateIpAddressLimitExceeded", "Number of private addresses will exceed limit.")


def unassign_private_ip_addresses(account: Account, given: Parameters) -> dict[str, Any]:
    interface = account.interface(given["NetworkInterfaceId"])
    wanted = given.get("PrivateIpAddresses") or []
    _disown(account, interface, wanted, account.secondaries(interface.id))
    return {}


def _disown(account: Account, interface: Interface, wanted: list[str], have: list[str]) -> None:
    foreign = [address for address in wanted if address not in have]
    if foreign:
        text = f"Some of [{', '.join(foreign)}] addresses are not assigned to interface {interface.id}"
        raise Ec2Error("InvalidParameterValue", text)
    for address in wanted:
        account.disown(address)


def assign_ipv6_addresses(account: Account, given: Parameters) -> dict[str, Any]:
    """There is no reassignment here: an address must be taken off first."""
    interface = account.interface(given["NetworkInterfaceId"])
    wanted = [str(ipaddress.ip_address(address)) for address in given.get("Ipv6Addresses") or []]
    if not wanted:
        raise Ec2Error("InvalidParameterCombination", "The testbed takes explicit Ipv6Addresses and nothing else")
    for address in wanted:
        account.check_assignable(interface.subnet, address)
        if address in account.addresses:
            raise Ec2Error("InvalidParameterValue", f"Some of [{address}] addresses are already assigned")
    _check_limit(account, interface, wanted, 6)
    for address in wanted:
        account.own(address, interface.id)
    return {"NetworkInterfaceId": interface.id, "AssignedIpv6Addresses": wanted}


def unassign_ipv6_addresses(account: Account, given: Parameters) -> dict[str, Any]:
    interface = account.interface(given["NetworkInterfaceId"])
    wanted = [str(ipaddress.ip_address(address)) for address in given.get("Ipv6Addresses") or []]
    _disown(account, interface, wanted, account.secondaries(interface.id, version=6))
    return {"NetworkInterfaceId": interface.id, "UnassignedIpv6Addresses": wanted}


# -- interfaces


def create_network_interface(account: Account, given: Parameters) -> dict[str, Any]:
    token = given.get("ClientToken", "")
    if token and token in account.tokens:
        return {"NetworkInterface": _interface(account, account.interface(account.tokens[token])), "ClientToken": token}
    subnet = account.subnet(given["SubnetId"])
    primary = given.get("PrivateIpAddress") or account.free_address(subnet)
    account.check_assignable(subnet, primary)
    if primary in account.addresses:
        raise Ec2Error("InvalidIPAddress.InUse", f"Address {primary} is in use.")
    interface = account.new_interface(subnet, primary)
    interface.groups = tuple(given.get("Groups") or interface.groups)
    interface.description = given.get("Description", "")
    interface.tags = _tags(given, "network-interface")
    if token:
        account.tokens[token] = interface.id
    return {"NetworkInterface": _interface(account, interface), "ClientToken": token or None}


def _tags(given: Parameters, resource: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for specification in given.get("TagSpecifications") or []:
        if specification.get("ResourceType") != resource:
            text = f"'{specification.get('ResourceType')}' is not a valid taggable resource type for this operation."
            raise Ec2Error("InvalidParameterValue", text)
        found.update({tag["Key"]: tag.get("Value", "") for tag in specification.get("Tags") or []})
    return found


def attach_network_interface(account: Account, given: Parameters) -> dict[str, Any]:
    interface, instance = account.interface(given["NetworkInterfaceId"]), account.instance(given["InstanceId"])
    index = given["DeviceIndex"]
    if interface.attachment:
        raise Ec2Error("InvalidNetworkInterface.InUse", f"Interface: [{interface.id}] in use.")
    if instance.state not in ("running", "stopped"):
        raise Ec2Error("IncorrectState", f"Instance '{instance.id}' is not 'running' or 'stopped'.")
    if interface.subnet.zone != instance.subnet.zone:
        text = "You may not attach a network interface to an instance if they are not in the same availability zone"
        raise Ec2Error("InvalidParameterCombination", text)
    taken = [i.attachment.device_index for i in account.of_instance(instance.id) if i.attachment]
    if index in taken:
        text = f"Instance '{instance.id}' already has an interface attached at device index '{index}'."
        raise Ec2Error("InvalidParameterValue", text)
    limit = INSTANCE_TYPES[instance.kind][0]
    if len(taken) >= limit:
        raise Ec2Error(
            "AttachmentLimitExceeded", f"Interface count {len(taken) + 1} exceeds the limit for {instance.kind}"
        )
    interface.mac = account.network.attach(interface.id, instance.id, index)
    interface.attachment = Attachment(account.new_id("eni-attach"), instance.id, index)
    interface.instance_type = instance.kind
    return {"AttachmentId": interface.attachment.id}


def delete_network_interface(account: Account, given: Parameters) -> dict[str, Any]:
    interface = account.interface(given["NetworkInterfaceId"])
    if interface.attachment:
        raise Ec2Error("InvalidParameterValue", f"Network interface '{interface.id}' is currently in use.")
    account.delete_interface(interface)
    return {}


def modify_network_interface_attribute(account: Account, given: Parameters) -> dict[str, Any]:
    interface = account.interface(given["NetworkInterfaceId"])
    changes = set(given) & {"Attachment", "Groups", "SourceDestCheck", "Description"}
    if len(changes) != 1:
        raise Ec2Error("InvalidParameterCombination", "Exactly one attribute may be modified in a request")
    if "Attachment" in given:
        change = given["Attachment"]
        if interface.attachment is None or interface.attachment.id != change.get("AttachmentId"):
            raise Ec2Error(
                "InvalidAttachmentID.NotFound", f"The attachment '{change.get('AttachmentId')}' does not exist"
            )
        interface.attachment.delete_on_termination = change["DeleteOnTermination"]
    elif "Groups" in given:
        interface.groups = tuple(given["Groups"])
    elif "SourceDestCheck" in given:
        interface.source_dest_check = given["SourceDestCheck"]["Value"]
    else:
        interface.description = given["Description"]["Value"]
    return {}


def describe_network_interfaces(account: Account, given: Parameters) -> dict[str, Any]:
    ids = given.get("NetworkInterfaceIds") or []
    found = [account.interface(id) for id in ids] or list(account.interfaces.values())
    page, token = _page(_filtered(account, found, given, _INTERFACE_FILTERS), given, bool(ids))
    return {"NetworkInterfaces": [_interface(account, interface) for interface in page], "NextToken": token}


def _interface(account: Account, interface: Interface) -> dict[str, Any]:
    lag_s = account.describe_lag_s
    addresses = [{"PrivateIpAddress": interface.primary, "Primary": True}]
    addresses += [{"PrivateIpAddress": ip, "Primary": False} for ip in account.secondaries(interface.id, lag_s=lag_s)]
    return {
        "NetworkInterfaceId": interface.id,
        "SubnetId": interface.subnet.id,
        "VpcId": interface.subnet.vpc,
        "AvailabilityZone": interface.subnet.zone,
        "MacAddress": interface.mac or "02:00:00:00:00:00",
        "Status": interface.status,
        "Description": interface.description,
        "PrivateIpAddress": interface.primary,
        "PrivateIpAddresses": addresses,
        "Ipv6Addresses": [{"Ipv6Address": ip} for ip in account.secondaries(interface.id, lag_s=lag_s, version=6)],
        "Groups": [{"GroupId": group, "GroupName": group} for group in interface.groups],
        "SourceDestCheck": interface.source_dest_check,
        "InterfaceType": "interface",
        "TagSet": _tag_list(interface.tags),
        "Attachment": _attachment(interface.attachment),
    }


def _tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def _attachment(attachment: Attachment | None, *, named: bool = True) -> dict[str, Any] | None:
    if attachment is None:
        return None
    return {
        "AttachmentId": attachment.id,
        **({"InstanceId": attachment.instance} if named else {}),
        "DeviceIndex": attachment.device_index,
        "DeleteOnTermination": attachment.delete_on_termination,
        "Status": "attached",
    }


# -- instances and subnets


def describe_instances(account: Account, given: Parameters) -> dict[str, Any]:
    ids = given.get("InstanceIds") or []
    found = [account.instance(id) for id in ids] or list(account.instances.values())
    page, token = _page(_filtered(account, found, given, _INSTANCE_FILTERS), given, bool(ids))
    return {"Reservations": [{"Instances": [_instance(account, i)]} for i in page], "NextToken": token}


_STATES = {"pending": 0, "running": 16, "shutting-down": 32, "terminated": 48, "stopping": 64, "stopped": 80}


def _instance(account: Account, instance: Instance) -> dict[str, Any]:
    return {
        "InstanceId": instance.id,
        "InstanceType": instance.kind,
        "InstanceLifecycle": instance.lifecycle,
        "State": {"Code": _STATES[instance.state], "Name": instance.state},
        "SubnetId": instance.subnet.id,
        "Placement": {"AvailabilityZone": instance.subnet.zone},
        "Tags": _tag_list(instance.tags),
        "NetworkInterfaces": [
            {
                "NetworkInterfaceId": interface.id,
                "SubnetId": interface.subnet.id,
                "MacAddress": interface.mac,
                "Groups": [{"GroupId": group} for group in interface.groups],
                "Attachment": _attachment(interface.attachment, named=False),
            }
            for interface in account.of_instance(instance.id)
        ],
    }


def describe_subnets(account: Account, given: Parameters) -> dict[str, Any]:
    ids = given.get("SubnetIds") or []
    found = [account.subnet(id) for id in ids] or list(account.subnets.values())
    return {"Subnets": [_subnet(subnet) for subnet in _filtered(account, found, given, _SUBNET_FILTERS)]}


def _subnet(subnet: Subnet) -> dict[str, Any]:
    sixes = [{"Ipv6CidrBlock": subnet.cidr6, "Ipv6CidrBlockState": {"State": "associated"}}] if subnet.cidr6 else []
    return {
        "SubnetId": subnet.id,
        "VpcId": subnet.vpc,
        "CidrBlock": subnet.cidr,
        "AvailabilityZone": subnet.zone,
        "Ipv6CidrBlockAssociationSet": sixes,
        "State": "available",
    }


def create_subnet_cidr_reservation(account: Account, given: Parameters) -> dict[str, Any]:
    subnet = account.subnet(given["SubnetId"])
    try:
        cidr = ipaddress.ip_network(given["Cidr"])
    except ValueError:
        raise Ec2Error("InvalidParameterValue", f"Value ({given['Cidr']}) for parameter cidr is invalid.") from None
    if str(cidr.network_address) not in subnet or str(cidr.broadcast_address) not in subnet:
        raise Ec2Error("InvalidParameterValue", f"The CIDR {cidr} is not within the subnet's CIDR range")
    others = [ipaddress.ip_network(other) for other, _, _ in subnet.reservations.values()]
    if any(other.version == cidr.version and other.overlaps(cidr) for other in others):
        raise Ec2Error("InvalidParameterValue", f"The CIDR {cidr} overlaps with an existing reservation")
    if given["ReservationType"] not in ("explicit", "prefix"):
        raise Ec2Error("InvalidParameterValue", f"Value ({given['ReservationType']}) for reservationType is invalid.")
    id = account.new_id("scr")
    subnet.reservations[id] = (str(cidr), given["ReservationType"], _tags(given, "subnet-cidr-reservation"))
    return {"SubnetCidrReservation": _reservation(subnet, id)}


def get_subnet_cidr_reservations(account: Account, given: Parameters) -> dict[str, Any]:
    subnet = account.subnet(given["SubnetId"])
    found = [_reservation(subnet, id) for id in subnet.reservations]
    return {
        "SubnetIpv4CidrReservations": [entry for entry in found if ":" not in entry["Cidr"]],
        "SubnetIpv6CidrReservations": [entry for entry in found if ":" in entry["Cidr"]],
    }


def _reservation(subnet: Subnet, id: str) -> dict[str, Any]:
    cidr, kind, tags = subnet.reservations[id]
    return {
        "SubnetCidrReservationId": id, "SubnetId": subnet.id, "Cidr": cidr, "ReservationType": kind,
        "Tags": _tag_list(tags),
    }  # fmt: skip


def describe_instance_types(account: Account, given: Parameters) -> dict[str, Any]:
    wanted = given.get("InstanceTypes") or list(INSTANCE_TYPES)
    unknown = [kind for kind in wanted if kind not in INSTANCE_TYPES]
    if unknown:
        text = f"The following supplied instance types do not exist: [{', '.join(unknown)}]"
        raise Ec2Error("InvalidInstanceType", text)
    return {"InstanceTypes": [_instance_type(kind) for kind in wanted]}


def _instance_type(kind: str) -> dict[str, Any]:
    interfaces, addresses = INSTANCE_TYPES[kind]
    limits = {"MaximumNetworkInterfaces": interfaces, "Ipv4AddressesPerInterface": addresses}
    return {"InstanceType": kind, "NetworkInfo": {**limits, "Ipv6AddressesPerInterface": addresses}}


def create_tags(account: Account, given: Parameters) -> dict[str, Any]:
    for resource in given["Resources"]:
        holder = account.instance(resource) if resource.startswith("i-") else account.interface(resource)
        holder.tags.update({tag["Key"]: tag.get("Value", "") for tag in given["Tags"]})
    return {}


# -- filters and pages


def _tag_values(thing: Any, key: str) -> list[str]:
    return [thing.tags[key]] if key in thing.tags else []


_INTERFACE_FILTERS: dict[str, Callable[[Account, Interface], list[str]]] = {
    "network-interface-id": lambda account, i: [i.id],
    "subnet-id": lambda account, i: [i.subnet.id],
    "status": lambda account, i: [i.status],
    "group-id": lambda account, i: list(i.groups),
    "attachment.instance-id": lambda account, i: [i.attachment.instance] if i.attachment else [],
    "attachment.device-index": lambda account, i: [str(i.attachment.device_index)] if i.attachment else [],
    "addresses.private-ip-address": lambda account, i: [
        i.primary, *account.secondaries(i.id, lag_s=account.describe_lag_s)
    ],
    "ipv6-addresses.ipv6-address": lambda account, i: account.secondaries(
        i.id, lag_s=account.describe_lag_s, version=6
    ),
    "tag-key": lambda account, i: list(i.tags),
}  # fmt: skip
_INSTANCE_FILTERS: dict[str, Callable[[Account, Instance], list[str]]] = {
    "instance-id": lambda account, i: [i.id],
    "instance-state-name": lambda account, i: [i.state],
    "tag-key": lambda account, i: list(i.tags),
}
_SUBNET_FILTERS: dict[str, Callable[[Account, Subnet], list[str]]] = {
    "subnet-id": lambda account, s: [s.id],
    "vpc-id": lambda account, s: [s.vpc],
    "availability-zone": lambda account, s: [s.zone],
}


def _filtered(account: Account, found: list[Any], given: Parameters, known: Mapping[str, Any]) -> list[Any]:
    for wanted in given.get("Filters") or []:
        name, values = wanted["Name"], wanted.get("Values") or []
        if name.startswith("tag:"):
            found = [thing for thing in found if _matches(_tag_values(thing, name[4:]), values)]
        elif name in known:
            found = [thing for thing in found if _matches(known[name](account, thing), values)]
        else:
            raise Ec2Error("InvalidParameterValue", f"The filter '{name}' is invalid")
    return found


def _matches(have: list[str], wanted: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(value, pattern) for value in have for pattern in wanted)


def _page(found: list[Any], given: Parameters, by_id: bool) -> tuple[list[Any], str | None]:
    limit = given.get("MaxResults")
    if limit is None:
        return found, None
    if by_id:
        raise Ec2Error("InvalidParameterCombination", "MaxResults and a list of ids exclude each other")
    if not 5 <= limit <= 1000:
        raise Ec2Error("InvalidParameterValue", f"Value ( {limit} ) for parameter maxResults is invalid.")
    start = int(given.get("NextToken") or 0)
    return found[start : start + limit], str(start + limit) if start + limit < len(found) else None


ACTIONS: dict[str, Callable[[Account, Parameters], dict[str, Any]]] = {
    "AssignPrivateIpAddresses": assign_private_ip_addresses,
    "UnassignPrivateIpAddresses": unassign_private_ip_addresses,
    "AssignIpv6Addresses": assign_ipv6_addresses,
    "UnassignIpv6Addresses": unassign_ipv6_addresses,
    "CreateNetworkInterface": create_network_interface,
    "AttachNetworkInterface": attach_network_interface,
    "DeleteNetworkInterface": delete_network_interface,
    "ModifyNetworkInterfaceAttribute": modify_network_interface_attribute,
    "DescribeNetworkInterfaces": describe_network_interfaces,
    "DescribeInstances": describe_instances,
    "DescribeSubnets": describe_subnets,
    "CreateSubnetCidrReservation": create_subnet_cidr_reservation,
    "GetSubnetCidrReservations": get_subnet_cidr_reservations,
    "DescribeInstanceTypes": describe_instance_types,
    "CreateTags": create_tags,
}
