"""A thousand nodes interrupted within one second, at the level of sources, decisions, planner and provider.

Real boto3 over HTTP against the testbed's EC2 with its token buckets, and a queue; what is simulated is the cluster: a
job is recorded in a dict where the operator would create a MigrationJob, and nothing streams.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import notice_bodies as bodies
from fast_queue import FastQueue
from midstream_operator.aws_settings import Ec2Settings, SqsSettings
from midstream_operator.handling import Create, Facts, HandlingSettings, Serving, decide
from midstream_operator.notices.base import Notice, NoticeKind
from midstream_operator.notices.instances import Instances
from midstream_operator.notices.sqs import SqsSource
from midstream_operator.packing import Stream, Target
from midstream_operator.plan_model import Plan, Situation
from midstream_operator.planner import plan
from midstream_operator.providers.base import Place
from midstream_operator.providers.ec2 import Ec2Provider
from midstream_operator.providers.ec2_inventory import CLUSTER_TAG, INSTANCE_TAG, NO_MANAGE_TAG
from midstream_operator.settings import Pool
from midstream_operator.view import Node
from midstream_testbed.ec2 import Ec2, Ec2Server, in_memory

MIB, GIB = 1 << 20, 1 << 30
SETTINGS = HandlingSettings()


@dataclass
class Fleet:
    """`doomed` nodes with a pod and a floating IP each, `survivors` with room for them."""

    doomed: int
    survivors: int
    ec2: Ec2 = field(default_factory=in_memory)
    nodes: dict[str, Node] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)  # node -> its floating IP
    jobs: dict[str, Create] = field(default_factory=dict)  # by the notice's id and pod, as jobs are named
    plans: dict[str, Plan] = field(default_factory=dict)  # by node
    told_at_s: dict[str, float] = field(default_factory=dict)  # node -> when its notice was handed over first
    planned_at_s: dict[str, float] = field(default_factory=dict)
    moves: set[asyncio.Task[None]] = field(default_factory=set)
    promised: int = 0  # EC2 calls of plans that have not been made yet

    def __post_init__(self) -> None:
        subnet = self.ec2.account.add_subnet("10.0.0.0/18")
        subnet.reservations["scr-1"] = ("10.0.32.0/19", "explicit", {})
        self.pool = Pool("llm", "ec2", ("10.0.32.0/19",), "", subnet.id)
        for number in range(self.doomed + self.survivors):
            name = f"node-{number:04}"
            own, second = (f"10.0.{base + number // 200}.{10 + number % 200}" for base in (1, 16))
            instance = self.ec2.account.add_instance(subnet, "g5.xlarge", primary=own)
            eni = self.ec2.account.new_interface(subnet, second)
            eni.tags = {CLUSTER_TAG: "test", INSTANCE_TAG: instance.id, NO_MANAGE_TAG: "true"}
            body = f"Action=AttachNetworkInterface&NetworkInterfaceId={eni.id}&InstanceId={instance.id}&DeviceIndex=1"
            self.ec2._buckets.clear()
            assert self.ec2.handle(SIGNED, body)[0] == 200
            self.nodes[name] = Node(name, f"aws:///eu-west-1a/{instance.id}", "", True, "")
            if number < self.doomed:
                self.addresses[name] = f"10.0.{32 + number // 200}.{10 + number % 200}"
                self.ec2.account.own(self.addresses[name], eni.id)
        self.ec2._buckets.clear()
        self.ec2.calls.clear()
        self.targets = [Target(f"pod-{name}", name, 40 * GIB, 12, 8000.0) for name in list(self.nodes)[self.doomed :]]
        self.free = {target.pod: 12 for target in self.targets}

    async def ready(self) -> None:
        """Whatever the operator has long before a notice comes."""

    async def done(self) -> None:
        """What `ready` opened is closed."""

    def note_planned(self, node: str) -> None:
        self.planned_at_s[node] = time.monotonic()

    def instance(self, node: str) -> str:
        return self.nodes[node].provider_id.rpartition("/")[2]

    def interrupted(self) -> list[str]:
        return list(self.addresses)

    # -- the operator, as far as this goes

    async def handle(self, notice: Notice, provider: Ec2Provider) -> None:
        node = notice.node
        self.told_at_s.setdefault(node, time.monotonic())
        facts = Facts(notice, [Serving(f"uid-{node}", "default", f"pod-{node}")], [])
        for step in decide(facts, SETTINGS, datetime.now(UTC)):
            if isinstance(step, Create) and f"{notice.id}/{step.pod.uid}" not in self.jobs:
                self.jobs[f"{notice.id}/{step.pod.uid}"] = step
                self._plan(node, step, provider)

    def _plan(self, node: str, job: Create, provider: Ec2Provider) -> None:
        assert job.deadline is not None
        streams = tuple(
            Stream(f"{node}/{n}", f"pod-{node}", self.addresses[node], 200 * MIB, 4000, 1e5) for n in range(8)
        )
        budget = provider.budget()
        made = plan(
            Situation(
                node, time.time(), job.deadline.timestamp() + SETTINGS.margin_s, streams, self._roomy(), 600e6,
                calls=type(budget)(budget.available, budget.refill_per_s, self.promised),
            )
        )  # fmt: skip
        self.plans[node] = made
        self.note_planned(node)
        target = made.moving[0].target
        assert target is not None
        self.free[target.pod] -= 1
        self.moves.add(asyncio.create_task(self._move(node, target.node, provider), name=f"move {node}"))

    def _roomy(self) -> tuple[Target, ...]:
        """The picker's part: the few survivors that serve least."""
        best = sorted(self.targets, key=lambda t: (-self.free[t.pod], t.pod))[:3]
        return tuple(best)

    async def _move(self, node: str, target: str, provider: Ec2Provider) -> None:
        place = Place(target, self.nodes[target].provider_id, "", "default", f"pod-{target}", f"uid-{target}")
        await provider.assign([self.addresses[node]], place, 1)
        while not await provider.confirm([self.addresses[node]], place):
            await asyncio.sleep(0.5)

    def owners(self) -> Counter[str]:
        """How many of the addresses are on which instance."""
        account = self.ec2.account
        attachments = [account.interfaces[account.addresses[a].interface].attachment for a in self.addresses.values()]
        return Counter(attachment.instance for attachment in attachments if attachment)


SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=x/20260101/eu-west-1/ec2/aws4_request, SignedHeaders=host, "
    f"Signature={'0' * 64}",
    "X-Amz-Date": "20260101T000000Z",
}


async def interrupt(fleet: Fleet, queue: FastQueue, url: str, ec2: Ec2Settings, foreign: int) -> SqsSource:
    """All nodes at once, by queue and by metadata; returns when the queue is empty and all addresses have moved."""
    provider = Ec2Provider(ec2, [fleet.pool])
    settings = SqsSettings(queue_url=queue.url, endpoint=queue.url, long_poll_s=1)
    source = SqsSource(settings, Instances(fleet.nodes).node_of)

    async def handle(notice: Notice) -> None:
        await fleet.handle(notice, provider)

    await fleet.ready()
    at = datetime.now(UTC)
    deadline = at + timedelta(seconds=120)
    doomed = fleet.interrupted()
    messages = [{**bodies.spot(fleet.instance(node)), "time": at.isoformat()} for node in doomed]
    strangers = [bodies.spot(f"i-f{n:016x}") for n in range(foreign)]
    queue.send(*strangers[: foreign // 2], *messages, *strangers[foreign // 2 :])
    listening = asyncio.create_task(source.run(handle))
    try:
        for node in doomed[::2]:  # every second one is heard by its agent as well
            instance = fleet.instance(node)
            await handle(Notice(NoticeKind.SPOT_INTERRUPTION, "imds", node, instance, issued_at=at, deadline=deadline))
            await asyncio.sleep(0)
        while queue.left():
            assert not listening.done()
            await asyncio.sleep(0.05)
        await asyncio.gather(*fleet.moves)
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await provider.close()
        await fleet.done()
    return source


def run(fleet: Fleet, *, foreign: int = 0) -> SqsSource:
    with Ec2Server(fleet.ec2) as server, FastQueue() as queue:
        ec2 = Ec2Settings(cluster="test", endpoint=server.url)
        return asyncio.run(interrupt(fleet, queue, server.url, ec2, foreign))
