"""Bodies of messages as AWS documents them (EventBridge events reference, Auto Scaling lifecycle hooks, AWS Health)."""

from __future__ import annotations

import json
from typing import Any

NODE = "i-0123456789abcdef0"
TIME = "2026-11-25T10:00:00Z"


def event(kind: str, source: str, **detail: Any) -> dict[str, Any]:
    return {
        "version": "0", "id": "12345678-1234-1234-1234-123456789012", "detail-type": kind, "source": source,
        "account": "123456789012", "time": TIME, "region": "eu-west-1",
        "resources": [f"arn:aws:ec2:eu-west-1b:instance/{detail.get('instance-id', NODE)}"], "detail": detail,
    }  # fmt: skip


def spot(instance: str = NODE, action: str = "terminate") -> dict[str, Any]:
    detail = {"instance-id": instance, "instance-action": action}
    return event("EC2 Spot Instance Interruption Warning", "aws.ec2", **detail)


def rebalance(instance: str = NODE) -> dict[str, Any]:
    return event("EC2 Instance Rebalance Recommendation", "aws.ec2", **{"instance-id": instance})


def state(name: str, instance: str = NODE) -> dict[str, Any]:
    return event("EC2 Instance State-change Notification", "aws.ec2", **{"instance-id": instance, "state": name})


def reservation(instance: str = NODE) -> dict[str, Any]:
    detail = {"instance-id": instance, "instance-action": "terminate"}
    return event("EC2 Capacity Reservation Instance Interruption Warning", "aws.ec2", **detail)


LIFECYCLE = {
    "LifecycleActionToken": "87654321-4321-4321-4321-210987654321", "AutoScalingGroupName": "llm",
    "LifecycleHookName": "midstream", "EC2InstanceId": NODE,
    "LifecycleTransition": "autoscaling:EC2_INSTANCE_TERMINATING",
}  # fmt: skip


def lifecycle() -> dict[str, Any]:
    return event("EC2 Instance-terminate Lifecycle Action", "aws.autoscaling", **LIFECYCLE)


def bare_lifecycle() -> dict[str, Any]:
    return {**LIFECYCLE, "RequestId": "r", "AccountId": "123456789012", "Time": "2026-11-25T10:00:00.123Z",
            "Service": "AWS Auto Scaling", "Origin": "AutoScalingGroup", "Destination": "EC2"}  # fmt: skip


TEST_NOTIFICATION = {
    "AccountId": "123456789012", "RequestId": "r", "AutoScalingGroupARN": "arn:aws:autoscaling:...",
    "AutoScalingGroupName": "llm", "Service": "AWS Auto Scaling", "Event": "autoscaling:TEST_NOTIFICATION",
    "Time": "2026-11-25T10:00:00.000Z",
}  # fmt: skip


def health(*instances: str, service: str = "EC2", category: str = "scheduledChange", **more: Any) -> dict[str, Any]:
    detail = {
        "eventArn": "arn:aws:health:eu-west-1::event/AWS_EC2_INSTANCE_REBOOT_MAINTENANCE_SCHEDULED_1",
        "eventTypeCode": "AWS_EC2_INSTANCE_REBOOT_MAINTENANCE_SCHEDULED", "eventTypeCategory": category,
        "service": service, "startTime": "Wed, 25 Nov 2026 12:00:00 GMT",
        "affectedEntities": [{"entityValue": i} for i in instances], **more,
    }  # fmt: skip
    return event("AWS Health Event", "aws.health", **detail)


def wrapped(body: dict[str, Any]) -> dict[str, Any]:
    """As SNS hands it on: the body as an escaped string."""
    return {"Type": "Notification", "MessageId": "m", "TopicArn": "arn:aws:sns:...", "Message": json.dumps(body)}
