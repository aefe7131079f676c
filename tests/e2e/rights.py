"""What our service accounts may do by the installed roles, and what the API server's audit log says that they did."""

from __future__ import annotations

from typing import Any

from midstream_testbed.cluster import ControlPlane

Json = dict[str, Any]
Right = tuple[str, str, str]  # group, resource[/subresource], verb


def account(name: str, namespace: str = "midstream-system") -> str:
    return f"system:serviceaccount:{namespace}:{name}"


def granted(plane: ControlPlane, name: str) -> set[Right]:
    """By the cluster role and the role of this name; rights on a signer show only in what else is allowed."""
    found = set()
    roles = plane.get("clusterroles,roles", "-A", "-l", "app.kubernetes.io/name=midstream")["items"]
    for role in (r for r in roles if r["metadata"]["name"] == name):
        for rule in role["rules"]:
            for group in rule["apiGroups"]:
                found |= {(group, resource, verb) for resource in rule["resources"] for verb in rule["verbs"]}
    return {right for right in found if right[1] != "signers"}


def used(log: list[Json], name: str) -> set[Right]:
    found = set()
    for entry in log:
        of = entry.get("objectRef", {})
        if entry["user"]["username"] == account(name) and of.get("resource"):
            resource = "/".join(x for x in (of["resource"], of.get("subresource")) if x)
            found.add((of.get("apiGroup", ""), resource, entry["verb"]))
    return found


def forbidden(log: list[Json], name: str) -> list[tuple[str, str]]:
    mine = (e for e in log if e["user"]["username"] == account(name))
    return [(e["verb"], e["requestURI"]) for e in mine if e["responseStatus"]["code"] == 403]
