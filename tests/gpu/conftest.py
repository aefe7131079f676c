"""For a Python with torch, transformers and pytest and nothing else, no network: `make test-gpu GPU_PYTHON=python3`.
These tests import nothing of the other ones. Where the environment has no torch, Debian's is used, as the engine does;
it has no CUDA."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEBIAN = "/usr/lib/python3/dist-packages"
OUT = ROOT / "build" / "bench" / "gpu.json"
ROWS: list[dict[str, Any]] = []


def _import(name: str) -> ModuleType | None:
    with suppress(ImportError):
        return importlib.import_module(name)
    sys.path.append(DEBIAN)
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
    finally:
        sys.path.remove(DEBIAN)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    found = _import("torch")
    if found is None:
        pytest.skip("no torch (probe: import)")
    return found


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest, torch: ModuleType) -> Any:
    """The CPU always, since the same code runs there; CUDA where a probe finds it."""
    if request.param == "cuda":
        _need_cuda(torch)
    return torch.device(request.param)


@pytest.fixture
def cuda(torch: ModuleType) -> Any:
    _need_cuda(torch)
    return torch.device("cuda")


def _need_cuda(torch: ModuleType) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU (probe: torch.cuda.is_available)")


@pytest.fixture(scope="session")
def figures() -> Iterator[list[dict[str, Any]]]:
    """Rows as the benchmarks write them, into build/bench/gpu.json, and on the screen."""
    yield ROWS
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(ROWS, indent=2) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for row in ROWS:
        beside = f"{row['reference']} {row['reference_value']}"
        terminalreporter.write_line(f"{row['name']}: {row['value']} {row['unit']}, goal {row['goal']}; {beside}")
