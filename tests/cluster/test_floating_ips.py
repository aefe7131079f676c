"""FloatingIPs: from the pool to a pod, into the EndpointSlice, along with a job, and back to the pool."""

from __future__ import annotations

import ipaddress

from cluster_world import POOL, Place, World, wait_for


def test_an_address_is_taken_attached_and_published(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    fip = place.add_fip(serviceName="llm", ports=[{"name": "http", "port": 8000}])
    status = fip["status"]
    assert ipaddress.ip_address(status["address"]) in ipaddress.ip_network(POOL)
    assert (status["node"], status["pod"], status["interface"]) == ("a", "llm-0", "eth0")
    assert world.agents.do("routes")["a"][status["address"]] == place.uids["llm-0"][1]
    (endpoint,) = place.slice()["endpoints"]
    assert endpoint["addresses"] == [status["address"]]
    assert endpoint["targetRef"]["name"] == "llm-0"
    assert (endpoint["nodeName"], endpoint["zone"]) == ("a", "z1")
    assert place.slice()["metadata"]["labels"]["kubernetes.io/service-name"] == "llm"
    wait_for("the warning", lambda: "NoService" in place.events("FloatingIP", "llm"))


def test_the_printed_columns_say_where_the_address_is(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    address = place.add_fip()["status"]["address"]
    header, row = world.plane.kubectl("get", "fip", "llm", "-n", place.name).splitlines()
    assert header.split() == ["NAME", "ADDRESS", "POD", "NODE", "READY", "AGE"]
    assert row.split()[:5] == ["llm", address, "llm-0", "a", "True"]


def test_two_addresses_are_two_and_a_pod_may_hold_both(place: Place) -> None:
    place.add_pod("llm-0", "a")
    one, two = (place.add_fip(n)["status"] for n in ("one", "two"))
    assert one["address"] != two["address"]
    assert one["pod"] == two["pod"] == "llm-0"


def test_a_job_takes_the_address_and_its_endpoint_along(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    before = place.add_fip(serviceName="llm", ports=[{"port": 8000}])["status"]
    place.add_pod("llm-1", "b")
    place.wait_job(place.add_job(), "Succeeded")
    after = place.wait_fip("llm", "True")["status"]
    assert (after["address"], after["node"], after["pod"]) == (before["address"], "b", "llm-1")
    assert after["epoch"] > before["epoch"]
    (endpoint,) = place.slice()["endpoints"]
    assert (endpoint["targetRef"]["name"], endpoint["nodeName"], endpoint["conditions"]["ready"]) == (
        "llm-1",
        "b",
        True,
    )


def test_the_endpoint_moves_before_the_job_has_succeeded(world: World, place: Place) -> None:
    """Whoever waits for the job may delete the source pod: the slice must not name it any more."""
    place.add_pod("llm-0", "a")
    place.add_fip(serviceName="llm", ports=[{"port": 8000}])
    place.add_pod("llm-1", "b")
    place.wait_job(place.add_job(), "Succeeded")
    assert [e["targetRef"]["name"] for e in place.slice()["endpoints"]] == ["llm-1"]


def test_when_the_pod_is_gone_the_address_goes_to_another(world: World, place: Place) -> None:
    address = place.serving()["status"]["address"]
    place.kill_pod("llm-0")
    wait_for("the move", lambda: place.wait_fip("llm", "True")["status"]["pod"] == "llm-1")
    assert world.agents.do("routes")["b"][address] == place.uids["llm-1"][1]


def test_without_a_pod_it_is_not_ready_and_the_slice_is_empty(place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.add_fip(serviceName="llm", ports=[{"port": 8000}])
    place.kill_pod("llm-0")
    status = place.wait_fip("llm", "False", "NoPod")["status"]
    assert "pod" not in status
    assert not place.slice()["endpoints"]
    place.add_pod("llm-1", "b")
    assert place.wait_fip("llm", "True")["status"]["pod"] == "llm-1"


def test_an_address_that_the_agent_has_lost_is_attached_again(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    address = place.add_fip()["status"]["address"]
    world.agents.do("lose-route", node="a", address=address)
    wait_for("it again", lambda: address in world.agents.do("routes")["a"], 20)


def test_a_label_taken_away_takes_the_address_off_the_running_pod(world: World, place: Place) -> None:
    address = place.serving()["status"]["address"]
    world.plane.kubectl("label", "pod", "llm-0", "-n", place.name, "midstream.dev/enabled-")
    wait_for("the move", lambda: place.wait_fip("llm", "True")["status"]["pod"] == "llm-1")
    assert address not in world.agents.do("routes")["a"]


def test_deletion_detaches_and_gives_the_address_back(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    address = place.add_fip()["status"]["address"]
    world.plane.kubectl("delete", "fip", "llm", "-n", place.name, "--timeout=10s")
    assert address not in world.agents.do("routes")["a"]
    assert place.add_fip("again")["status"]["address"] == address


def test_deletion_does_not_hang_on_an_agent_that_is_dead(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    address = place.add_fip()["status"]["address"]
    place.add_pod("other", "b", labels={"app": "other"})
    selector = {"matchLabels": {"app": "other"}}
    world.agents.do("die", node="a")
    try:
        world.plane.kubectl("delete", "fip", "llm", "-n", place.name, "--timeout=20s")
        other = place.add_fip("other", podSelector=selector)["status"]["address"]
        assert other != address, "it may still be on its node: nobody else gets it"
    finally:
        world.agents.do("rise", node="a")
    wait_for("the warning", lambda: "NotReleased" in place.events("FloatingIP", "llm"))
    wait_for("it off its node", lambda: address not in world.agents.do("routes")["a"])
    assert place.add_fip("again", podSelector=selector)["status"]["address"] == address


def test_an_address_that_leads_to_another_pod_is_not_taken_for_attached(world: World, place: Place) -> None:
    """The agent has a route for it, but not to this pod."""
    place.add_pod("llm-0", "a")
    world.agents.do("route", node="a", address="10.98.0.1", uid="somebody")
    name = place.make_fip("tiny", pool="tiny")
    try:
        place.wait_fip(name, "False", "AddressTaken")
    finally:
        world.agents.do("lose-route", node="a", address="10.98.0.1")
    place.wait_fip(name, "True")


def test_what_cannot_be_served_says_why(place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.make_fip("nowhere", pool="none")
    place.wait_fip("nowhere", "False", "UnknownPool")
    place.make_fip("other", provider="ec2")
    place.wait_fip("other", "False", "WrongProvider")


def test_a_pool_that_is_used_up_says_so(place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.add_fip("first", pool="tiny")
    place.make_fip("second", pool="tiny")
    place.wait_fip("second", "False", "PoolExhausted")
    place.world.plane.kubectl("delete", "fip", "first", "-n", place.name, "--timeout=10s")
    place.wait_fip("second", "True")


def test_a_service_with_a_selector_is_warned_about(world: World, place: Place) -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "llm"},
        "spec": {"selector": {"app": "llm"}, "ports": [{"port": 8000}]},
    }
    world.plane.request("POST", place.path("services", "", "v1"), service)
    place.add_pod("llm-0", "a")
    place.add_fip(serviceName="llm", ports=[{"port": 8000}])
    wait_for("the warning", lambda: "ServiceHasSelector" in place.events("FloatingIP", "llm"))
