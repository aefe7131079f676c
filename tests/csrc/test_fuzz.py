"""The reader of checkpoints takes bytes from a peer: a million hostile ones leave no sanitizer report.

LONG=1 makes it ten million. Removing the reader's length checks one by one was found within seconds by this
fuzzer: the section's length, a name's length, the unsent part against the queue, an option given twice.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"
RUNS = 10_000_000 if os.environ.get("LONG") else 1_000_000


def make(target: str, **variables: int) -> str:
    argv = ["make", "-s", "-C", str(CSRC), target, *(f"{name}={value}" for name, value in variables.items())]
    done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=550)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-8000:]
    return output


def test_hostile_checkpoints_are_refused_and_the_corpus_reaches_the_whole_parser() -> None:
    output = make("fuzz", FUZZ_RUNS=RUNS, FUZZ_SEED=int(not os.environ.get("LONG")))
    assert f"Done {RUNS} runs" in output
    print("\n".join(line for line in output.splitlines() if line.startswith(("Done", "stat::"))))
    print(make("coverage", COVERAGE_MIN=90))
