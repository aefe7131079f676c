"""What follows from a notice: the table of handling.py, and the races, at the level of decisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from midstream_operator.errors import Final
from midstream_operator.handling import (
    Abort,
    Commit,
    Create,
    Facts,
    HandlingSettings,
    Moving,
    RebalancePolicy,
    Serving,
    Step,
    Taint,
    deadline_of,
    decide,
    stands,
)
from midstream_operator.model import Phase, Reason
from midstream_operator.notices.base import Notice, NoticeKind

NOW = datetime(2026, 11, 25, 10, 0, tzinfo=UTC)
END = NOW + timedelta(seconds=120)
SETTINGS = HandlingSettings()
SPOT = Notice(NoticeKind.SPOT_INTERRUPTION, "imds", node="node-a", instance_id="i-a", issued_at=NOW, deadline=END)
REBALANCE = replace(SPOT, kind=NoticeKind.REBALANCE, deadline=None)
POD, POD2 = Serving("uid-0", "default", "llm-0"), Serving("uid-1", "default", "llm-1")
INTERRUPTIONS = sorted(set(NoticeKind) - {NoticeKind.REBALANCE, NoticeKind.MAINTENANCE})


def job(pod: str = "uid-0", target: str = "node-b", phase: Phase = Phase.PREPARING, **other: object) -> Moving:
    return replace(Moving("default", f"job-{pod}", pod, target, Reason.SPOT_INTERRUPTION, phase), **other)  # type: ignore[arg-type]


def steps(
    notice: Notice = SPOT, pods: Sequence[Serving] = (POD,), jobs: Sequence[Moving] = (),
    ended: Mapping[str, Sequence[Phase]] | None = None, settings: HandlingSettings = SETTINGS, now: datetime = NOW,
) -> list[Step]:  # fmt: skip
    return decide(Facts(notice, pods, jobs, ended or {}), settings, now)


def creates(found: Sequence[Step]) -> list[Create]:
    return [step for step in found if isinstance(step, Create)]


def test_an_interruption_taints_first_and_makes_a_job_for_each_pod() -> None:
    found = steps(pods=(POD, POD2))
    assert found[0] == Taint("node-a", "SpotInterruption")
    assert [(c.pod, c.reason, c.attempt) for c in creates(found)] == [
        (POD, Reason.SPOT_INTERRUPTION, 1), (POD2, Reason.SPOT_INTERRUPTION, 1),
    ]  # fmt: skip
    assert {c.deadline for c in creates(found)} == {END - timedelta(seconds=5)}


@pytest.mark.parametrize("kind", INTERRUPTIONS)
def test_every_kind_but_a_rebalance_moves_and_one_under_way_is_enough(kind: NoticeKind) -> None:
    notice = replace(SPOT, kind=kind)
    assert len(creates(steps(notice))) == 1
    assert steps(notice, jobs=[job()]) == [Taint("node-a", kind.value)]


@pytest.mark.parametrize(
    ("policy", "annotation", "expected"),
    [
        ("Ignore", None, None),
        ("Prepare", None, False),
        ("Migrate", None, True),
        ("Ignore", RebalancePolicy.MIGRATE, True),
        ("Migrate", RebalancePolicy.IGNORE, None),
        ("Migrate", RebalancePolicy.PREPARE, False),
    ],
)
def test_rebalance_policy(policy: str, annotation: RebalancePolicy | None, expected: bool | None) -> None:
    found = steps(REBALANCE, [replace(POD, rebalance=annotation)], settings=replace(SETTINGS, rebalance=policy))
    assert [c.commit for c in creates(found)] == ([] if expected is None else [expected])
    assert all(c.reason is Reason.REBALANCE and c.deadline is None for c in creates(found))
    assert (found == []) is (policy == "Ignore" and expected is None)


def test_a_rebalance_is_prepared_once() -> None:
    assert creates(steps(REBALANCE, jobs=[job(reason=Reason.REBALANCE)])) == []
    assert creates(steps(REBALANCE, ended={"uid-0": [Phase.ABORTED]})) == [], "a person said no"


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(Final, match="Prepare"):
        HandlingSettings(rebalance="Sometimes")


# -- races


def test_an_interruption_during_a_rebalances_preparation_commits_it() -> None:
    prepared = job(reason=Reason.REBALANCE)
    assert steps(jobs=[prepared])[1:] == [Commit(prepared, END - timedelta(seconds=SETTINGS.margin_s))]
    other = replace(SPOT, node="node-b", instance_id="i-b")
    assert steps(other, [], [prepared])[1:] == [], "while it stands by it finds another target itself"
    assert steps(jobs=[replace(prepared, committed=True)])[1:] == []


def test_two_nodes_interrupted_at_once_each_others_best_target() -> None:
    """Whatever notice is handled first: the job that picked the other node is called back, and a second attempt finds
    both nodes tainted."""
    a_to_b, b_to_a = job("uid-0", "node-b"), job("uid-1", "node-a")
    spot_b = replace(SPOT, node="node-b", instance_id="i-b")
    assert [s.job for s in steps(spot_b, [POD2], [a_to_b, b_to_a]) if isinstance(s, Abort)] == [a_to_b]
    assert [s.job for s in steps(SPOT, [POD], [a_to_b, b_to_a]) if isinstance(s, Abort)] == [b_to_a]
    (again,) = creates(steps(SPOT, [POD], [], {"uid-0": [Phase.ABORTED]}))
    assert again.attempt == 2 and again.deadline == END - timedelta(seconds=5)


@pytest.mark.parametrize("phase", list(Phase))
def test_a_job_whose_target_goes_is_called_back_only_before_its_point_of_no_return(phase: Phase) -> None:
    spot_b = replace(SPOT, node="node-b", instance_id="i-b")
    called_back = any(isinstance(s, Abort) for s in steps(spot_b, [], [job(phase=phase)]))
    assert called_back == (phase in (Phase.PENDING, Phase.PREPARING, Phase.SWITCHING))


def test_with_thirty_seconds_left_the_job_has_what_is_left() -> None:
    (made,) = creates(steps(now=END - timedelta(seconds=30)))
    assert made.deadline == END - timedelta(seconds=5) and not made.replay


@pytest.mark.parametrize("late_s", [0, 4, 60])
def test_a_deadline_that_is_over_is_tried_all_the_same(late_s: float) -> None:
    now = END + timedelta(seconds=late_s)
    (made,) = creates(steps(now=now))
    assert made.deadline == now + timedelta(seconds=10)
    assert creates(steps(now=now, ended={"uid-0": [Phase.FAILED]})) == [], "once"


def test_hibernation_gives_no_two_minutes() -> None:
    notice = replace(SPOT, deadline=NOW + timedelta(seconds=10), details={"action": "hibernate"})
    (made,) = creates(steps(notice))
    assert made.replay and made.deadline == NOW + timedelta(seconds=10)


def test_eviction_deletion_taint_imds_and_sqs_at_the_same_instant_make_one_job() -> None:
    """Karpenter's way: in any order, the job of the first is what the others find."""
    notices = [
        SPOT, replace(SPOT, source="sqs"), replace(SPOT, source="node", kind=NoticeKind.DRAIN, deadline=None),
        replace(SPOT, source="sqs", kind=NoticeKind.STATE_CHANGE, deadline=NOW, details={"state": "shutting-down"}),
    ]  # fmt: skip
    for order in permutations(notices):
        jobs: list[Moving] = []
        for notice in order:
            jobs += [job(c.pod.uid, reason=c.reason) for c in creates(steps(notice, [POD, POD2], jobs))]
        assert [j.pod_uid for j in jobs] == ["uid-0", "uid-1"]


def test_no_target_at_all_is_the_jobs_to_say_and_other_attempts_follow_while_there_is_time() -> None:
    failed = {"uid-0": [Phase.FAILED, Phase.ROLLED_BACK]}
    assert [c.attempt for c in creates(steps(ended=failed))] == [3]
    assert creates(steps(ended=failed, now=END)) == []
    assert creates(steps(ended={"uid-0": [Phase.FAILED] * 5})) == [], "and not for ever"
    assert creates(steps(ended={"uid-0": [Phase.SUCCEEDED]})) == []


def test_what_a_person_aborted_is_not_begun_again() -> None:
    facts = Facts(SPOT, [POD, POD2], [], {"uid-0": [Phase.ABORTED]}, frozenset({"uid-0"}))
    assert [c.pod for c in creates(decide(facts, SETTINGS, NOW))] == [POD2]


@pytest.mark.parametrize("state", ["stopped", "terminated"])
def test_of_a_dead_instance_nothing_can_move(state: str) -> None:
    assert steps(replace(SPOT, kind=NoticeKind.STATE_CHANGE, details={"state": state}), jobs=[job()]) == []


def test_maintenance_weeks_ahead_waits_until_it_is_near() -> None:
    notice = replace(SPOT, kind=NoticeKind.MAINTENANCE, deadline=NOW + timedelta(days=14))
    assert steps(notice) == []
    assert creates(steps(notice, now=NOW + timedelta(days=14, minutes=-50)))
    assert stands(notice, SETTINGS, NOW, NOW + timedelta(days=13), True)


def test_how_long_a_notice_stands() -> None:
    later = END + timedelta(seconds=599)
    assert stands(SPOT, SETTINGS, NOW, later, True) and not stands(SPOT, SETTINGS, NOW, later, False)
    assert not stands(SPOT, SETTINGS, NOW, later + timedelta(seconds=2), True)
    assert stands(REBALANCE, SETTINGS, NOW, NOW + timedelta(days=9), True)


def test_a_spot_notice_that_names_no_time_has_what_ec2_promises() -> None:
    taint = replace(SPOT, source="node", deadline=None)
    assert deadline_of(taint, SETTINGS, NOW) == END - timedelta(seconds=5)
    assert deadline_of(replace(taint, issued_at=None), SETTINGS, NOW) is None


phases = st.sampled_from(Phase)
moving = st.builds(
    Moving, st.just("default"), st.sampled_from(["j0", "j1", "j2"]), st.sampled_from(["uid-0", "uid-1", "uid-2"]),
    st.sampled_from(["", "node-a", "node-b"]), st.sampled_from(Reason), phases, st.booleans(),
)  # fmt: skip


@given(
    st.sampled_from(NoticeKind), st.none() | st.integers(-300, 300), st.lists(moving, max_size=4),
    st.dictionaries(st.sampled_from(["uid-0", "uid-1"]), st.lists(phases, max_size=6)), st.integers(-300, 900),
)  # fmt: skip
def test_whatever_is_known_no_pod_gets_two_jobs_and_no_deadline_is_past(
    kind: NoticeKind, left_s: int | None, jobs: list[Moving], ended: dict[str, list[Phase]], passed_s: int
) -> None:
    now = NOW + timedelta(seconds=passed_s)
    deadline = None if left_s is None else NOW + timedelta(seconds=left_s)
    found = steps(replace(SPOT, kind=kind, deadline=deadline), (POD, POD2), jobs, ended, now=now)
    made = creates(found)
    assert len({c.pod.uid for c in made}) == len(made)
    assert not {c.pod.uid for c in made} & {j.pod_uid for j in jobs}
    assert all(c.deadline is None or c.deadline > now for c in made)
    assert all(1 <= c.attempt <= SETTINGS.attempts for c in made)
    assert all(s.job.can_be_called_back for s in found if isinstance(s, Abort))
    taints = [n for n, s in enumerate(found) if isinstance(s, Taint)]
    assert taints in ([], [0]), "the taint comes before any job picks a target"
