"""Every timeout and limit of the agent, with its unit and the reason for its value.

One settings object is made from the command line at start and passed down; nothing else in the agent
reads the environment, so that a test can build an agent with other values without touching the process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Nic:
    """The interface that carries floating IPs: a secondary ENI that no CNI manages."""

    name: str = "eth1"
    gateway_v4: str = ""  # subnet base + 1 on EC2; empty: floating IPv4 addresses are refused
    gateway_v6: str = ""  # link-local of the VPC router; empty: floating IPv6 addresses are refused
    mtu_bytes: int = 9001


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """mTLS material of this node; the certificate's DNS SAN is the node's name."""

    ca: Path
    cert: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds, unless the name says otherwise."""

    handoff_s: float = 5.0  # one request to a pod; a busy gateway answers within milliseconds
    pause_s: float = 10.0  # a step of a large engine may take long; clients do not wait for it
    peer_connect_s: float = 5.0
    peer_reply_s: float = 15.0  # one reply before the point of no return; then: roll back
    accept_settle_ms: int = 50  # one round trip of a far client: its SYN-ACK's answer arrives
    handshake_s: float = 4.0  # SYN-ACKs are repeated after 1 and 3 s; who is still silent then has gone
    address_confirm_s: float = 20.0  # EC2 moves an address in seconds; afterwards move it back
    probe_interval_ms: float = 0.25  # first probe of the path; doubles up to the next line
    probe_interval_max_ms: float = 50.0
    retry_s: float = 0.2  # between two tries of what must succeed (COMMIT, DISCARD)
    retry_max_s: float = 2.0
    tunnel_probe_s: float = 1.0  # a round trip between two nodes, many times over
    tunnel_probe_interval_ms: float = 5.0  # first probe of the tunnel; doubles up to the next line
    tunnel_probe_interval_max_ms: float = 25.0  # 42 probes in all: where 5 of 9 fail, all do 1 time in 10^10
    remaining_poll_s: float = 0.2  # streams that finish at the source: how often they are counted
    orphan_linger_s: float = 120.0  # address here, its former node silent: its streams are over by then
    moved_linger_s: float = 60.0  # late packets of a moved flow must not reach the old listener
    stop_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Kv:
    """How KV blocks travel between two agents."""

    port: int = 9446  # of the target; the source learns it in PREPARE
    streams: int = 0  # 0: one for each 5 Gb/s of the NIC (EC2's cap of a flow), at least 8: a core hashes 0.8 GB/s
    tls: bool = True  # off only where the network between nodes is trusted or encrypted itself
    bytes_per_s: int = 0  # all streams of a job together; 0: what the network gives
    piece_bytes: int = 1 << 20  # one write; the bandwidth limit is kept to within a piece a stream
    connect_s: float = 5.0  # TCP, TLS and greeting of one stream
    stall_s: float = 10.0  # a stream on which nothing moves for so long is broken
    tries: int = 3  # of a stream to connect again, and of a block that arrived damaged
    retry_s: float = 0.1  # before a broken stream is connected again
    greeting_streams: int = 64  # strangers that the target listens to at once
    offer_blocks: int = 2048  # hashes in one question to the target's pod
    answer_s: float = 10.0  # the target asks its pod meanwhile
    rounds_max: int = 20  # of pre-copy; it has converged or never will
    tail_ms: float = 5.0  # what is left is small enough when it takes no longer than this
    tail_s: float = 2.0  # clients wait for the tail; then it is computed again
    switch_s: float = 15.0  # pause to commit and address, which the copy must leave before a deadline
    shrink: float = 0.8  # a round with more than this part of the one before it is no progress
    prefill_tokens_per_s: float = 0.0  # of the target's engine, for the choice to recompute; 0: unknown, so move


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what a pod or a peer may make this agent hold in memory."""

    streams_per_job: int = 20_000
    batch_streams: int = 64  # a client waits for its batch: 20 to 25 ms for so many, with another one beside it
    parallel_batches: int = 2  # one is restored while the next is frozen
    message_bytes: int = 256 << 20
    jobs_remembered: int = 64


@dataclass(frozen=True, slots=True)
class ImdsSettings:
    """EC2's instance metadata. Seconds, unless the name says otherwise."""

    host: str = ""  # 169.254.169.254 on EC2; empty: nobody is asked
    port: int = 80
    timeout_s: float = 2.0  # IMDS answers in milliseconds, or the hop limit is in the way
    poll_s: float = 1.0  # a notice is heard within this time
    jitter: float = 0.1  # a thousand nodes must not ask in step
    retry_max_s: float = 5.0  # between two tries while IMDS is away: a notice may come meanwhile
    absent_max_s: float = 60.0  # where it has never answered: this is no EC2 instance


@dataclass(frozen=True, slots=True)
class Settings:
    """What one agent knows of itself."""

    node: str
    listen: str  # host:port of the gRPC server
    tls: TlsFiles
    json_logs: bool = False
    metrics_listen: str = ""  # host:port of Prometheus' endpoint; empty: none
    node_addresses: tuple[str, ...] = ()
    bpffs: Path = Path("/sys/fs/bpf/midstream")
    state_dir: Path = Path("/var/lib/midstream")
    cgroup_root: Path = Path("/sys/fs/cgroup")
    handoff_path: str = "/run/midstream/handoff.sock"
    nic: Nic = field(default_factory=Nic)
    probe_port: int = 9444
    tunnel: bool = True
    tunnel_port: int = 9445  # not 4789, which a CNI's overlay may use
    timeouts: Timeouts = field(default_factory=Timeouts)
    limits: Limits = field(default_factory=Limits)
    kv: Kv = field(default_factory=Kv)
    imds: ImdsSettings = field(default_factory=ImdsSettings)
    boot_id: str = ""  # empty: the kernel's
    fip_rule_to: int = 513  # between the VPC CNI's 512 and 1024 (facts: its source)
    fip_rule_from: int = 600
    fip_table: int = 10_600


def host_of(endpoint: str) -> str:
    """The host in host:port; IPv6 in brackets."""
    return endpoint.rpartition(":")[0].strip("[]")
