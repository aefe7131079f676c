"""What Prometheus gets of an agent. Names by its conventions: base units, `_total` for counters.

The kernel's own account (packets by reason, flows by state) is read when somebody asks, in the asking thread: a
scrape takes about a millisecond, and never reads more while clients wait than the maps' sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.server import HTTPServer
from typing import Any

from midstream_runtime.contract.errors import Final
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.hold import Hold
from midstream_agent.hold_layout import FLOW_FROZEN, FLOW_HELD, FLOW_HERE, FLOW_MOVED

# A hold below 10 ms goes unnoticed between two tokens; ten seconds are a proxy's usual patience.
_HOLD_BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STATES = {FLOW_FROZEN: "frozen", FLOW_HELD: "held", FLOW_MOVED: "moved", FLOW_HERE: "here"}


class Metrics:
    """Counts of this process; a restart begins at 0, as Prometheus expects."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry, "namespace": "midstream", "subsystem": "agent"}
        self._ended = Counter(
            "migrations", "Migrations off this node that ended", ["outcome", "reason", "switchover"], **named
        )
        self._streams = Counter("streams", "Streams of ended migrations, by what became of them", ["outcome"], **named)
        self._hold = Histogram("hold_seconds", "How long a batch of streams was held", buckets=_HOLD_BUCKETS_S, **named)
        self._checkpoints = Counter("checkpoint_bytes", "Bytes of checkpoints sent", **named)
        self._kv = Counter("kv_sent_bytes", "Bytes of KV cache sent", **named)
        self.arrived = Counter("streams_arrived", "Streams that became live on this node", **named)

    def ended(self, report: pb.JobReport) -> None:
        """A job of this node as a source has come to its end."""
        outcome = pb.Phase.Name(report.phase).removeprefix("PHASE_").lower()
        self._ended.labels(outcome, report.reason, report.switchover).inc()
        counts = report.streams
        for name, count in (
            ("migrated", counts.migrated), ("rolled_back", counts.rolled_back), ("lost", counts.lost),
            ("unmovable", counts.unmovable),
        ):  # fmt: skip
            self._streams.labels(name).inc(count)
        for hold_ms in [b.hold_ms for b in report.batches] or [report.hold_ms]:
            if hold_ms:
                self._hold.observe(hold_ms / 1000)
        self._checkpoints.inc(report.checkpoint_bytes)
        self._kv.inc(report.kv.bytes_sent)

    def watch(self, hold: Hold, active: Callable[[], int]) -> None:
        """Tell of the kernel's maps, too, and of how many jobs are under way."""
        self.registry.register(_Kernel(hold, active))

    def serve(self, listen: str) -> HTTPServer:
        """Answer GET /metrics on host:port, in a thread of its own."""
        host, _, port = listen.rpartition(":")
        try:
            server, _ = start_http_server(int(port), host.strip("[]"), self.registry)
        except (OSError, ValueError) as e:
            raise Final("listen", f"metrics cannot be served on {listen}: {e}") from e
        return server


class _Kernel(Collector):
    def __init__(self, hold: Hold, active: Callable[[], int]) -> None:
        self._hold, self._active = hold, active

    def describe(self) -> Iterator[Metric]:
        """Nothing is asked of the kernel when this is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        packets = CounterMetricFamily("midstream_agent_packets", "Packets by what our programs did", labels=["reason"])
        for reason, count in self._hold.counters().items():
            packets.add_metric([reason], count)
        yield packets
        flows = GaugeMetricFamily("midstream_agent_flows", "Flows in the kernel's map, by state", labels=["state"])
        states = self._hold.flow_states()
        for state, name in _STATES.items():
            flows.add_metric([name], states.get(state, 0))
        yield flows
        yield GaugeMetricFamily("midstream_agent_migrations_active", "Migrations off this node", self._active())
