"""Which pod takes over: every reason against a candidate, and the order among those that are left."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from midstream_operator.errors import Final, Retryable
from midstream_operator.model import Target
from midstream_operator.picker import Scene, explain, pick, refusal
from operator_objects import node, pod

SOURCE = pod("llm-0", "a")
NODES = {n.name: n for n in (node("a"), node("b"), node("c", zone="z2"))}
AGENTS = frozenset({"a", "b", "c"})


def scene(*pods: Any, **more: Any) -> Scene:
    return Scene(**{"pods": [SOURCE, *pods], "nodes": NODES, "agents": AGENTS, **more})


def test_the_only_other_pod_takes_over() -> None:
    assert pick(SOURCE, Target(), scene(pod("llm-1", "b")), 10).pod.name == "llm-1"


@pytest.mark.parametrize(
    ("candidate", "more", "says"),
    [
        (pod("x", "b", labels={"app": "echo"}), {}, "serves workload echo, the source workload llm"),
        (pod("x", "b", labels={"midstream.dev/model": "m2"}), {}, "serves m2"),
        (pod("x", "b", labels={"midstream.dev/runtime-version": "2"}), {}, "runtime version 2, not unset"),
        (pod("x", "b", spec={"hostNetwork": True}), {}, "hostNetwork"),
        (pod("x", "b", metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}), {}, "is being deleted"),
        (pod("x", "b", ready=False), {}, "is not Ready"),
        (pod("x", "a"), {}, "runs on a like the source"),
        (pod("x", "b"), {"taking": frozenset({"uid-x"})}, "another job moves its streams away"),
        (pod("x", "nowhere"), {}, "node nowhere is not Ready"),
        (pod("x", "b"), {"nodes": {**NODES, "b": node("b", ready=False)}}, "node b is not Ready"),
        (pod("x", "b"), {"nodes": {**NODES, "b": node("b", unschedulable=True)}}, "node b is leaving (cordoned)"),
        (
            pod("x", "b"),
            {"nodes": {**NODES, "b": node("b", taints=[{"key": "karpenter.sh/disrupted"}])}},
            "node b is leaving (karpenter.sh/disrupted)",
        ),
        (pod("x", "b"), {"interrupted": frozenset({"b"})}, "node b is being interrupted"),
        (pod("x", "b"), {"agents": frozenset({"a"})}, "no agent is ready on node b"),
        (pod("x", "c"), {"zone": "z1"}, "node c is not in zone z1"),
    ],
)
def test_a_refused_candidate_is_told_why(candidate: Any, more: dict[str, Any], says: str) -> None:
    there = scene(candidate, **more)
    assert refusal(SOURCE, candidate, there).startswith(says)
    with pytest.raises(Retryable, match="no pod can take over: x: ") as e:
        pick(SOURCE, Target(), there, 10)
    assert e.value.code == "no_target"


def test_a_taint_that_says_nothing_about_leaving_is_no_reason() -> None:
    nodes = {**NODES, "b": node("b", taints=[{"key": "nvidia.com/gpu"}])}
    assert pick(SOURCE, Target(), scene(pod("x", "b"), nodes=nodes), 10).pod.name == "x"


def test_the_one_that_serves_least_is_preferred_then_the_quieter_node_then_the_name() -> None:
    pods = (pod("x", "b"), pod("y", "c"), pod("w", "b"))
    assert pick(SOURCE, Target(), scene(*pods, addresses={"uid-x": 1, "uid-w": 1}), 10).pod.name == "y"
    assert pick(SOURCE, Target(), scene(*pods, incoming={"b": 1}), 10).pod.name == "y"
    assert pick(SOURCE, Target(), scene(*pods), 10).pod.name == "w"


def test_a_named_pod_that_cannot_is_refused_for_good() -> None:
    with pytest.raises(Final, match="bad_target: x cannot take over: is not Ready"):
        pick(SOURCE, Target(pod="x"), scene(pod("x", "b", ready=False), pod("y", "b")), 10)
    with pytest.raises(Final, match=r"unknown_target: no pod z .* in namespace default"):
        pick(SOURCE, Target(pod="z"), scene(pod("x", "b")), 10)


def test_a_node_or_a_selector_narrows_the_choice() -> None:
    pods = (pod("x", "b"), pod("y", "c", labels={"rank": "1"}))
    assert pick(SOURCE, Target(node="c"), scene(*pods), 10).pod.name == "y"
    assert pick(SOURCE, Target(selector={"matchLabels": {"rank": "1"}}), scene(*pods), 10).pod.name == "y"
    with pytest.raises(Retryable, match="no other enabled pod in namespace default on node d"):
        pick(SOURCE, Target(node="d"), scene(*pods), 10)


def test_the_source_itself_is_no_candidate() -> None:
    with pytest.raises(Retryable, match="no other enabled pod"):
        pick(SOURCE, Target(), scene(), 10)
    with pytest.raises(Final, match="unknown_target"):
        pick(SOURCE, Target(pod="llm-0"), scene(), 10)


def test_a_pod_of_the_same_name_elsewhere_is_another_one() -> None:
    twin = replace(pod("llm-1", "b"), uid="other")
    assert pick(SOURCE, Target(), scene(twin), 10).pod.uid == "other"


def test_many_refusals_are_counted_beyond_the_first_few() -> None:
    refused = tuple((f"p{i}", "is not Ready") for i in range(100))
    assert explain(refused, 2) == "p0: is not Ready; p1: is not Ready; 98 more: is not Ready"
