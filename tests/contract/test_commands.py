"""The commands that README, CI and Makefile name are the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PARTS = (ROOT / "scripts/parts.sh").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.M))


def test_every_make_command_of_the_readme_exists() -> None:
    named = set(re.findall(r"make ([a-z0-9-]+)", README))
    assert {"demo", "test", "bench", "help"} <= named
    assert named <= TARGETS, named - TARGETS


def test_ci_runs_the_readmes_test_command_and_the_linters() -> None:
    ran = re.findall(r"^make ([a-z0-9-]+)", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.M)
    assert ran == ["lint", "test"]


def test_make_test_runs_every_kind_under_a_limit() -> None:
    kinds = {t for t in TARGETS if t.startswith("test-")}
    listed = re.search(r"test\) parts=\(([^)]*)\)", PARTS)
    assert listed is not None
    assert set(listed[1].split()) == kinds
    assert kinds <= set(re.findall(r"\[(test-[a-z0-9]+)\]=\d+", PARTS))


@pytest.mark.parametrize("name", ["run", "operator", "dev", "go", "vllm"])
def test_locks_hold_hashes_and_no_registry(name: str) -> None:
    lock = (ROOT / f"requirements/{name}.txt").read_text(encoding="utf-8")
    wanted = re.findall(r"^([a-z0-9-]+)==", (ROOT / f"requirements/{name}.in").read_text(encoding="utf-8"), re.M)
    assert wanted
    for package in wanted:
        assert re.search(rf"^{package}==\S+ \\\n    --hash=sha256:", lock, re.M), package
    assert not re.search(r"https?://|--(index-url|find-links|extra-index-url|trusted-host)", lock)
