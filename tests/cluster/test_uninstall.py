"""The chart's hook before `helm uninstall`, with the rights that the chart gives it: no client is left hanging."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_world import CHECKOUT, NAMESPACE, Place, World, python_path, wait_for

DEPLOYMENT = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/midstream-operator"
OPERATOR = {"app.kubernetes.io/name": "midstream", "app.kubernetes.io/component": "operator"}


@pytest.fixture(scope="module")
def account(world: World) -> Path:
    """A kubeconfig of the hook's account."""
    argv = [
        str(world.plane.assets / "helm"), "template", "m", str(CHECKOUT / "charts/midstream"), "-n", NAMESPACE,
        "--show-only", "templates/uninstall.yaml",
    ]  # fmt: skip
    rendered = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
    rights = [part for part in rendered.split("\n---\n") if "kind: Job" not in part]
    world.plane.kubectl("apply", "-n", NAMESPACE, "-f", "-", stdin="\n---\n".join(rights))
    return world.plane.service_account(NAMESPACE, "midstream-uninstall")


@pytest.fixture
def deployment(world: World) -> Iterator[None]:
    """The operator's, as an object: its pods are none, or what the test makes."""
    container = {"name": "c", "image": "none"}
    template = {"metadata": {"labels": OPERATOR}, "spec": {"containers": [container]}}
    spec = {"replicas": 2, "selector": {"matchLabels": OPERATOR}, "template": template}
    body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "midstream-operator"}, "spec": spec}
    world.plane.request("POST", DEPLOYMENT.rpartition("/")[0], body)
    yield
    world.plane.request("DELETE", DEPLOYMENT)


def hook(account: Path, seconds: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "midstream_operator.uninstall", "--namespace", NAMESPACE, "--seconds", str(seconds)]
    env = {**os.environ, "PYTHONPATH": python_path(), "KUBECONFIG": str(account)}
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def replicas(world: World) -> int:
    found: dict[str, Any] = world.plane.request("GET", DEPLOYMENT)
    return int(found["spec"]["replicas"])


@pytest.mark.usefixtures("deployment")
def test_it_is_refused_while_a_migration_is_under_way(world: World, place: Place, account: Path) -> None:
    place.serving()
    with world.agents.stopped_at("SEND"):
        name = place.add_job()
        place.wait_job(name, "Switching")
        process = hook(account, seconds=1)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith(f"migrations_under_way: not uninstalled: {place.name}/{name} (Switching) would never end")
    assert replicas(world) == 2
    place.wait_job(name, "Succeeded")


@pytest.mark.usefixtures("deployment")
def test_a_migration_that_ends_in_time_is_waited_for(world: World, place: Place, account: Path) -> None:
    place.serving()
    with world.agents.stopped_at("SEND"):
        name = place.add_job()
        place.wait_job(name, "Switching")
        process = hook(account, seconds=60)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert replicas(world) == 0
    place.wait_job(name, "Succeeded")


@pytest.mark.usefixtures("deployment")
def test_what_begins_before_the_operator_has_stopped_gets_it_back(world: World, place: Place, account: Path) -> None:
    place.serving()
    world.add_pod(NAMESPACE, "op-1", "a", OPERATOR, "10.1.0.9")
    with world.agents.stopped_at("SEND"):
        process = hook(account, seconds=1)
        wait_for("the operator scaled to none", lambda: replicas(world) == 0)
        name = place.add_job()  # the operator of the tests, which is no pod, still acts
        place.wait_job(name, "Switching")
        world.plane.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/op-1?gracePeriodSeconds=0")
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and f"{place.name}/{name} (Switching)" in said
    assert replicas(world) == 2
    place.wait_job(name, "Succeeded")


@pytest.mark.usefixtures("deployment")
def test_a_pending_job_is_no_reason(world: World, place: Place, account: Path) -> None:
    """It waits for a target that may never come, and has begun nothing."""
    place.add_pod("llm-0", "a")
    place.add_fip()
    name = place.add_job(deadline="2099-01-01T00:00:00Z")
    wait_for("its message", lambda: place.status(name).get("message"))
    process = hook(account, seconds=0)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    place.patch_job(name, {"spec": {"abort": True}})
    place.wait_job(name, "Aborted")
