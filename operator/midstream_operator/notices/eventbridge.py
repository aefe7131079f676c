"""What a message in the queue says. Pure functions: text in, notices out, or why there are none.

EventBridge puts its event into the body as it is. Autoscaling groups may also post a lifecycle body themselves, bare or
as an escaped string in `Message` (through SNS). Nothing here trusts the sender: what has not the expected shape is
poison, and says what is wrong with it.

| detail-type | kind | deadline |
|---|---|---|
| EC2 Spot Instance Interruption Warning | SpotInterruption | its time + 120 s; hibernate: no two minutes |
| EC2 Capacity Reservation Instance Interruption Warning | CapacityReservation | its time + 120 s |
| EC2 Instance Rebalance Recommendation | Rebalance | none: the node is at risk, no more |
| EC2 Instance State-change Notification | StateChange | its time: the instance goes now |
| EC2 Instance-terminate Lifecycle Action | Lifecycle | none: the group waits until it is completed |
| AWS Health Event (EC2, scheduled change) | Maintenance | the start of the work |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from midstream_operator.aws_settings import SqsSettings
from midstream_operator.notices.base import Notice, NoticeKind

SOURCE = "sqs"
GOING = ("stopping", "stopped", "shutting-down", "terminated")
TERMINATING = "autoscaling:EC2_INSTANCE_TERMINATING"
TEST = "autoscaling:TEST_NOTIFICATION"


class Poison(Exception):
    """Not a message that could ever be understood."""


@dataclass(frozen=True, slots=True)
class Parsed:
    notices: tuple[Notice, ...] = ()
    ignored: str = ""  # a message that is none of our business, and why


def parse(body: str, settings: SqsSettings | None = None) -> Parsed:
    """Raises Poison."""
    limits = settings or SqsSettings()
    event = _unwrapped(body)
    if event.get("Event") == TEST:
        return Parsed(ignored="test notification of an autoscaling group")
    if "detail-type" not in event and "LifecycleTransition" in event:
        return _lifecycle(event, _time(event.get("Time") or event.get("time")))
    kind = _text(event, "detail-type")
    reader = _READERS.get(kind)
    if reader is None:
        return Parsed(ignored=f"detail-type {kind}")
    detail = event.get("detail")
    if not isinstance(detail, dict):
        raise Poison(f"{kind}: no detail")
    return reader(detail, _time(event.get("time")), limits)


def _unwrapped(body: str) -> dict[str, Any]:
    event = _object(body)
    inner = event.get("Message")
    return _object(inner) if isinstance(inner, str) and "detail-type" not in event else event


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Poison(f"not JSON: {e}") from e
    if not isinstance(found, dict):
        raise Poison(f"not an object but {type(found).__name__}")
    return found


def _text(event: Mapping[str, Any], key: str) -> str:
    value = event.get(key)
    if not isinstance(value, str) or not value:
        raise Poison(f"no {key}")
    return value


def _instance(detail: Mapping[str, Any], key: str = "instance-id") -> str:
    """The detail's own: the ARN in `resources` carries an availability zone where others carry the region."""
    found = _text(detail, key)
    if not found.startswith("i-") or len(found) > 32:
        raise Poison(f"{key} {found[:40]!r} is no instance id")
    return found


def _time(value: Any) -> datetime:
    if not isinstance(value, str):
        raise Poison("no time")
    try:
        found = parsedate_to_datetime(value) if "," in value else datetime.fromisoformat(value.replace("Z", "+00:00"))
    except ValueError as e:
        raise Poison(f"time {value[:40]!r} is none") from e
    return found if found.tzinfo else found.replace(tzinfo=UTC)


# -- one reader a detail-type


def _interruption(kind: NoticeKind) -> Callable[[Mapping[str, Any], datetime, SqsSettings], Parsed]:
    def read(detail: Mapping[str, Any], at: datetime, limits: SqsSettings) -> Parsed:
        action = str(detail.get("instance-action", "terminate"))
        left_s = limits.hibernate_s if action == "hibernate" else limits.notice_s
        notice = Notice(
            kind, SOURCE, instance_id=_instance(detail), issued_at=at, deadline=at + timedelta(seconds=left_s),
            details={"action": action},
        )  # fmt: skip
        return Parsed((notice,))

    return read


def _rebalance(detail: Mapping[str, Any], at: datetime, limits: SqsSettings) -> Parsed:
    return Parsed((Notice(NoticeKind.REBALANCE, SOURCE, instance_id=_instance(detail), issued_at=at),))


def _state_change(detail: Mapping[str, Any], at: datetime, limits: SqsSettings) -> Parsed:
    instance, state = _instance(detail), _text(detail, "state")
    if state not in GOING:
        return Parsed(ignored=f"state {state}")
    details = {"state": state}
    return Parsed(
        (Notice(NoticeKind.STATE_CHANGE, SOURCE, instance_id=instance, issued_at=at, deadline=at, details=details),)
    )


def _lifecycle_event(detail: Mapping[str, Any], at: datetime, limits: SqsSettings) -> Parsed:
    return _lifecycle(detail, at)


def _lifecycle(detail: Mapping[str, Any], at: datetime) -> Parsed:
    if detail.get("Event") == TEST:
        return Parsed(ignored="test notification of an autoscaling group")
    transition = _text(detail, "LifecycleTransition")
    if transition != TERMINATING:
        return Parsed(ignored=f"lifecycle transition {transition}")
    details = {
        "token": _text(detail, "LifecycleActionToken"),
        "group": _text(detail, "AutoScalingGroupName"),
        "hook": _text(detail, "LifecycleHookName"),
    }
    instance = _instance(detail, "EC2InstanceId")
    return Parsed((Notice(NoticeKind.LIFECYCLE, SOURCE, instance_id=instance, issued_at=at, details=details),))


def _health(detail: Mapping[str, Any], at: datetime, limits: SqsSettings) -> Parsed:
    service, category = detail.get("service"), detail.get("eventTypeCategory")
    if service != "EC2" or category != "scheduledChange":
        return Parsed(ignored=f"health event {service}/{category}")
    if detail.get("statusCode") == "closed":
        return Parsed(ignored="health event that is closed")
    entities = detail.get("affectedEntities")
    if not isinstance(entities, list) or not all(isinstance(entity, dict) for entity in entities):
        raise Poison("AWS Health Event: no affectedEntities")
    deadline = _time(detail.get("startTime")) if detail.get("startTime") else None
    details = {"code": str(detail.get("eventTypeCode", ""))}
    instances = [_instance(entity, "entityValue") for entity in entities]
    return Parsed(tuple(
        Notice(NoticeKind.MAINTENANCE, SOURCE, instance_id=i, issued_at=at, deadline=deadline, details=dict(details))
        for i in instances
    ))  # fmt: skip


_READERS: dict[str, Callable[[Mapping[str, Any], datetime, SqsSettings], Parsed]] = {
    "EC2 Spot Instance Interruption Warning": _interruption(NoticeKind.SPOT_INTERRUPTION),
    "EC2 Capacity Reservation Instance Interruption Warning": _interruption(NoticeKind.CAPACITY_RESERVATION),
    "EC2 Instance Rebalance Recommendation": _rebalance,
    "EC2 Instance State-change Notification": _state_change,
    "EC2 Instance-terminate Lifecycle Action": _lifecycle_event,
    "AWS Health Event": _health,
}
