"""EventBridge's rule and SQS' queue, by moto: the other way on which EC2 tells of an interruption.

The event's body is the one of EventBridge's reference. A spot event carries no end: EC2 promises 120 s after its
`time`, so who plays a shorter notice gives it an earlier time, and nothing in the product knows.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

from midstream_testbed.cluster import ControlPlane
from midstream_testbed.instances import REGION

NOTICE_S = 120
SPOT = "EC2 Spot Instance Interruption Warning"


class NoticeQueue:
    """A context manager over one moto server on loopback."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        host, self.port = self._server.get_host_and_port()
        where: dict[str, Any] = {
            "endpoint_url": f"http://{host}:{self.port}", "region_name": REGION,
            "aws_access_key_id": "AKIATESTBED", "aws_secret_access_key": "testbed",
        }  # fmt: skip
        self._sqs, self._events = boto3.client("sqs", **where), boto3.client("events", **where)
        self.url = str(self._sqs.create_queue(QueueName="midstream")["QueueUrl"])
        attributes = self._sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=["QueueArn"])["Attributes"]
        self._events.put_rule(Name="midstream", EventPattern=json.dumps({"source": ["aws.ec2"], "detail-type": [SPOT]}))
        self._events.put_targets(Rule="midstream", Targets=[{"Id": "queue", "Arn": attributes["QueueArn"]}])

    def __enter__(self) -> NoticeQueue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sqs.close()
        self._events.close()
        self._server.stop()

    def url_inside(self, plane: ControlPlane) -> str:
        """The queue as a process beside the API server reaches it."""
        return self.url.replace(f":{self.port}/", f":{plane.expose(self.port)}/")

    def interrupt(self, instance: str, end: datetime, action: str = "terminate") -> None:
        """A spot interruption that ends then."""
        entry: dict[str, Any] = {
            "Source": "aws.ec2", "DetailType": SPOT, "Time": end.astimezone(UTC) - timedelta(seconds=NOTICE_S),
            "Detail": json.dumps({"instance-id": instance, "instance-action": action}),
        }  # fmt: skip
        self._events.put_events(Entries=[entry])

    def left(self) -> int:
        """Messages that nobody has deleted."""
        names: list[Any] = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self._sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=names)["Attributes"]
        return sum(int(found[name]) for name in names)
