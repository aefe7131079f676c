"""The testbed's EC2 is as strict as the real one, by real boto3 over HTTP."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from midstream_testbed.ec2 import Ec2, Ec2Server, in_memory


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class World:
    ec2: Ec2
    url: str
    client: Any
    clock: Clock
    subnet: str
    node_a: str
    node_b: str

    def interface(self, instance: str, index: int = 1) -> str:
        made = self.client.create_network_interface(SubnetId=self.subnet)["NetworkInterface"]["NetworkInterfaceId"]
        self.client.attach_network_interface(NetworkInterfaceId=made, InstanceId=instance, DeviceIndex=index)
        return str(made)

    def addresses(self, interface: str) -> list[str]:
        found = self.client.describe_network_interfaces(NetworkInterfaceIds=[interface])["NetworkInterfaces"][0]
        return [entry["PrivateIpAddress"] for entry in found["PrivateIpAddresses"] if not entry["Primary"]]


@pytest.fixture
def world() -> Iterator[World]:
    clock = Clock()
    ec2 = in_memory(move_seconds=3.0, clock=clock)
    subnet = ec2.account.add_subnet("10.0.0.0/24", cidr6="fd00::/64")
    nodes = [ec2.account.add_instance(subnet, "g4dn.xlarge").id for _ in range(2)]
    with Ec2Server(ec2) as server:
        client = boto3.client(
            "ec2", endpoint_url=server.url, region_name="eu-west-1", aws_access_key_id="id",
            aws_secret_access_key="secret", config=Config(retries={"total_max_attempts": 1}),
        )  # fmt: skip
        yield World(ec2, server.url, client, clock, subnet.id, *nodes)
        client.close()


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(ClientError) as caught:
        call()
    return str(caught.value.response["Error"]["Code"])


def test_an_address_moves_by_reassignment_and_packets_follow_later(world: World) -> None:
    a, b = world.interface(world.node_a), world.interface(world.node_b)
    world.client.assign_private_ip_addresses(NetworkInterfaceId=a, PrivateIpAddresses=["10.0.0.100"])
    assert world.ec2.account.network.owner("10.0.0.100") == a
    move = {"NetworkInterfaceId": b, "PrivateIpAddresses": ["10.0.0.100"]}
    assert code_of(lambda: world.client.assign_private_ip_addresses(**move)) == "InvalidParameterValue"
    world.client.assign_private_ip_addresses(**move, AllowReassignment=True)
    assert world.addresses(b) == ["10.0.0.100"] and world.addresses(a) == []
    assert world.ec2.account.network.owner("10.0.0.100") == a, "the yes comes before the effect"
    world.clock.now_s += 3.0
    assert world.ec2.account.network.owner("10.0.0.100") == b


def test_describe_and_imds_may_be_late(world: World) -> None:
    a, b = world.interface(world.node_a), world.interface(world.node_b)
    world.client.assign_private_ip_addresses(NetworkInterfaceId=a, PrivateIpAddresses=["10.0.0.100"])
    world.ec2.account.describe_lag_s, world.ec2.account.imds_lag_s = 1.0, 2.0
    world.clock.now_s += 5.0
    world.client.assign_private_ip_addresses(
        NetworkInterfaceId=b, PrivateIpAddresses=["10.0.0.100"], AllowReassignment=True
    )
    assert world.addresses(b) == []
    world.clock.now_s += 1.0
    assert world.addresses(b) == ["10.0.0.100"]
    assert "10.0.0.100" not in world.ec2.account.imds_addresses(b)
    world.clock.now_s += 1.0
    assert "10.0.0.100" in world.ec2.account.imds_addresses(b)


def test_a_yes_that_does_not_happen(world: World) -> None:
    a = world.interface(world.node_a)
    world.ec2.account.lie = True
    world.client.assign_private_ip_addresses(NetworkInterfaceId=a, PrivateIpAddresses=["10.0.0.100"])
    assert world.addresses(a) == []
    world.ec2.account.lie, world.ec2.account.lie_to_packets = False, True
    world.client.assign_private_ip_addresses(NetworkInterfaceId=a, PrivateIpAddresses=["10.0.0.100"])
    assert world.addresses(a) == ["10.0.0.100"] and world.ec2.account.network.owner("10.0.0.100") is None


Refused = tuple[str, Callable[[World], object]]
REFUSED: dict[str, Refused] = {
    "outside the subnet": ("InvalidParameterValue", lambda w: assign(w, "10.0.1.9")),
    "an address of AWS": ("InvalidParameterValue", lambda w: assign(w, "10.0.0.2")),
    "broadcast": ("InvalidParameterValue", lambda w: assign(w, "10.0.0.255")),
    "a primary address": ("InvalidParameterValue", lambda w: assign(w, "10.0.0.4")),
    "no such interface": ("InvalidNetworkInterfaceID.NotFound", lambda w: assign(w, "10.0.0.9", "eni-0")),
    "too many": (
        "PrivateIpAddressLimitExceeded",
        lambda w: assign(w, *(f"10.0.0.{100 + n}" for n in range(10))),
    ),
    "not assigned": (
        "InvalidParameterValue",
        lambda w: w.client.unassign_private_ip_addresses(
            NetworkInterfaceId=w.interface(w.node_a), PrivateIpAddresses=["10.0.0.99"]
        ),
    ),
    "no such instance": ("InvalidInstanceID.NotFound", lambda w: w.client.describe_instances(InstanceIds=["i-0"])),
    "no such subnet": ("InvalidSubnetID.NotFound", lambda w: w.client.create_network_interface(SubnetId="subnet-0")),
    "device index taken": ("InvalidParameterValue", lambda w: w.interface(w.node_a, 0)),
    "too many interfaces": ("AttachmentLimitExceeded", lambda w: [w.interface(w.node_a, n) for n in (1, 2, 3)]),
    "attached twice": (
        "InvalidNetworkInterface.InUse",
        lambda w: w.client.attach_network_interface(
            NetworkInterfaceId=w.interface(w.node_a), InstanceId=w.node_b, DeviceIndex=1
        ),
    ),
    "deleted while in use": (
        "InvalidParameterValue",
        lambda w: w.client.delete_network_interface(NetworkInterfaceId=w.interface(w.node_a)),
    ),
    "overlapping reservation": (
        "InvalidParameterValue",
        lambda w: [reserve(w, "10.0.0.64/27"), reserve(w, "10.0.0.64/28")],
    ),
    "no such filter": (
        "InvalidParameterValue",
        lambda w: w.client.describe_network_interfaces(Filters=[{"Name": "colour", "Values": ["red"]}]),
    ),
    "no such type": ("InvalidInstanceType", lambda w: w.client.describe_instance_types(InstanceTypes=["x9.huge"])),
    "an action we do not have": ("InvalidAction", lambda w: w.client.describe_vpcs()),
    "IPv6 that somebody holds": (
        "InvalidParameterValue",
        lambda w: [
            w.client.assign_ipv6_addresses(NetworkInterfaceId=w.interface(node), Ipv6Addresses=["fd00::9"])
            for node in (w.node_a, w.node_b)
        ],
    ),
}


def assign(world: World, *addresses: str, interface: str = "") -> object:
    *wanted, last = addresses
    if last.startswith("eni-"):
        interface = last
    else:
        wanted.append(last)
    target = interface or world.interface(world.node_a)
    return world.client.assign_private_ip_addresses(
        NetworkInterfaceId=target, PrivateIpAddresses=wanted, AllowReassignment=True
    )


def reserve(world: World, cidr: str) -> object:
    return world.client.create_subnet_cidr_reservation(SubnetId=world.subnet, Cidr=cidr, ReservationType="explicit")


@pytest.mark.parametrize("case", REFUSED)
def test_what_ec2_refuses_is_refused_by_the_same_name(world: World, case: str) -> None:
    code, call = REFUSED[case]
    assert code_of(lambda: call(world)) == code


def test_an_explicit_reservation_is_never_given_out_by_itself(world: World) -> None:
    reserve(world, "10.0.0.0/25")
    made = world.client.create_network_interface(SubnetId=world.subnet)["NetworkInterface"]
    assert made["PrivateIpAddress"] == "10.0.0.128"


def test_calls_are_throttled_for_each_action_and_refill(world: World) -> None:
    world.ec2.mutating = (2.0, 1.0)
    tag = {"Resources": [world.node_a], "Tags": [{"Key": "k", "Value": "v"}]}
    world.client.create_tags(**tag)
    world.client.create_tags(**tag)
    assert code_of(lambda: world.client.create_tags(**tag)) == "RequestLimitExceeded"
    world.client.describe_instances()
    world.clock.now_s += 1.0
    world.client.create_tags(**tag)


def test_dry_run_says_what_would_happen(world: World) -> None:
    assert code_of(lambda: world.client.describe_subnets(DryRun=True)) == "DryRunOperation"
    world.ec2.denied.add("DescribeSubnets")
    assert code_of(lambda: world.client.describe_subnets(DryRun=True)) == "UnauthorizedOperation"


def test_faults_can_be_injected_and_pass(world: World) -> None:
    world.ec2.fail("DescribeInstances", "InternalError", status=500)
    assert code_of(world.client.describe_instances) == "InternalError"
    world.client.describe_instances()
    world.ec2.down = True
    assert code_of(world.client.describe_instances) == "Unavailable"


@pytest.mark.parametrize(
    ("body", "authorization", "code", "status"),
    [
        (b"Action=DescribeInstances", "", "MissingParameter", 400),
        (b"Action=DescribeInstances", "AWS4-HMAC-SHA256 Credential=x", "AuthFailure", 401),
        (b"Action=DescribeInstances&Colour=red", "right", "UnknownParameter", 400),
        (b"Action=DescribeInstances&Colour.1.Name=red", "right", "UnknownParameter", 400),
        (b"Action=AttachNetworkInterface&InstanceId=i-0&NetworkInterfaceId=e", "right", "MissingParameter", 400),
        (b"Action=DescribeInstances&DryRun=maybe", "right", "InvalidParameterValue", 400),
        (b"Action=DescribeInstances&InstanceId.2=i-0", "right", "InvalidParameterValue", 400),
        (b"Action=Nonsense", "right", "InvalidAction", 400),
    ],
)
def test_requests_that_boto3_would_not_make(
    world: World, body: bytes, authorization: str, code: str, status: int
) -> None:
    scope = "Credential=id/20260101/eu-west-1/ec2/aws4_request, SignedHeaders=host;x-amz-date"
    right = f"AWS4-HMAC-SHA256 {scope}, Signature={'0' * 64}"
    headers = {"Authorization": right if authorization == "right" else authorization, "X-Amz-Date": "20260101T000000Z"}
    request = urllib.request.Request(world.url, body, {k: v for k, v in headers.items() if v})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=5)
    with caught.value as answer:
        assert answer.code == status and f"<Code>{code}</Code>" in answer.read().decode()


def test_a_dead_instance_leaves_its_secondary_interface_and_addresses(world: World) -> None:
    a = world.interface(world.node_a)
    assign(world, "10.0.0.100", a)
    world.ec2.account.end_instance(world.node_a)
    found = world.client.describe_network_interfaces(NetworkInterfaceIds=[a])["NetworkInterfaces"][0]
    assert found["Status"] == "available" and world.addresses(a) == ["10.0.0.100"]
    state = world.client.describe_instances(InstanceIds=[world.node_a])["Reservations"][0]["Instances"][0]["State"]
    assert state["Name"] == "terminated"
    assign(world, "10.0.0.100", world.interface(world.node_b))


def test_lists_come_in_pages(world: World) -> None:
    for _ in range(6):
        world.client.create_network_interface(SubnetId=world.subnet)
    pages = list(world.client.get_paginator("describe_network_interfaces").paginate(PaginationConfig={"PageSize": 5}))
    assert [len(page["NetworkInterfaces"]) for page in pages] == [5, 3]
