"""Timeouts and limits of everything that speaks to AWS, with unit and reason. Credentials come from boto3's own chain
(IRSA, EKS Pod Identity): none are ever configured here."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Ec2Settings:
    cluster: str = "midstream"  # value of the ownership tag: interfaces with another value are never touched
    region: str = ""  # empty: AWS_REGION, which IRSA and Pod Identity set
    endpoint: str = ""  # a VPC interface endpoint; empty: AWS' own
    security_groups: tuple[str, ...] = ()  # of interfaces we make; empty: those of the node's primary interface
    create_reservations: bool = False  # make a pool's subnet CIDR reservation; false: refuse a pool without one
    threads: int = 8  # calls at once: boto3 is synchronous, and the loop must never wait for it
    connect_s: float = 3.0
    read_s: float = 10.0  # EC2 answers AssignPrivateIpAddresses within a second or two
    batch_s: float = 0.05  # calls for one interface wait so long for others: a move takes seconds anyway
    burst: float = 50.0  # our share of the account's token bucket (100 assumed): the VPC CNI drinks from it as well
    per_s: float = 5.0  # and of its refill
    inventory_s: float = 1.0  # a listing of our interfaces serves everybody who asks within this time
    retry_s: float = 0.5  # first pause after a throttled or failed call; doubles, jittered
    retry_max_s: float = 8.0
    give_up_s: float = 60.0  # of retries; then the caller hears of it and comes again
    leftover_s: float = 900.0  # an interface of ours that hangs on nothing and holds nothing is deleted after this
    values_per_filter: int = 200  # EC2's limit


@dataclass(frozen=True, slots=True)
class SqsSettings:
    queue_url: str = ""  # empty: no queue
    region: str = ""
    endpoint: str = ""
    delete_foreign: bool = True  # messages about instances of other clusters; false: left for another consumer
    long_poll_s: int = 20  # SQS' maximum
    visibility_s: int = 20  # a message that could not be recorded comes again after this
    batch: int = 10  # SQS' maximum
    pollers: int = 4  # a flood of 10,000 messages must not delay the one that matters
    retry_s: float = 1.0  # first pause while SQS does not answer; doubles
    retry_max_s: float = 15.0
    notice_s: float = 120.0  # between a spot notice's time and the end of its instance, as EC2 promises
    hibernate_s: float = 10.0  # hibernation begins with its notice: what is done at once may still be done
    heartbeat_s: float = 30.0  # of a lifecycle action; its own timeout is 30 s at least


@dataclass(frozen=True, slots=True)
class AwsSettings:
    ec2: Ec2Settings = field(default_factory=Ec2Settings)
    sqs: SqsSettings = field(default_factory=SqsSettings)
