"""The operator, a job, and EC2: real boto3 over HTTP against the testbed's EC2 (midstream_testbed.ec2)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import pytest
from cluster_world import Place, World, wait_for
from midstream_testbed.ec2 import Ec2, Ec2Server, in_memory

ZONE = "eu-west-1a"


class Cloud:
    """Two nodes that are instances, and the pool "cloud"."""

    def __init__(self, ec2: Ec2, world: World) -> None:
        self.ec2 = ec2
        subnet = ec2.account.add_subnet("10.0.0.0/24")
        subnet.reservations["scr-1"] = ("10.0.0.96/27", "explicit", {})
        self.pool = {"name": "cloud", "provider": "ec2", "cidrs": ["10.0.0.96/27"], "zone": ZONE, "subnet": subnet.id}
        self.nodes = {ec2.account.add_instance(subnet, "g4dn.xlarge").id: name for name in ("ec2-a", "ec2-b")}
        for instance, name in self.nodes.items():
            world.add_node(name, ZONE, instance)

    def owner(self, address: str) -> str:
        """The node to which the account's table gives the address."""
        owned = self.ec2.account.addresses.get(address)
        attachment = self.ec2.account.interfaces[owned.interface].attachment if owned else None
        return self.nodes[attachment.instance] if attachment else ""

    def network_owner(self, address: str) -> str:
        """Where packets for it go, whatever the table says."""
        interface = self.ec2.account.network.owner(address)
        attachment = self.ec2.account.interfaces[interface].attachment if interface else None
        return self.nodes[attachment.instance] if attachment else ""


@pytest.fixture(scope="module")
def cloud(world: World) -> Iterator[Cloud]:
    before = copy.deepcopy(world.operators.config)
    ec2 = in_memory()
    cloud = Cloud(ec2, world)
    with pytest.MonkeyPatch.context() as patch, Ec2Server(ec2) as server:
        for name, value in (("ACCESS_KEY_ID", "AKIATEST"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "eu-1")):
            patch.setenv(f"AWS_{name}", value)
        world.operators.stop_all()
        world.operators.config["pools"].append(cloud.pool)
        world.operators.config["timeouts"]["addressConfirmS"] = 2
        world.operators.config["timeouts"]["addressLookS"] = 0.2
        world.operators.config["aws"] = {"ec2": {"cluster": "test", "endpoint": server.url, "region": "eu-west-1"}}
        yield cloud
        world.operators.stop_all()
        world.operators.config = before


def test_ec2_is_asked_when_the_job_has_committed_and_not_before(cloud: Cloud, world: World, place: Place) -> None:
    """The source agent ends its job when packets take the new path: who waited for that would wait for ever."""
    place.add_pod("llm-0", "ec2-a")
    address = place.add_fip(pool="cloud", provider="ec2")["status"]["address"]
    place.add_pod("llm-1", "ec2-b")
    assert cloud.owner(address) == "ec2-a"
    with world.agents.stopped_at("SEND"):
        job = place.add_job()
        place.wait_job(job, "Switching")
        assert cloud.owner(address) == "ec2-a"
        world.agents.do("stop-at", steps=["RELEASE"])
        place.wait_job(job, "Committing")
        wait_for("the address at the target", lambda: cloud.owner(address) == "ec2-b")
        assert place.status(job)["phase"] == "Committing"
    place.wait_job(job, "Succeeded")
    assert place.wait_fip("llm", "True")["status"]["node"] == "ec2-b"


def test_with_wait_ec2_is_asked_before_the_commit(cloud: Cloud, world: World, place: Place) -> None:
    """The agents commit when packets take the new path, and nobody else can have them do so."""
    place.add_pod("llm-0", "ec2-a")
    address = place.add_fip(pool="cloud", provider="ec2")["status"]["address"]
    place.add_pod("llm-1", "ec2-b")
    with world.agents.stopped_at("MOVE_ADDRESS"):
        job = place.add_job(switchover="Wait")
        wait_for("the address at the target", lambda: cloud.owner(address) == "ec2-b")
        assert place.status(job)["phase"] == "Switching"
    place.wait_job(job, "Succeeded")


def test_an_address_that_did_not_arrive_is_asked_back(cloud: Cloud, world: World, place: Place) -> None:
    """EC2 said yes, the agents saw no packet in time and went back: the address must not stay at the target."""
    place.add_pod("llm-0", "ec2-a")
    address = place.add_fip(pool="cloud", provider="ec2")["status"]["address"]
    place.add_pod("llm-1", "ec2-b")
    with world.agents.stopped_at("MOVE_ADDRESS"):
        job = place.add_job(switchover="Wait")
        wait_for("the address at the target", lambda: cloud.owner(address) == "ec2-b")
        world.agents.do("fail-at", steps=[["MOVE_ADDRESS", "address_not_moved"]])
    place.wait_job(job, "RolledBack")
    world.agents.do("fail-at", steps=[])
    assert cloud.owner(address) == "ec2-a"
    assert place.wait_fip("llm", "True")["status"]["node"] == "ec2-a"


def test_a_yes_that_did_not_happen_is_found_and_asked_for_again(cloud: Cloud, world: World, place: Place) -> None:
    """EC2's table has it at the target, the instance's metadata does not, and the agents see no packet: not moved."""
    place.add_pod("llm-0", "ec2-a")
    address = place.add_fip(pool="cloud", provider="ec2")["status"]["address"]
    place.add_pod("llm-1", "ec2-b")
    world.agents.do("metadata", node="ec2-b", addresses=[])
    cloud.ec2.account.lie_to_packets = True
    try:
        with world.agents.stopped_at("COMMIT"):  # the agents wait for the path
            job = place.add_job()
            place.wait_job(job, "Committing")
            wait_for("the address at the target, by EC2", lambda: cloud.owner(address) == "ec2-b")
            first = len(cloud.ec2.called("AssignPrivateIpAddresses"))
            wait_for("its name", lambda: "metadata does not" in place.status(job).get("message", ""))
            wait_for("another call", lambda: len(cloud.ec2.called("AssignPrivateIpAddresses")) > first)
            wait_for("the event", lambda: "AddressNotMoved" in place.events("MigrationJob", job))
            assert cloud.network_owner(address) == "ec2-a", "EC2 lies still"
            cloud.ec2.account.lie_to_packets = False
            wait_for("packets at the target", lambda: cloud.network_owner(address) == "ec2-b")
            world.agents.do("metadata", node="ec2-b", addresses=["10.0.0.5", address])
        place.wait_job(job, "Succeeded")
        assert place.wait_fip("llm", "True")["status"]["node"] == "ec2-b"
    finally:
        cloud.ec2.account.lie_to_packets = False
        world.agents.do("metadata", node="ec2-b", addresses=None)


def test_packets_that_do_not_take_the_new_path_have_it_asked_again(cloud: Cloud, world: World, place: Place) -> None:
    """EC2's listing and the instance's metadata agree, and are both wrong."""
    place.add_pod("llm-0", "ec2-a")
    address = place.add_fip(pool="cloud", provider="ec2")["status"]["address"]
    place.add_pod("llm-1", "ec2-b")
    world.agents.do("metadata", node="ec2-b", addresses=[address])
    cloud.ec2.account.lie_to_packets = True
    try:
        with world.agents.stopped_at("MOVE_ADDRESS"):
            job = place.add_job(switchover="Wait")
            wait_for("its name", lambda: "no packet takes the new path" in place.status(job).get("message", ""))
            assert cloud.network_owner(address) == "ec2-a"
            cloud.ec2.account.lie_to_packets = False
            wait_for("packets at the target", lambda: cloud.network_owner(address) == "ec2-b")
        place.wait_job(job, "Succeeded")
    finally:
        cloud.ec2.account.lie_to_packets = False
        world.agents.do("metadata", node="ec2-b", addresses=None)


def test_an_address_that_the_instance_does_not_know_of_is_not_ready(cloud: Cloud, world: World, place: Place) -> None:
    world.agents.do("metadata", node="ec2-a", addresses=[])
    try:
        place.add_pod("llm-0", "ec2-a")
        place.make_fip("llm", pool="cloud", provider="ec2")
        said = place.wait_fip("llm", "False", "AddressNotMoved")["status"]
        assert "the instance's own metadata does not" in said["conditions"][0]["message"]
        world.agents.do("metadata", node="ec2-a", addresses=[said["address"]])
        place.wait_fip("llm", "True")
    finally:
        world.agents.do("metadata", node="ec2-a", addresses=None)


def doctor(world: World) -> list[dict[str, str]]:
    (name,) = world.operators.running
    found: list[dict[str, str]] = json.loads(world.operators.fetch(name, "/doctor"))["findings"]
    return [f for f in found if f["check"] == "iam cloud"]


def test_the_doctor_asks_ec2_what_the_role_allows(cloud: Cloud, world: World, place: Place) -> None:
    (found,) = wait_for("the doctor", lambda: doctor(world))
    assert found["severity"] == "ok" and "actions are allowed" in found["message"]
    cloud.ec2.denied.add("AttachNetworkInterface")
    cloud.ec2.denied.add("DescribeInstances")
    try:
        denied = wait_for("the denials", lambda: [f for f in doctor(world) if f["severity"] == "error"], 15)
    finally:
        cloud.ec2.denied.clear()
    assert any(f["message"].startswith("ec2:DescribeInstances (nodes, and the proof") for f in denied), denied
    assert all("docs/iam.md" in f["remedy"] for f in denied)
