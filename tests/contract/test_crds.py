"""The CRDs are what the operator's Python says: enums, defaults, immutability, and the examples fit them."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from midstream_operator import model
from midstream_operator.notices.base import NoticeKind
from midstream_operator.respond import REASONS
from midstream_operator.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def schema(kind: str) -> dict[str, Any]:
    crd = yaml.safe_load((ROOT / f"crds/{kind}.yaml").read_text(encoding="utf-8"))
    found: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def at(kind: str, path: str) -> dict[str, Any]:
    node = schema(kind)
    for name in path.split("."):
        node = node["items"] if name == "[]" else node["properties"][name]
    return node


@pytest.mark.parametrize(
    ("kind", "path", "enum"),
    [
        ("migrationjob", "status.phase", model.Phase),
        ("migrationjob", "spec.reason", model.Reason),
        ("migrationjob", "spec.kv.mode", model.KvMode),
        ("migrationjob", "spec.switchover", model.Switchover),
        ("migrationjob", "spec.onFailure", model.OnFailure),
        ("migrationjob", "spec.target.podSelector.matchExpressions.[].operator", model.SelectorOperator),
        ("floatingip", "spec.provider", model.Provider),
        ("floatingip", "spec.podSelector.matchExpressions.[].operator", model.SelectorOperator),
    ],
)
def test_enums_are_the_same(kind: str, path: str, enum: type[StrEnum]) -> None:
    assert at(kind, path)["enum"] == [member.value for member in enum]


def test_group_version_and_plurals_are_the_same() -> None:
    for kind, plural in (("migrationjob", model.JOBS), ("floatingip", model.FLOATING_IPS)):
        crd = yaml.safe_load((ROOT / f"crds/{kind}.yaml").read_text(encoding="utf-8"))
        assert crd["spec"]["group"] == model.GROUP
        assert crd["spec"]["names"]["plural"] == plural
        assert [v["name"] for v in crd["spec"]["versions"]] == [model.VERSION]


def test_every_field_of_a_job_but_abort_is_immutable() -> None:
    spec = at("migrationjob", "spec")
    rules = [r["rule"] for r in spec["x-kubernetes-validations"]]
    fixed = {name for rule in rules for name in re.findall(r"self\.(\w+) == oldSelf\.\1", rule)}
    assert fixed == set(spec["properties"]) - {"abort"}
    for name in set(spec["properties"]) - set(spec["required"]):
        optional = "default" not in spec["properties"][name]
        assert optional == any(f"has(self.{name}) == has(oldSelf.{name})" in rule for rule in rules), name


def test_every_kind_of_notice_has_a_reason() -> None:
    assert set(REASONS) == set(NoticeKind)


@pytest.mark.parametrize("name", ["migrationjob", "floatingip"])
def test_the_example_fits_its_schema(name: str) -> None:
    for document in yaml.safe_load_all((ROOT / f"examples/{name}.yaml").read_text(encoding="utf-8")):
        if document["kind"].lower() == name:
            jsonschema.validate(document, schema(name))
            assert document["apiVersion"] == model.API_VERSION


def test_what_the_operator_reads_is_in_the_schema() -> None:
    job = model.JobSpec.of({"spec": {"source": {"podName": "p"}}})
    spec = at("migrationjob", "spec")["properties"]
    assert job.reason == spec["reason"]["default"]
    assert job.kv_mode == spec["kv"]["properties"]["mode"]["default"]
    assert job.switchover == spec["switchover"]["default"]
    assert job.on_failure == spec["onFailure"]["default"]
    assert (job.abort, job.dry_run) == (spec["abort"]["default"], spec["dryRun"]["default"])


def test_the_enabling_label_is_the_one_that_the_documents_name() -> None:
    label = Settings().enabled_label
    for kind, path in (("migrationjob", "spec.source"), ("floatingip", "spec.podSelector")):
        assert f"{label}=true" in at(kind, path)["description"]
