"""What follows from a notice about a node: a pure function of what is there now.

It is asked again and again while a notice stands, and says each time what is still missing. So a lost event, a restart
and a job that failed are all made good by the next pass, and nothing is done twice.

    interruption             taint; a job for each serving pod without one; what is prepared commits, and is told until
                             when; jobs whose *target* is that node are called back before their point of no return
                             (what is only prepared finds another target itself)
    rebalance: Ignore        nothing
               Prepare       taint (no new targets there); a job that has a target, copies KV ahead, and waits
               Migrate       the same, and it goes on at once
    maintenance, far away    nothing yet
    a job is under way       nothing: the first notice made it
    an attempt failed        another one, while the node may still be there
    a person aborted it      nothing: it was their word
    stopped, terminated      nothing can move any more

An interruption is everything else: spot, reservation, lifecycle, drain, scale-in, state change. Deadlines are the
notice's minus a margin, and for a spot notice without one its time + 120 s. One that is over is stretched to a few
seconds from now: the instance may live longer than it was told, and a try costs the client nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum

from midstream_operator.errors import Final
from midstream_operator.model import Phase, Reason
from midstream_operator.notices.base import Notice, NoticeKind


class RebalancePolicy(StrEnum):
    IGNORE = "Ignore"
    PREPARE = "Prepare"
    MIGRATE = "Migrate"


class Capacity(StrEnum):
    NONE = "None"  # there is a warm replica, or somebody else sees to it
    SCALE = "Scale"  # where nobody can take over, the workload is scaled by one until the move is over


@dataclass(frozen=True, slots=True)
class HandlingSettings:
    rebalance: str = "Prepare"  # Ignore, Prepare, Migrate; a pod's annotation midstream.dev/rebalance overrides it
    capacity: str = "None"  # None, Scale: what a rebalance's job asks for that finds no target
    margin_s: float = 5.0  # before the deadline: clocks differ, and EC2 has been early
    notice_s: float = 120.0  # what EC2 promises, where a source does not say until when
    least_s: float = 10.0  # a deadline that is over, or nearly, becomes this: nothing is lost by trying
    attempts: int = 5  # of one notice for one pod
    stands_s: float = 600.0  # a notice is looked after for so long beyond its deadline
    pass_s: float = 1.0  # between two looks at what stands
    warm_s: float = 30.0  # between two copies of KV to the target of a rebalance; 0: none is copied before the move
    maintenance_s: float = (
        3600.0  # before scheduled maintenance: it is announced weeks ahead (IMDS says it all the time)
    )

    def __post_init__(self) -> None:
        if self.rebalance not in set(RebalancePolicy):
            raise Final("bad_config", f"handling.rebalance: {self.rebalance!r} is none of {', '.join(RebalancePolicy)}")
        if self.capacity not in set(Capacity):
            raise Final("bad_config", f"handling.capacity: {self.capacity!r} is none of {', '.join(Capacity)}")

    @property
    def policy(self) -> RebalancePolicy:
        return RebalancePolicy(self.rebalance)


@dataclass(frozen=True, slots=True)
class Serving:
    """A pod with floating addresses on the node of the notice."""

    uid: str
    namespace: str
    name: str
    rebalance: RebalancePolicy | None = None  # by annotation


@dataclass(frozen=True, slots=True)
class Moving:
    """A job that has not ended."""

    namespace: str
    name: str
    pod_uid: str
    target_node: str
    reason: Reason
    phase: Phase
    committed: bool = False  # a prepared job that was told to go

    @property
    def stands_by(self) -> bool:
        """Prepared for a move that may never come."""
        return self.reason is Reason.REBALANCE and not self.committed

    @property
    def can_be_called_back(self) -> bool:
        return self.phase in (Phase.PENDING, Phase.PREPARING, Phase.SWITCHING) and not self.stands_by


@dataclass(frozen=True, slots=True)
class Facts:
    notice: Notice
    pods: Sequence[Serving]
    jobs: Sequence[Moving]  # of the whole cluster
    ended: Mapping[str, Sequence[Phase]] = field(default_factory=dict)  # pod's uid -> jobs of this notice that ended
    declined: frozenset[str] = frozenset()  # pods whose job of this notice a person aborted


@dataclass(frozen=True, slots=True)
class Taint:
    node: str
    why: str


@dataclass(frozen=True, slots=True)
class Create:
    pod: Serving
    reason: Reason
    deadline: datetime | None
    attempt: int = 1
    commit: bool = False  # a rebalance that does not wait for the interruption
    replay: bool = False  # no time for KV


@dataclass(frozen=True, slots=True)
class Commit:
    job: Moving
    deadline: datetime | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    job: Moving
    why: str


Step = Taint | Create | Commit | Abort

REASONS = {
    NoticeKind.SPOT_INTERRUPTION: Reason.SPOT_INTERRUPTION,
    NoticeKind.REBALANCE: Reason.REBALANCE,
    NoticeKind.CAPACITY_RESERVATION: Reason.CAPACITY_RESERVATION,
    NoticeKind.MAINTENANCE: Reason.MAINTENANCE,
    NoticeKind.DRAIN: Reason.DRAIN,
    NoticeKind.SCALE_IN: Reason.SCALE_IN,
    NoticeKind.STATE_CHANGE: Reason.SPOT_INTERRUPTION,
    NoticeKind.LIFECYCLE: Reason.SCALE_IN,
}
DEAD = ("stopped", "terminated")


def decide(facts: Facts, settings: HandlingSettings, now: datetime) -> list[Step]:
    """In the order in which it has to be done: the taint first, so that no job picks the node as its target."""
    notice = facts.notice
    if notice.details.get("state") in DEAD:
        return []
    if notice.kind is NoticeKind.REBALANCE:
        return _rebalance(facts, settings)
    ahead = timedelta(seconds=settings.maintenance_s)
    if notice.kind is NoticeKind.MAINTENANCE and notice.deadline is not None and notice.deadline - now > ahead:
        return []
    taint = [Taint(notice.node, notice.kind.value)] if notice.node and not notice.pod_uid else []
    return [*taint, *_callbacks(facts), *_moves(facts, settings, now)]


def _callbacks(facts: Facts) -> list[Step]:
    """The target is interrupted in mid-migration: back to the source, before the point of no return."""
    why = f"{facts.notice.node} is going ({facts.notice.kind.value}): another target is needed"
    return [
        Abort(job, why)
        for job in facts.jobs
        if facts.notice.node and job.target_node == facts.notice.node and job.can_be_called_back
    ]


def _moves(facts: Facts, settings: HandlingSettings, now: datetime) -> list[Step]:
    steps: list[Step] = []
    deadline = deadline_of(facts.notice, settings, now)
    replay = facts.notice.details.get("action") == "hibernate"
    for pod in facts.pods:
        job = next((job for job in facts.jobs if job.pod_uid == pod.uid), None)
        if job is not None:
            if job.stands_by:
                steps.append(Commit(job, deadline))
            continue
        attempt = _attempt(facts.ended.get(pod.uid, ()), settings)
        if attempt and pod.uid not in facts.declined and (attempt == 1 or _is_time(facts.notice, settings, now)):
            steps.append(Create(pod, REASONS[facts.notice.kind], deadline, attempt, replay=replay))
    return steps


def _attempt(ended: Sequence[Phase], settings: HandlingSettings) -> int:
    """Number of the next one; 0: none."""
    if Phase.SUCCEEDED in ended or len(ended) >= settings.attempts:
        return 0
    return len(ended) + 1


def _is_time(notice: Notice, settings: HandlingSettings, now: datetime) -> bool:
    """For another attempt: while the node may still be there."""
    end = _end(notice, settings)
    return end is None or now < end


def _end(notice: Notice, settings: HandlingSettings) -> datetime | None:
    if notice.deadline is not None:
        return notice.deadline
    if notice.kind is NoticeKind.SPOT_INTERRUPTION and notice.issued_at is not None:
        return notice.issued_at + timedelta(seconds=settings.notice_s)
    return None


def deadline_of(notice: Notice, settings: HandlingSettings, now: datetime) -> datetime | None:
    """None: nobody says until when, or it is so."""
    end = _end(notice, settings)
    if end is None:
        return None
    return max(end - timedelta(seconds=settings.margin_s), now + timedelta(seconds=settings.least_s))


def _rebalance(facts: Facts, settings: HandlingSettings) -> list[Step]:
    steps: list[Step] = []
    for pod in facts.pods:
        policy = pod.rebalance or settings.policy
        begun = any(job.pod_uid == pod.uid for job in facts.jobs) or facts.ended.get(pod.uid)
        if policy is not RebalancePolicy.IGNORE and not begun:
            steps.append(Create(pod, Reason.REBALANCE, None, commit=policy is RebalancePolicy.MIGRATE))
    wanted = settings.policy is not RebalancePolicy.IGNORE or bool(steps)
    return [Taint(facts.notice.node, facts.notice.kind.value), *steps] if wanted and facts.notice.node else steps


def stands(notice: Notice, settings: HandlingSettings, since: datetime, now: datetime, node_is_there: bool) -> bool:
    """Whether a notice is still to be looked after."""
    if not node_is_there:
        return False
    end = _end(notice, settings) or since
    if notice.kind in (NoticeKind.REBALANCE, NoticeKind.MAINTENANCE) and notice.deadline is None:
        return True  # for as long as the node lives
    return now < max(end, since) + timedelta(seconds=settings.stands_s)
