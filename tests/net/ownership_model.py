"""Runs spin on agent/midstream_agent/model/ownership.pml: exhaustive searches, and shortest runs as sequences of rows.

A row of the model's `do` loops is a row of the table in docs/ownership.md. Needs spin and gcc (scripts/setup.sh model).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

MODEL = Path(__file__).resolve().parents[2] / "agent/midstream_agent/model/ownership.pml"
MAX_DEPTH = 1_000_000
SEARCH_S = 500  # on a busy machine; alone, the longest search takes half a minute


@dataclass(frozen=True)
class Found:
    """What a search said: the texts of assertions that some run violates, and what it never reached."""

    states: int
    violated: frozenset[str]
    unreached: frozenset[str]  # rows
    cycle: bool  # a job that never ends
    output: str

    @property
    def clean(self) -> bool:
        return not self.violated and not self.cycle


@dataclass(frozen=True)
class Row:
    """One event of a run, and what the model says is true after it."""

    name: str
    batch: int
    live: tuple[bool, bool]  # at the source, at the target
    source: tuple[bool, bool, bool]  # journalled SENT, COMMIT, ABORT
    target: tuple[bool, bool, bool]  # journalled RESTORED, ACTIVATED, DISCARDED
    address_at_target: bool

    @classmethod
    def parse(cls, line: str) -> Row:
        """`@ COMMIT 0: live 0 0 source 1 1 0 target 1 0 0 address 1`"""
        name, batch, *bits = re.findall(r"[A-Z][A-Z_]+|\d+", line)
        live1, live2, s1, s2, s3, t1, t2, t3, address = (bit == "1" for bit in bits)
        return cls(name, int(batch), (live1, live2), (s1, s2, s3), (t1, t2, t3), address)


class Checker:
    """One build of the model: `wait` is switchover Wait with one batch, else Steer with two at once; with "ONE" one."""

    def __init__(self, folder: Path, *defines: str, wait: bool, search: tuple[str, ...]) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        options = [f"-D{d}" for d in (*defines, *(["WAIT"] if wait else []))]
        shutil.copy(MODEL, folder)
        _run(["spin", "-a", *options, MODEL.name], folder)
        # no partial order reduction: every row is one atomic step on what all can see, so it could not leave any out
        _run(["gcc", "-O1", "-w", "-DNOREDUCE", "-DCOLLAPSE", *search, "-o", "pan", "pan.c"], folder)

    def search(self, *options: str) -> Found:
        """Every state that can be reached, also beyond errors."""
        return self._found("-c0", *options)

    def first_error(self) -> Found:
        """As far as the first error."""
        return self._found("-c1")

    def _found(self, *options: str) -> Found:
        out = _run([str(self.folder / "pan"), f"-m{MAX_DEPTH}", *options], self.folder)
        states = re.search(r"(\d+) states, stored", out)
        stopped = "Search not completed" in out and "-c0" in options
        if states is None or stopped or "max search depth too small" in out:
            raise RuntimeError(f"spin did not look at all states:\n{out[-3000:]}")
        rows = frozenset(re.findall(r'^\t.*"printf\(\'@ %e %d\\n\',(\w+),b\)"$', out, re.M))
        violated = re.findall(r"^pan:\d+: assertion violated (.*) \(at ", out, re.M)
        texts = frozenset(v.replace(" ", "") for v in violated)
        return Found(int(states[1]), texts, rows, "non-progress cycle (" in out, out)

    def shortest_run(self, goal: str) -> list[Row]:
        """The shortest whole run in which the rows of `goal` come in that order; "+ROW" is the very next one."""
        env = {**os.environ, "GOAL": goal}
        trail = self.folder / f"{MODEL.name}.trail"
        trail.unlink(missing_ok=True)
        _run([str(self.folder / "pan"), f"-m{MAX_DEPTH}", "-n"], self.folder, env)
        if not trail.exists():
            raise LookupError(f"the model has no run with {goal}")
        out = _run([str(self.folder / "pan"), "-S"], self.folder, env, any_status=True)
        return [Row.parse(line) for line in re.findall(r"@ [A-Z].*", out)]


def run_finder(folder: Path, *, steer: bool = False) -> Checker:
    """Finds shortest runs of one batch, by switchover Wait or Steer."""
    return Checker(folder, "TRACE", *(["ONE"] if steer else []), wait=not steer, search=("-DSAFETY", "-DBFS"))


def rows_of_model() -> set[str]:
    """All rows by name, without those that only a negative control has."""
    return set(re.findall(r"EV\(([A-Z_]+)\)", MODEL.read_text(encoding="ascii"))) - {"BROKEN"}


def _run(argv: list[str], folder: Path, env: dict[str, str] | None = None, *, any_status: bool = False) -> str:
    done = subprocess.run(
        argv, cwd=folder, env=env, capture_output=True, text=True, timeout=SEARCH_S, check=False, errors="replace"
    )
    if done.returncode and not any_status:
        raise RuntimeError(f"{argv[0]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout
