"""Notices that meet each other, or what they have begun: real operator and API server, simulated agents."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from cluster_world import MERGE, Place, World, wait_for

pytestmark = pytest.mark.usefixtures("nodes_as_before")
KARPENTER = "karpenter.sh/disrupted"


def notice(world: World, node: str, left_s: float = 120, action: str = "terminate") -> None:
    details = {"action": action}
    world.agents.do("notice", node=node, kind="SpotInterruption", left_s=left_s, details=details)


def test_two_nodes_at_once_do_not_choose_each_other(world: World, place: Place) -> None:
    """Each is the other's best target by name and by load; the third must take both."""
    place.add_pod("llm-0", "a")
    place.add_fip("one")
    place.add_pod("llm-1", "b")
    place.add_fip("two")
    place.add_pod("llm-2", "c")
    notice(world, "a")
    notice(world, "b")
    wait_for("both moved", lambda: sum(j.get("status", {}).get("phase") == "Succeeded" for j in place.jobs()) == 2)
    ends = [j["status"] for j in place.jobs() if j["status"]["phase"] == "Succeeded"]
    assert {s["source"]["nodeName"] for s in ends} == {"a", "b"}
    assert [s["target"]["podName"] for s in ends] == ["llm-2", "llm-2"]
    for name in ("one", "two"):
        assert place.wait_fip(name, "True")["status"]["node"] == "c"


def test_thirty_seconds_are_enough_and_the_job_knows_them(world: World, place: Place) -> None:
    place.serving()
    notice(world, "a", left_s=30)
    name = place.one_job()
    status = place.wait_job(name, "Succeeded")
    left = datetime.fromisoformat(place.job(name)["spec"]["deadline"]) - datetime.now(UTC)
    assert timedelta(seconds=5) < left < timedelta(seconds=26)
    assert "s are left; copying must end" in status["plan"] and "3 streams" in status["plan"]


def test_ten_seconds_leave_no_time_for_kv(world: World, place: Place) -> None:
    """Connections first: what cannot be copied is computed again, and the agent is told so at once."""
    place.serving()
    notice(world, "a", left_s=17)
    status = place.wait_job(place.one_job(), "Succeeded")
    assert "3 replay their tokens" in status["plan"] and "is given up before any connection" in status["plan"]
    assert [c["kv"] for c in world.agents.do("asked") if c["call"] == "Migrate"][-1] == "KV_MODE_REPLAY"


def test_hibernation_begins_with_its_notice_so_no_kv_is_copied(world: World, place: Place) -> None:
    place.serving()
    notice(world, "a", left_s=0, action="hibernate")
    name = place.one_job()
    place.wait_job(name, "Succeeded")
    assert place.job(name)["spec"]["kv"]["mode"] == "Replay"


def test_without_a_target_the_job_waits_for_one(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.add_fip()
    notice(world, "a")
    name = place.one_job()
    wait_for("the reason", lambda: "no other enabled pod" in place.status(name).get("message", ""))
    assert place.status(name)["phase"] == "Pending"
    place.add_pod("llm-1", "b")
    assert place.wait_job(name, "Succeeded")["target"]["podName"] == "llm-1"
    assert len(place.jobs()) == 1


def test_without_a_target_until_the_end_it_is_said(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.add_fip()
    notice(world, "a", left_s=12)
    name = place.one_job()
    status = place.wait_job(name, "Failed")
    assert status["reason"] == "DeadlinePassed" and "no other enabled pod" in status["message"]


def test_a_taint_alone_leaves_time_for_a_target_to_come(world: World, place: Place) -> None:
    """It does not say until when: EC2's two minutes begin when it is seen."""
    place.add_pod("llm-0", "a")
    place.add_fip()
    taints = {"spec": {"taints": [{"key": "aws-node-termination-handler/spot-itn", "effect": "NoSchedule"}]}}
    world.plane.request("PATCH", "/api/v1/nodes/a", taints, MERGE)
    name = place.one_job()
    left = datetime.fromisoformat(place.job(name)["spec"]["deadline"]) - datetime.now(UTC)
    assert timedelta(seconds=80) < left < timedelta(seconds=116)
    wait_for("the reason", lambda: "no other enabled pod" in place.status(name).get("message", ""))
    place.add_pod("llm-1", "b")
    place.wait_job(name, "Succeeded")
    assert len(place.jobs()) == 1


def test_a_drain_without_a_deadline_waits_for_a_target_too(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.add_fip()
    taints = {"spec": {"taints": [{"key": KARPENTER, "effect": "NoSchedule"}]}}
    world.plane.request("PATCH", "/api/v1/nodes/a", taints, MERGE)
    name = place.one_job()
    wait_for("the reason", lambda: "no other enabled pod" in place.status(name).get("message", ""))
    assert "deadline" not in place.job(name)["spec"] and place.status(name)["phase"] == "Pending"
    place.add_pod("llm-1", "b")
    place.wait_job(name, "Succeeded")
    assert len(place.jobs()) == 1


def test_a_rebalance_waits_for_a_target_and_the_interruption_says_how_long(world: World, place: Place) -> None:
    place.add_pod("llm-0", "a")
    place.add_fip()
    world.agents.do("notice", node="a", kind="Rebalance")
    name = place.one_job()
    wait_for("the reason", lambda: "no other enabled pod" in place.status(name).get("message", ""))
    notice(world, "a", left_s=20)
    wait_for("the deadline", lambda: "midstream.dev/deadline" in place.job(name)["metadata"].get("annotations", {}))
    status = place.wait_job(name, "Failed")
    assert status["reason"] == "DeadlinePassed" and "no other enabled pod" in status["message"]


def test_a_target_that_goes_while_a_rebalance_is_prepared_is_replaced(world: World, place: Place) -> None:
    """Prepared for b, then b itself is interrupted: c is prepared, and KV goes there, too."""
    place.serving()
    world.agents.do("notice", node="a", kind="Rebalance")
    name = place.one_job()
    wait_for("KV at b", lambda: "of KV of 3 streams at b" in place.status(name).get("message", ""))
    place.add_pod("llm-2", "c")
    notice(world, "b")
    wait_for("KV at c", lambda: "of KV of 3 streams at c" in place.status(name).get("message", ""))
    assert place.status(name)["target"]["podName"] == "llm-2"
    notice(world, "a")
    assert place.wait_job(name, "Succeeded")["target"]["podName"] == "llm-2"
    assert len(place.jobs()) == 1


def test_an_eviction_a_taint_and_the_nodes_deletion_at_once_make_one_job(world: World, place: Place) -> None:
    """As Karpenter does: its taint, the eviction of the pods, the Node with its finalizer in deletion."""
    world.add_node("karpenter")
    path = "/api/v1/nodes/karpenter"
    place.add_pod("llm-0", "karpenter")
    place.add_fip()
    place.add_pod("llm-1", "b")
    world.plane.request("PATCH", path, {"metadata": {"finalizers": ["karpenter.sh/termination"]}}, MERGE)
    taints = {"spec": {"taints": [{"key": KARPENTER, "effect": "NoSchedule"}]}}
    pod = f"{place.path('pods', 'llm-0', 'v1')}?gracePeriodSeconds=120"
    ask = world.plane.request
    asked = [lambda: ask("PATCH", path, taints, MERGE), lambda: ask("DELETE", pod), lambda: ask("DELETE", path)]
    try:
        with ThreadPoolExecutor(len(asked)) as pool:
            for done in [pool.submit(what) for what in asked]:
                done.result()
        status = place.wait_job(place.one_job(), "Succeeded")
        assert status["target"]["podName"] == "llm-1"
        assert len(place.jobs()) == 1
    finally:
        world.nodes.remove("karpenter")
        world.plane.request("PATCH", path, {"metadata": {"finalizers": None}}, MERGE)
