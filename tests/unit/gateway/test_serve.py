"""`midstream-serve` as a process: it keeps its engine, drains, and says what is wrong with its options."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gateway_pair import PYTHON, ROOT, completion

ENV = {**os.environ, "PYTHONPATH": str(ROOT / "runtime")}


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "midstream_runtime.serve", "--listen", f"127.0.0.1:{port}", "--engine-python", PYTHON,
            "--handoff", str(folder / "handoff.sock"), "--pool-slots", "128", *options]  # fmt: skip
    process = subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        assert process.stdout.readline().startswith("ready "), process.stderr.read()
        yield process, port
    finally:
        process.terminate()
        process.communicate(timeout=30)


def ask(port: int, path: str, body: object = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def engine_of(process: subprocess.Popen[str]) -> int:
    """The gateway's only child."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii")
    (pid,) = text.split()
    return int(pid)


def test_an_engine_that_dies_is_started_again(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, port):
        status, before = ask(port, "/v1/completions", completion(8, stream=False))
        assert status == 200
        os.kill(engine_of(process), signal.SIGKILL)
        deadline, seen = time.monotonic() + 60, set()
        while True:
            status, after = ask(port, "/v1/completions", completion(8, stream=False))
            seen.add(status)
            if status == 200 and 503 in seen:
                break
            assert time.monotonic() < deadline, seen
            time.sleep(0.01)
        assert json.loads(after)["choices"] == json.loads(before)["choices"]
        assert ask(port, "/health")[0] == 200


def test_asked_to_end_it_ends_with_its_engine(tmp_path: Path) -> None:
    with serving(tmp_path) as (process, _):
        engine = engine_of(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(engine, 0)


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--listen", "[::]"], 2, "write ADDRESS:PORT"),
        (["--listen", "[::]:x"], 2, "write ADDRESS:PORT"),
        (["--path-mtu", "100"], 2, "an MTU is between"),
        (["--listen", "127.0.0.1:0", "--model", "/nonexistent"], 1, "engine_failed: the engine ended with status"),
        (["--listen", "127.0.0.1:0", "--engine-python", "/nonexistent/python"], 1, "engine_failed"),
    ],
)
def test_what_cannot_work_is_said(tmp_path: Path, options: list[str], status: int, words: str) -> None:
    argv = [sys.executable, "-m", "midstream_runtime.serve", "--handoff", str(tmp_path / "h.sock")]
    if "--engine-python" not in options:
        argv += ["--engine-python", PYTHON]
    done = subprocess.run([*argv, *options], env=ENV, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, words in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr.split("midstream-serve:")[-1]
