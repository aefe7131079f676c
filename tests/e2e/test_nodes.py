"""On real nodes: kubelet, containerd, our images, the chart; clients outside the VPC who must notice nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from midstream_testbed.cluster import CHECKOUT
from nodes_world import Json, World
from traffic import Traffic, assert_nothing_happened


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with World.create(tmp_path_factory.mktemp("nodes")) as world:
        yield world


def migration_job(pod: str) -> Json:
    """The one of examples/, for this pod."""
    job: Json = yaml.safe_load((CHECKOUT / "examples/migrationjob.yaml").read_text(encoding="utf-8"))
    job["metadata"]["generateName"] = f"{pod}-"
    job["spec"]["source"]["podName"] = pod
    return job


def test_a_job_moves_the_streams_of_a_pod(world: World, tmp_path: Path) -> None:
    place = world.serve()
    traffic = Traffic(world.client, place.address, tmp_path, tokens=600)
    traffic.learn()
    with world.client.capture() as capture:
        traffic.wait_under_way(traffic.start())
        source, target = place.holder(), place.spare()
        name = place.create(migration_job(source["metadata"]["name"]))
        world.plane.kubectl("wait", "-n", place.name, "--for=condition=Complete", f"mj/{name}", "--timeout=60s")
        still = [s for s in traffic.streams if s.process.poll() is None]
        assert still, "the answers had ended before the job: it moved nothing"
        world.plane.kubectl("delete", "pod", "-n", place.name, source["metadata"]["name"], "--force", "--wait=false")
        traffic.finish()
        assert_nothing_happened(traffic, capture)
    status = place.job(name)["status"]
    assert status["phase"] == "Succeeded"
    assert status["streams"]["migrated"] == len(traffic.streams)
    assert status["target"]["podName"] == target["metadata"]["name"]
    assert status["kv"]["bytesSent"] > 0
    assert place.events("MigrationJob", name) == ["Planned", "Switching", "Committed", "Succeeded"]
    assert place.endpoint()["targetRef"]["name"] == target["metadata"]["name"]
    assert place.holder()["metadata"]["name"] == target["metadata"]["name"]
