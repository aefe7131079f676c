"""On real nodes: kubelet, containerd, our images, the chart; clients outside the VPC who must notice nothing."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest
import rights
import yaml
from midstream_testbed.cluster import CHECKOUT
from midstream_testbed.verdict import Answer
from nodes_world import SYSTEM, TOLD_TO_STOP, Json, Place, World, serving_template, wait_for
from traffic import Traffic, assert_nothing_happened

TOKENS = 900  # one every 10 ms
ANOTHER_AUTHORITY = ("", "configmaps", "patch")  # used when the Secret holds another one than what agents were told
MOVE_SECONDS = 4.0  # of the network, where something is killed meanwhile
HELD = "source.SEND.do.before"  # streams are held and exported, nothing of them has left the source
SLOW = "source.PREPARE.do.before=delay:3000"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World.create(tmp_path_factory.mktemp("nodes")) as world:
        yield world


@pytest.fixture(scope="module")
def place(world: World) -> Place:
    return world.serve()


@pytest.fixture(scope="module")
def references(world: World, place: Place, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """What clients get when nothing happens."""
    traffic = Traffic(world.client, place.address, tmp_path_factory.mktemp("references"), TOKENS)
    traffic.learn()
    return traffic.references


@pytest.fixture(autouse=True)
def tell_of_a_failure(request: pytest.FixtureRequest, world: World) -> Iterator[None]:
    """What the cluster has to say, while it is still there."""
    before = request.session.testsfailed
    yield
    if request.session.testsfailed > before:
        world.tell()


@pytest.fixture
def traffic(world: World, place: Place, references: list[Answer], tmp_path: Path) -> Traffic:
    """To two Ready pods on two nodes, one with the address."""
    world.wait_whole()
    place.spread()
    return Traffic(world.client, place.address, tmp_path, TOKENS, references)


def migration_job(pod: str) -> Json:
    """The one of examples/, for this pod."""
    job: Json = yaml.safe_load((CHECKOUT / "examples/migrationjob.yaml").read_text(encoding="utf-8"))
    job["metadata"]["generateName"] = f"{pod}-"
    job["spec"]["source"]["podName"] = pod
    return job


def test_a_job_moves_the_streams_of_a_pod(place: Place, traffic: Traffic) -> None:
    with traffic.client.capture() as capture:
        traffic.wait_under_way(traffic.start())
        source, target = place.holder(), place.spare()
        name = place.create(migration_job(source["metadata"]["name"]))
        assert place.wait_ended(name)["phase"] == "Succeeded", place.job(name)["status"]
        place.kubectl("wait", "--for=condition=Complete", f"mj/{name}", "--timeout=1s")
        assert any(s.process.poll() is None for s in traffic.streams), "the answers had ended before the job"
        place.kubectl("delete", "pod", source["metadata"]["name"], "--grace-period=0", "--force")
        traffic.finish()
        assert_nothing_happened(traffic, capture)
    status = place.job(name)["status"]
    assert (status["phase"], status["streams"]["migrated"]) == ("Succeeded", len(traffic.streams))
    assert status["target"]["podName"] == target["metadata"]["name"]
    assert status["kv"]["bytesSent"] > 0
    assert place.events("MigrationJob", name) == ["Planned", "Switching", "Committed", "Succeeded"]
    assert place.endpoint()["targetRef"]["name"] == target["metadata"]["name"]
    assert place.holder()["metadata"]["name"] == target["metadata"]["name"]


def test_a_drain_waits_for_the_migration(world: World, place: Place, traffic: Traffic) -> None:
    source = place.holder()
    node, pod = source["spec"]["nodeName"], source["metadata"]["name"]
    with traffic.client.capture() as capture, place.follow_log(pod, "engine") as log:
        traffic.wait_under_way(traffic.start())
        place.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=150s")
        traffic.finish()
        assert_nothing_happened(traffic, capture)
    world.plane.kubectl("uncordon", node)
    (job,) = [j for j in place.get("migrationjobs")["items"] if j["spec"]["source"]["podName"] == pod]
    assert (job["spec"]["reason"], job["status"]["phase"]) == ("Drain", "Succeeded")
    assert job["status"]["streams"]["migrated"] == len(traffic.streams)
    # only after RELEASE: the hook kept the kubelet waiting until streams and address were the target's
    assert told_to_stop(log()) >= moment(job["status"]["completionTime"])


def told_to_stop(log: list[str]) -> datetime.datetime:
    (told,) = [line for line in log if TOLD_TO_STOP in line]
    return datetime.datetime.fromisoformat(told.split()[0][:19])


def moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text.removesuffix("Z"))


def test_without_the_hook_a_pod_ends_before_its_streams_have_left(world: World, place: Place, traffic: Traffic) -> None:
    """Negative control of the drain: the webhook knows pods by a label, which this one gets too late for it."""
    pod = serving_template()
    pod["metadata"] |= {"name": "bare", "labels": {**pod["metadata"]["labels"], "midstream.dev/enabled": "false"}}
    pod["spec"]["nodeName"] = node = place.spare()["spec"]["nodeName"]
    place.create({"apiVersion": "v1", "kind": "Pod", **pod})
    place.kubectl("wait", "--for=condition=Ready", "pod/bare", "--timeout=60s")
    place.kubectl("label", "--overwrite", "pod", "bare", "midstream.dev/enabled=true")
    there = migration_job(place.holder()["metadata"]["name"])
    there["spec"]["target"] = {"podName": "bare"}
    assert place.wait_ended(place.create(there))["phase"] == "Succeeded"
    with place.follow_log("bare", "engine") as log:
        traffic.wait_under_way(traffic.start())
        world.arm(node, SLOW)
        place.kubectl("delete", "pod", "bare")
        traffic.finish()
    (job,) = wait_for("its job", lambda: [j for j in place.get("migrationjobs")["items"] if is_of(j, "bare")])
    assert told_to_stop(log()) < moment(place.wait_ended(job["metadata"]["name"])["completionTime"])
    assert not any(s.answer().identical_to(s.reference) for s in traffic.streams)
    wait_for("the address elsewhere", lambda: place.fip()["status"].get("pod") not in (None, "bare"))
    place.wait_fip()


def is_of(job: Json, pod: str) -> bool:
    return bool(job["spec"]["source"]["podName"] == pod)


def test_a_rollout_under_load_loses_no_stream(place: Place, traffic: Traffic) -> None:
    before = {p["metadata"]["uid"] for p in place.pods()}
    with traffic.client.capture() as capture:
        traffic.wait_under_way(traffic.start())
        place.kubectl("rollout", "restart", "deployment/llm")
        traffic.keep_going(until=lambda: place.is_rolled_out("llm"))
        traffic.finish()
        assert_nothing_happened(traffic, capture)
    assert not before & {p["metadata"]["uid"] for p in place.pods()}


@pytest.mark.parametrize("victim", ["operator", "source agent"])
def test_a_death_while_streams_are_held_harms_none(world: World, place: Place, traffic: Traffic, victim: str) -> None:
    """Before the point of no return: the agents need no operator, and an agent's successor takes everything back."""
    with traffic.client.capture() as capture:
        traffic.wait_under_way(traffic.start())
        source = place.holder()
        node, pod = source["spec"]["nodeName"], source["metadata"]["name"]
        with world.stopped_at(node, HELD) as wait_held:
            name = place.create(migration_job(pod))
            wait_held()
            if victim == "operator":
                leader = world.leader()
                world.kill("operator")
                wait_for("another leader", lambda: world.leader() not in ("", leader))
            else:
                world.kill("agent", node)
        status = place.wait_ended(name)
        traffic.finish()
        assert_nothing_happened(traffic, capture)
    assert status["streams"]["lost"] == 0
    moved = victim == "operator"
    assert (status["phase"], "pointOfNoReturn" in status) == ("Succeeded" if moved else "RolledBack", moved), status
    assert (place.holder()["spec"]["nodeName"] != node) == moved


def test_a_pod_that_dies_while_its_streams_are_held_leaves_no_client_hanging(
    world: World, place: Place, traffic: Traffic
) -> None:
    traffic.wait_under_way(traffic.start())
    source = place.holder()
    node, pod = source["spec"]["nodeName"], source["metadata"]["name"]
    with world.stopped_at(node, HELD) as wait_held:
        name = place.create(migration_job(pod))
        wait_held()
        place.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
        world.nodes[node].wait_dead(source)
    status = place.wait_ended(name)
    traffic.finish()
    assert (status["phase"], status["streams"]["lost"]) == ("Succeeded", 0), status


@pytest.mark.parametrize("victim", ["operator", "source agent", "source pod"])
def test_a_death_in_mid_job_harms_no_stream(world: World, place: Place, traffic: Traffic, victim: str) -> None:
    """The target owns the streams, the network has not moved the address: they come through the source's tunnel."""
    world.vpc.fabric.move_seconds = MOVE_SECONDS
    try:
        with traffic.client.capture() as capture:
            traffic.wait_under_way(traffic.start())
            source = place.holder()
            node, pod = source["spec"]["nodeName"], source["metadata"]["name"]
            name = place.create(migration_job(pod))
            wait_for("the commit", lambda: place.phase(name) not in ("", "Pending", "Preparing", "Switching"))
            assert place.phase(name) == "Committing", place.job(name)["status"]
            if victim == "source pod":
                place.kubectl("delete", "pod", pod, "--grace-period=0", "--force")
            else:
                world.kill("agent" if victim == "source agent" else "operator", node)
            status = place.wait_ended(name)
            assert status["phase"] == "Succeeded", status
            traffic.finish()
            assert_nothing_happened(traffic, capture)
    finally:
        world.vpc.fabric.move_seconds = 0.0
    assert status["streams"]["lost"] == 0
    assert place.holder()["spec"]["nodeName"] != node


@pytest.mark.parametrize("image", ["operator", "agent", "runtime", "builtin"])
def test_an_image_starts_without_any_right(place: Place, image: str) -> None:
    name = place.create(help_pod(image))
    wait_for(f"the end of {name}", lambda: place.get("pod", name)["status"]["phase"] in ("Succeeded", "Failed"))
    said = place.kubectl("logs", name)
    assert place.get("pod", name)["status"]["phase"] == "Succeeded", said
    assert said.startswith("usage: "), said


def help_pod(image: str) -> Json:
    """The image's own entry point and user; the agent's is root, and without capabilities nobody."""
    context: Json = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
    context["capabilities"] = {"drop": ["ALL"]}
    context["runAsNonRoot"] = image != "agent"
    container = {"name": "c", "image": f"localhost/midstream-{image}:test", "imagePullPolicy": "Never"}
    spec = {"containers": [{**container, "args": ["--help"], "securityContext": context}], "restartPolicy": "Never"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"help-{image}"}, "spec": spec}


@pytest.mark.usefixtures("place")
def test_the_charts_own_test_passes(world: World) -> None:
    """`helm test`, in a cluster without DNS: helm fails where the pod does."""
    assert "Phase:          Succeeded" in world.helm("test", "midstream")


@pytest.mark.usefixtures("place")
def test_nothing_was_forbidden_and_all_rights_of_certificates_are_used(world: World) -> None:
    """Of all tests before. tests/cluster compares the other rights, with an authority of its own and no webhook."""
    log = world.plane.audit()
    for name in ("midstream-operator", "midstream-agent"):
        assert rights.forbidden(log, name) == []
        had, did = rights.granted(world.plane, name), rights.used(log, name)
        assert did <= had
        here = {r for r in had if r[0].startswith(("certificates", "admission")) or r[1] in ("secrets", "configmaps")}
        assert here - did <= {ANOTHER_AUTHORITY}


def test_an_uninstall_is_refused_while_streams_are_held(world: World, place: Place, traffic: Traffic) -> None:
    """The last one: afterwards nothing of ours runs, and streams that are where they belong need nothing of ours."""
    with traffic.client.capture() as capture:
        traffic.wait_under_way(traffic.start())
        source = place.holder()
        with world.stopped_at(source["spec"]["nodeName"], HELD) as wait_held:
            name = place.create(migration_job(source["metadata"]["name"]))
            wait_held()
            assert "midstream-uninstall" in world.helm("uninstall", "midstream", check=False)
            said = world.plane.kubectl("logs", "-n", SYSTEM, "job/midstream-uninstall").stdout
            assert said.startswith("migrations_under_way: ") and f"default/{name} (Switching)" in said
        assert place.wait_ended(name)["phase"] == "Succeeded"
        world.helm("uninstall", "midstream", "--wait")
        wait_for("the end of all of ours", lambda: not world.plane.get("pods", "-n", SYSTEM)["items"])
        traffic.wait_under_way(traffic.start())
        traffic.finish()
        assert_nothing_happened(traffic, capture)
