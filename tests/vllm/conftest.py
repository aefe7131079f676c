"""One pair of vLLM servers a session; without vLLM every test here is skipped by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm_servers import VllmServer, free_port, make_model, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = why_not()
    for item in items:
        if absent is not None and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.skip(reason=f"no vLLM: {absent}"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def servers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[VllmServer, VllmServer]]:
    folder = tmp_path_factory.mktemp("servers")
    pair = (VllmServer(tiny_model, free_port(), folder), VllmServer(tiny_model, free_port(), folder))
    try:
        for server in pair:
            server.start()
        for server in pair:
            server.wait()
        yield pair
    finally:
        for server in pair:
            server.kill()
