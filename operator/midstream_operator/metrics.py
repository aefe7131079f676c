"""What Prometheus gets of the operator. Names by its conventions: base units, `_total` for counters."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# A stall below 10 ms goes unnoticed between two tokens; ten seconds are a proxy's usual patience.
_STALL_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_WAIT_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": self.registry, "namespace": "midstream", "subsystem": "operator"}
        self.active = Gauge("migrations_active", "Migrations by phase", ["phase"], **of)
        self.ended = Counter("migrations", "Migrations that ended, by outcome", ["outcome", "reason"], **of)
        self.refused = Counter("refusals", "Jobs refused before anything was frozen, by reason", ["reason"], **of)
        self.streams = Counter("streams", "Streams of ended migrations, by what became of them", ["outcome"], **of)
        self.kv_bytes = Counter("kv_sent_bytes", "Bytes of KV cache sent", **of)
        self.stall = Histogram(
            "stall_seconds", "Longest wait of a client in a migration", buckets=_STALL_BUCKETS_S, **of
        )
        self.planned = Histogram("plan_seconds", "From a job's creation to its plan", buckets=_WAIT_BUCKETS_S, **of)
        self.freeze = Histogram(
            "notice_to_freeze_seconds",
            "From a job's creation to the first stream's hold",
            buckets=_WAIT_BUCKETS_S,
            **of,
        )
        self.jobs = Gauge("jobs", "MigrationJobs that exist", ["state"], **of)
        self.addresses = Gauge("floating_ips", "FloatingIPs that exist", ["ready"], **of)
        self.notices = Counter("notices", "Notices taken", ["kind", "source"], **of)
        self.leader = Gauge("leader", "1 while this replica leads", **of)
        self.requests = Counter("api_requests", "Requests to the API server", ["method", "status"], **of)
