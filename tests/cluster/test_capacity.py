"""A rebalance recommendation where nobody can take over: the workload is scaled, and scaled back when the move is over.

Real API server and operator, simulated agents. No controller makes or removes pods here: the tests do that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from cluster_world import MERGE, Place, World, wait_for

pytestmark = pytest.mark.usefixtures("nodes_as_before")
COST = "controller.kubernetes.io/pod-deletion-cost"
TEMPLATE = {"metadata": {"labels": {"app": "llm"}}, "spec": {"containers": [{"name": "c", "image": "none"}]}}


@pytest.fixture(scope="module", autouse=True)
def scaling(world: World) -> Iterator[None]:
    before = copy.deepcopy(world.operators.config)
    world.operators.stop_all()
    world.operators.config["handling"] = {"capacity": "Scale"}
    yield
    world.operators.stop_all()
    world.operators.config = before


def make(place: Place, kind: str, plural: str, owner: dict[str, Any] | None = None) -> dict[str, Any]:
    """A workload `llm` of one replica; its reference, as the controller of what is below it."""
    spec: dict[str, Any] = {"replicas": 1, "selector": {"matchLabels": {"app": "llm"}}, "template": TEMPLATE}
    if kind == "StatefulSet":
        spec["serviceName"] = "llm"
    meta = {"name": "llm", "ownerReferences": [owner] if owner else []}
    body = {"apiVersion": "apps/v1", "kind": kind, "metadata": meta, "spec": spec}
    made = place.world.plane.request("POST", place.path(plural, "", "apps/v1"), body)
    return {"apiVersion": "apps/v1", "kind": kind, "name": "llm", "uid": made["metadata"]["uid"], "controller": True}


def serve(place: Place, owner: dict[str, Any]) -> None:
    """llm-0 on a, of that controller, with an address; nobody else."""
    place.add_pod("llm-0", "a")
    body = {"metadata": {"ownerReferences": [owner]}}
    place.world.plane.request("PATCH", place.path("pods", "llm-0", "v1"), body, MERGE)
    place.add_fip()


def replicas(place: Place, plural: str) -> int:
    return int(place.world.plane.request("GET", place.path(plural, "llm", "apps/v1"))["spec"]["replicas"])


def recommend(world: World, place: Place) -> str:
    world.agents.do("notice", node="a", kind="Rebalance")
    return place.one_job()


def test_a_deployment_has_one_pod_more_until_the_move_is_over(world: World, place: Place) -> None:
    deployment = make(place, "Deployment", "deployments")
    serve(place, make(place, "ReplicaSet", "replicasets", deployment))
    name = recommend(world, place)
    wait_for("one more", lambda: replicas(place, "deployments") == 2)
    assert place.status(name)["phase"] == "Pending"
    place.add_pod("llm-1", "b")
    place.wait_job(name, "Preparing")
    world.agents.do("notice", node="a", kind="SpotInterruption", left_s=120)
    place.wait_job(name, "Succeeded")
    assert replicas(place, "deployments") == 1
    pod = world.plane.request("GET", place.path("pods", "llm-0", "v1"))
    assert int(pod["metadata"]["annotations"][COST]) < 0, "the pod that was left goes, not the one with the streams"
    wait_for("the story", lambda: {"CapacityAsked", "CapacityGivenBack"} <= set(place.events("MigrationJob", name)))


def test_a_restart_in_between_asks_for_no_second_one(world: World, place: Place) -> None:
    serve(place, make(place, "ReplicaSet", "replicasets"))
    name = recommend(world, place)
    wait_for("one more", lambda: replicas(place, "replicasets") == 2)
    world.operators.stop_all()
    world.operators.start("op")
    place.add_pod("llm-1", "b")
    place.wait_job(name, "Preparing")
    place.patch_job(name, {"spec": {"abort": True}})
    place.wait_job(name, "Aborted")
    assert replicas(place, "replicasets") == 1


def test_what_somebody_else_has_scaled_down_is_left_alone(world: World, place: Place) -> None:
    serve(place, make(place, "ReplicaSet", "replicasets"))
    name = recommend(world, place)
    wait_for("one more", lambda: replicas(place, "replicasets") == 2)
    body = {"spec": {"replicas": 1}}
    world.plane.request("PATCH", place.path("replicasets", "llm", "apps/v1"), body, MERGE)
    place.patch_job(name, {"spec": {"abort": True}})
    place.wait_job(name, "Aborted")
    assert replicas(place, "replicasets") == 1


def test_a_stateful_set_keeps_its_newest_pod_which_has_the_streams(world: World, place: Place) -> None:
    serve(place, make(place, "StatefulSet", "statefulsets"))
    name = recommend(world, place)
    wait_for("one more", lambda: replicas(place, "statefulsets") == 2)
    place.add_pod("llm-1", "b")
    place.wait_job(name, "Preparing")
    place.patch_job(name, {"metadata": {"annotations": {"midstream.dev/commit": "true"}}})
    place.wait_job(name, "Succeeded")
    assert replicas(place, "statefulsets") == 2
    wait_for("the warning", lambda: "CapacityKept" in place.events("MigrationJob", name))


def test_a_pod_of_nobody_is_named_and_its_job_waits_all_the_same(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.add_fip()
    name = recommend(world, place)
    wait_for("the reason", lambda: "NoCapacity" in place.events("MigrationJob", name))
    place.add_pod("llm-1", "b")
    place.wait_job(name, "Preparing")
