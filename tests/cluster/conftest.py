"""One cluster for all tests of this folder; each test gets a namespace, with an operator that leads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster_world import MERGE, Place, World
from midstream_testbed.cluster import BINARIES, ControlPlane


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A control plane whose nodes are objects only, simulated agents, operators."""
    with World.create(tmp_path_factory.mktemp("cluster"), BINARIES) as world:
        yield world


@pytest.fixture
def place(world: World) -> Iterator[Place]:
    world.operators.ensure()
    with world.namespace() as place:
        yield place


@pytest.fixture
def nodes_as_before(world: World) -> Iterator[None]:
    """A notice stands as long as its node is interrupted: a new operator knows nothing of it."""
    yield
    for node in world.nodes:
        world.agents.do("no-notices", node=node)
    world.operators.stop_all()
    for node in world.nodes:
        world.plane.request("PATCH", f"/api/v1/nodes/{node}", {"spec": {"taints": None}}, MERGE)


@pytest.fixture
def quiet_place(world: World) -> Iterator[Place]:
    """Without looking after an operator: the test does that itself, or needs none."""
    with world.namespace() as place:
        yield place


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    """A whole control plane with all its controllers."""
    with ControlPlane() as plane:
        yield plane


@pytest.fixture
def namespace(plane: ControlPlane) -> Iterator[str]:
    with plane.namespace() as name:
        yield name
