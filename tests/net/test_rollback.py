"""Whatever fails before COMMIT rolls back, whatever fails after it rolls forward; no byte is lost, nothing is left.

Agents are killed with SIGKILL, or a step is made to fail, at the named failpoints before and after each `do` and
`undo`. The test asserts where it killed, starts the agent again, and looks at the clients: each checks every byte.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
from world import V4, Clients, World

BEFORE_COMMIT = ("CONNECT", "PREPARE", "PAUSE", "HOLD", "EXPORT", "SEND", "MOVE_ADDRESS")
SOURCE_DO = [f"source.{step}.do.{when}" for step in BEFORE_COMMIT for when in ("before", "after")]
TARGET_DO = [
    "target.RESTORE.do.before",
    "target.RESTORE.do.after",
    "target.MOVE_ADDRESS.do.before",
    "target.MOVE_ADDRESS.do.after",
]
AFTER_COMMIT_SOURCE = ["source.COMMIT.do.journalled", "source.COMMIT.do.after", "source.RELEASE.do.before"]
AFTER_COMMIT_TARGET = [
    "target.ACTIVATE.do.before",
    "target.ACTIVATE.do.journalled",
    "target.ACTIVATE.do.after",
    "target.reply.commit",
]
CLIENTS = 6


def start_clients(world: World, seed: int) -> list[Clients]:
    groups = [
        world.clients(place, CLIENTS, seed * 100 + 20 * i, address=V4, kind="both", size=1_500_000, seconds=5.0)
        for i, place in enumerate((world.outside, world.a))
    ]
    world.wait_streams(V4, 2 * CLIENTS - 1)
    return groups


def assert_unharmed(groups: list[Clients]) -> None:
    results = [g.finish() for g in groups]
    assert [e for r in results for e in r["errors"]] == []
    assert sum(r["ok"] for r in results) == len(groups) * CLIENTS


def assert_nothing_held(world: World) -> None:
    """No flow entry, no note, no leaving address on either node (MOVED entries linger for two seconds)."""
    end = time.monotonic() + 10
    while (left := {name: world.held(name) for name in world.fleet.agents}) and any(left.values()):
        if time.monotonic() > end:
            raise AssertionError(f"left behind: {left}")
        time.sleep(0.1)


def settle(world: World, job: str) -> str:
    """Start killed agents again and wait for the job's end; its phase, by the source's agent."""
    world.restart_if_dead()
    return world.wait_job(job)


@pytest.mark.parametrize("where", SOURCE_DO + TARGET_DO)
def test_a_step_that_fails_before_commit_is_undone(world: World, where: str) -> None:
    groups = start_clients(world, 41)
    world.agent(world.at if where.startswith("source") else world.away).arm(f"{where}=error")
    report = world.hop()
    assert report["phase"] in ("PHASE_ROLLED_BACK", "PHASE_FAILED"), report["output"]
    assert report["reason"] == "failpoint"
    assert_unharmed(groups)
    assert_nothing_held(world)


@pytest.mark.parametrize("where", SOURCE_DO)
def test_the_source_agent_killed_before_commit_rolls_back_when_it_starts_again(world: World, where: str) -> None:
    groups = start_clients(world, 42)
    source = world.agent(world.at)
    source.arm(f"{where}=kill")
    job = world.hop_that_breaks()
    assert source.process.wait(20) == -9
    assert source.fired()[-1] == where
    phase = settle(world, job)
    assert phase in ("RolledBack", "Failed"), phase
    assert_unharmed(groups)
    assert_nothing_held(world)


@pytest.mark.parametrize("where", TARGET_DO)
def test_the_target_agent_killed_before_commit_leaves_the_streams_at_the_source(world: World, where: str) -> None:
    groups = start_clients(world, 43)
    target = world.agent(world.away)
    target.arm(f"{where}=kill")
    job = world.hop_in_background()
    assert target.process.wait(20) == -9
    assert target.fired()[-1] == where
    phase = settle(world, job)
    assert phase in ("RolledBack", "Failed"), phase
    assert_unharmed(groups)
    assert_nothing_held(world)


@pytest.mark.parametrize("where", AFTER_COMMIT_SOURCE)
def test_the_source_agent_killed_after_commit_goes_forward_when_it_starts_again(world: World, where: str) -> None:
    groups = start_clients(world, 44)
    source = world.agent(world.at)
    source.arm(f"{where}=kill")
    job = world.hop_that_breaks()
    assert source.process.wait(20) == -9
    assert source.fired()[-1] == where
    assert settle(world, job) == "Succeeded"
    world.at = world.away
    assert_unharmed(groups)
    assert_nothing_held(world)


@pytest.mark.parametrize("where", AFTER_COMMIT_TARGET)
def test_the_target_agent_killed_after_commit_goes_forward_when_it_starts_again(world: World, where: str) -> None:
    groups = start_clients(world, 45)
    target = world.agent(world.away)
    target.arm(f"{where}=kill")
    job = world.hop_in_background()
    assert target.process.wait(20) == -9
    assert target.fired()[-1] == where
    assert settle(world, job) == "Succeeded"
    world.at = world.away
    assert_unharmed(groups)
    assert_nothing_held(world)


def test_a_target_that_is_cut_off_is_rolled_back_once_it_can_be_asked_again(world: World) -> None:
    """Partition: the target's agent hears nothing after the checkpoint has come; silence is no proof."""
    groups = start_clients(world, 46)
    world.agent(world.away).arm("target.RESTORE.do.after=hang")
    job = world.hop_in_background()
    world.wait_fired(world.away, "target.RESTORE.do.after")
    with world.cut_off(world.away):
        time.sleep(2)
        phases = world.job_phase(job)
        assert phases == "Switching", "while the target is silent the clients stay held"
    world.agent(world.away).process.kill()
    world.agent(world.away).process.wait(10)
    assert settle(world, job) in ("RolledBack", "Failed")
    assert_unharmed(groups)
    assert_nothing_held(world)


def test_an_abort_before_the_point_of_no_return_rolls_back_and_a_second_one_says_that_it_ended(world: World) -> None:
    groups = start_clients(world, 47)
    world.agent(world.at).arm("source.PREPARE.do.after=delay:1500")
    job = world.hop_in_background()
    world.wait_fired(world.at, "source.PREPARE.do.after")
    assert "being rolled back" in world.fleet.cli("abort", job).stdout
    assert world.wait_job(job) == "Aborted"
    assert "has ended" in world.fleet.cli("abort", job).stdout
    assert_unharmed(groups)
    assert_nothing_held(world)


def test_the_deadline_stops_a_job_before_the_point_of_no_return(world: World) -> None:
    groups = start_clients(world, 48)
    world.agent(world.at).arm("source.PREPARE.do.after=delay:700")
    report: dict[str, Any] = world.hop("--deadline-s", "0.5")
    assert (report["phase"], report["reason"]) == ("PHASE_FAILED", "deadline_passed")
    assert_unharmed(groups)
    assert_nothing_held(world)
