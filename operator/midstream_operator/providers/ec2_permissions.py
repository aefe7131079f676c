"""What the operator may do on EC2, asked by dry run: nothing is changed, EC2 says whether it would have been.

`ACTIONS` is the whole of it. docs/iam.md and the Terraform and CloudFormation snippets list the same actions; a
contract test compares them. EC2 has no dry run for the four calls that move addresses: of those the IPv4 assignment is
proved by assigning, to one of our interfaces, an address that it holds already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from midstream_operator.errors import Final, OperatorError
from midstream_operator.providers.ec2_calls import Ec2Calls, Ec2Refusal
from midstream_operator.providers.ec2_inventory import CLUSTER_TAG, Interface, Inventory

ALLOWED, DENIED, UNKNOWN = "allowed", "denied", "unknown"

# What the policy must allow -> what needs it.
ACTIONS: dict[str, str] = {
    "ec2:DescribeInstances": "nodes, and the proof that one is gone",
    "ec2:DescribeInstanceTypes": "limits of an instance type",
    "ec2:DescribeNetworkInterfaces": "who holds an address",
    "ec2:DescribeSubnets": "pools",
    "ec2:GetSubnetCidrReservations": "pools",
    "ec2:CreateNetworkInterface": "a node's interface",
    "ec2:CreateTags": "the tag that keeps the VPC CNI off, in the call that makes the interface",
    "ec2:AttachNetworkInterface": "a node's interface",
    "ec2:ModifyNetworkInterfaceAttribute": "an interface that outlives its instance",
    "ec2:DeleteNetworkInterface": "leftovers",
    "ec2:AssignPrivateIpAddresses": "moving an IPv4 address",
    "ec2:UnassignPrivateIpAddresses": "freeing an IPv4 address",
    "ec2:AssignIpv6Addresses": "moving an IPv6 address",
    "ec2:UnassignIpv6Addresses": "moving and freeing an IPv6 address",
}
OPTIONAL = {"ec2:CreateSubnetCidrReservation": "making a pool's reservation (createReservations)"}


@dataclass(frozen=True, slots=True)
class Permission:
    action: str
    needed_for: str
    answer: str  # allowed | denied | unknown
    message: str = ""


async def examine(calls: Ec2Calls, inventory: Inventory, subnet: str, instance: str) -> list[Permission]:
    """One finding an action. `subnet` of a pool, `instance` of any node: a policy's conditions are judged by them."""
    try:
        ours = sorted((await inventory.interfaces()).values(), key=lambda i: i.id)
    except Final:
        ours = []  # said below, by its action
    free = next((i for i in ours if not i.instance), ours[0] if ours else None)
    found = []
    for action, parameters in _questions(calls.settings.cluster, subnet, instance, free).items():
        found.append(await _ask(calls, action, parameters))
    found.append(await _moves(calls, ours))
    asked = {permission.action for permission in found}
    rest = [action for action in ACTIONS if action not in asked]
    return found + [Permission(a, ACTIONS[a], UNKNOWN, "EC2 has no dry run for it: docs/iam.md") for a in rest]


def _questions(
    cluster: str, subnet: str, instance: str, interface: Interface | None
) -> dict[str, dict[str, Any] | None]:
    """Parameters of each dry run; None: there is nothing yet to ask with."""
    tags = [{"Key": CLUSTER_TAG, "Value": cluster}]
    named = {"NetworkInterfaceId": interface.id} if interface else None
    made = [{"ResourceType": "network-interface", "Tags": tags}]
    return {
        "ec2:DescribeInstances": {},
        "ec2:DescribeInstanceTypes": {},
        "ec2:DescribeNetworkInterfaces": {},
        "ec2:DescribeSubnets": {},
        "ec2:GetSubnetCidrReservations": {"SubnetId": subnet},
        "ec2:CreateNetworkInterface": {"SubnetId": subnet, "TagSpecifications": made},
        "ec2:AttachNetworkInterface": named and {**named, "InstanceId": instance, "DeviceIndex": 1},
        "ec2:ModifyNetworkInterfaceAttribute": named and {**named, "Description": {"Value": "dry run"}},
        "ec2:DeleteNetworkInterface": named,
    }


async def _ask(calls: Ec2Calls, action: str, parameters: dict[str, Any] | None) -> Permission:
    if parameters is None:
        return Permission(action, ACTIONS[action], UNKNOWN, "no interface of Midstream is there yet to ask with")
    return await _verdict(calls, action, {**parameters, "DryRun": True})


async def _moves(calls: Ec2Calls, ours: list[Interface]) -> Permission:
    action = "ec2:AssignPrivateIpAddresses"
    for interface in ours:
        held = sorted(address for address in interface.addresses if ":" not in address)
        if held:
            return await _verdict(calls, action, {"NetworkInterfaceId": interface.id, "PrivateIpAddresses": held[:1]})
    return Permission(action, ACTIONS[action], UNKNOWN, "no interface of Midstream holds an address yet")


async def _verdict(calls: Ec2Calls, action: str, parameters: dict[str, Any]) -> Permission:
    try:
        await calls.once(_method(action), **parameters)
        answer, message = ALLOWED, ""
    except Ec2Refusal as e:
        answer, message = (ALLOWED, "") if e.aws_code == "DryRunOperation" else (UNKNOWN, e.message)
    except OperatorError as e:
        answer, message = DENIED if e.code in ("ec2_denied", "no_credentials") else UNKNOWN, e.message
    return Permission(action, ACTIONS[action], answer, message)


def _method(action: str) -> str:
    """ec2:AssignPrivateIpAddresses -> assign_private_ip_addresses, as boto3 spells it."""
    name = action.partition(":")[2].replace("Ipv6", "_ipv6")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).strip("_").replace("__", "_")
