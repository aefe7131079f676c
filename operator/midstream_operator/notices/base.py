"""What a notice says, and how a source hands one over.

The same interruption reaches us on several ways (IMDS, EventBridge, a taint, an eviction), with ids of their own.
So a notice's id is a hash of what it says: kind and subject. The job that answers it is named after the id, and
the second message finds the first one's job.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol


class NoticeKind(StrEnum):
    SPOT_INTERRUPTION = "SpotInterruption"  # the node ends at the deadline
    REBALANCE = "Rebalance"  # the node is at risk: prepare
    CAPACITY_RESERVATION = "CapacityReservation"  # the reservation ends at the deadline
    MAINTENANCE = "Maintenance"  # the host is worked on at a planned time
    DRAIN = "Drain"  # a pod is evicted, its node is being emptied
    SCALE_IN = "ScaleIn"  # a pod or node is not wanted any more
    STATE_CHANGE = "StateChange"  # the instance is stopping or stopped
    LIFECYCLE = "Lifecycle"  # an autoscaling group waits for an action to be completed


@dataclass(frozen=True, slots=True)
class Notice:
    """One thing that will happen to one subject. Two notices with the same id are the same notice."""

    kind: NoticeKind
    source: str  # who said it: imds, sqs, eviction, ...; not part of the id
    node: str = ""  # the Node's name, where the source knows it
    instance_id: str = ""  # the cloud's name of the node, where it knows that
    namespace: str = ""  # of the pod, for a notice about one pod
    pod: str = ""
    pod_uid: str = ""
    issued_at: datetime | None = None
    deadline: datetime | None = None
    details: dict[str, str] = field(default_factory=dict, compare=False)  # for the source's own acknowledgement

    @property
    def subject(self) -> str:
        return self.pod_uid or self.instance_id or self.node

    @property
    def id(self) -> str:
        """16 hex digits, a part of object names."""
        said = "\0".join((self.kind.value, self.subject))
        return hashlib.sha256(said.encode()).hexdigest()[:16]


Handle = Callable[[Notice], Awaitable[None]]


class NoticeSource(Protocol):
    """Watches one place for notices, until it is cancelled."""

    name: str

    async def run(self, handle: Handle) -> None:
        """Hand over each notice as it comes. It is safely recorded once `handle` has returned, and only then may it
        be acknowledged; when `handle` raises, it has to come again. A notice may be handed over twice."""
        ...
