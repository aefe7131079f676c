"""One cluster for all tests of this folder; each test gets a namespace, with an operator that leads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_world import Place, World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    assets = Path(os.environ["KUBEBUILDER_ASSETS"])
    with World.create(tmp_path_factory.mktemp("cluster"), assets) as world:
        yield world


@pytest.fixture
def place(world: World) -> Iterator[Place]:
    world.operators.ensure()
    with world.namespace() as place:
        yield place


@pytest.fixture
def quiet_place(world: World) -> Iterator[Place]:
    """Without looking after an operator: the test does that itself, or needs none."""
    with world.namespace() as place:
        yield place
