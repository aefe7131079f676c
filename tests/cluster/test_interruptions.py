"""Notices about nodes become jobs: by instance metadata (the agents' word), by taints, in every order, on a real API
server. Nodes are shared, so each test takes off what it put on them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cluster_world import MERGE, Place, World, wait_for

OURS = "midstream.dev/interrupted"
NTH = "aws-node-termination-handler/spot-itn"


pytestmark = pytest.mark.usefixtures("nodes_as_before")


def taints(world: World, node: str) -> list[str]:
    return [t["key"] for t in world.plane.request("GET", f"/api/v1/nodes/{node}")["spec"].get("taints") or []]


def taint(world: World, node: str, key: str) -> None:
    body = {"spec": {"taints": [{"key": key, "effect": "NoSchedule"}]}}
    world.plane.request("PATCH", f"/api/v1/nodes/{node}", body, MERGE)


def test_a_spot_notice_by_metadata_moves_the_pod_and_taints_the_node(world: World, place: Place) -> None:
    place.serving()
    world.agents.do("notice", node="a", kind="SpotInterruption", left_s=120)
    name = place.one_job()
    status = place.wait_job(name, "Succeeded")
    spec = place.job(name)["spec"]
    left = datetime.fromisoformat(spec["deadline"]) - datetime.now(UTC)
    assert spec["reason"] == "SpotInterruption" and timedelta(seconds=80) < left < timedelta(seconds=116)
    assert status["target"]["podName"] == "llm-1"
    assert OURS in taints(world, "a")


def test_metadata_and_a_taint_at_once_make_one_job(world: World, place: Place) -> None:
    place.serving()
    taint(world, "a", NTH)
    world.agents.do("notice", node="a", kind="SpotInterruption", left_s=120)
    place.wait_job(place.one_job(), "Succeeded")
    assert len(place.jobs()) == 1


def calls(world: World, place: Place, call: str) -> list[dict[str, Any]]:
    """What llm-0's agent was asked to do for it."""
    asked = world.agents.do("asked")
    return [a for a in asked if a["call"] == call and a["target"] in {uid for _, uid in place.uids.values()}]


def test_a_rebalance_prepares_and_the_interruption_commits(world: World, place: Place) -> None:
    place.serving()
    world.agents.do("notice", node="a", kind="Rebalance")
    name = place.one_job()
    place.wait_job(name, "Preparing")
    assert OURS in taints(world, "a"), "a node at risk takes nothing new"
    wait_for("KV ahead", lambda: "192.0 MiB of KV of 3 streams at b" in place.status(name)["message"])
    assert calls(world, place, "Migrate") == [] and place.wait_fip("llm", "True")["status"]["node"] == "a"
    world.agents.do("notice", node="a", kind="SpotInterruption", left_s=120)
    status = place.wait_job(name, "Succeeded")
    assert len(place.jobs()) == 1
    (move,) = calls(world, place, "Migrate")
    until = datetime.fromtimestamp(move["deadline_ms"] / 1000, UTC)
    assert timedelta(seconds=80) < until - datetime.now(UTC) < timedelta(seconds=116), "EC2's, which came later"
    assert "s are left; copying must end" in status["plan"]


def test_a_person_may_have_what_is_prepared_go(world: World, place: Place) -> None:
    place.serving()
    world.agents.do("notice", node="a", kind="Rebalance")
    name = place.one_job()
    place.wait_job(name, "Preparing")
    place.patch_job(name, {"metadata": {"annotations": {"midstream.dev/commit": "true"}}})
    place.wait_job(name, "Succeeded")


def test_a_pod_may_want_to_move_at_a_rebalance(world: World, place: Place) -> None:
    place.serving()
    body = {"metadata": {"annotations": {"midstream.dev/rebalance": "Migrate"}}}
    world.plane.request("PATCH", place.path("pods", "llm-0", "v1"), body, MERGE)
    world.agents.do("notice", node="a", kind="Rebalance")
    place.wait_job(place.one_job(), "Succeeded")


def test_a_deadline_that_is_no_time_is_named(world: World, place: Place) -> None:
    place.serving()
    world.agents.do("notice", node="a", kind="Rebalance")
    name = place.one_job()
    place.wait_job(name, "Preparing")
    place.patch_job(name, {"metadata": {"annotations": {"midstream.dev/deadline": "soon"}}})
    status = place.wait_job(name, "Failed")
    assert status["reason"] == "BadDeadline" and "midstream.dev/deadline" in status["message"]


def test_an_operator_that_restarts_goes_on_preparing(world: World, place: Place) -> None:
    place.serving()
    world.agents.do("notice", node="a", kind="Rebalance")
    name = place.one_job()
    place.wait_job(name, "Preparing")
    world.operators.stop_all()
    before = len(calls(world, place, "Warm"))
    world.operators.start("op")
    wait_for("KV ahead once more", lambda: len(calls(world, place, "Warm")) > before)
    world.agents.do("notice", node="a", kind="SpotInterruption", left_s=120)
    place.wait_job(name, "Succeeded")
    assert len(place.jobs()) == 1


def test_a_pod_may_refuse_rebalances(world: World, place: Place) -> None:
    place.serving()
    body = {"metadata": {"annotations": {"midstream.dev/rebalance": "Ignore"}}}
    world.plane.request("PATCH", place.path("pods", "llm-0", "v1"), body, MERGE)
    world.agents.do("notice", node="a", kind="Rebalance")
    wait_for("the notice", lambda: OURS in taints(world, "a"))
    assert place.jobs() == []


def test_when_the_target_goes_too_another_one_is_found(world: World, place: Place) -> None:
    """Two nodes interrupted within moments, the second while it is the first one's target."""
    place.serving()
    with world.agents.stopped_at("EXPORT"):
        world.agents.do("notice", node="a", kind="SpotInterruption", left_s=120)
        name = place.one_job()
        place.wait_job(name, "Switching")
        place.add_pod("llm-2", "c")
        world.agents.do("notice", node="b", kind="SpotInterruption", left_s=120)
        place.wait_job(name, "Aborted", "RolledBack")
    again = wait_for("another attempt", lambda: [j for j in place.jobs() if j["metadata"]["name"] != name])
    status = place.wait_job(again[0]["metadata"]["name"], "Succeeded")
    assert again[0]["metadata"]["name"] == f"{name}-2" and status["target"]["podName"] == "llm-2"


def test_what_a_person_aborts_stays_aborted(world: World, place: Place) -> None:
    place.serving()
    with world.agents.stopped_at("PREPARE"):
        world.agents.do("notice", node="a", kind="SpotInterruption", left_s=120)
        name = place.one_job()
        place.wait_job(name, "Preparing")
        place.patch_job(name, {"spec": {"abort": True}})
        place.wait_job(name, "Aborted")
    before = heard(world)
    for more in (1, 2):  # the second is taken when the first has been answered
        world.agents.do("notice", node="a", kind="SpotInterruption", left_s=120 + more)
    wait_for("the notice, told again", lambda: heard(world) >= before + 2)
    assert [job["metadata"]["name"] for job in place.jobs()] == [name]


def heard(world: World) -> float:
    (name,) = world.operators.running
    lines = world.operators.fetch(name, "/metrics").splitlines()
    sample = 'midstream_operator_notices_total{kind="SpotInterruption",source="imds"}'
    return sum(float(line.split()[-1]) for line in lines if line.startswith(sample))


def test_a_failed_attempt_is_made_again_while_there_is_time(world: World, place: Place) -> None:
    place.serving()
    world.agents.do("fail-at", steps=[["EXPORT", "checkpoint_failed"]])
    world.agents.do("notice", node="a", kind="SpotInterruption", left_s=120)
    name = place.one_job()
    place.wait_job(name, "RolledBack", "Failed")
    world.agents.do("fail-at", steps=[])
    wait_for(
        "an attempt that succeeds", lambda: [j for j in place.jobs() if j.get("status", {}).get("phase") == "Succeeded"]
    )


def test_an_operator_that_comes_late_hears_what_stands(world: World, place: Place) -> None:
    place.serving()
    world.operators.stop_all()
    world.agents.do("notice", node="a", kind="SpotInterruption", left_s=120)
    world.operators.start("op")
    place.wait_job(place.one_job(), "Succeeded")
