"""The loader as the init container runs it, and helpers around what it pinned."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from midstream_agent import bpf
from midstream_agent.hold import Hold

ROOT = Path(__file__).parents[2]


def run_loader(*args: str, check: bool = True, prefix: tuple[str, ...] = (), **env: str) -> str:
    """Standard error of `python -m midstream_agent.hold ...`; with check=False it must fail."""
    path = os.pathsep.join([str(ROOT / "agent"), str(ROOT / "runtime")])
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "midstream_agent.hold", *args],
        env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode == 0) == check, done.stderr
    return done.stderr


def clear(hold: Hold) -> None:
    for m in (hold._flows, hold._notes, hold._addrs):
        keys = m.keys()
        m.delete_many(b"".join(keys), len(keys))


def runner(bpffs: Path) -> Callable[..., bpf.TestRun]:
    """Runs a pinned program on a packet."""

    def run(name: str, packet: bytes, ctx: bytes = b"", repeat: int = 1, flags: int = 0) -> bpf.TestRun:
        fd = bpf.obj_get(bpffs / name)
        try:
            return bpf.prog_test_run(fd, packet, ctx, repeat, flags)
        finally:
            os.close(fd)

    return run
