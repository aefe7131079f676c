"""A job's status: phases only go forward, conditions as batch/v1 has them, figures out of the agent's report."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from midstream_agent.contract import agent_pb2 as pb
from midstream_operator.model import Phase
from midstream_operator.status import PHASES, Draft, new_condition, with_condition
from operator_objects import job_object

T0 = datetime(2026, 1, 1, tzinfo=UTC)


def draft() -> Draft:
    return Draft(job_object(), 1024)


def event(phase: int, step: str = "", what: str = "begin", message: str = "") -> pb.MigrateEvent:
    return pb.MigrateEvent(phase=pb.Phase.ValueType(phase), step=step, what=what, message=message)


def test_every_phase_of_an_agent_is_one_of_ours() -> None:
    assert set(PHASES) == {v for v in pb.Phase.values() if v != pb.PHASE_UNSPECIFIED}
    assert set(PHASES.values()) == set(Phase) - {Phase.PENDING}


def test_phases_are_stamped_once_and_never_go_back() -> None:
    d = draft()
    for i, phase in enumerate((Phase.PENDING, Phase.PREPARING, Phase.COMMITTING, Phase.SWITCHING, Phase.PREPARING)):
        d.enter(phase, T0 + timedelta(seconds=i))
    assert d.phase is Phase.COMMITTING
    stamps = [(s["phase"], s["time"][-3:-1]) for s in d.status["phaseTransitionTimestamps"]]
    assert stamps == [("Pending", "00"), ("Preparing", "01"), ("Committing", "02")]
    assert d.status["pointOfNoReturn"] == "2026-01-01T00:00:02Z"


def test_replayed_events_change_nothing() -> None:
    d = draft()
    story = [
        event(pb.PHASE_PREPARING, "PREPARE"),
        event(pb.PHASE_SWITCHING, "HOLD"),
        event(pb.PHASE_COMMITTING, "COMMIT"),
    ]
    for e in story:
        d.step(e, T0)
    d.written(d.patch())
    for e in story:
        assert not d.step(e, T0 + timedelta(hours=1))
    assert d.patch() == {}


def test_the_end_of_an_agent_is_not_the_end_of_the_job() -> None:
    d = draft()
    assert not d.step(event(pb.PHASE_SUCCEEDED), T0)
    assert not d.phase.ended


@pytest.mark.parametrize(
    ("phase", "true", "false"),
    [
        (Phase.SUCCEEDED, "Complete", "Failed"),
        (Phase.FAILED, "Failed", "Complete"),
        (Phase.ROLLED_BACK, "Failed", "Complete"),
        (Phase.ABORTED, "Failed", "Complete"),
    ],
)
def test_the_conditions_are_those_of_a_batch_job(phase: Phase, true: str, false: str) -> None:
    d = draft()
    d.end(phase, "" if phase is Phase.SUCCEEDED else "deadline_passed", "why", T0)
    conditions = {c["type"]: c for c in d.status["conditions"]}
    assert conditions[true]["status"] == "True"
    assert conditions[false]["status"] == "False"
    assert d.status["reason"] == ("Succeeded" if phase is Phase.SUCCEEDED else "DeadlinePassed")
    assert d.status["completionTime"] == "2026-01-01T00:00:00Z"


def test_a_condition_keeps_its_time_while_its_status_stays() -> None:
    first = with_condition([], new_condition("Ready", "False", "A", "a", 1), T0)
    second = with_condition(first, new_condition("Ready", "False", "B", "b", 1), T0 + timedelta(seconds=1))
    third = with_condition(second, new_condition("Ready", "True", "C", "c", 1), T0 + timedelta(seconds=2))
    assert second[0]["reason"] == "B"
    assert second[0]["lastTransitionTime"] == first[0]["lastTransitionTime"]
    assert third[0]["lastTransitionTime"] == "2026-01-01T00:00:02Z"
    assert len(third) == 1


def test_a_patch_has_what_changed_and_nothing_else() -> None:
    d = draft()
    d.enter(Phase.PENDING, T0)
    d.written(d.patch())
    d.say("waiting")
    patch = d.patch()
    assert patch == {"message": "waiting"}
    d.say("still waiting")
    d.written(patch)
    assert d.patch() == {"message": "still waiting"}


def test_the_report_becomes_figures() -> None:
    report = pb.JobReport(
        streams=pb.StreamCounts(total=5, migrated=3, rolled_back=1, lost=0, unmovable=1),
        unmovable_reasons=["NotOnFloatingIP", "NotOnFloatingIP"],
        kv=pb.KvCounts(
            bytes_total=10, bytes_sent=8, rounds=2, bytes_shared=1, blocks_recomputed=3, reason="pool_full"
        ),
        hold_ms=3.25,
        steps=[
            pb.StepTiming(name="MOVE_ADDRESS", took_ms=1.5, outcome="done"),
            pb.StepTiming(name="COMMIT", took_ms=1.0, outcome="failed"),
            pb.StepTiming(name="COMMIT", took_ms=2.0, outcome="done"),
            pb.StepTiming(name="HOLD", took_ms=0.5, outcome="undone"),
        ],
    )
    d = draft()
    d.report(report)
    assert d.status["streams"] == {
        "total": 5, "migrated": 3, "rolledBack": 1, "lost": 0, "unmovable": 1, "unmovableReasons": ["NotOnFloatingIP"],
    }  # fmt: skip
    assert d.status["kv"] == {
        "bytesTotal": 10, "bytesSent": 8, "bytesShared": 1, "rounds": 2, "blocksRecomputed": 3, "reason": "PoolFull",
    }  # fmt: skip
    assert d.status["timings"] == {"moveAddress": 1.5, "commit": 3.0, "holdUndo": 0.5, "hold": 3.25}
    assert d.status["stall"]["max"] == 3.25


def test_a_message_is_cut_to_what_a_status_may_hold() -> None:
    d = draft()
    d.say("x" * 5000)
    assert len(d.status["message"]) == 1024
