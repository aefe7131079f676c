"""Last: the API server's audit log of all tests before is what the granted rules allow, no more and no less."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import yaml
from cluster_world import ACCOUNT, Place, World, chart_rights

Right = tuple[str, str, str]  # group, resource[/subresource], verb


def granted(world: World) -> set[Right]:
    """By the chart's roles of the operator."""
    found = set()
    for document in yaml.safe_load_all(chart_rights(world.plane.assets)):
        mine = document and document["metadata"]["name"] == "midstream-operator"
        for rule in document.get("rules", []) if mine else []:
            for group in rule["apiGroups"]:
                found |= {(group, resource, verb) for resource in rule["resources"] for verb in rule["verbs"]}
    return found


def used(log: list[dict[str, Any]]) -> Counter[Right]:
    found: Counter[Right] = Counter()
    for entry in log:
        of = entry.get("objectRef", {})
        if of.get("resource"):
            name = "/".join(x for x in (of["resource"], of.get("subresource")) if x)
            found[of.get("apiGroup", ""), name, entry["verb"]] += 1
    return found


@pytest.fixture
def log(world: World, place: Place) -> list[dict[str, Any]]:
    """Not empty when this file runs alone, too."""
    place.serving()
    place.wait_job(place.add_job(), "Succeeded")
    return world.plane.audit(ACCOUNT)


def test_nothing_was_forbidden(log: list[dict[str, Any]]) -> None:
    forbidden = [(e["verb"], e["requestURI"]) for e in log if e["responseStatus"]["code"] == 403]
    assert forbidden == []


def test_every_right_was_used_and_nothing_else(
    request: pytest.FixtureRequest, world: World, log: list[dict[str, Any]]
) -> None:
    rights, had = set(used(log)), granted(world)
    assert rights <= had
    whole = {f"test_{what}.py" for what in ("migrations", "evictions", "floating_ips", "interruptions", "capacity")}
    ran = {item.path.name for item in request.session.items}
    if whole <= ran:
        assert had - rights == set()


def test_the_requests_of_a_job_are_bounded(world: World, place: Place) -> None:
    """Patches and Events of one job and its address: a thousand jobs must not be a storm."""
    place.serving()
    before = len(world.plane.audit(ACCOUNT))
    name = place.add_job()
    place.wait_job(name, "Succeeded")
    writes = [
        e for e in world.plane.audit(ACCOUNT)[before:]
        if e["objectRef"].get("namespace") == place.name and e["verb"] in ("create", "patch", "update", "delete")
    ]  # fmt: skip
    assert 0 < len(writes) <= 16, [(e["verb"], e["requestURI"]) for e in writes]
