"""One control plane a session; each test that changes it has a namespace of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from midstream_testbed.cluster import ControlPlane


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    with ControlPlane() as plane:
        yield plane


@pytest.fixture
def namespace(plane: ControlPlane) -> Iterator[str]:
    with plane.namespace() as name:
        yield name
