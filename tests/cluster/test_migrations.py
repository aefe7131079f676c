"""MigrationJobs from create to the end, against simulated agents: what users see at each point."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cluster_world import MERGE, Place, World, wait_for

STEP_OF_PHASE = {"Preparing": "PREPARE", "Switching": "SEND", "Committing": "RELEASE"}


def later(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(c for c in status["conditions"] if c["type"] == kind)


def test_a_job_moves_the_pods_streams_and_tells_the_story(world: World, place: Place) -> None:
    address = place.serving()["status"]["address"]
    name = place.add_job()
    world.plane.kubectl("wait", "--for=condition=Complete", f"mj/{name}", "-n", place.name, "--timeout=30s")
    status = place.status(name)
    assert status["phase"] == "Succeeded"
    assert [s["phase"] for s in status["phaseTransitionTimestamps"]] == [
        "Pending", "Preparing", "Switching", "Committing", "Succeeded",
    ]  # fmt: skip
    assert status["source"] | {"step": ""} == {
        "nodeName": "a", "podUID": place.uids["llm-0"][1], "addresses": [address], "step": "",
    }  # fmt: skip
    assert status["target"] == {"nodeName": "b", "podName": "llm-1", "podUID": place.uids["llm-1"][1]}
    assert status["streams"]["migrated"] == 3
    assert status["stall"]["max"] == 3.5
    assert status["pointOfNoReturn"] <= status["completionTime"]
    assert "the only one that can take over" in status["plan"]
    assert condition(status, "Complete")["status"] == "True"
    assert condition(status, "Failed")["status"] == "False"
    assert status["observedGeneration"] == place.job(name)["metadata"]["generation"]
    story = ["Planned", "Switching", "Committed", "Succeeded"]
    wait_for("the events", lambda: place.events("MigrationJob", name) == story)
    wait_for("the pod's event", lambda: "MigrationSucceeded" in place.events("Pod", "llm-0"))


def test_the_printed_columns_are_what_a_person_looks_for(world: World, place: Place) -> None:
    place.serving()
    name = place.add_job(name="move")
    place.wait_job(name, "Succeeded")
    header, row = world.plane.kubectl("get", "mj", name, "-n", place.name).splitlines()
    assert header.split() == ["NAME", "PHASE", "POD", "SOURCE", "TARGET", "STREAMS", "KV", "STALL", "AGE"]
    assert re.fullmatch(r"move +Succeeded +llm-0 +a +b +3 +4096 +3.5 +\d+s *", row)


def test_labels_and_no_owner_lead_to_the_pod(place: Place) -> None:
    place.serving()
    name = place.add_job()
    place.wait_job(name, "Succeeded")
    meta = place.job(name)["metadata"]
    assert "ownerReferences" not in meta
    assert "finalizers" not in meta
    assert meta["labels"]["midstream.dev/pod"] == "llm-0"
    assert meta["labels"]["midstream.dev/pod-uid"] == place.uids["llm-0"][1]
    assert meta["labels"]["midstream.dev/workload"] == "llm"


def test_a_dry_run_plans_and_asks_no_agent(world: World, place: Place) -> None:
    place.serving()
    before = len(world.agents.do("asked"))
    name = place.add_job(dryRun=True)
    status = place.wait_job(name, "Succeeded")
    assert status["reason"] == "DryRun"
    assert "to llm-1 on b" in status["plan"]
    assert [a for a in world.agents.do("asked")[before:] if a["call"] == "Migrate"] == []


# -- what cannot be ------------------------------------------------------------------------------------


def _no_pod(place: Place) -> None:
    pass


def _no_label(place: Place) -> None:
    place.add_pod("llm-0", "a", enabled=False)


def _no_gateway(place: Place) -> None:
    place.add_pod("llm-0", "a", bare=True)
    place.add_fip()
    place.add_pod("llm-1", "b")


def _no_agent(place: Place) -> None:
    place.add_pod("llm-0", "elsewhere")


def _host_network(place: Place) -> None:
    place.add_pod("llm-0", "a", hostNetwork=True)


def _other_model(place: Place) -> None:
    place.serving()
    place.add_pod("other", "b", labels={"midstream.dev/model": "another"})


def _other_namespace(place: Place) -> None:
    """llm-1 is in another namespace, which is none of this job's business."""
    place.add_pod("llm-0", "a")


def _no_address(place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.add_pod("llm-1", "b")


def _foreign_address(place: Place) -> None:
    place.serving()
    path = place.path("floatingips", "llm")
    place.world.plane.patch_status(path, {"address": "192.0.2.1"})
    place.wait_fip("llm", "False", "ForeignAddress")


@pytest.mark.parametrize(
    ("arrange", "spec", "reason", "says"),
    [
        (_no_pod, {}, "UnknownPod", "there is no pod llm-0"),
        (_no_label, {}, "NotEnabled", "kubectl label pod llm-0 midstream.dev/enabled=true"),
        (_no_gateway, {}, "NoHandoff", "CONNECT"),
        (_no_agent, {}, "NoAgent", "no agent on node elsewhere"),
        (_host_network, {}, "HostNetwork", "its node's network"),
        (_other_model, {"target": {"podName": "other"}}, "BadTarget", "serves another"),
        (_other_namespace, {"target": {"podName": "llm-1"}}, "UnknownTarget", "has to be of the source's namespace"),
        (_no_address, {}, "NoFloatingIp", "CONNECT"),
        (_foreign_address, {}, "ForeignAddress", "192.0.2.1 is not of pool default"),
        (_no_label, {"deadline": "2020-01-01T00:00:00Z"}, "DeadlinePassed", "passed before the job began"),
        (_no_address, {"target": {"nodeName": "c"}}, "NoTarget", "no other enabled pod"),
        (_no_address, {"onFailure": "DropStreams"}, "Unsupported", "onFailure"),
    ],
)
def test_a_job_that_cannot_be_fails_by_name(
    world: World, place: Place, arrange: Any, spec: dict[str, Any], reason: str, says: str
) -> None:
    arrange(place)
    status = place.wait_job(place.add_job(**spec), "Failed")
    assert status["reason"] == reason
    assert says in status["message"]
    assert condition(status, "Failed") | {"lastTransitionTime": ""} == {
        "type": "Failed", "status": "True", "reason": reason, "message": status["message"],
        "observedGeneration": 1, "lastTransitionTime": "",
    }  # fmt: skip
    assert "Switching" not in [s["phase"] for s in status["phaseTransitionTimestamps"]]


def test_every_refused_candidate_is_told_why(place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.add_pod("same-node", "a")
    place.add_pod("unready", "b")
    place.world.pod_ready(place.name, "unready", False)
    status = place.wait_job(place.add_job(), "Failed")
    assert status["reason"] == "NoTarget"
    assert "same-node: runs on a like the source" in status["message"]
    assert "unready: is not Ready" in status["message"]


def test_with_a_deadline_a_target_may_still_come(place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.add_fip()
    name = place.add_job(deadline=later(60))
    wait_for("the reason", lambda: "no other enabled pod" in place.status(name).get("message", ""))
    assert place.status(name)["phase"] == "Pending"
    place.add_pod("llm-1", "b")
    place.wait_job(name, "Succeeded")


def test_a_failure_before_the_point_of_no_return_rolls_back(world: World, place: Place) -> None:
    place.serving()
    world.agents.do("fail-at", steps={"SEND": "target_failed"})
    try:
        status = place.wait_job(place.add_job(), "RolledBack")
    finally:
        world.agents.do("fail-at", steps={})
    assert status["reason"] == "TargetFailed"
    assert status["streams"]["rolledBack"] == 3
    assert condition(status, "Failed")["status"] == "True"
    assert place.wait_fip("llm", "True")["status"]["node"] == "a"


# -- abort ---------------------------------------------------------------------------------------------


def test_abort_while_waiting_for_a_target(place: Place) -> None:
    place.add_pod("llm-0", "a")
    name = place.add_job(deadline=later(60))
    place.wait_job(name, "Pending")
    place.patch_job(name, {"spec": {"abort": True}})
    assert place.wait_job(name, "Aborted")["reason"] == "Aborted"


@pytest.mark.parametrize("phase", ["Preparing", "Switching"])
def test_abort_before_the_point_of_no_return(world: World, place: Place, phase: str) -> None:
    place.serving()
    with world.agents.stopped_at(STEP_OF_PHASE[phase]):
        name = place.add_job()
        place.wait_job(name, phase)
        place.patch_job(name, {"spec": {"abort": True}})
        status = place.wait_job(name, "Aborted")
    assert status["reason"] == "Aborted"
    assert place.wait_fip("llm", "True")["status"]["node"] == "a"


def test_abort_after_the_point_of_no_return_says_that_it_is_too_late(world: World, place: Place) -> None:
    place.serving()
    with world.agents.stopped_at("RELEASE"):
        name = place.add_job()
        place.wait_job(name, "Committing")
        place.patch_job(name, {"spec": {"abort": True}})
        wait_for("the answer", lambda: "past the point of no return" in place.status(name)["message"])
    assert place.wait_job(name, "Succeeded", "Aborted")["phase"] == "Succeeded"
    wait_for("the event", lambda: "AbortTooLate" in place.events("MigrationJob", name))


# -- restarts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", STEP_OF_PHASE)
def test_a_killed_operator_loses_nothing(world: World, place: Place, phase: str) -> None:
    place.serving()
    with world.agents.stopped_at(STEP_OF_PHASE[phase]):
        name = place.add_job()
        place.wait_job(name, phase)
        for replica in list(world.operators.running):
            world.operators.kill(replica)
    world.operators.start("op")
    status = place.wait_job(name, "Succeeded")
    assert [s["phase"] for s in status["phaseTransitionTimestamps"]].count(phase) == 1
    assert place.wait_fip("llm", "True")["status"]["node"] == "b"
    begun = {a["job"] for a in world.agents.do("asked") if a["call"] == "Migrate" and a["job"] == status["agentJob"]}
    assert len(begun) == 1


def test_a_job_made_while_no_operator_runs_is_carried_out_later(world: World, place: Place) -> None:
    place.serving()
    world.operators.stop_all()
    name = place.add_job()
    world.operators.start("op")
    place.wait_job(name, "Succeeded")


@pytest.mark.parametrize(("phase", "end"), [("Switching", "RolledBack"), ("Committing", "Succeeded")])
def test_an_agent_that_restarts_is_followed_again(world: World, place: Place, phase: str, end: str) -> None:
    place.serving()
    with world.agents.stopped_at(STEP_OF_PHASE[phase]):
        name = place.add_job()
        place.wait_job(name, phase)
        world.agents.do("restart", node="a")
    status = place.wait_job(name, end)
    assert status.get("reason") == ("AgentRestarted" if end == "RolledBack" else "Succeeded")


def test_a_report_that_an_agent_has_forgotten_is_made_good_by_looking(world: World, place: Place) -> None:
    place.serving()
    with world.agents.stopped_at("RELEASE"):
        name = place.add_job()
        place.wait_job(name, "Committing")
        for replica in list(world.operators.running):
            world.operators.kill(replica)
    wait_for("the agent to be through", lambda: _on(world, "b", place))
    world.agents.do("restart", node="a")
    world.operators.start("op")
    status = place.wait_job(name, "Succeeded")
    assert "its report is lost" in status["message"]


def _on(world: World, node: str, place: Place) -> bool:
    return place.uids["llm-1"][1] in world.agents.do("routes")[node].values()


def test_an_agent_that_never_answers_is_named(world: World, place: Place) -> None:
    place.serving()
    world.agents.do("die", node="a")
    try:
        status = place.wait_job(place.add_job(), "Failed")
    finally:
        world.agents.do("rise", node="a")
    assert status["reason"] == "AgentUnreachable"
    assert "the agent on a does not answer" in status["message"]


@contextlib.contextmanager
def out_of_service(world: World, name: str) -> Iterator[None]:
    """The node is down for good, by its admin's word, and its agent with it."""
    taint = {"key": "node.kubernetes.io/out-of-service", "value": "nodeshutdown", "effect": "NoExecute"}
    world.agents.do("die", node=name)
    world.node_ready(name, False)
    world.plane.request("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": [taint]}}, MERGE)
    try:
        yield
    finally:
        world.plane.request("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": None}}, MERGE)
        world.node_ready(name, True)
        world.agents.do("rise", node=name)


@pytest.mark.parametrize(
    ("step", "end", "reason", "migrated"),
    [
        ("RELEASE", "Succeeded", "Succeeded", 3),
        ("COMMIT", "Failed", "SourceLost", 3),
        ("SEND", "Failed", "SourceLost", 0),
    ],
)
def test_when_the_source_is_gone_for_good_the_target_takes_over_what_it_has(
    world: World, place: Place, step: str, end: str, reason: str, migrated: int
) -> None:
    """Before RELEASE all streams had moved; before COMMIT they were there, and others may have been at the source."""
    address = place.serving()["status"]["address"]
    with world.agents.stopped_at(step):
        name = place.add_job()
        wait_for("the step", lambda: place.status(name).get("source", {}).get("step") == step)
        with out_of_service(world, "a"):
            status = place.wait_job(name, "Succeeded", "Failed", timeout_s=40)
            assert (status["phase"], status["reason"]) == (end, reason), status
            assert status.get("streams", {}).get("migrated", 0) == migrated
            assert "node a is gone (taint node.kubernetes.io/out-of-service)" in status["message"]
            if migrated:
                assert world.agents.do("routes")["b"][address] == place.uids["llm-1"][1]
                wait_for("the event", lambda: "SourceGone" in place.events("MigrationJob", name))


def test_a_source_that_is_only_silent_is_waited_for(world: World, place: Place) -> None:
    place.serving()
    with world.agents.stopped_at("RELEASE"):
        name = place.add_job()
        place.wait_job(name, "Committing")
        world.agents.do("die", node="a")
        world.node_ready("a", False)
        try:
            wait_for("a word", lambda: "asked again" in place.status(name).get("message", ""))
            time.sleep(2)
            assert place.status(name)["phase"] == "Committing"
        finally:
            world.node_ready("a", True)
            world.agents.do("rise", node="a")
    place.wait_job(name, "Succeeded")


def test_the_agent_keeps_the_deadline(world: World, place: Place) -> None:
    place.serving()
    with world.agents.stopped_at("SEND"):
        name = place.add_job(deadline=later(2))
        place.wait_job(name, "Switching")
        wait_for(
            "the deadline", lambda: datetime.now(UTC) > datetime.fromisoformat(place.job(name)["spec"]["deadline"])
        )
    status = place.wait_job(name, "RolledBack", "Succeeded")
    assert (status["phase"], status["reason"]) == ("RolledBack", "DeadlinePassed")


# -- one another -----------------------------------------------------------------------------------------


def test_a_second_job_of_a_pod_waits_for_the_first(world: World, place: Place) -> None:
    place.serving()
    with world.agents.stopped_at("SEND"):
        first = place.add_job()
        place.wait_job(first, "Switching")
        second = place.add_job()
        wait_for("the reason", lambda: "another job moves its streams" in place.status(second).get("message", ""))
    place.wait_job(first, "Succeeded")
    status = place.wait_job(second, "Succeeded")
    assert status["reason"] == "NothingToMove"
    assert status.get("streams") is None


def test_no_more_than_the_limit_leave_a_node_at_once(world: World, place: Place) -> None:
    for i in range(4):
        place.add_pod(f"s{i}", "a", labels={"app": f"s{i}", "midstream.dev/workload": "w"})
        place.add_fip(f"f{i}", podSelector={"matchLabels": {"app": f"s{i}"}})
    place.add_pod("t", "b", labels={"app": "t", "midstream.dev/workload": "w"})
    with world.agents.stopped_at("SEND"):
        jobs = [place.add_job(f"s{i}") for i in range(4)]
        wait_for("three", lambda: [place.status(j).get("phase") for j in jobs].count("Switching") == 3)
        waiting = [place.status(j) for j in jobs if place.status(j).get("phase") == "Pending"]
        assert ["3 migrations leave node a, its limit" in s["message"] for s in waiting] == [True]
    for job in jobs:
        place.wait_job(job, "Succeeded")


def test_a_deleted_job_is_rolled_back_and_does_not_hang(world: World, place: Place) -> None:
    place.serving()
    with world.agents.stopped_at("SEND"):
        name = place.add_job()
        place.wait_job(name, "Switching")
        world.plane.kubectl("delete", "mj", name, "-n", place.name, "--timeout=10s")
        wait_for("the abort", lambda: ("Abort", name) in _asked(world, name))
    assert place.wait_job(place.add_job(), "Succeeded")


def _asked(world: World, name: str) -> set[tuple[str, str]]:
    return {(a["call"], name) for a in world.agents.do("asked") if a["job"].startswith(name)}


def test_finished_jobs_go_after_their_ttl(place: Place) -> None:
    place.serving()
    name = place.add_job(ttlSecondsAfterFinished=1, dryRun=True)
    kept = place.add_job(dryRun=True)
    place.wait_job(kept, "Succeeded")

    def items() -> list[str]:
        found = place.world.plane.request("GET", place.path("migrationjobs"))["items"]
        return [j["metadata"]["name"] for j in found]

    wait_for("its end", lambda: name not in items())
    assert kept in items()


def test_a_rebalance_prepares_and_goes_when_told(world: World, place: Place) -> None:
    place.serving()
    name = place.add_job(reason="Rebalance")
    wait_for("prepared", lambda: "moves when annotated" in place.status(name).get("message", ""))
    assert place.status(name)["phase"] == "Preparing"
    place.patch_job(name, {"metadata": {"annotations": {"midstream.dev/commit": "true"}}})
    place.wait_job(name, "Succeeded")
