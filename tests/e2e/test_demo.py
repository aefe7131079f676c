"""The demo's own entry point, and what it must say of itself when something is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROMISED = {
    "tokens", "tokens_lost", "tokens_doubled", "identical_to_unmigrated", "source_host", "target_host",
    "target_prefill_tokens", "kv_tokens_used", "rst_seen", "fin_unexpected", "packets_missed_by_capture", "stall_ms",
    "checkpoint_us", "restore_us", "kv_bytes", "checkpoint_bytes", "switchover", "steps",
}  # fmt: skip


def demo(folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, demo.json and the report."""
    out = folder / "demo.json"
    argv = [sys.executable, "-m", "midstream_testbed.demo", "--json", str(out), *options]
    env = {**os.environ, "TMPDIR": str(folder)}  # of a demo that fails, as controls must, logs are kept there
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=300, check=False)
    said = done.stdout + done.stderr
    assert out.exists(), said
    return done.returncode, json.loads(out.read_text(encoding="utf-8")), said


def assert_whole(result: dict[str, Any], said: str) -> None:
    assert result["tokens"] > 0, said
    assert (result["tokens_lost"], result["tokens_doubled"]) == (0, 0), said
    assert result["identical_to_unmigrated"] is True, said
    assert (result["rst_seen"], result["fin_unexpected"], result["packets_missed_by_capture"]) == (0, 0, 0), said
    assert result["uploads_answered"] == 1, said


def test_a_live_stream_changes_nodes(tmp_path: Path) -> None:
    status, result, said = demo(tmp_path)
    assert status == 0, said
    assert set(result) >= PROMISED
    assert_whole(result, said)
    assert (result["source_host"], result["target_host"]) == ("node-a", "node-b")
    assert (result["target_prefill_tokens"], result["switchover"]) == (0, "Steer")
    assert min(result["kv_tokens_used"], result["kv_bytes"], result["checkpoint_bytes"]) > 0
    assert set(result["stall_ms"]) >= {"p50", "p99", "max"}
    assert [s for s in result["steps"] if s["name"] == "COMMIT"], result["steps"]
    assert "node-a -> node-b" in said and "IDENTICAL" in said


def test_two_hundred_streams_change_nodes(tmp_path: Path) -> None:
    status, result, said = demo(tmp_path, "--streams", "200", "--tokens", "600")
    assert status == 0, said
    assert_whole(result, said)
    assert result["target_prefill_tokens"] == 0


def test_clients_do_not_wait_for_a_slow_cloud(tmp_path: Path) -> None:
    status, result, said = demo(tmp_path, "--move-seconds", "3")
    assert status == 0, said
    assert_whole(result, said)
    assert result["switchover"] == "Steer"
    followed_ms = next(s["tookMs"] for s in result["steps"] if s["name"] == "FOLLOW")
    assert followed_ms > 2500, "the address took 3 s"
    assert result["stall_ms"]["max"] < followed_ms, "clients waited for the address"


def test_clients_wait_for_a_slow_cloud_without_a_tunnel(tmp_path: Path) -> None:
    status, result, said = demo(tmp_path, "--move-seconds", "3", "--switchover", "wait")
    assert status == 0, said
    assert_whole(result, said)
    assert result["stall_ms"]["max"] >= 2900, "the address took 3 s: a shorter stall was not measured"


def test_without_the_hold_bytes_are_lost(tmp_path: Path) -> None:
    """Negative control: the same play, with and without the hold, over a link that takes a second. What the kernel
    acknowledged behind the checkpoint is in no queue any more, and the capture shows it."""
    status, result, said = demo(tmp_path, "--slow-send-ms", "1000", "--switchover", "wait")
    assert status == 0, said
    assert_whole(result, said)
    assert result["uploads_answered"] == 1
    status, result, said = demo(tmp_path, "--slow-send-ms", "1000", "--switchover", "wait", "--without-hold")
    assert status == 1, said
    assert result["uploads_answered"] == 0 or result["rst_seen"] > 0, said


def test_wiped_kv_changes_the_answer(tmp_path: Path) -> None:
    """Negative control: the moved KV is really what the target continues from."""
    status, result, said = demo(tmp_path, "--zero-kv")
    assert status == 1, said
    assert result["identical_to_unmigrated"] is False
    assert result["kv_tokens_used"] > 0, "the control must wipe KV that is used"
    assert (result["rst_seen"], result["packets_missed_by_capture"]) == (0, 0), "the connection itself is unharmed"


@pytest.mark.parametrize("option", ["--streams=0", "--tokens=-1", "--move-seconds=-1"])
def test_bad_options_are_refused(option: str) -> None:
    argv = [sys.executable, "-m", "midstream_testbed.demo", option]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert option.partition("=")[0] in done.stderr
