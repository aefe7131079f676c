"""EC2 takes an instance back, the operator has its streams moved, the instance ends: `make demo NOTICE=spot` itself.

Real operator, agents, API server, boto3, sockets and kernel; EC2, its metadata and its queue are the testbed's. Only
the testbed's clock is shortened: a host that gets its notice is killed when the notice says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Json = dict[str, Any]
LONG = [pytest.param("120", id="two-minutes")] if os.environ.get("LONG") else []


def demo(folder: Path, *options: str, timeout_s: float = 540) -> tuple[int, Json, str]:
    """Exit status, demo.json and the report."""
    out = folder / "demo.json"
    argv = [sys.executable, "-m", "midstream_testbed.spot", "--json", str(out), *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    said = done.stdout + done.stderr
    assert out.exists(), said
    return done.returncode, json.loads(out.read_text(encoding="utf-8")), said


def assert_moved_in_time(result: Json, said: str, seconds: float) -> Json:
    """Nothing lost, one job, and the source had let go while its instance lived; what demo.json says of the notice."""
    assert (result["tokens_lost"], result["tokens_doubled"], result["identical_to_unmigrated"]) == (0, 0, True), said
    assert (result["rst_seen"], result["fin_unexpected"], result["packets_missed_by_capture"]) == (0, 0, 0), said
    assert result["uploads_answered"] == 1 and result["tokens"] > 0, said
    notice: Json = result["notice"]
    assert (notice["kind"], notice["phase"], notice["jobs"]) == ("SpotInterruption", "Succeeded", 1), said
    assert 0 < notice["left_at_release_s"] < seconds and notice["notice_to_pause_ms"] > 0, said
    assert notice["terminated_late_s"] >= 0, "the instance must not outlive its notice, nor be killed before"
    assert notice["address_at"] == "node-b" and notice["address_moved_s"] >= 3, "EC2's yes takes effect 3 s later"
    assert result["switchover"] == "Steer" and result["target_prefill_tokens"] == 0, said
    return notice


@pytest.mark.parametrize("seconds", ["30", *LONG])
def test_streams_are_elsewhere_before_the_instance_ends(tmp_path: Path, seconds: str) -> None:
    status, result, said = demo(tmp_path, "--notice-seconds", seconds, timeout_s=540 + 6 * float(seconds))
    assert status == 0, said
    notice = assert_moved_in_time(result, said, float(seconds))
    assert notice["source"] == "imds"
    assert "SpotInterruption by imds" in said and "IDENTICAL" in said
    assert "llm-1 on node-b" in notice["plan"] and "2 streams" in notice["plan"], "told by the source's agent"


def test_the_queue_alone_is_enough(tmp_path: Path) -> None:
    status, result, said = demo(tmp_path, "--source", "sqs", "--notice-seconds", "30")
    assert status == 0, said
    assert_moved_in_time(result, said, 30)


def test_a_hundred_streams_and_both_sources_make_one_job(tmp_path: Path) -> None:
    status, result, said = demo(tmp_path, "--source", "both", "--streams", "100", "--notice-seconds", "40",
                                "--pace-ms", "60")  # fmt: skip
    assert status == 0, said
    assert_moved_in_time(result, said, 40)
    assert result["migrated_streams"] == 101, said


def test_an_agent_that_asks_no_metadata_loses_them(tmp_path: Path) -> None:
    """Negative control: nothing but the notice moves the streams, and the instance's end is a real one."""
    status, result, said = demo(tmp_path, "--deaf", "--notice-seconds", "15")
    assert status == 1, said
    assert result["notice"]["jobs"] == 0 and result["tokens_lost"] > 0, said
    assert "the source had not let go when it was terminated" in said
