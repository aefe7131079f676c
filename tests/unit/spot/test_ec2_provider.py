"""The EC2 provider, by real boto3 over HTTP, against the testbed's EC2."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from midstream_operator.aws_settings import Ec2Settings
from midstream_operator.errors import Final, OperatorError, Retryable
from midstream_operator.providers.base import Place
from midstream_operator.providers.ec2 import Ec2Provider
from midstream_operator.providers.ec2_inventory import CLUSTER_TAG, INSTANCE_TAG, NO_MANAGE_TAG
from midstream_operator.providers.ec2_permissions import ACTIONS, ALLOWED, DENIED, UNKNOWN, examine
from midstream_operator.settings import Pool
from midstream_testbed.ec2 import Ec2, Ec2Server, in_memory

FIP, FIP2, FIP6 = "10.0.0.100", "10.0.0.101", "fd00::100"


@dataclass
class World:
    ec2: Ec2
    settings: Ec2Settings
    pool: Pool
    nodes: dict[str, str]  # name -> instance

    def place(self, node: str, pod: str = "llm") -> Place:
        provider_id = f"aws:///eu-west-1a/{self.nodes[node]}"
        return Place(node, provider_id, "eu-west-1a", "default", pod, f"uid-{pod}")

    def run(self, work: Callable[[Ec2Provider], Awaitable[Any]], *, check: bool = True, **witnesses: Any) -> Any:
        """One life of the operator."""

        async def body() -> Any:
            provider = Ec2Provider(self.settings, **witnesses)
            try:
                if check:
                    await provider.check(self.pool)
                return await work(provider)
            finally:
                await provider.close()

        return asyncio.run(body())

    def refusal(self, work: Callable[[Ec2Provider], Awaitable[Any]], **options: Any) -> OperatorError:
        with pytest.raises(OperatorError) as caught:
            self.run(work, **options)
        return caught.value

    def owner(self, address: str) -> str:
        """The node that the table gives the address to."""
        owned = self.ec2.account.addresses.get(address)
        if owned is None:
            return ""
        attachment = self.ec2.account.interfaces[owned.interface].attachment
        names = {instance: node for node, instance in self.nodes.items()}
        return names[attachment.instance] if attachment else "nobody"

    def mutations(self) -> list[str]:
        return [c.action for c in self.ec2.calls if not c.action.startswith(("Describe", "Get")) and not c.code]


@pytest.fixture
def world() -> Iterator[World]:
    ec2 = in_memory()
    subnet = ec2.account.add_subnet("10.0.0.0/24", cidr6="fd00::/64")
    subnet.reservations["scr-1"] = ("10.0.0.96/27", "explicit", {})
    subnet.reservations["scr-2"] = ("fd00::100/120", "explicit", {})
    nodes = {name: ec2.account.add_instance(subnet, "g4dn.xlarge").id for name in ("a", "b", "c")}
    pool = Pool("llm", "ec2", ("10.0.0.96/27", "fd00::100/120"), "eu-west-1a", subnet.id)
    with Ec2Server(ec2) as server:
        settings = Ec2Settings(
            cluster="test", endpoint=server.url, retry_s=0.02, retry_max_s=0.1, give_up_s=2.0, batch_s=0.01,
            inventory_s=0.05, leftover_s=0.0,
        )  # fmt: skip
        yield World(ec2, settings, pool, nodes)


# -- moving


def test_an_address_comes_moves_and_goes(world: World) -> None:
    async def work(provider: Ec2Provider) -> None:
        await provider.assign([FIP], world.place("a"), 1)
        assert world.owner(FIP) == "a" and await provider.confirm([FIP], world.place("a"))
        await provider.assign([FIP], world.place("b"), 2)
        assert world.owner(FIP) == "b" and await provider.confirm([FIP], world.place("b"))
        assert not await provider.confirm([FIP], world.place("a"))
        await provider.release([FIP], world.place("b"), 3)
        await provider.release([FIP], world.place("b"), 3)
        assert world.owner(FIP) == ""

    world.run(work)


def test_ipv6_is_taken_off_and_put_on(world: World) -> None:
    async def work(provider: Ec2Provider) -> None:
        await provider.assign([FIP, FIP6], world.place("a"), 1)
        await provider.assign([FIP, FIP6], world.place("b"), 2)
        assert await provider.confirm([FIP, FIP6], world.place("b"))

    world.run(work)
    assert [world.owner(FIP), world.owner(FIP6)] == ["b", "b"]


def test_an_operator_that_dies_between_the_two_calls_of_ipv6_is_taken_up(world: World) -> None:
    world.run(lambda p: p.assign([FIP6], world.place("a"), 1))
    world.ec2.fail("AssignIpv6Addresses", "InvalidParameterValue", "the operator died here")
    assert world.refusal(lambda p: p.assign([FIP6], world.place("b"), 2)).code == "ec2_refused"
    assert world.owner(FIP6) == ""
    world.run(lambda p: p.assign([FIP6], world.place("b"), 3))
    assert world.owner(FIP6) == "b"


def test_what_is_there_already_costs_no_call_also_after_a_restart(world: World) -> None:
    world.run(lambda p: p.assign([FIP], world.place("a"), 1))
    before = len(world.mutations())
    world.run(lambda p: p.assign([FIP], world.place("a"), 1))
    assert len(world.mutations()) == before


def test_addresses_of_one_interface_go_in_one_call(world: World) -> None:
    async def work(provider: Ec2Provider) -> None:
        await provider.assign([FIP, FIP2], world.place("a"), 1)
        await asyncio.gather(
            provider.assign([FIP], world.place("b", "llm-0"), 2), provider.assign([FIP2], world.place("b", "llm-1"), 2)
        )

    world.run(work)
    calls = world.ec2.called("AssignPrivateIpAddresses")
    assert [call.parameters["PrivateIpAddresses"] for call in calls] == [[FIP, FIP2]] * 2


def test_one_bad_address_does_not_stop_the_others_of_its_batch(world: World) -> None:
    bad = "10.0.0.110"
    world.ec2.account.new_interface(next(iter(world.ec2.account.subnets.values())), bad).tags[CLUSTER_TAG] = "test"

    async def work(provider: Ec2Provider) -> Any:
        places = [world.place("a", "llm-0"), world.place("a", "llm-1")]
        await provider.interfaces.of(world.nodes["a"], world.pool.subnet)
        return await asyncio.gather(
            provider.assign([bad], places[0], 1), provider.assign([FIP], places[1], 1), return_exceptions=True
        )

    first, second = world.run(work)
    assert isinstance(first, Final) and "primary address" in first.message
    assert second is None and world.owner(FIP) == "a"


# -- the interface


def test_the_interface_is_made_so_that_the_cni_leaves_it_alone(world: World) -> None:
    world.run(lambda p: p.assign([FIP], world.place("a"), 1))
    (made,) = world.ec2.called("CreateNetworkInterface")
    tags = {tag["Key"]: tag["Value"] for tag in made.parameters["TagSpecifications"][0]["Tags"]}
    assert tags[NO_MANAGE_TAG] == "true" and tags[CLUSTER_TAG] == "test" and tags[INSTANCE_TAG] == world.nodes["a"]
    assert world.ec2.called("CreateTags") == [], "a tag that comes later is too late"
    (eni,) = [i for i in world.ec2.account.of_instance(world.nodes["a"]) if i.tags]
    assert eni.attachment and not eni.attachment.delete_on_termination
    world.run(lambda p: p.assign([FIP2], world.place("a"), 1))
    assert len(world.ec2.called("CreateNetworkInterface")) == 1


def test_two_that_need_the_interface_at_once_make_one(world: World) -> None:
    async def work(provider: Ec2Provider) -> None:
        await asyncio.gather(*(provider.assign([f"10.0.0.{100 + n}"], world.place("a", f"p{n}"), 1) for n in range(5)))

    world.run(work)
    assert len(world.ec2.called("CreateNetworkInterface")) == 1


@pytest.mark.parametrize("lost_at", ["CreateNetworkInterface", "AttachNetworkInterface"])
def test_an_interface_whose_answer_was_lost_is_found_again(
    world: World, lost_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = world.ec2.handle
    lost: list[str] = []

    def spoiled(headers: Any, body: str) -> tuple[int, bytes]:
        status, answer = handle(headers, body)
        if f"Action={lost_at}" in body and not lost:
            lost.append(body)
            return 503, b"<Response><Errors><Error><Code>Unavailable</Code></Error></Errors></Response>"
        return status, answer

    monkeypatch.setattr(world.ec2, "handle", spoiled)
    world.run(lambda p: p.assign([FIP], world.place("a"), 1))
    made = [i for i in world.ec2.account.interfaces.values() if i.tags]
    assert lost and len(made) == 1 and world.owner(FIP) == "a"


def test_an_interface_of_a_dead_operator_is_attached_and_not_made_again(world: World) -> None:
    world.ec2.fail("AttachNetworkInterface", "IncorrectState", "the operator died here")
    world.refusal(lambda p: p.assign([FIP], world.place("a"), 1))
    world.run(lambda p: p.assign([FIP], world.place("a"), 1))
    assert len([i for i in world.ec2.account.interfaces.values() if i.tags]) == 1


def test_the_cni_takes_the_index_first(world: World) -> None:
    async def work(provider: Ec2Provider) -> None:
        await provider.inventory.instance(world.nodes["a"])
        instance = await provider.interfaces.living(world.nodes["a"])
        subnet = world.ec2.account.subnets[world.pool.subnet]
        theirs = world.ec2.account.new_interface(subnet, "10.0.0.50")
        world.ec2.handle(SIGNED, f"Action=AttachNetworkInterface&NetworkInterfaceId={theirs.id}"
                                 f"&InstanceId={instance.id}&DeviceIndex=1")  # fmt: skip
        ours = world.ec2.account.new_interface(subnet, "10.0.0.51")
        await provider.interfaces._attach(ours.id, instance)
        assert ours.attachment and ours.attachment.device_index == 2

    world.run(work)


SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/eu-west-1/ec2/aws4_request, SignedHeaders=host, "
    f"Signature={'0' * 64}",
    "X-Amz-Date": "20260101T000000Z",
}


def test_addresses_outlive_the_instance_and_leftovers_are_collected(world: World) -> None:
    async def work(provider: Ec2Provider) -> None:
        await provider.assign([FIP], world.place("a"), 1)
        world.ec2.account.end_instance(world.nodes["a"])
        assert await provider.interfaces.collect() == [], "it still holds an address"
        assert await provider.gone(world.place("a").provider_id) == "ec2:terminated"
        await provider.assign([FIP], world.place("b"), 2)
        assert world.owner(FIP) == "b"
        assert len(await provider.interfaces.collect()) == 1
        assert await provider.interfaces.collect() == []

    world.run(work)


# -- refused by name


def foreign(world: World, address: str) -> None:
    other = world.ec2.account.new_interface(world.ec2.account.subnets[world.pool.subnet], "10.0.0.60")
    world.ec2.account.own(address, other.id)


def lose_tag(world: World) -> None:
    world.run(lambda p: p.assign([FIP2], world.place("a"), 1))
    for interface in world.ec2.account.of_instance(world.nodes["a"]):
        interface.tags.pop(NO_MANAGE_TAG, None)


def fill(world: World) -> None:
    for _ in range(2):
        eni = world.ec2.account.new_interface(
            world.ec2.account.subnets[world.pool.subnet], world.ec2.account.free_address(
                world.ec2.account.subnets[world.pool.subnet]))  # fmt: skip
        index = len(world.ec2.account.of_instance(world.nodes["a"]))
        world.ec2.handle(SIGNED, f"Action=AttachNetworkInterface&NetworkInterfaceId={eni.id}"
                                 f"&InstanceId={world.nodes['a']}&DeviceIndex={index}")  # fmt: skip


REFUSED: dict[str, tuple[str, Callable[[World], None], Sequence[str]]] = {
    "outside every pool": ("address_not_in_pool", lambda w: None, ["10.0.0.40"]),
    "held by a stranger": ("address_foreign", lambda w: foreign(w, FIP), [FIP]),
    "the CNI would take it": ("cni_conflict", lose_tag, [FIP]),
    "no interface left": ("eni_limit", fill, [FIP]),
    "too many on one interface": ("address_limit", lambda w: None, [f"10.0.0.{100 + n}" for n in range(10)]),
    "a dead instance": (
        "instance_not_running", lambda w: w.ec2.account.end_instance(w.nodes["a"], "stopped"), [FIP],
    ),
    "no rights": ("ec2_denied", lambda w: w.ec2.denied.add("CreateNetworkInterface"), [FIP]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_by_name(world: World, case: str) -> None:
    code, prepare, addresses = REFUSED[case]

    async def work(provider: Ec2Provider) -> None:
        await asyncio.get_running_loop().run_in_executor(None, prepare, world)
        await provider.assign(addresses, world.place("a"), 1)

    problem = world.refusal(work)
    assert problem.code == code and isinstance(problem, Final) and len(problem.message) > 30


def test_an_older_epoch_is_refused(world: World) -> None:
    async def work(provider: Ec2Provider) -> None:
        await provider.assign([FIP], world.place("a"), 5)
        await provider.assign([FIP], world.place("b"), 4)

    assert world.refusal(work).code == "stale_epoch" and world.owner(FIP) == "a"


def test_a_node_that_is_not_of_ec2_is_refused(world: World) -> None:
    place = replace(world.place("a"), provider_id="gce://project/zone/node")
    assert world.refusal(lambda p: p.assign([FIP], place, 1)).code == "no_provider_id"


POOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "no subnet": ("no_subnet", {"subnet": ""}),
    "unknown subnet": ("no_subnet", {"subnet": "subnet-0"}),
    "another zone": ("wrong_zone", {"zone": "eu-west-1b"}),
    "outside the subnet": ("pool_outside_subnet", {"cidrs": ("10.9.0.0/28",)}),
    "not reserved": ("no_reservation", {"cidrs": ("10.0.0.160/28",)}),
    "half reserved": ("no_reservation", {"cidrs": ("10.0.0.64/26",)}),
}


@pytest.mark.parametrize("case", POOLS)
def test_a_pool_that_cannot_be_served_is_refused_by_name(world: World, case: str) -> None:
    code, wrong = POOLS[case]
    assert world.refusal(lambda p: p.check(replace(world.pool, **wrong)), check=False).code == code


def test_a_pool_in_which_a_stranger_sits_is_refused(world: World) -> None:
    foreign(world, FIP)
    assert world.refusal(lambda p: p.check(world.pool), check=False).code == "address_foreign"


def test_a_missing_reservation_is_made_where_that_is_asked_for(world: World) -> None:
    world.settings = replace(world.settings, create_reservations=True)
    wider = replace(world.pool, cidrs=("10.0.0.160/28",))
    world.run(lambda p: p.check(wider), check=False)
    kinds = {c: k for c, k, _ in world.ec2.account.subnets[world.pool.subnet].reservations.values()}
    assert kinds["10.0.0.160/28"] == "explicit"
    world.run(lambda p: p.check(wider), check=False)


# -- a yes that is none


def yes(answer: bool | None) -> Callable[[Sequence[str], Place], Awaitable[bool | None]]:
    async def witness(addresses: Sequence[str], place: Place) -> bool | None:
        return answer

    return witness


def test_a_yes_that_does_not_happen_is_not_confirmed(world: World) -> None:
    async def work(provider: Ec2Provider) -> bool:
        world.ec2.account.lie = True
        await provider.assign([FIP], world.place("a"), 1)
        return await provider.confirm([FIP], world.place("a"))

    assert world.run(work, path=yes(True)) is False


@pytest.mark.parametrize(
    ("imds", "path", "confirmed"),
    [
        (None, None, True),
        (True, None, True),
        (False, None, False),  # EC2 says yes, the node has not heard of it
        (None, False, False),  # EC2 lies: no packet takes the new way
        (True, False, False),
        (False, True, True),  # IMDS is stale: packets have the last word
    ],
)
def test_three_witnesses(world: World, imds: bool | None, path: bool | None, confirmed: bool) -> None:
    async def work(provider: Ec2Provider) -> bool:
        await provider.assign([FIP], world.place("a"), 1)
        return await provider.confirm([FIP], world.place("a"))

    assert world.run(work, imds=yes(imds), path=yes(path)) is confirmed


def test_packets_that_agents_have_seen_go_before_a_stale_imds(world: World) -> None:
    async def work(provider: Ec2Provider) -> tuple[bool, bool]:
        await provider.assign([FIP], world.place("a"), 1)
        there = await provider.confirm([FIP], world.place("a"), proved=True)
        return there, await provider.confirm([FIP], world.place("b"), proved=True)

    assert world.run(work, imds=yes(False)) == (True, False), "and EC2's listing before both"


@pytest.mark.parametrize(("imds", "calls"), [(True, 1), (False, 2), (None, 1)])
def test_a_move_that_a_witness_denies_is_asked_for_again_and_named(world: World, imds: bool | None, calls: int) -> None:
    async def work(provider: Ec2Provider) -> str:
        await provider.assign([FIP], world.place("a"), 1)
        await provider.confirm([FIP], world.place("a"))
        await provider.assign([FIP], world.place("a"), 1)
        return provider.why_not([FIP])

    why = world.run(work, imds=yes(imds))
    assert world.mutations().count("AssignPrivateIpAddresses") == calls
    assert ("the instance's own metadata does not" in why) is (imds is False)


# -- EC2 has a bad day


def test_throttled_calls_come_again_and_all_get_through(world: World) -> None:
    world.ec2.mutating = (2.0, 20.0)

    async def work(provider: Ec2Provider) -> None:
        for node in "abc":
            await provider.interfaces.of(world.nodes[node], world.pool.subnet)
        for turn in range(4):
            await asyncio.gather(
                *(provider.assign([f"10.0.0.{100 + n}"], world.place("abc"[(n + turn) % 3]), turn) for n in range(6))
            )
        assert provider.calls.outcomes["assign_private_ip_addresses", "RequestLimitExceeded"] > 0
        assert provider.budget().available < world.settings.burst

    world.run(work)
    assert [world.owner(f"10.0.0.{100 + n}") for n in range(6)] == list("abcabc")


@pytest.mark.parametrize("code", ["Unavailable", "InternalError", "RequestLimitExceeded"])
def test_an_answer_that_may_pass_is_asked_again_and_then_told(world: World, code: str) -> None:
    world.ec2.fail("AssignPrivateIpAddresses", code, status=503, times=2)
    world.run(lambda p: p.assign([FIP], world.place("a"), 1))
    world.settings = replace(world.settings, give_up_s=0.1)
    world.ec2.fail("AssignPrivateIpAddresses", code, status=503, times=1000)
    assert isinstance(world.refusal(lambda p: p.assign([FIP], world.place("b"), 2)), Retryable)


def test_while_ec2_does_not_listen_at_all_the_error_has_a_name(world: World) -> None:
    world.settings = replace(world.settings, endpoint="http://127.0.0.1:9", give_up_s=0.1)
    problem = world.refusal(lambda p: p.gone(world.place("a").provider_id), check=False)
    assert problem.code == "ec2_unavailable" and isinstance(problem, Retryable)


def test_the_loop_runs_on_while_ec2_is_slow(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = world.ec2.handle

    def slow(headers: Any, body: str) -> tuple[int, bytes]:
        time.sleep(0.2)
        return handle(headers, body)

    monkeypatch.setattr(world.ec2, "handle", slow)

    async def work(provider: Ec2Provider) -> int:
        assigning = asyncio.create_task(provider.assign([FIP], world.place("a"), 1))
        turns = 0
        while not assigning.done():
            await asyncio.sleep(0.01)
            turns += 1
        await assigning
        return turns

    assert world.run(work) > 60, "a blocked loop would have turned once a call"


# -- proof of death


@pytest.mark.parametrize(
    ("state", "evidence"),
    [
        ("running", ""),
        ("stopping", ""),
        ("shutting-down", ""),
        ("stopped", "ec2:stopped"),
        ("terminated", "ec2:terminated"),
    ],
)
def test_only_ec2s_own_word_proves_that_a_node_is_gone(world: World, state: str, evidence: str) -> None:
    world.ec2.account.instances[world.nodes["a"]].state = state
    assert world.run(lambda p: p.gone(world.place("a").provider_id)) == evidence


def test_an_unknown_instance_proves_nothing(world: World) -> None:
    assert world.run(lambda p: p.gone("aws:///eu-west-1a/i-0123456789abcdef0")) == ""


def test_many_questions_at_once_are_one_call(world: World) -> None:
    async def work(provider: Ec2Provider) -> None:
        await asyncio.gather(*(provider.gone(world.place(node).provider_id) for node in "abc" * 50))

    world.run(work)
    assert len(world.ec2.called("DescribeInstances")) == 1


# -- permissions


def test_permissions_are_asked_without_changing_anything(world: World) -> None:
    world.run(lambda p: p.assign([FIP], world.place("a"), 1))
    before = world.mutations()
    world.ec2.denied |= {"DeleteNetworkInterface", "DescribeSubnets"}

    async def work(provider: Ec2Provider) -> dict[str, str]:
        found = await examine(provider.calls, provider.inventory, world.pool.subnet, world.nodes["b"])
        return {permission.action: permission.answer for permission in found}

    found = world.run(work, check=False)
    assert set(found) == set(ACTIONS)
    assert [a for a, answer in found.items() if answer == DENIED] == [
        "ec2:DescribeSubnets",
        "ec2:DeleteNetworkInterface",
    ]
    assert [a for a, answer in found.items() if answer == UNKNOWN] == [
        "ec2:CreateTags", "ec2:UnassignPrivateIpAddresses", "ec2:AssignIpv6Addresses", "ec2:UnassignIpv6Addresses",
    ]  # fmt: skip
    assert found["ec2:AssignPrivateIpAddresses"] == ALLOWED
    assert world.mutations()[len(before) :] == ["AssignPrivateIpAddresses"] and world.owner(FIP) == "a"
