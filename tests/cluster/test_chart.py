"""The chart: rendered with several values, judged by the API server; bad values are refused by name."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from midstream_agent.hold import Hold
from midstream_agent.metrics import Metrics as AgentMetrics
from midstream_operator.metrics import Metrics as OperatorMetrics
from midstream_operator.settings import Settings
from midstream_testbed.cluster import ControlPlane

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "charts/midstream"
VALUES = sorted((Path(__file__).parent / "values").glob("*.yaml"))
NAMESPACE = "midstream-system"
Json = dict[str, Any]

# What other operators' CRDs would be: enough for the API server to take their objects.
FOREIGN = [
    ("monitoring.coreos.com", "PodMonitor", "podmonitors"),
    ("monitoring.coreos.com", "PrometheusRule", "prometheusrules"),
    ("cert-manager.io", "Certificate", "certificates"),
]


def crd(group: str, kind: str, plural: str) -> Json:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"plural": plural, "kind": kind},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
        },
    }


@pytest.fixture(scope="module")
def ready(plane: ControlPlane) -> Iterator[ControlPlane]:
    """With the namespace, our CRDs and the foreign kinds."""
    ours = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (CHART / "crds").glob("*.yaml")]
    plane.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    plane.apply(*ours, *(crd(*names) for names in FOREIGN), server_side=True)
    names = [f"crd/{plural}.{group}" for group, _, plural in FOREIGN]
    plane.kubectl("wait", "--for=condition=Established", *names, "--timeout=30s")
    yield plane
    plane.kubectl("delete", *names)
    plane.kubectl("delete", "namespace", NAMESPACE)


def rendered(plane: ControlPlane, *options: str) -> list[Json]:
    done = plane.run("helm", "template", "m", CHART, "-n", NAMESPACE, *options)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@contextlib.contextmanager
def made(plane: ControlPlane, objects: list[Json]) -> Iterator[None]:
    text = "\n---\n".join(json.dumps(document) for document in objects)
    plane.kubectl("create", "--validate=strict", "-n", NAMESPACE, "-f", "-", input=text)
    try:
        yield
    finally:
        plane.kubectl("delete", "-n", NAMESPACE, "-f", "-", input=text)


@pytest.mark.parametrize("values", [None, *VALUES], ids=["defaults", *(path.stem for path in VALUES)])
def test_the_api_server_takes_all_objects(ready: ControlPlane, values: Path | None) -> None:
    """Strict: a misspelt field is an error, and so is a policy that refuses the pods. Accounts come first, as helm has
    it: a pod whose account is not there is refused."""
    every = rendered(ready, *(["-f", str(values)] if values else []))
    objects = [o for o in every if o["kind"] != "ServiceAccount"]
    text = "\n---\n".join(json.dumps(document) for document in objects)
    with made(ready, [o for o in every if o["kind"] == "ServiceAccount"]):
        done = ready.kubectl(
            "create", "--dry-run=server", "--validate=strict", "-n", NAMESPACE, "-f", "-", input=text, check=False
        )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(objects)
    assert "Warning" not in done.stderr, done.stderr


def test_a_misspelt_field_would_be_found(ready: ControlPlane) -> None:
    """Negative control of the test before."""
    (deployment,) = [o for o in rendered(ready) if o["kind"] == "Deployment"]
    deployment["spec"]["template"]["spec"]["prioClassName"] = "x"
    done = ready.kubectl(
        "create", "--dry-run=server", "--validate=strict", "-n", NAMESPACE, "-f", "-",
        input=json.dumps(deployment), check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "prioClassName" in done.stderr


@pytest.mark.parametrize("values", [None, *VALUES], ids=["defaults", *(path.stem for path in VALUES)])
def test_the_operator_takes_its_configuration(plane: ControlPlane, values: Path | None) -> None:
    objects = rendered(plane, *(["-f", str(values)] if values else []))
    (config,) = [o for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["name"] == "midstream-operator"]
    settings = Settings.parse(yaml.safe_load(config["data"]["operator.yaml"]))
    assert settings.namespace == NAMESPACE


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_helm_lint_has_nothing_to_say(plane: ControlPlane, values: Path) -> None:
    done = plane.run("helm", "lint", "--strict", CHART, "-f", values)
    assert "1 chart(s) linted, 0 chart(s) failed" in done.stdout


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("operator.replica=3", "replica"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("agent.mtu=70000", "mtu"),
        ("tls.issuer=vault", "issuer"),
        ("webhook.graceSeconds=30", "graceSeconds"),
        ("pools[0].name=a,pools[0].provider=ec2,pools[0].cidrs[0]=10.0.0.0/28", "subnet"),
        ("pools[0].name=a,pools[0].provider=l2,pools[0].cidrs[0]=nonsense", "cidrs"),
        ("pools[0].name=a,pools[0].provider=ec2,pools[0].cidrs[0]=10.0.0.0/28,pools[0].zone=z,pools[0].subnet=s",
         "aws.cluster"),
        ("webhook.enabled=true,tls.issuer=files", "tls.issuer"),
    ],
)  # fmt: skip
def test_bad_values_are_refused_by_name(plane: ControlPlane, option: str, said: str) -> None:
    done = plane.run("helm", "template", "m", CHART, "--set", option, check=False)
    assert done.returncode != 0
    assert said in done.stderr


def test_the_agent_lists_each_capability_with_its_reason() -> None:
    text = (CHART / "templates/agent.yaml").read_text(encoding="utf-8")
    lists = re.findall(r"\(list \. \(list ([^)]*)\)\)", text)
    added = set(re.findall(r'"(\w+)"', " ".join(lists)))
    reasons = set(re.findall(r'^      "(\w+)" "[^"]+"', text, re.M))
    assert added and added == reasons


def test_pods_ask_for_no_more_than_they_need(plane: ControlPlane) -> None:
    """Every container but the agent's two runs without any capability, as nobody, on a read-only root."""
    for document in rendered(plane, "-f", str(VALUES[-1])):
        spec = document.get("spec", {}).get("template", {}).get("spec")
        if spec is None:
            continue
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context.get("privileged"), container["name"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"]["drop"] == ["ALL"]
            assert bool(context["capabilities"].get("add")) == (container["name"] in ("load", "agent"))
            assert {"requests", "limits"} <= set(container["resources"])


def test_hooks_run_when_they_shall_and_leave_nothing(plane: ControlPlane) -> None:
    """A comma in a flow mapping would end the value: the hook would not run at an upgrade, and stay for ever."""
    every = [o["metadata"]["annotations"] for o in rendered(plane) if o["metadata"].get("annotations")]
    assert all(isinstance(value, str) for annotations in every for value in annotations.values())
    hooks = [a for a in every if "helm.sh/hook" in a]
    assert {a["helm.sh/hook"] for a in hooks} == {"pre-install,pre-upgrade", "test", "pre-delete"}
    assert {a["helm.sh/hook-delete-policy"] for a in hooks} == {"before-hook-creation,hook-succeeded"}


def test_every_alert_has_a_line_in_the_runbook_and_every_metric_exists() -> None:
    rules = yaml.safe_load((CHART / "alerts.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    runbook = (ROOT / "docs/runbook.md").read_text(encoding="utf-8")
    headings = {f"docs/runbook.md#{h.lower()}" for h in re.findall(r"^## (\w+)$", runbook, re.M)}
    assert {rule["annotations"]["runbook"] for rule in rules} == headings
    assert headings == {f"docs/runbook.md#{rule['alert'].lower()}" for rule in rules}
    dashboard = (CHART / "dashboards/midstream.json").read_text(encoding="utf-8")
    named = set(re.findall(r"midstream_(?:operator|agent)_\w+", dashboard + json.dumps(rules)))
    assert {re.sub(r"_bucket$", "", name) for name in named} <= exported()


def exported() -> set[str]:
    agent = AgentMetrics()
    agent.watch(cast(Hold, NoMaps()), lambda: 0)
    found = set()
    for registry in (OperatorMetrics().registry, agent.registry):
        for family in registry.collect():
            found.add(family.name + ("_total" if family.type == "counter" else ""))
    return found


class NoMaps:
    """The names do not depend on what the kernel has counted."""

    def counters(self) -> dict[str, int]:
        return {}

    def flow_states(self) -> dict[int, int]:
        return {}


def test_the_charts_crds_are_the_repositorys() -> None:
    theirs = {path.name: path.read_bytes() for path in (CHART / "crds").glob("*")}
    assert theirs == {path.name: path.read_bytes() for path in (ROOT / "crds").glob("*")}
