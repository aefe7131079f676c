"""Specs, selectors, digests, retention, epochs, notices, slices: the operator's pure parts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from midstream_operator.endpoints import endpoint_slice
from midstream_operator.errors import Final, reason_of
from midstream_operator.lease import TERM_SIZE, Epochs, next_term
from midstream_operator.model import FipSpec, JobSpec, bytes_of, duration_ms, label_value, matches, parse_time
from midstream_operator.notices.base import Notice, NoticeKind
from midstream_operator.notices.eviction import EvictionSource
from midstream_operator.providers.base import Place
from midstream_operator.respond import notice_job
from midstream_operator.retention import Finished, expired
from midstream_operator.settings import Pool, Settings
from midstream_operator.view import Agent, Node, View, workload_of
from operator_objects import job_object, node, node_object, pod, pod_object

T0 = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("selector", "labels", "taken"),
    [
        ({}, {"a": "1"}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "2"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, {"a": "2"}, True),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, {}, False),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {"a": "1"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"a": ""}, True),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": ""}, False),
    ],
)
def test_selectors_take_what_kubernetes_takes(selector: dict[str, Any], labels: dict[str, str], taken: bool) -> None:
    assert matches(selector, labels) is taken


def test_a_specs_fields_are_read() -> None:
    spec = JobSpec.of(
        job_object(
            target={"nodeName": "b"}, deadline="2026-01-01T00:02:00Z", maxStall="2s", abort=True,
            kv={"mode": "Replay", "maxBandwidth": "5Mi"}, ttlSecondsAfterFinished=0,
        )
    )  # fmt: skip
    assert (spec.target.node, spec.target.pod, spec.abort, spec.ttl_s) == ("b", "", True, 0)
    assert spec.deadline == T0 + timedelta(minutes=2)
    assert (spec.max_stall_ms, spec.kv_mode, spec.kv_bytes_per_s) == (2000, "Replay", 5 << 20)
    assert [JobSpec.of(job_object(kv=kv)).kv_bytes_per_s for kv in ({}, {"maxBandwidth": 7})] == [0, 7]
    assert [bytes_of(q) for q in ("5", "20k", "500M", "1G", "3Ki", "2Gi")] == [
        5, 20_000, 500_000_000, 10**9, 3 << 10, 2 << 30,
    ]  # fmt: skip
    assert duration_ms("250ms") == 250


def test_a_codes_reason_is_camel_case() -> None:
    assert [reason_of(c) for c in ("deadline_passed", "no_agent", "aborted")] == [
        "DeadlinePassed",
        "NoAgent",
        "Aborted",
    ]


@pytest.mark.parametrize(
    ("meta", "workload"),
    [
        ({"labels": {"midstream.dev/workload": "w"}}, "w"),
        ({"labels": {"pod-template-hash": "5d"}, "ownerReferences": [{"controller": True, "name": "llm-5d"}]}, "llm"),
        ({"labels": {}, "ownerReferences": [{"controller": True, "name": "set"}]}, "set"),
        ({"labels": {"app": "chat"}}, "chat"),
        ({}, "p"),
    ],
)
def test_a_pods_workload_outlives_a_rollout(meta: dict[str, Any], workload: str) -> None:
    assert workload_of({"metadata": {"name": "p", **meta}}) == workload


def test_an_agents_endpoint_is_its_pods_address() -> None:
    assert Agent.of(pod_object("agent", "b"), 9443).endpoint == "10.0.0.1:9443"
    assert Agent.of(pod_object("agent", "b", podIP="fd00::1"), 9443).endpoint == "[fd00::1]:9443"
    assert not Agent.of(pod_object("agent", metadata={"deletionTimestamp": "2026-01-01T00:00:00Z"}), 1).ready


def test_during_a_rolling_update_the_ready_agent_is_asked() -> None:
    view = View()
    for name, ready in (("old", False), ("new", True)):
        view.put_agent(name, Agent.of(pod_object(name, "b", ready=ready), 1))
    agent = view.agent("b")
    assert agent is not None
    assert agent.pod == "new"


def test_listeners_hear_of_changes_only() -> None:
    view, heard = View(), []
    view.pod_listeners.append(lambda p: heard.append(p.name))
    view.put_pod(pod("x"))
    view.put_pod(pod("x"))
    view.drop_pod("uid-x")
    view.drop_pod("uid-x")
    assert heard == ["x", "x"]
    assert view.pod("default", "x") is None


def test_a_pod_that_came_back_under_its_name_is_not_dropped_with_the_old_one() -> None:
    view = View()
    view.put_pod(pod("x"))
    view.put_pod(pod("x", metadata={"uid": "second"}))
    view.drop_pod("uid-x")
    found = view.pod("default", "x")
    assert found is not None
    assert found.uid == "second"


@pytest.mark.parametrize(
    ("spec", "leaving"),
    [
        ({}, ""),
        ({"unschedulable": True}, "cordoned"),
        ({"taints": [{"key": "aws-node-termination-handler/spot-itn"}]}, "aws-node-termination-handler/spot-itn"),
        ({"taints": [{"key": "nvidia.com/gpu"}]}, ""),
    ],
)
def test_a_node_that_is_about_to_go_is_known_by_its_taints(spec: dict[str, Any], leaving: str) -> None:
    assert Node.of(node_object("n", **spec)).leaving == leaving


# -- retention -----------------------------------------------------------------------------------------


def finished(name: str, age_s: int, ttl_s: int | None = None, workload: str = "w") -> Finished:
    return Finished("default", name, f"uid-{name}", workload, T0 - timedelta(seconds=age_s), ttl_s)


def test_the_five_newest_of_a_workload_stay_and_others_go_after_the_ttl() -> None:
    jobs = [finished(f"j{i}", i * 100) for i in range(10)] + [finished("other", 5000, workload="v")]
    assert [j.name for j in expired(jobs, T0, 5, 700)] == ["j7", "j8", "j9"]


def test_a_ttl_of_its_own_counts_whatever_else_is_there() -> None:
    assert [j.name for j in expired([finished("a", 10, 5), finished("b", 4, 5)], T0, 5, 9999)] == ["a"]


@given(st.lists(st.tuples(st.integers(0, 1000), st.sampled_from("xyz"))), st.integers(0, 6))
def test_of_each_workload_at_least_so_many_are_kept(jobs: list[tuple[int, str]], kept: int) -> None:
    all_jobs = [finished(f"j{i}", age, workload=w) for i, (age, w) in enumerate(jobs)]
    gone = set(expired(all_jobs, T0, kept, 0))
    for workload in "xyz":
        mine = [j for j in all_jobs if j.workload == workload]
        left = [j for j in mine if j not in gone]
        assert len(left) == min(kept, len(mine))
        assert all(k.at >= g.at for k in left for g in gone if g.workload == workload)


# -- epochs --------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 2**41), st.integers(1, TERM_SIZE - 1)), min_size=1, max_size=20))
def test_epochs_grow_from_term_to_term_whatever_the_clocks_say(terms: list[tuple[int, int]]) -> None:
    recorded, last = 0, 0
    for clock_ms, given_out in terms:
        recorded = next_term(recorded, clock_ms)
        epochs = Epochs(recorded)
        assert epochs.next() > last
        last = recorded + given_out
    assert last < 2**53, "exact in any JSON reader"


def test_epochs_go_on_above_what_objects_tell() -> None:
    epochs = Epochs(100)
    epochs.raise_above(50)
    assert epochs.next() == 101
    epochs.raise_above(101)
    assert epochs.next() > 101


def test_a_term_that_is_used_up_ends_the_process() -> None:
    epochs = Epochs(0)
    with pytest.raises(RuntimeError, match="used up"):
        for _ in range(TERM_SIZE):
            epochs.next()


# -- notices -------------------------------------------------------------------------------------------


def test_the_same_notice_from_two_sources_is_one_job() -> None:
    told = [
        Notice(NoticeKind.SPOT_INTERRUPTION, s, instance_id="i-1", issued_at=t)
        for s, t in (("imds", T0), ("sqs", None))
    ]
    assert told[0].id == told[1].id
    one, two = (notice_job(pod("llm-0"), n)["metadata"]["name"] for n in told)
    assert one == two
    assert notice_job(pod("llm-1"), told[0])["metadata"]["name"] != one
    assert len(one) <= 63


def test_notices_of_other_kinds_or_nodes_are_others() -> None:
    ids = {Notice(k, "s", instance_id=i).id for k in NoticeKind for i in ("i-1", "i-2")}
    assert len(ids) == 2 * len(NoticeKind)


def test_an_evictions_deadline_is_before_the_kill_and_its_kind_follows_the_node() -> None:
    view = View()
    view.put_node(node("a"))
    going = pod("x", "a", metadata={"deletionTimestamp": "2026-01-01T00:02:00Z"})
    source = EvictionSource(view, 5.0, 1.0)
    notice = source.notice(going)
    assert (notice.kind, notice.deadline) == (NoticeKind.SCALE_IN, T0 + timedelta(seconds=115))
    view.put_node(node("a", unschedulable=True))
    assert source.notice(going).kind is NoticeKind.DRAIN
    job = notice_job(going, notice)
    assert job["spec"] == {"source": {"podName": "x"}, "reason": "ScaleIn", "deadline": "2026-01-01T00:01:55Z"}
    assert "ownerReferences" not in job["metadata"]


# -- slices and pools ------------------------------------------------------------------------------------

FIP = {
    "metadata": {"name": "llm", "namespace": "default", "uid": "u"},
    "spec": {
        "pool": "p", "provider": "l2", "podSelector": {}, "serviceName": "svc",
        "ports": [{"name": "http", "port": 8000}],
    },
}  # fmt: skip


@pytest.mark.parametrize(("address", "family"), [("10.0.0.9", "IPv4"), ("fd00::9", "IPv6")])
def test_a_slice_has_all_that_load_balancers_look_for(address: str, family: str) -> None:
    found = endpoint_slice(FIP, FipSpec.of(FIP), address, Place("b", "", "z1", "default", "llm-1", "uid-1"))
    assert found["addressType"] == family
    assert found["metadata"]["labels"]["kubernetes.io/service-name"] == "svc"
    (endpoint,) = found["endpoints"]
    assert endpoint["targetRef"] == {"kind": "Pod", "namespace": "default", "name": "llm-1", "uid": "uid-1"}
    assert (endpoint["nodeName"], endpoint["zone"], endpoint["conditions"]["ready"]) == ("b", "z1", True)


def test_without_a_pod_a_slice_has_no_endpoints() -> None:
    assert endpoint_slice(FIP, FipSpec.of(FIP), "10.0.0.9", None)["endpoints"] == []


def test_a_pools_addresses_are_its_own() -> None:
    pool = Pool("p", "l2", ("10.0.0.8/31", "fd00::1/128"))
    assert list(pool.addresses()) == ["10.0.0.8", "10.0.0.9", "fd00::1"]
    assert "10.0.0.9" in pool
    assert "10.0.0.10" not in pool


def test_label_values_are_valid() -> None:
    assert label_value("a" * 80) == "a" * 63
    assert label_value("llm.0/x_") == "llm.0-x"


def test_times_are_read_as_the_api_server_writes_them() -> None:
    assert parse_time("2026-01-01T00:00:00Z") == parse_time("2026-01-01T00:00:00.000000Z") == T0


# -- configuration -----------------------------------------------------------------------------------------


def test_a_configuration_is_read_with_its_nested_parts() -> None:
    settings = Settings.parse(
        {
            "namespace": "ms",
            "pools": [{"name": "p", "provider": "l2", "cidrs": ["10.0.0.0/30"]}],
            "limits": {"jobs": 3},
            "timeouts": {"leaseS": 4},
            "tls": {"ca": "/ca"},
        }
    )
    assert (settings.namespace, settings.limits.jobs, settings.timeouts.lease_s) == ("ms", 3, 4)
    assert settings.pool("p").cidrs == ("10.0.0.0/30",)
    assert str(settings.tls.ca) == "/ca"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"nope": 1}, "nope: no such setting"),
        ({"limits": {"jobz": 1}}, "limits.jobz: no such setting"),
        ({"limits": {"jobs": "many"}}, "limits.jobs: a number >= 0 is wanted, not 'many'"),
        ({"limits": {"jobs": -1}}, "limits.jobs: a number"),
        ({"timeouts": 3}, "timeouts.: a mapping is wanted"),
        ({"pools": {}}, "pools: a list is wanted"),
        ({"pools": [{"name": "p"}]}, r"pools\[0\].provider: is missing"),
        ({"pools": [{"name": "p", "provider": "l2", "cidrs": ["10.0.0.1/24"]}]}, "has host bits set"),
        ({"namespace": 3}, "namespace: text is wanted"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(data: dict[str, Any], says: str) -> None:
    with pytest.raises(Final, match=says) as e:
        Settings.parse(data)
    assert e.value.code == "bad_config"


def test_an_unknown_pool_names_those_that_there_are() -> None:
    with pytest.raises(Final, match="no pool 'q': the operator was installed with p"):
        Settings.parse({"pools": [{"name": "p", "provider": "l2", "cidrs": ["10.0.0.0/30"]}]}).pool("q")
