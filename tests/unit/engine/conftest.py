"""Engine processes for tests, and Debian's torch for those that look inside.

Processes run under a Python that has torch (MIDSTREAM_ENGINE_PYTHON, or the system's); the tests themselves
run in the development environment, whose Python can import Debian's torch when its folder is last on the
path."""

from __future__ import annotations

import functools
import importlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
PYTHON = os.environ.get("MIDSTREAM_ENGINE_PYTHON", "/usr/bin/python3")
_DEBIAN = "/usr/lib/python3/dist-packages"


@functools.cache
def _import_torch() -> ModuleType | None:
    with suppress(ImportError):
        return importlib.import_module("torch")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.path.append(_DEBIAN)
    try:
        torch = importlib.import_module("torch")
        torch.set_num_threads(1)
        return torch
    except ImportError:
        return None
    finally:
        sys.path.remove(_DEBIAN)


@pytest.fixture
def torch() -> ModuleType:
    found = _import_torch()
    if found is None:
        pytest.skip("no torch: install Debian's python3-torch")
    return found


@functools.cache
def _engine_python_works() -> bool:
    try:
        return subprocess.run([PYTHON, "-c", "import torch"], capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


StartEngine = Callable[..., str]


@pytest.fixture
def start_engine(tmp_path: Path) -> Iterator[StartEngine]:
    """Starts an engine process and returns its socket's path; all of them end with the test."""
    if not _engine_python_works():
        pytest.skip(f"no torch for {PYTHON}: install Debian's python3-torch")
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> str:
        path = str(tmp_path / f"engine{len(processes)}.sock")
        argv = [PYTHON, "-m", "midstream_runtime.engine.builtin", "--socket", path, *arguments]
        env = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}
        process = subprocess.Popen(argv, env=env)
        processes.append(process)
        _await_listening(process, path)
        return path

    start.processes = processes  # type: ignore[attr-defined]
    yield start
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait(timeout=60)


def _await_listening(process: subprocess.Popen[bytes], path: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        with socket.socket(socket.AF_UNIX) as probe, suppress(OSError):
            probe.connect(path)
            return
        assert process.poll() is None, "the engine process ended"
        assert time.monotonic() < deadline, "the engine does not listen"
        time.sleep(0.02)
