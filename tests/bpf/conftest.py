"""Real programs in a private bpffs; BPF_PROG_TEST_RUN needs no interface and no namespace."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # bpf_packets; importlib mode adds nothing by itself

from midstream_agent import bpf
from midstream_agent.hold import Hold

ROOT = Path(__file__).parents[2]
Loader = Callable[..., Path]


@pytest.fixture(scope="session")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """Loads the programs into a bpffs of their own, by the command line that the init container runs."""
    made: list[Path] = []

    def load(*args: str) -> Path:
        folder = tmp_path_factory.mktemp("bpffs")
        made.append(folder)
        run_loader("load", "--bpffs", str(folder), *args)
        return folder

    yield load
    for folder in made:
        ctypes.CDLL(None).umount2(os.fsencode(folder), 2)  # MNT_DETACH


def run_loader(*args: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT / "agent"), str(ROOT / "runtime")])
    return subprocess.run(
        [sys.executable, "-m", "midstream_agent.hold", *args],
        env={**os.environ, "PYTHONPATH": path, **env}, check=check, capture_output=not check, text=True, timeout=120,
    )  # fmt: skip


@pytest.fixture(scope="session")
def bpffs(loader: Loader) -> Path:
    return loader()


@pytest.fixture
def hold(bpffs: Path) -> Iterator[Hold]:
    """Empty maps, before and after."""
    with Hold.open(bpffs) as hold:
        clear(hold)
        yield hold
        clear(hold)


def clear(hold: Hold) -> None:
    for m in (hold._flows, hold._notes, hold._addrs):
        keys = m.keys()
        m.delete_many(b"".join(keys), len(keys))


@pytest.fixture
def run_program(bpffs: Path) -> Callable[..., bpf.TestRun]:
    def run(name: str, packet: bytes, ctx: bytes = b"", repeat: int = 1, flags: int = 0) -> bpf.TestRun:
        fd = bpf.obj_get(bpffs / name)
        try:
            return bpf.prog_test_run(fd, packet, ctx, repeat, flags)
        finally:
            os.close(fd)

    return run
