"""Real programs in a private bpffs; BPF_PROG_TEST_RUN needs no interface and no namespace."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the bpf_* modules: importlib mode adds nothing by itself

from bpf_loader import ROOT, clear, run_loader, runner
from midstream_agent.bpf import TestRun
from midstream_agent.hold import Hold

Loader = Callable[..., Path]


@pytest.fixture(scope="session")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loader]:
    """Loads programs into a new bpffs, by the command line that the init container runs."""
    made: list[Path] = []

    def load(*args: str) -> Path:
        folder = tmp_path_factory.mktemp("bpffs")
        made.append(folder)
        run_loader("load", "--bpffs", str(folder), *args)
        return folder

    yield load
    for folder in made:
        ctypes.CDLL(None).umount2(os.fsencode(folder), 2)  # MNT_DETACH


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


@pytest.fixture
def run_program(bpffs: Path) -> Callable[..., TestRun]:
    return runner(bpffs)


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[str, str, str], Path]:
    """A copy of the sources with one fault in it."""

    def make(file: str, old: str, new: str) -> Path:
        folder = tmp_path / "bpf"
        shutil.copytree(ROOT / "bpf", folder)
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
        (folder / file).write_text(text.replace(old, new))
        return folder

    return make
