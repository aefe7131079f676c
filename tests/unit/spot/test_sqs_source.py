"""The SQS source, by real boto3 over HTTP, against moto's SQS and EventBridge."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import boto3
import notice_bodies as bodies
import pytest
from fast_queue import FastQueue
from midstream_operator.aws_settings import SqsSettings
from midstream_operator.notices.base import Notice, NoticeKind
from midstream_operator.notices.instances import Instances
from midstream_operator.notices.sqs import SqsSource
from midstream_operator.view import Node
from moto.server import ThreadedMotoServer
from notice_bodies import NODE

PATIENCE_S = 30.0


@dataclass
class Queue:
    """A queue of the fake account, and the source that reads it."""

    client: Any
    events: Any
    settings: SqsSettings
    taken: list[Notice] = field(default_factory=list)
    refuse: int = 0  # so many notices cannot be recorded

    def send(self, *messages: Any) -> None:
        texts = [m if isinstance(m, str) else json.dumps(m) for m in messages]
        for start in range(0, len(texts), 10):
            entries = [{"Id": str(n), "MessageBody": t} for n, t in enumerate(texts[start : start + 10])]
            self.client.send_message_batch(QueueUrl=self.settings.queue_url, Entries=entries)

    def left(self) -> int:
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        found = self.client.get_queue_attributes(QueueUrl=self.settings.queue_url, AttributeNames=names)
        return sum(int(found["Attributes"][name]) for name in names)

    async def handle(self, notice: Notice) -> None:
        if self.refuse:
            self.refuse -= 1
            raise RuntimeError("the API server does not answer")
        self.taken.append(notice)

    def run(
        self, until: Callable[[], bool], handle: Callable[[Notice], Awaitable[None]] | None = None,
        meanwhile: Callable[[SqsSource], Awaitable[None]] | None = None,
    ) -> SqsSource:  # fmt: skip
        """One life of the operator: the source runs until `until` holds."""
        nodes = {name: Node(name, f"aws:///eu-west-1b/{id}", "", True, "") for name, id in {"node-a": NODE}.items()}
        source = SqsSource(self.settings, Instances(nodes).node_of)

        async def body() -> None:
            task = asyncio.create_task(source.run(handle or self.handle))
            end = time.monotonic() + PATIENCE_S
            if meanwhile:
                await meanwhile(source)
            while not await asyncio.to_thread(until):
                assert time.monotonic() < end and not task.done(), f"{source.health} {source.outcomes}"
                await asyncio.sleep(0.02)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

        asyncio.run(body())
        return source


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def queue(moto: str, no_real_aws: None, request: pytest.FixtureRequest) -> Iterator[Queue]:
    client = boto3.client("sqs", endpoint_url=moto, region_name="eu-west-1")
    events = boto3.client("events", endpoint_url=moto, region_name="eu-west-1")
    url = client.create_queue(QueueName=f"q{abs(hash(request.node.nodeid))}")["QueueUrl"]
    settings = SqsSettings(
        queue_url=url, endpoint=moto, long_poll_s=1, visibility_s=1, retry_s=0.05, retry_max_s=0.2, pollers=2
    )
    yield Queue(client, events, settings)
    client.close()
    events.close()


def test_an_event_of_eventbridge_comes_through_its_rule(queue: Queue) -> None:
    names = ["QueueArn"]
    arn = queue.client.get_queue_attributes(QueueUrl=queue.settings.queue_url, AttributeNames=names)["Attributes"][
        "QueueArn"
    ]
    pattern = {"source": ["aws.ec2"], "detail-type": ["EC2 Spot Instance Interruption Warning"]}
    queue.events.put_rule(Name="midstream", EventPattern=json.dumps(pattern))
    queue.events.put_targets(Rule="midstream", Targets=[{"Id": "queue", "Arn": arn}])
    body = bodies.spot()
    entry = {"Source": body["source"], "DetailType": body["detail-type"], "Detail": json.dumps(body["detail"])}
    queue.events.put_events(Entries=[entry])
    source = queue.run(lambda: bool(queue.taken) and queue.left() == 0)
    (notice,) = queue.taken
    assert (notice.kind, notice.node, notice.instance_id) == (NoticeKind.SPOT_INTERRUPTION, "node-a", NODE)
    assert source.outcomes["recorded"] == 1 and str(source.health) == "sqs: ok"


def test_a_message_is_deleted_only_when_it_is_recorded(queue: Queue) -> None:
    queue.refuse = 2
    queue.send(bodies.spot())
    source = queue.run(lambda: bool(queue.taken) and queue.left() == 0)
    assert source.outcomes["failed"] == 2 and len(queue.taken) == 1


def test_an_operator_that_dies_before_recording_loses_nothing(queue: Queue) -> None:
    queue.send(bodies.spot())
    begun: list[Notice] = []

    async def never(notice: Notice) -> None:
        begun.append(notice)
        await asyncio.sleep(PATIENCE_S)

    queue.run(lambda: bool(begun), handle=never)
    assert queue.left() == 1
    queue.run(lambda: bool(queue.taken) and queue.left() == 0)
    assert [notice.id for notice in queue.taken] == [begun[0].id]


def test_an_operator_that_dies_after_recording_hands_over_the_same_notice_again(queue: Queue) -> None:
    """The job is named after the notice, so twice is once."""
    queue.send(bodies.spot())

    async def record_and_die(notice: Notice) -> None:
        queue.taken.append(notice)
        await asyncio.sleep(PATIENCE_S)

    queue.run(lambda: len(queue.taken) == 1, handle=record_and_die)
    queue.run(lambda: len(queue.taken) == 2 and queue.left() == 0)
    assert queue.taken[0].id == queue.taken[1].id


def test_poison_and_what_is_not_ours_does_not_stay(queue: Queue) -> None:
    queue.send("not json", bodies.TEST_NOTIFICATION, bodies.spot("i-0ffffffffffffffff"), bodies.spot())
    source = queue.run(lambda: queue.left() == 0)
    assert source.outcomes == {"poison": 1, "ignored": 1, "foreign": 1, "recorded": 1}


def test_foreign_messages_are_left_for_others_by_setting(queue: Queue) -> None:
    queue.settings = replace(queue.settings, delete_foreign=False)
    queue.send(bodies.spot("i-0ffffffffffffffff"), bodies.spot())
    source = queue.run(lambda: queue.left() == 1 and bool(queue.taken))
    assert source.outcomes["foreign"] >= 1 and len(queue.taken) == 1


def test_a_flood_of_foreign_messages_does_not_hide_the_one_that_matters(queue: Queue) -> None:
    foreign = [bodies.spot(f"i-f{n:016x}") for n in range(2000)]
    with FastQueue() as fast:
        queue.settings = replace(queue.settings, queue_url=fast.url, endpoint=fast.url, visibility_s=300)
        fast.send(*foreign[:1000], bodies.spot(), *foreign[1000:])
        source = queue.run(lambda: fast.left() == 0)
    assert len(queue.taken) == 1 and source.outcomes["foreign"] == 2000


def test_a_queue_that_does_not_answer_is_named_and_comes_back(queue: Queue) -> None:
    good = queue.settings
    queue.settings = replace(good, queue_url=good.queue_url + "-gone")

    async def until_ill(source: SqsSource) -> None:
        while not source.health.error:
            await asyncio.sleep(0.01)
        assert "QueueDoesNotExist" in str(source.health)
        queue.client.create_queue(QueueName=good.queue_url.rpartition("/")[2] + "-gone")
        queue.send(bodies.spot())
        while source.health.error:
            await asyncio.sleep(0.01)

    queue.run(lambda: bool(queue.taken) and queue.left() == 0, meanwhile=until_ill)


def test_notices_of_all_kinds_come_in_one_batch(queue: Queue) -> None:
    queue.send(
        bodies.spot(), bodies.rebalance(), bodies.state("stopping"), bodies.reservation(), bodies.lifecycle(),
        bodies.bare_lifecycle(), bodies.wrapped(bodies.bare_lifecycle()), bodies.health(NODE),
    )  # fmt: skip
    queue.run(lambda: queue.left() == 0)
    assert {notice.kind for notice in queue.taken} == set(NoticeKind) - {NoticeKind.DRAIN, NoticeKind.SCALE_IN}
    assert len({notice.id for notice in queue.taken}) == 6, "three bodies of one lifecycle action are one notice"


def test_nodes_of_other_clouds_and_unknown_instances_are_foreign() -> None:
    now = [0.0]
    nodes = {"g": Node("g", "gce://project/zone/vm", "", True, "")}
    instances = Instances(nodes, lambda: now[0])
    assert instances.node_of("") == "" and instances.node_of(NODE) == ""
    nodes["a"] = Node("a", f"aws:///eu-west-1b/{NODE}", "", True, "")
    assert instances.node_of(NODE) == "", "the flood: no walk through all nodes for each message"
    now[0] = 1.0
    assert instances.node_of(NODE) == "a"
    del nodes["a"]
    assert instances.node_of(NODE) == "a", "its pods may be there still"
