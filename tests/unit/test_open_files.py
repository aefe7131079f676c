"""A process that starts with few descriptors allowed takes what it may have."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import resource
from midstream_runtime.contract import open_files
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
assert open_files.allow_all() == hard
files = [open("/dev/null") for _ in range(100)]
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""


def test_the_soft_limit_of_open_files_becomes_the_hard_one() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=60)
