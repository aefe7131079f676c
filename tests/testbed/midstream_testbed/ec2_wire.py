"""The EC2 Query protocol, read from the model that boto3 itself ships: form parameters in, XML out.

What botocore's model does not know is refused as EC2 refuses it (UnknownParameter, MissingParameter), so that a
product that sends a wrong name, or relies on an answer of a wrong shape, fails here as it would there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from xml.sax.saxutils import escape

from botocore.loaders import Loader
from botocore.model import ListShape, OperationModel, ServiceModel, Shape, StructureShape

NAMESPACE = "http://ec2.amazonaws.com/doc/2016-11-15/"


class Ec2Error(Exception):
    """An error as the API answers it. Codes and statuses: the EC2 API Reference's list of error codes."""

    def __init__(self, code: str, message: str, status: int = 400) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message, self.status = code, message, status


@functools.cache
def service() -> ServiceModel:
    return ServiceModel(Loader().load_service_model("ec2", "service-2"), "ec2")


def operation(action: str) -> OperationModel:
    if action not in service().operation_names:
        raise Ec2Error("InvalidAction", f"The action {action} is not valid for this web service.")
    return service().operation_model(action)


# -- what comes in


def parse(model: OperationModel, form: Mapping[str, str]) -> dict[str, Any]:
    """`PrivateIpAddress.1=10.0.0.9` -> {"PrivateIpAddresses": ["10.0.0.9"]}."""
    tree: dict[str, Any] = {}
    for key, value in form.items():
        if key in ("Action", "Version"):
            continue
        *parents, leaf = key.split(".")
        branch = tree
        for part in parents:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise _unknown(key)
        branch[leaf] = value
    if model.input_shape is None:
        return {}
    parsed: dict[str, Any] = _structure(model.input_shape, tree, "")
    return parsed


def _unknown(name: str) -> Ec2Error:
    return Ec2Error("UnknownParameter", f"The parameter {name} is not recognized")


def _form_name(shape: Shape, name: str) -> str:
    given = shape.serialization
    if "queryName" in given:
        return str(given["queryName"])
    found = str(given.get("name", name))
    return found[0].upper() + found[1:]


def _structure(shape: StructureShape, tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise Ec2Error("InvalidParameterValue", f"Value ({tree}) for parameter {where} is invalid. Expected: structure")
    names = {_form_name(member, name): (name, member) for name, member in shape.members.items()}
    found = {}
    for key, value in tree.items():
        if key not in names:
            raise _unknown(f"{where}{key}")
        name, member = names[key]
        found[name] = _value(member, value, f"{where}{key}")
    for name in shape.required_members:
        if name not in found:
            wanted = _form_name(shape.members[name], name)
            raise Ec2Error("MissingParameter", f"The request must contain the parameter {where}{wanted}")
    return found


def _value(shape: Shape, value: Any, where: str) -> Any:
    if isinstance(shape, StructureShape):
        return _structure(shape, value, f"{where}.")
    if isinstance(shape, ListShape):
        if not isinstance(value, dict) or sorted(value, key=_number) != [str(n + 1) for n in range(len(value))]:
            raise Ec2Error("InvalidParameterValue", f"Invalid list for parameter {where}")
        return [_value(shape.member, value[str(n + 1)], f"{where}.{n + 1}") for n in range(len(value))]
    if isinstance(value, dict):
        raise _unknown(f"{where}.{next(iter(value))}")
    return _scalar(shape, value, where)


def _number(text: str) -> int:
    return int(text) if text.isdigit() else -1


def _scalar(shape: Shape, value: str, where: str) -> Any:
    if shape.type_name == "boolean":
        if value.lower() not in ("true", "false"):
            raise Ec2Error("InvalidParameterValue", f"Invalid value '{value}' for {where}. Expected: true or false")
        return value.lower() == "true"
    if shape.type_name in ("integer", "long"):
        if not re.fullmatch(r"-?\d+", value):
            raise Ec2Error("InvalidParameterValue", f"Invalid value '{value}' for {where}. Expected: integer")
        return int(value)
    return value


# -- what goes out


def answer(model: OperationModel, result: Mapping[str, Any], request_id: str) -> bytes:
    body = _members(model.output_shape, result) if model.output_shape is not None else "<return>true</return>"
    name = f"{model.name}Response"
    text = f'<{name} xmlns="{NAMESPACE}"><requestId>{request_id}</requestId>{body}</{name}>'
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()


def error(problem: Ec2Error, request_id: str) -> bytes:
    inner = f"<Code>{escape(problem.code)}</Code><Message>{escape(problem.message)}</Message>"
    text = f"<Response><Errors><Error>{inner}</Error></Errors><RequestID>{request_id}</RequestID></Response>"
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()


def _members(shape: StructureShape, value: Mapping[str, Any]) -> str:
    unknown = set(value) - set(shape.members)
    if unknown:
        raise AssertionError(f"{shape.name} has no member {sorted(unknown)}: the testbed answers a wrong shape")
    parts = []
    for name, member in shape.members.items():
        if value.get(name) is not None:
            tag = member.serialization.get("name", name)
            parts.append(f"<{tag}>{_text(member, value[name])}</{tag}>")
    return "".join(parts)


def _text(shape: Shape, value: Any) -> str:
    if isinstance(shape, StructureShape):
        return _members(shape, value)
    if isinstance(shape, ListShape):
        tag = shape.member.serialization.get("name", "item")
        return "".join(f"<{tag}>{_text(shape.member, item)}</{tag}>" for item in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return escape(str(value))
