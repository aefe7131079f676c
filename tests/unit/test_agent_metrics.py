"""What Prometheus reads of an agent: its jobs' ends, and the kernel's own account."""

from __future__ import annotations

import json
import logging
import socket
import urllib.request
from typing import cast

import pytest
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.contract import logs
from midstream_agent.hold import Hold
from midstream_agent.hold_layout import FLOW_HELD, FLOW_MOVED
from midstream_agent.metrics import Metrics
from midstream_runtime.contract.errors import Final
from prometheus_client.parser import text_string_to_metric_families


class Maps:
    """In place of the kernel's maps, which tests/bpf reads for real."""

    def counters(self) -> dict[str, int]:
        return {"answer_zero_window": 7, "moved_drop": 0}

    def flow_states(self) -> dict[int, int]:
        return {FLOW_HELD: 3, FLOW_MOVED: 2}


def read(url: str) -> dict[tuple[str, ...], float]:
    """(name, label values ...) -> value."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def report() -> pb.JobReport:
    return pb.JobReport(
        phase=pb.PHASE_FAILED, reason="target_lost", switchover="Steer", checkpoint_bytes=1000,
        streams=pb.StreamCounts(total=6, migrated=3, lost=2, rolled_back=1), kv=pb.KvCounts(bytes_sent=5000),
        batches=[pb.BatchReport(streams=3, hold_ms=4), pb.BatchReport(streams=3, hold_ms=700)],
    )  # fmt: skip


def test_jobs_and_maps_are_told() -> None:
    metrics = Metrics()
    metrics.watch(cast(Hold, Maps()), lambda: 1)
    metrics.ended(report())
    metrics.arrived.inc(4)
    listen = f"127.0.0.1:{free_port()}"
    server = metrics.serve(listen)
    try:
        found = read(f"http://{listen}/metrics")
    finally:
        server.shutdown()
        server.server_close()
    assert found["midstream_agent_migrations_total", "failed", "target_lost", "Steer"] == 1
    assert [found["midstream_agent_streams_total", x] for x in ("migrated", "lost", "rolled_back")] == [3, 2, 1]
    assert found["midstream_agent_hold_seconds_count",] == 2
    assert found["midstream_agent_hold_seconds_bucket", "0.005"] == 1
    assert found["midstream_agent_kv_sent_bytes_total",] == 5000
    assert found["midstream_agent_checkpoint_bytes_total",] == 1000
    assert found["midstream_agent_streams_arrived_total",] == 4
    assert found["midstream_agent_packets_total", "answer_zero_window"] == 7
    assert [found["midstream_agent_flows", x] for x in ("frozen", "held", "moved")] == [0, 3, 2]
    assert found["midstream_agent_migrations_active",] == 1


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Final, match="metrics cannot be served"):
            Metrics().serve(f"127.0.0.1:{taken.getsockname()[1]}")


def test_a_log_line_names_the_job_of_its_task() -> None:
    record = logging.LogRecord("agent", logging.WARNING, __file__, 1, "held %d", (3,), None)
    token = logs.JOB.set("uid-1")
    try:
        said = json.loads(logs.JsonFormatter().format(record))
    finally:
        logs.JOB.reset(token)
    assert (said["job"], said["level"], said["message"]) == ("uid-1", "warning", "held 3")
    assert "job" not in json.loads(logs.JsonFormatter().format(record))
