"""A deletionTimestamp on a serving pod starts a job, whoever set it; and the operator says what it did in metrics."""

from __future__ import annotations

from datetime import datetime, timedelta

from cluster_world import Place, World, wait_for


def jobs(place: Place) -> list[dict[str, object]]:
    found: list[dict[str, object]] = place.world.plane.request("GET", place.path("migrationjobs"))["items"]
    return found


def delete(place: Place, pod: str, grace_s: int = 120) -> None:
    """As an eviction does. No kubelet ends it here, so the pod stays Terminating."""
    place.world.plane.request("DELETE", f"{place.path('pods', pod, 'v1')}?gracePeriodSeconds={grace_s}")


def test_a_deleted_pods_streams_move_before_it_is_killed(world: World, place: Place) -> None:
    place.serving()
    delete(place, "llm-0")
    (job,) = wait_for("a job", lambda: jobs(place))
    name = job["metadata"]["name"]  # type: ignore[index]
    status = place.wait_job(name, "Succeeded")
    spec = place.job(name)["spec"]
    assert (spec["reason"], spec["source"]["podName"]) == ("ScaleIn", "llm-0")
    pod = world.plane.request("GET", place.path("pods", "llm-0", "v1"))
    kill = datetime.fromisoformat(pod["metadata"]["deletionTimestamp"])
    assert kill - datetime.fromisoformat(spec["deadline"]) == timedelta(seconds=5)
    assert status["target"]["podName"] == "llm-1"


def test_on_a_cordoned_node_it_is_a_drain(world: World, place: Place) -> None:
    place.serving()
    world.cordon("a")
    try:
        delete(place, "llm-0")
        (job,) = wait_for("a job", lambda: jobs(place))
        assert job["spec"]["reason"] == "Drain"  # type: ignore[index]
        place.wait_job(job["metadata"]["name"], "Succeeded")  # type: ignore[index]
    finally:
        world.cordon("a", False)


def test_a_pod_deleted_while_no_operator_ran_is_found_and_makes_one_job(world: World, place: Place) -> None:
    place.serving()
    world.operators.stop_all()
    delete(place, "llm-0")
    world.operators.start("op")
    (job,) = wait_for("a job", lambda: jobs(place))
    place.wait_job(job["metadata"]["name"], "Succeeded")  # type: ignore[index]
    world.operators.stop_all()
    world.operators.ensure()
    assert len(jobs(place)) == 1


def test_a_pod_without_floating_addresses_needs_no_job(world: World, place: Place) -> None:
    place.serving()
    place.add_pod("plain", "a", labels={"app": "plain"})
    delete(place, "plain")
    delete(place, "llm-0")
    wait_for("the other's job", lambda: jobs(place))
    assert [j["spec"]["source"]["podName"] for j in jobs(place)] == ["llm-0"]  # type: ignore[index]


def test_metrics_count_what_happened(world: World, place: Place) -> None:
    place.serving()
    place.wait_job(place.add_job(), "Succeeded")
    place.wait_job(place.add_job("nobody"), "Failed")
    (name,) = world.operators.running
    text = world.operators.fetch(name, "/metrics")
    for sample in (
        'midstream_operator_migrations_total{outcome="Succeeded",reason="Succeeded"}',
        'midstream_operator_refusals_total{reason="unknown_pod"}',
        'midstream_operator_streams_total{outcome="migrated"}',
        "midstream_operator_stall_seconds_count",
        "midstream_operator_plan_seconds_count",
        "midstream_operator_notice_to_freeze_seconds_count",
    ):
        (line,) = [x for x in text.splitlines() if x.startswith(sample)]
        assert float(line.split()[-1]) >= 1, line
