"""Two replicas, one writer: the Lease, its loss, and epochs that agents refuse."""

from __future__ import annotations

import re

from cluster_world import NAMESPACE, Place, World, wait_for


def lease(world: World) -> dict[str, object]:
    path = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/midstream-operator"
    found: dict[str, object] = world.plane.request("GET", path)
    return found


def test_when_the_leader_dies_the_other_replica_goes_on(world: World, place: Place) -> None:
    place.serving()
    (first,) = world.operators.running
    world.operators.start("second")
    wait_for("readiness", lambda: _ready(world, "second"))
    assert not world.operators.leads("second")
    with world.agents.stopped_at("SEND"):
        name = place.add_job()
        place.wait_job(name, "Switching")
        world.operators.kill(first)
        wait_for("the second to lead", lambda: world.operators.leads("second"))
    place.wait_job(name, "Succeeded")


def _ready(world: World, name: str) -> bool:
    try:
        return world.operators.fetch(name, "/readyz") == "ok\n"
    except OSError:
        return False


def test_a_graceful_end_hands_the_lease_over(world: World, place: Place) -> None:
    (first,) = world.operators.running
    world.operators.start("next")
    wait_for("readiness", lambda: _ready(world, "next"))
    assert world.operators.stop(first) == 0
    wait_for("the next to lead", lambda: world.operators.leads("next"))


def test_each_term_begins_above_the_one_before(world: World, place: Place) -> None:
    before = lease(world)
    world.operators.stop_all()
    world.operators.start("op")
    world.operators.ensure()
    after = lease(world)
    terms = [int(x["metadata"]["annotations"]["midstream.dev/term"]) for x in (before, after)]  # type: ignore[index]
    assert terms[1] - terms[0] >= 1 << 20


def test_an_agent_that_has_seen_a_newer_epoch_refuses(world: World, place: Place) -> None:
    place.serving()
    uid = place.uids["llm-0"][1]
    world.agents.do("epoch", node="a", what=f"pod:{uid}", epoch=1 << 52)
    status = place.wait_job(place.add_job(), "Failed")
    assert status["reason"] == "StaleEpoch"
    assert re.search(r"older than \d+", status["message"]) or "another" in status["message"]


def test_epochs_of_one_address_only_grow(world: World, place: Place) -> None:
    address = place.serving()["status"]["address"]
    place.wait_job(place.add_job(), "Succeeded")
    place.kill_pod("llm-1")
    wait_for("the way back", lambda: place.wait_fip("llm", "True")["status"]["pod"] == "llm-0")
    told = [a["epoch"] for a in world.agents.do("asked") if a["address"] == address]
    assert len(told) >= 2
    assert told == sorted(told)


def test_losing_the_lease_ends_the_process(world: World, place: Place) -> None:
    """Somebody else has taken it: this replica must not write any more."""
    (name,) = world.operators.running
    path = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/midstream-operator"
    taken = {"spec": {"holderIdentity": "somebody", "renewTime": "2030-01-01T00:00:00.000000Z"}}
    world.plane.request("PATCH", path, taken, "application/merge-patch+json")
    process = world.operators.running[name]
    wait_for("its end", lambda: process.poll() is not None)
    del world.operators.running[name]


def test_a_deleted_lease_does_not_take_the_epochs_back(world: World, place: Place) -> None:
    before = place.serving()["status"]["epoch"]
    world.operators.stop_all()
    world.plane.request("DELETE", f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/midstream-operator")
    world.operators.ensure()
    place.wait_job(place.add_job(), "Succeeded")
    assert place.wait_fip("llm", "True")["status"]["epoch"] > before
