"""Worlds for the net tests: built once a session, one for each MTU; what they made goes away with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from midstream_testbed.fleet import Fleet
from midstream_testbed.vpc import Vpc
from town import Town
from world import World


def _world(folder: Path, mtu: int, *options: str, steer: bool = False) -> Iterator[World]:
    with Vpc.create(mtu=mtu) as vpc, Fleet(vpc, folder, steer=steer) as fleet:
        yield World.build(vpc, fleet, *options)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Jumbo frames on every link, as inside a VPC."""
    yield from _world(tmp_path_factory.mktemp("world9001"), 9001)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """MTU 1500 on every link."""
    yield from _world(tmp_path_factory.mktemp("world1500"), 1500)


@pytest.fixture(scope="session")
def steer_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Jumbo frames, and streams that change nodes before their address does, in small batches."""
    yield from _world(tmp_path_factory.mktemp("steer9001"), 9001, "--batch-streams", "8", steer=True)


@pytest.fixture(scope="session")
def small_steer_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The same with an MTU of 1500 on every link."""
    yield from _world(tmp_path_factory.mktemp("steer1500"), 1500, "--batch-streams", "8", steer=True)


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path) as fleet:
        yield Town(vpc, fleet)
