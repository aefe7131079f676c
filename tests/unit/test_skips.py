"""A skip that nobody listed makes the run fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"


@pytest.mark.parametrize(
    ("listed", "exit_status"),
    [("", 1), ("test_it.py::test_probed: no such device (probe: open)\n", 0), ("test_it.py::test_other: why\n", 1)],
)
def test_an_unlisted_skip_fails_the_run(tmp_path: Path, listed: str, exit_status: int) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "allowed_skips.txt").write_text(listed, encoding="utf-8")
    test = "import pytest\n\n@pytest.mark.parametrize('n', [1])\ndef test_probed(n): pytest.skip('no such device')\n"
    (tmp_path / "test_it.py").write_text(test, encoding="utf-8")
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "-c", "/dev/null", "."]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == exit_status, done.stdout
    assert ("SKIPPED WITHOUT LEAVE" in done.stdout) == bool(exit_status)
