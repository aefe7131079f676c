"""What /metrics tells, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class Metrics:
    """One registry a gateway, so that a process can have several (tests do)."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("midstream_requests", "Requests by path and status", ("path", "status"), registry=r)
        self.connections = Counter("midstream_connections", "Client connections accepted", registry=r)
        self.lost = Counter(
            "midstream_connections_lost", "Connections that the client or the network broke", registry=r
        )
        self.tokens = Counter("midstream_tokens", "Tokens that the engine gave for clients here", registry=r)
        self.prompt_tokens = Counter("midstream_prompt_tokens", "Prompt tokens of finished answers", registry=r)
        self.streams = Gauge("midstream_streams", "Client connections now", registry=r)
        self.running = Gauge("midstream_answers_running", "Answers under way", registry=r)
        self.engine_up = Gauge("midstream_engine_up", "1 while the engine is there", registry=r)
        self.adopted = Counter("midstream_adopted_streams", "Streams that came from another node", registry=r)
        self.adopted_prefill = Counter(
            "midstream_adopted_prefill_tokens",
            "Tokens computed again for answers that came; 0 when KV came",
            registry=r,
        )
        self.adopted_kv = Counter("midstream_adopted_kv_tokens", "Tokens of KV that came with answers", registry=r)
        self.adopted_names: set[str] = set()
        """Answers under way that came from another node."""

    def render(self) -> bytes:
        return generate_latest(self.registry)
