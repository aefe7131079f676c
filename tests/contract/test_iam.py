"""The policy in docs/iam.md, in Terraform and in CloudFormation is one, and it is what the operator calls."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from botocore.loaders import Loader
from midstream_operator.notices import eventbridge, lifecycle, sqs
from midstream_operator.providers import ec2, ec2_interfaces, ec2_inventory, ec2_pools
from midstream_operator.providers.ec2_permissions import ACTIONS, OPTIONAL

ROOT = Path(__file__).resolve().parents[2]


def documented() -> dict[str, Any]:
    found = re.search(r"```json\n(.*?)```", (ROOT / "docs/iam.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found
    policy: dict[str, Any] = json.loads(found[1])
    return policy


class Template(yaml.SafeLoader):
    """CloudFormation's short forms, as what they stand on."""


for tag in ("!Sub", "!Ref", "!GetAtt"):
    Template.add_constructor(tag, lambda _, node: node.value)


def template() -> dict[str, Any]:
    text = (ROOT / "examples/aws/iam.yaml").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.load(text, Template)
    return found


def terraform() -> str:
    return (ROOT / "examples/aws/iam.tf").read_text(encoding="utf-8")


def as_set(value: Any) -> set[str]:
    return set(value) if isinstance(value, list) else {value}


def by_sid(policy: dict[str, Any]) -> dict[str, tuple[set[str], dict[str, Any]]]:
    return {s["Sid"]: (as_set(s["Action"]), s.get("Condition", {})) for s in policy["Statement"]}


def methods(*modules: Any) -> set[str]:
    """boto3 calls in the source: what is passed by name to mutate, read, pages, and the queue's and group's methods."""
    text = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in modules)
    called = re.findall(r'(?:mutate|read|pages|once|_call)\(\s*"(\w+)"', text) + re.findall(r'= "(unassign_\w+)"', text)
    called += re.findall(r'^ASSIGN = "(\w+)"', text, re.MULTILINE)
    called += re.findall(r'else "(unassign_\w+)"', text) + re.findall(r'"(unassign_\w+)" if', text)
    return {*called, *re.findall(r"_client\.(\w+),", text)}


def iam_names(service: str, called: set[str]) -> set[str]:
    model = Loader().load_service_model(service, "service-2")
    names = {name.lower(): name for name in model["operations"]}
    batch = {"deletemessagebatch": "DeleteMessage"}  # one permission for both
    return {f"{service}:{batch.get(m.replace('_', ''), names.get(m.replace('_', ''), ''))}" for m in called}


def test_the_policy_allows_what_the_operator_calls_and_nothing_else() -> None:
    allowed = {action for actions, _ in by_sid(documented()).values() for action in actions}
    called = iam_names("ec2", methods(ec2, ec2_interfaces, ec2_inventory, ec2_pools))
    assert called - set(OPTIONAL) | {"ec2:CreateTags"} == {a for a in allowed if a.startswith("ec2:")} == set(ACTIONS)
    assert iam_names("sqs", methods(sqs)) == {a for a in allowed if a.startswith("sqs:")}
    assert iam_names("autoscaling", methods(lifecycle)) == {a for a in allowed if a.startswith("autoscaling:")}


def test_cloudformation_has_the_same_policy() -> None:
    given = template()["Resources"]["Policy"]["Properties"]["PolicyDocument"]
    names = {"AWS::Partition": "aws", "AWS::Region": "REGION", "AWS::AccountId": "ACCOUNT", "Subnet": "SUBNET",
             "SecurityGroup": "SECURITY_GROUP", "Cluster": "CLUSTER"}  # fmt: skip
    assert json.loads(re.sub(r"\$\{([^}]+)\}", lambda m: names[m[1]], given)) == documented()


def test_terraform_has_the_same_statements() -> None:
    document = terraform().split('data "aws_iam_policy_document" "trust"')[0]
    found = {}
    for block in document.split("statement {")[1:]:
        sid = re.search(r'sid\s+= "(\w+)"', block)
        actions = re.search(r"actions\s+= \[(.*?)\]", block, re.DOTALL)
        assert sid and actions
        condition = re.search(r'test\s+= "(\w+)"\s+variable = "([^"]+)"', block)
        found[sid[1]] = set(re.findall(r'"([^"]+)"', actions[1])), condition and (condition[1], condition[2])
    for name, (allowed, conditions) in by_sid(documented()).items():
        wanted = [(test, next(iter(keys)).replace("CLUSTER", "${var.cluster}")) for test, keys in conditions.items()]
        assert found.pop(name) == (allowed, wanted[0] if wanted else None)
    assert not found


def test_the_rules_bring_exactly_the_events_that_the_parser_reads() -> None:
    rules = [
        r["Properties"]["EventPattern"] for r in template()["Resources"].values() if r["Type"] == "AWS::Events::Rule"
    ]
    by_template = {kind for rule in rules for kind in rule["detail-type"]}
    assert by_template == set(eventbridge._READERS)
    text = terraform()
    assert all(f'"{kind}"' in text for kind in by_template)
    (state,) = [rule for rule in rules if "EC2 Instance State-change Notification" in rule["detail-type"]]
    assert set(state["detail"]["state"]) == set(eventbridge.GOING)
