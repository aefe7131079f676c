"""The CLI's inventory: every mistake is a message that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from midstream_cli.inventory import Inventory, UsageError
from midstream_cli.main import job_request, main, parser

DATA: dict[str, Any] = {
    "tls": {"ca": "ca.pem", "cert": "op.pem", "key": "op.key"},
    "nodes": {"a": {"endpoint": "10.0.0.1:1"}, "b": {"endpoint": "10.0.0.2:1"}},
    "pods": {
        "llm-0": {"uid": "u0", "node": "a", "workload": "llm"},
        "llm-1": {"uid": "u1", "node": "b", "workload": "llm"},
        "echo": {"uid": "u2", "node": "b", "workload": "echo"},
    },
}


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    path = tmp_path / "midstream.json"
    path.write_text(json.dumps(DATA))
    return path


def request(inventory: Path, *args: str) -> Any:
    return job_request(Inventory.load(inventory), parser().parse_args(["migrate", *args]))


def test_the_only_pod_of_the_workload_on_the_node_is_the_target(inventory: Path) -> None:
    node, job = request(inventory, "llm-0", "--to", "b")
    assert (node, job.target_pod.uid, job.target_node.endpoint) == ("a", "u1", "10.0.0.2:1")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nope", "--to", "b"], "unknown pod 'nope'"),
        (["llm-0", "--to", "c"], "unknown node 'c'"),
        (["llm-0", "--to", "a"], "runs on a already"),
        (["llm-0"], "say where to"),
        (["echo", "--to", "a"], "has 0 pods of workload 'echo'"),
        (["llm-1", "--target-pod", "echo"], "like llm-1"),
        (["llm-0", "--target-pod", "echo", "--to", "a"], "runs on b, not on a"),
    ],
)
def test_a_target_that_cannot_be_is_refused_by_name(inventory: Path, args: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        request(inventory, *args)


def test_a_missing_and_a_malformed_inventory_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "none.json"
    assert main(["--inventory", str(missing), "status"]) == 2
    assert "give --inventory FILE" in capsys.readouterr().err
    missing.write_text("{}")
    assert main(["--inventory", str(missing), "status"]) == 2
    assert "malformed" in capsys.readouterr().err
