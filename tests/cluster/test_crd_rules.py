"""What the API server takes and refuses, by the CRDs alone: every refusal names the field and why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cluster_world import CHECKOUT, Place, World

Json = dict[str, Any]


def job(**spec: Any) -> Json:
    return {
        "apiVersion": "midstream.dev/v1alpha1",
        "kind": "MigrationJob",
        "metadata": {"name": "j"},
        "spec": {"source": {"podName": "p"}, **spec},
    }


def fip(**spec: Any) -> Json:
    good = {"pool": "p", "provider": "l2", "podSelector": {"matchLabels": {"a": "b"}}}
    meta = {"name": "f"}
    return {"apiVersion": "midstream.dev/v1alpha1", "kind": "FloatingIP", "metadata": meta, "spec": {**good, **spec}}


GOOD = {
    "least": job(),
    "a target pod": job(target={"podName": "q"}),
    "a target node": job(target={"nodeName": "n"}),
    "a selector": job(target={"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]}}),
    "all": job(
        reason="SpotInterruption", deadline="2030-01-01T00:00:00Z", kv={"mode": "Copy", "maxBandwidth": "500M"},
        switchover="Wait", maxStall="250ms", onFailure="KeepSource", abort=False, dryRun=True,
        ttlSecondsAfterFinished=0,
    ),
    "bandwidth as a number": job(kv={"maxBandwidth": 1000}),
    "least of a floating ip": fip(),
    "a service with ports": fip(serviceName="s", ports=[{"name": "http", "port": 80}]),
}  # fmt: skip

BAD = {
    "no source": ({**job(), "spec": {}}, "spec.source: Required value"),
    "no pod": (job(source={}), "spec.source.podName: Required value"),
    "an empty pod": (job(source={"podName": ""}), "spec.source.podName"),
    "two targets": (job(target={"podName": "q", "nodeName": "n"}), "at most one of podName, nodeName and podSelector"),
    "three targets": (job(target={"podName": "q", "nodeName": "n", "podSelector": {}}), "at most one of"),
    "a reason of nobody": (job(reason="Bored"), 'spec.reason: Unsupported value: "Bored"'),
    "a wrong mode": (job(kv={"mode": "copy"}), "spec.kv.mode: Unsupported value"),
    "a wrong switchover": (job(switchover="Fast"), "spec.switchover: Unsupported value"),
    "no time": (job(deadline="tomorrow"), "spec.deadline"),
    "a stall without a unit": (job(maxStall="250"), "spec.maxStall"),
    "a bandwidth of nothing": (job(kv={"maxBandwidth": "0"}), "spec.kv.maxBandwidth"),
    "a ttl below zero": (job(ttlSecondsAfterFinished=-1), "spec.ttlSecondsAfterFinished"),
    "a field of nobody": (job(tareget={}), 'unknown field "spec.tareget"'),
    "In without values": (
        job(target={"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}),
        "In and NotIn need values",
    ),
    "a name that is too long": ({**job(), "metadata": {"name": "j" * 64}}, "metadata.name"),
    "a floating ip without a pool": ({**fip(), "spec": {"provider": "l2"}}, "spec.pool: Required value"),
    "a provider of nobody": (fip(provider="gcp"), "spec.provider: Unsupported value"),
    "a selector of everything": (fip(podSelector={}), "an empty selector would take every pod"),
    "a service without ports": (fip(serviceName="s"), "serviceName needs ports"),
    "a port beyond": (fip(ports=[{"port": 70000}]), "spec.ports[0].port"),
    "a port twice": (fip(ports=[{"port": 80}, {"port": 80}]), "Duplicate value"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_objects_are_taken(world: World, quiet_place: Place, name: str) -> None:
    body = json.dumps(GOOD[name])
    world.plane.kubectl("create", "-n", quiet_place.name, "--dry-run=server", "-f", "-", stdin=body)


@pytest.mark.parametrize("name", BAD)
def test_bad_objects_are_refused_by_name(world: World, quiet_place: Place, name: str) -> None:
    body, says = BAD[name]
    done = world.plane.try_kubectl(
        "create", "-n", quiet_place.name, "--dry-run=server", "--validate=strict", "-f", "-", stdin=json.dumps(body)
    )
    assert done.returncode != 0
    assert says in done.stderr


CHANGES: list[tuple[Json, Json, str]] = [
    ({}, {"source": {"podName": "other"}}, "source is immutable"),
    ({}, {"target": {"nodeName": "n"}}, "target is immutable"),
    ({"target": {"nodeName": "n"}}, {"target": None}, "target is immutable"),
    ({"target": {"nodeName": "n"}}, {"target": {"nodeName": "m"}}, "target is immutable"),
    ({}, {"deadline": "2030-01-01T00:00:00Z"}, "deadline is immutable"),
    ({}, {"kv": {"mode": "Copy"}}, "kv is immutable"),
    ({}, {"switchover": "Wait"}, "switchover is immutable"),
    ({"ttlSecondsAfterFinished": 5}, {"ttlSecondsAfterFinished": None}, "ttlSecondsAfterFinished is immutable"),
    ({}, {"dryRun": True}, "dryRun is immutable"),
    ({"abort": True}, {"abort": False}, "abort cannot be taken back"),
]


@pytest.mark.parametrize(("before", "change", "says"), CHANGES, ids=[c[2] + str(i) for i, c in enumerate(CHANGES)])
def test_a_job_is_immutable_but_for_abort(
    world: World, quiet_place: Place, before: Json, change: Json, says: str
) -> None:
    name = quiet_place.add_job("nobody", "j", **before)
    body = json.dumps({"spec": change})
    done = world.plane.try_kubectl("patch", "mj", name, "-n", quiet_place.name, "--type=merge", "-p", body)
    assert says in done.stderr


def test_abort_can_be_set(world: World, quiet_place: Place) -> None:
    name = quiet_place.add_job("nobody", "j")
    quiet_place.patch_job(name, {"spec": {"abort": True}})
    assert quiet_place.job(name)["spec"]["abort"] is True


def test_pool_and_provider_of_an_address_stay(world: World, quiet_place: Place) -> None:
    world.plane.kubectl("create", "-n", quiet_place.name, "-f", "-", stdin=json.dumps(fip()))
    for change, says in (({"pool": "q"}, "pool is immutable"), ({"provider": "ec2"}, "provider is immutable")):
        body = json.dumps({"spec": change})
        done = world.plane.try_kubectl("patch", "fip", "f", "-n", quiet_place.name, "--type=merge", "-p", body)
        assert says in done.stderr


@pytest.mark.parametrize("name", ["migrationjob", "floatingip"])
def test_the_examples_are_taken(world: World, quiet_place: Place, name: str) -> None:
    path = f"{CHECKOUT}/examples/{name}.yaml"
    said = world.plane.kubectl("create", "-n", quiet_place.name, "--dry-run=server", "-f", path)
    assert f"{name}.midstream.dev/" in said


def test_short_names_and_the_category_find_our_kinds(world: World, quiet_place: Place) -> None:
    quiet_place.add_job("nobody", "j")
    for kind in ("mj", "midstream", "migrationjobs"):
        assert "j" in world.plane.kubectl("get", kind, "-n", quiet_place.name, "-o", "name")
