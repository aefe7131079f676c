"""MigrationJob and FloatingIP as the operator reads them. The CRDs under crds/ are the contract with users; a test
compares their enums with these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

GROUP, VERSION = "midstream.dev", "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
JOBS, FLOATING_IPS = "migrationjobs", "floatingips"

# On a job, so that it is found by its pod without an owner reference: that would delete the record with the pod.
LABEL_POD, LABEL_POD_UID = "midstream.dev/pod", "midstream.dev/pod-uid"
LABEL_WORKLOAD = "midstream.dev/workload"
LABEL_NOTICE = "midstream.dev/notice"
# On a pod: what may take over from what. Without them the pods of one controller are alike.
LABEL_MODEL, LABEL_RUNTIME = "midstream.dev/model", "midstream.dev/runtime-version"
# On a job whose reason is Rebalance: "true" ends its preparation.
ANNOTATION_COMMIT = "midstream.dev/commit"
# On such a job, then: until when, which nobody knew when it was made. RFC 3339.
ANNOTATION_DEADLINE = "midstream.dev/deadline"
# On such a job: what its workload was scaled to, so that somebody can take over (capacity.py).
ANNOTATION_CAPACITY = "midstream.dev/capacity"
# On a job that the operator aborted itself, to find another target: another attempt follows.
ANNOTATION_CALLED_BACK = "midstream.dev/called-back"
# On a pod: what a rebalance recommendation does to it, whatever the operator's setting.
ANNOTATION_REBALANCE = "midstream.dev/rebalance"

Json = dict[str, Any]


class Phase(StrEnum):
    PENDING = "Pending"  # accepted, not planned; or waiting for a slot or a target
    PREPARING = "Preparing"  # everything that clients do not notice
    SWITCHING = "Switching"  # the first batch is held, shipped, restored
    COMMITTING = "Committing"  # past the point of no return: further batches, the address, release
    SUCCEEDED = "Succeeded"
    ROLLED_BACK = "RolledBack"  # something failed before the point of no return: the source goes on
    FAILED = "Failed"  # refused before anything was frozen, or some streams did not make it
    ABORTED = "Aborted"

    @property
    def ended(self) -> bool:
        return self in ENDED


ENDED = frozenset({Phase.SUCCEEDED, Phase.ROLLED_BACK, Phase.FAILED, Phase.ABORTED})


class Reason(StrEnum):
    MANUAL = "Manual"
    SPOT_INTERRUPTION = "SpotInterruption"
    REBALANCE = "Rebalance"
    DRAIN = "Drain"
    MAINTENANCE = "Maintenance"
    SCALE_IN = "ScaleIn"
    CAPACITY_RESERVATION = "CapacityReservation"


class KvMode(StrEnum):
    AUTO = "Auto"
    COPY = "Copy"
    REPLAY = "Replay"


class Switchover(StrEnum):
    AUTO = "Auto"
    STEER = "Steer"
    WAIT = "Wait"


class OnFailure(StrEnum):
    KEEP_SOURCE = "KeepSource"
    DROP_STREAMS = "DropStreams"


class Provider(StrEnum):
    L2 = "l2"
    EC2 = "ec2"


class SelectorOperator(StrEnum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True)
class Target:
    """At most one is set; none: the operator picks."""

    pod: str = ""
    node: str = ""
    selector: Json | None = None


@dataclass(frozen=True, slots=True)
class JobSpec:
    pod: str
    target: Target
    reason: Reason
    deadline: datetime | None
    kv_mode: KvMode
    kv_bytes_per_s: int
    switchover: Switchover
    max_stall_ms: float | None
    on_failure: OnFailure
    abort: bool
    dry_run: bool
    ttl_s: int | None

    @classmethod
    def of(cls, obj: Json) -> JobSpec:
        """The API server has checked it against the CRD and has put the defaults in."""
        spec = obj["spec"]
        target = spec.get("target") or {}
        kv = spec.get("kv") or {}
        return cls(
            pod=spec["source"]["podName"],
            target=Target(target.get("podName", ""), target.get("nodeName", ""), target.get("podSelector")),
            reason=Reason(spec.get("reason", Reason.MANUAL)),
            deadline=parse_time(spec["deadline"]) if spec.get("deadline") else None,
            kv_mode=KvMode(kv.get("mode", KvMode.AUTO)),
            kv_bytes_per_s=bytes_of(str(kv.get("maxBandwidth", 0))),
            switchover=Switchover(spec.get("switchover", Switchover.AUTO)),
            max_stall_ms=duration_ms(spec["maxStall"]) if spec.get("maxStall") else None,
            on_failure=OnFailure(spec.get("onFailure", OnFailure.KEEP_SOURCE)),
            abort=bool(spec.get("abort")),
            dry_run=bool(spec.get("dryRun")),
            ttl_s=spec.get("ttlSecondsAfterFinished"),
        )


@dataclass(frozen=True, slots=True)
class FipSpec:
    pool: str
    provider: Provider
    selector: Json
    ports: tuple[tuple[str, int], ...]
    service: str

    @classmethod
    def of(cls, obj: Json) -> FipSpec:
        spec = obj["spec"]
        return cls(
            pool=spec["pool"],
            provider=Provider(spec["provider"]),
            selector=spec["podSelector"],
            ports=tuple((p.get("name", ""), int(p["port"])) for p in spec.get("ports", [])),
            service=spec.get("serviceName", ""),
        )


def matches(selector: Json, labels: Mapping[str, str]) -> bool:
    """Whether a LabelSelector takes these labels."""
    wanted: Mapping[str, str] = selector.get("matchLabels") or {}
    if any(labels.get(k) != v for k, v in wanted.items()):
        return False
    return all(_expression(e, labels) for e in selector.get("matchExpressions") or [])


def _expression(e: Json, labels: Mapping[str, str]) -> bool:
    key, values = e["key"], e.get("values") or []
    match SelectorOperator(e["operator"]):
        case SelectorOperator.IN:
            return key in labels and labels[key] in values
        case SelectorOperator.NOT_IN:
            return labels.get(key) not in values
        case SelectorOperator.EXISTS:
            return key in labels
        case SelectorOperator.DOES_NOT_EXIST:
            return key not in labels


def phase_of(obj: Json) -> Phase:
    """Of a MigrationJob; one without a status is Pending."""
    return Phase((obj.get("status") or {}).get("phase", Phase.PENDING))


def version_of(obj: Json) -> int:
    """Resource versions of one kind grow (Kubernetes 1.35 says so officially; etcd's always did)."""
    return int(obj["metadata"]["resourceVersion"])


def parse_time(text: str) -> datetime:
    """RFC 3339, as the API server writes it."""
    return datetime.fromisoformat(text.replace("Z", "+00:00"))


def format_time(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def now() -> datetime:
    return datetime.now(UTC)


_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def bytes_of(quantity: str) -> int:
    """What the CRD lets through: a whole number with one of Kubernetes' suffixes."""
    number = quantity.rstrip("kKMGi")
    return int(number) * _SUFFIXES[quantity[len(number) :]]


def duration_ms(text: str) -> float:
    """`250ms`, `2s`."""
    found = re.fullmatch(r"([0-9]+)(ms|s)", text)
    if found is None:
        raise ValueError(f"{text!r} is no duration: 250ms, 2s")
    return float(found[1]) * (1000 if found[2] == "s" else 1)


def label_value(text: str) -> str:
    """Text as a label's value: at most 63 characters, ends trimmed to what a label may begin and end with."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:63].strip("_.-")
