"""For all tests: a skip counts as a failure, unless tests/allowed_skips.txt lists it with its probe."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# The same examples in each run, so that a failure is somebody's change; LONG=1 looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=2000, database=None)
hypothesis.settings.load_profile("long" if os.environ.get("LONG") else "same")

ALLOWED = Path(__file__).with_name("allowed_skips.txt")
_unlisted = pytest.StashKey[list[str]]()


def allowed_skips(text: str) -> set[str]:
    """Ids of tests, one a line: `path::name: the probe's reason`."""
    found = set()
    for line in text.splitlines():
        name, separator, why = line.partition(": ")
        if not separator or not why.strip():
            raise pytest.UsageError(f"{ALLOWED.name}: {line!r} names no reason")
        found.add(name)
    return found


def is_allowed(nodeid: str, allowed: set[str]) -> bool:
    return nodeid in allowed or nodeid.partition("[")[0] in allowed


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_unlisted] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    report = yield
    if report.skipped and not is_allowed(item.nodeid, allowed_skips(ALLOWED.read_text(encoding="utf-8"))):
        item.config.stash[_unlisted].append(item.nodeid)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash[_unlisted]:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for nodeid in config.stash[_unlisted]:
        terminalreporter.write_line(
            f"SKIPPED WITHOUT LEAVE {nodeid}: list it with its probe in {ALLOWED.name}", red=True
        )
