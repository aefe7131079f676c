"""`kubectl midstream`: kubectl finds the plugin, and it does through the API what the operator then carries out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from cluster_world import NAMESPACE, Place, World, python_path


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PATH with kubectl-midstream in it, as pip installs it."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "kubectl-midstream"
    script.write_text(f"#!{sys.executable}\nimport sys\nfrom midstream_cli.main import main\nsys.exit(main())\n")
    script.chmod(0o755)
    return folder


def midstream(world: World, place: Place, plugins: Path, *args: str) -> subprocess.CompletedProcess[str]:
    kubectl = world.plane.assets / "kubectl"
    env = {
        **os.environ,
        "PATH": f"{plugins}:{os.environ['PATH']}",
        "KUBECONFIG": str(world.plane.kubeconfig("admin")),
        "PYTHONPATH": python_path(),
    }
    argv = [str(kubectl), "midstream", "-n", place.name, *args]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_migrate_follows_the_job_to_its_end(world: World, place: Place, plugins: Path, tmp_path: Path) -> None:
    place.serving()
    done = midstream(world, place, plugins, "migrate", "llm-0", "--to", "b", "--report", str(tmp_path / "r.json"))
    assert done.returncode == 0, done.stderr
    assert "Succeeded: 3 streams moved from a to b" in done.stdout
    assert "3 total, 3 migrated" in done.stdout
    assert json.loads((tmp_path / "r.json").read_text())["status"]["phase"] == "Succeeded"


def test_a_dry_run_shows_the_plan(world: World, place: Place, plugins: Path) -> None:
    place.serving()
    done = midstream(world, place, plugins, "migrate", "llm-0", "--dry-run")
    assert done.returncode == 0
    assert "to llm-1 on b, the only one that can take over" in done.stdout


@pytest.mark.parametrize(
    ("args", "status", "says"),
    [
        (["migrate", "nobody"], 1, "Failed (UnknownPod): there is no pod nobody"),
        (["migrate", "llm-0", "--to", "b", "--target-pod", "x"], 2, "not both"),
        (["migrate", "llm-0", "--address", "10.0.0.1"], 2, "for agents without a cluster"),
        (["abort", "nothing"], 2, "no MigrationJob nothing"),
        (["attach", "llm-0", "10.0.0.1"], 2, "make a FloatingIP"),
    ],
)
def test_what_users_get_wrong_is_said(
    world: World, place: Place, plugins: Path, args: list[str], status: int, says: str
) -> None:
    done = midstream(world, place, plugins, *args)
    assert done.returncode == status
    assert says in done.stdout + done.stderr


def test_status_lists_jobs_and_tells_one(world: World, place: Place, plugins: Path) -> None:
    place.serving()
    name = place.add_job(dryRun=True)
    place.wait_job(name, "Succeeded")
    assert "Succeeded   llm-0" in midstream(world, place, plugins, "status").stdout
    told = midstream(world, place, plugins, "status", name).stdout
    assert "plan: " in told
    assert "Pending" in told


def test_abort_says_what_became_of_it(world: World, place: Place, plugins: Path) -> None:
    place.serving()
    with world.agents.stopped_at("SEND"):
        name = place.add_job()
        place.wait_job(name, "Switching")
        done = midstream(world, place, plugins, "abort", name)
    assert done.returncode == 0
    assert "Aborted" in done.stdout
    assert midstream(world, place, plugins, "abort", name).returncode == 1


@pytest.fixture(scope="module")
def operator_pod(world: World) -> dict[str, str]:
    """The API server proxies to pods only, and to no loopback address: this one has the machine's own."""
    address = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
    world.add_pod(NAMESPACE, "operator", "a", {}, address)
    return {"ip": address}


@pytest.fixture
def service(world: World, place: Place, operator_pod: dict[str, str]) -> None:
    """The chart's Service of the operator, with the process that leads as its endpoint, as the endpoints controller
    would write it."""
    (name,) = [n for n in world.operators.running if world.operators.leads(n)]
    service = {"metadata": {"name": "midstream-operator"}, "spec": {"ports": [{"name": "http", "port": 8080}]}}
    ports = [{"name": "http", "port": world.operators.ports[name]}]
    target = {"kind": "Pod", "namespace": NAMESPACE, "name": "operator"}
    endpoints = {
        "metadata": {"name": "midstream-operator"},
        "subsets": [{"addresses": [{**operator_pod, "targetRef": target}], "ports": ports}],
    }
    for path, body in (
        (f"/api/v1/namespaces/{NAMESPACE}/services", service),
        (f"/api/v1/namespaces/{NAMESPACE}/endpoints", endpoints),
    ):
        full = f"{path}/{body['metadata']['name']}"  # type: ignore[index]
        world.plane.try_kubectl("delete", "--raw", full)
        world.plane.request("POST", path, body)


def test_doctor_reports_each_finding_with_its_remedy(
    world: World, place: Place, plugins: Path, service: None, tmp_path: Path
) -> None:
    place.serving()
    bundle = tmp_path / "bundle.tar.gz"
    done = midstream(world, place, plugins, "doctor", "--bundle", str(bundle))
    assert done.returncode == 1
    assert "sick: error   conntrack: loose is off; remedy: sysctl loose=1" in done.stdout
    assert "a: ok      bpf" in done.stdout
    assert "cluster: ok      pool default: l2" in done.stdout
    with tarfile.open(bundle) as tar:
        names = {Path(n).name for n in tar.getnames()}
    assert {"doctor.json", "migrationjobs.json", "floatingips.json", "nodes.json", "events.json"} <= names


def test_doctor_without_an_operator_says_so(world: World, quiet_place: Place, plugins: Path) -> None:
    done = midstream(world, quiet_place, plugins, "--operator-namespace", "nowhere", "doctor")
    assert done.returncode == 1
    assert "no report from the operator" in done.stdout


def test_a_node_is_planned_for_before_anything_happens(
    world: World, place: Place, plugins: Path, service: None
) -> None:
    place.serving()
    done = midstream(world, place, plugins, "plan", "a", "--seconds", "60")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan for a (Steer), 60 s before its deadline"), done.stdout
    assert "3 streams move with 192.0 MiB of KV" in done.stdout and "3 streams go to llm-1 on b" in done.stdout
    assert "assumed: 119.2 MiB/s out of a, which has copied no KV yet" in done.stdout
    assert place.jobs() == []
    assert "nothing to move" in midstream(world, place, plugins, "plan", "c").stdout
    unknown = midstream(world, place, plugins, "plan", "nowhere")
    assert unknown.returncode == 2 and "there is no node nowhere" in unknown.stderr
