"""The socket tests once more, against the library built with AddressSanitizer and UBSan: any report is fatal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "csrc"
REPORTS = ("AddressSanitizer", "runtime error:")

_OVERFLOW = """
import socket
from midstream_agent import tcp
with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
    tcp.KEY_BYTES = 8
    tcp.flow_keys([client.fileno()])
"""


@pytest.fixture(scope="module")
def sanitized() -> str:
    """A command that runs others with the sanitized library."""
    subprocess.run(["make", "-s", "-C", str(ROOT / "csrc"), "asan"], check=True, timeout=120)
    return str(ROOT / "build" / "csrc" / "asan" / "run")


def test_a_write_past_the_end_of_a_callers_buffer_is_caught(sanitized: str) -> None:
    """Shows that the runs below could fail: the library is the sanitized one, and sees Python's buffers."""
    done = subprocess.run([sanitized, sys.executable, "-c", _OVERFLOW], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "ms_flow_key_of" in done.stderr or "ms_tcp_flow_keys" in done.stderr


@pytest.mark.parametrize(
    "what",
    [
        ["test_move.py", "test_options.py", "test_refusals.py"],
        ["test_half_closed.py"],
        ["test_streams.py::test_streams_are_byte_exact[both-6-bbr-9001]"],
    ],
    ids=["options", "half-closed", "streams"],
)
def test_socket_tests_pass_without_a_report(sanitized: str, what: list[str]) -> None:
    argv = [sanitized, sys.executable, "-m", "pytest", "-q", "-x", *(str(HERE / name) for name in what)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert not any(report in output for report in REPORTS), output
    print(done.stdout.splitlines()[-1])
