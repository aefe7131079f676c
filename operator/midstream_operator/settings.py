"""Every timeout and limit of the operator, with its unit and the reason for its value.

One settings object is made at start, from the command line and one configuration file, and passed down; nothing
else in the operator reads the environment.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from midstream_operator.aws_settings import AwsSettings, Ec2Settings, SqsSettings
from midstream_operator.errors import Final
from midstream_operator.handling import HandlingSettings


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The operator's mTLS material; the certificate's DNS SAN is `midstream-operator`."""

    ca: Path = Path("/etc/midstream/tls/ca.crt")
    cert: Path = Path("/etc/midstream/tls/tls.crt")
    key: Path = Path("/etc/midstream/tls/tls.key")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds, unless the name says otherwise."""

    agent_connect_s: float = 3.0  # an agent that does not answer is retried, not waited for
    agent_reply_s: float = 10.0  # attaching an address: netlink and a handful of packets
    agent_patience_s: float = 30.0  # an agent that was never reached for so long: the job is refused
    retry_s: float = 0.5  # first pause after a failure that may pass; doubles
    retry_max_s: float = 5.0  # and no longer than this: the deadline of a spot node is 120 s away
    resync_s: float = 20.0  # all objects are looked at again, also when no event came
    status_every_s: float = 1.0  # progress within a phase is written at most this often; phases at once
    lease_s: float = 15.0  # a dead leader is replaced after this long (Kubernetes' own components: 15)
    lease_renew_s: float = 3.0  # between two renewals
    lease_give_up_s: float = 10.0  # a leader that could not renew for so long stops writing; less than lease_s
    watch_s: int = 290  # a watch is asked for this long, then opened anew (API servers end them at 300 or more)
    address_confirm_s: float = 30.0  # EC2 moves an address in seconds; then it is asked again
    address_look_s: float = 2.0  # between two looks at a move that a job has begun; its end is not waited for so long
    address_release_s: float = 20.0  # a deleted FloatingIP goes after this long even if nobody answers
    eviction_margin_s: float = 5.0  # an eviction's job must be through this long before the pod is killed
    gone_poll_s: float = 3.0  # between two questions whether a silent node is gone


@dataclass(frozen=True, slots=True)
class Limits:
    jobs: int = 100  # active migrations in the cluster
    jobs_per_node: int = 10  # of one source node: its uplink is shared by their KV copies
    kept_per_workload: int = 5  # newest finished jobs of a workload that outlive their ttl
    job_ttl_s: int = 24 * 3600  # of a finished job that names none
    message_chars: int = 1024  # of a status message
    refusals_told: int = 10  # candidates that a plan lists with their reasons


@dataclass(frozen=True, slots=True)
class Planning:
    """What the planner takes for true where nobody has measured it; each plan that does so says it."""

    survey_s: float = 0.5  # a pod that has not told its figures by then is planned without: a notice must not wait
    bandwidth_bytes_per_s: float = 125e6  # 1 Gb/s, until a node has made a KV copy: a tenth of what GPU instances have
    prefill_tokens_per_s: float = 1000.0  # slow on purpose: KV is rather copied than computed again
    copy_reserve_s: float = 15.0  # from the end of a KV copy to the deadline: agents keep to it (their switch_s)
    streams_free: int = 4096  # of a target: its agent asks it for room for each before anything is frozen
    targets_asked: int = 16  # of a node's plan, a pod: more would only make it slower


@dataclass(frozen=True, slots=True)
class Pool:
    """Addresses that FloatingIPs may take: no others are ever touched."""

    name: str
    provider: str  # l2 | ec2
    cidrs: tuple[str, ...]
    zone: str = ""  # nodes elsewhere cannot hold the addresses (ec2: a subnet is of one zone); empty: all can
    subnet: str = ""  # ec2: the subnet's id

    def __contains__(self, address: str) -> bool:
        found = ipaddress.ip_address(address)
        return any(found in ipaddress.ip_network(cidr) for cidr in self.cidrs)

    def addresses(self) -> Iterator[str]:
        """Usable addresses in order; a pool's first and last address are usable, a /24's are not its own network's."""
        for cidr in self.cidrs:
            for address in ipaddress.ip_network(cidr):
                yield str(address)


@dataclass(frozen=True, slots=True)
class Webhook:
    """What is added to enabled pods (injection.py); the certificate is the operator's own."""

    port: int = 0  # 0: no webhook
    image: str = ""  # of the gateway
    grace_s: int = 150  # least terminationGracePeriodSeconds of an injected pod: a spot notice's 120 s and some
    gateway_port: int = 8000
    prestop_port: int = 8002
    engine_port: int = 8001  # where the engine's own server listens, in the pod
    configuration: str = "midstream"  # MutatingWebhookConfiguration that gets our caBundle


@dataclass(frozen=True, slots=True)
class Settings:
    namespace: str = "midstream-system"  # the operator's own: its Lease, its agents
    identity: str = "midstream-operator"  # this replica, by the pod's name
    tls: TlsFiles = field(default_factory=TlsFiles)
    agent_selector: str = "app.kubernetes.io/name=midstream,app.kubernetes.io/component=agent"
    agent_port: int = 9443
    agent_account: str = "midstream-agent"  # the agents' ServiceAccount: whose certificate requests are signed
    certificates: str = "files"  # operator: kept and signed here (certificates.py); files: somebody else's
    certificate_days: float = 30.0  # of the operator's and the agents'; renewed when a third of it is left
    enabled_label: str = "midstream.dev/enabled"  # pods with the value "true" are watched, no others
    node_selector: str = ""  # server-side selector of the nodes that are watched
    gateway_port_name: str = "midstream"  # of the serving container's port; FloatingIP.spec.ports names others
    http_port: int = 8080  # /healthz, /readyz, /metrics, /doctor
    pools: tuple[Pool, ...] = ()
    timeouts: Timeouts = field(default_factory=Timeouts)
    limits: Limits = field(default_factory=Limits)
    aws: AwsSettings = field(default_factory=AwsSettings)
    handling: HandlingSettings = field(default_factory=HandlingSettings)
    planning: Planning = field(default_factory=Planning)
    webhook: Webhook = field(default_factory=Webhook)

    def pool(self, name: str) -> Pool:
        for pool in self.pools:
            if pool.name == name:
                return pool
        have = ", ".join(p.name for p in self.pools) or "none"
        raise Final("unknown_pool", f"no pool {name!r}: the operator was installed with {have}")

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Settings:
        """From the configuration file's content, camelCase keys; an unknown or wrong one is refused by name."""
        settings: Settings = _build(cls, data, "")
        for pool in settings.pools:
            _check_pool(pool)
        return settings


_NESTED: dict[str, type[Any]] = {
    c.__name__: c
    for c in (TlsFiles, Timeouts, Limits, AwsSettings, Ec2Settings, SqsSettings, HandlingSettings, Planning, Webhook)
}
_NUMBERS = {"int": (int,), "float": (int, float)}


def _build(cls: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise Final("bad_config", f"{where or 'configuration'}: a mapping is wanted, not {data!r}")
    known = {_camel(f.name): f for f in fields(cls)}
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise Final("bad_config", f"{where}{unknown[0]}: no such setting; there are: {', '.join(sorted(known))}")
    values = {known[k].name: _value(str(known[k].type), v, f"{where}{k}") for k, v in data.items()}
    missing = [k for k, f in known.items() if f.name in ("name", "provider", "cidrs") and f.name not in values]
    if missing:
        raise Final("bad_config", f"{where}{missing[0]}: is missing")
    return cls(**values)


def _value(kind: str, value: Any, where: str) -> Any:
    if kind in _NESTED:
        return _build(_NESTED[kind], value, f"{where}.")
    if kind.startswith("tuple"):
        if not isinstance(value, list):
            raise Final("bad_config", f"{where}: a list is wanted, not {value!r}")
        if "Pool" in kind:
            return tuple(_build(Pool, v, f"{where}[{i}].") for i, v in enumerate(value))
        return tuple(str(v) for v in value)
    if kind in _NUMBERS:
        if isinstance(value, bool) or not isinstance(value, _NUMBERS[kind]) or value < 0:
            raise Final("bad_config", f"{where}: a number >= 0 is wanted, not {value!r}")
        return value
    if kind == "bool":
        if not isinstance(value, bool):
            raise Final("bad_config", f"{where}: true or false is wanted, not {value!r}")
        return value
    if not isinstance(value, str):
        raise Final("bad_config", f"{where}: text is wanted, not {value!r}")
    return Path(value) if kind == "Path" else value


def _check_pool(pool: Pool) -> None:
    for cidr in pool.cidrs:
        try:
            ipaddress.ip_network(cidr)
        except ValueError as e:
            raise Final("bad_config", f"pools: {pool.name}: {e}") from e


def _camel(name: str) -> str:
    """lease_renew_s -> leaseRenewS: as Kubernetes' own configuration files spell names."""
    head, *rest = name.split("_")
    return head + "".join(word.capitalize() for word in rest)
