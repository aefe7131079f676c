"""Whatever fails before COMMIT rolls back, whatever fails after it rolls forward; no byte is lost, nothing is left.

Agents are killed with SIGKILL, or a step is made to fail, at the named failpoints before and after each `do` and
`undo`; or the other node cannot be reached from some step on. Each test asserts where it struck, starts the agent
again, and looks at the clients (each checks every byte of its stream) and at both nodes: addresses, routes, rules,
qdiscs, filters, BPF maps, journals, sockets and descriptors must be what they were.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from midstream_testbed.fleet import Fleet
from midstream_testbed.vpc import Vpc
from traces import CLIENTS, Streams, Traces, kill_at, settle, start_streams
from world import V4, World

BEFORE_COMMIT = ("CONNECT", "PREPARE", "PAUSE", "HOLD", "EXPORT", "SEND", "MOVE_ADDRESS")
SOURCE_DO = [f"source.{step}.do.{when}" for step in BEFORE_COMMIT for when in ("before", "after")]
SOURCE_UNDO = [f"source.{step}.undo.{when}" for step in BEFORE_COMMIT for when in ("before", "after")]
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
UNDONE = ("RolledBack", "Failed")
OTHER_SERVER = [sys.executable, str(Path(__file__).parents[2] / "examples" / "websocket_echo.py"), "8000"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One with little patience for a silent peer, as several tests wait for it to end."""
    folder = tmp_path_factory.mktemp("rollback")
    with Vpc.create() as vpc, Fleet(vpc, folder) as fleet:
        yield World.build(vpc, fleet, "--peer-reply-s", "3", "--address-confirm-s", "2")


@pytest.fixture(scope="module")
def traces(world: World) -> Traces:
    return Traces.of(world)


@pytest.fixture
def streams(traces: Traces, request: pytest.FixtureRequest) -> Streams:
    return start_streams(traces, sum(request.node.name.encode()))


@pytest.mark.parametrize("where", SOURCE_DO + TARGET_DO)
def test_a_step_that_fails_before_commit_is_undone(world: World, streams: Streams, where: str) -> None:
    world.agent(world.at if where.startswith("source") else world.away).arm(f"{where}=error")
    report = world.hop()
    assert report["phase"] in ("PHASE_ROLLED_BACK", "PHASE_FAILED"), report["output"]
    assert report["reason"] == "failpoint"
    streams.unharmed()


@pytest.mark.parametrize("where", SOURCE_DO)
def test_the_source_agent_killed_before_commit_rolls_back_when_it_starts_again(
    world: World, streams: Streams, where: str
) -> None:
    job = kill_at(world, world.at, where)
    assert settle(world, job) in UNDONE
    streams.unharmed()


@pytest.mark.parametrize("where", SOURCE_UNDO)
def test_the_source_agent_killed_while_it_rolls_back_ends_that_when_it_starts_again(
    world: World, streams: Streams, where: str
) -> None:
    job = kill_at(world, world.at, where, "source.MOVE_ADDRESS.do.after")
    assert settle(world, job) in UNDONE
    streams.unharmed()


def test_a_client_that_resets_while_the_agent_is_away_takes_nobody_with_it(world: World, streams: Streams) -> None:
    """Its socket is nobody's any more when the next agent asks the pod for those of the job."""
    unread = {"kind": "down", "size": 8_000_000, "seconds": 30.0, "slow": "reader", "spread_s": 0.0}
    doomed = world.clients(world.inside, 1, 7, address=V4, **unread)
    world.wait_streams(V4, CLIENTS + 1)
    time.sleep(0.3)  # something lies unread in it: its end is a RST and no FIN
    job = kill_at(world, world.at, "source.PAUSE.undo.before", "source.MOVE_ADDRESS.do.after")
    doomed.process.kill()
    doomed.process.wait(20)
    assert settle(world, job) == "RolledBack"
    streams.unharmed()


@pytest.mark.parametrize("where", TARGET_DO)
def test_the_target_agent_killed_before_commit_leaves_the_streams_at_the_source(
    world: World, streams: Streams, where: str
) -> None:
    job = kill_at(world, world.away, where)
    assert settle(world, job) in UNDONE
    streams.unharmed()


def test_the_target_agent_killed_while_it_discards_has_discarded_when_it_starts_again(
    world: World, streams: Streams
) -> None:
    job = kill_at(world, world.away, "target.DISCARD.do.before", "source.MOVE_ADDRESS.do.after")
    assert settle(world, job) in UNDONE
    streams.unharmed()


@pytest.mark.parametrize("where", AFTER_COMMIT_SOURCE)
def test_the_source_agent_killed_after_commit_goes_forward_when_it_starts_again(
    world: World, streams: Streams, where: str
) -> None:
    job = kill_at(world, world.at, where)
    assert settle(world, job) == "Succeeded"
    world.at = world.away
    streams.unharmed()


@pytest.mark.parametrize("where", AFTER_COMMIT_TARGET)
def test_the_target_agent_killed_after_commit_goes_forward_when_it_starts_again(
    world: World, streams: Streams, where: str
) -> None:
    job = kill_at(world, world.away, where)
    assert settle(world, job) == "Succeeded"
    world.at = world.away
    streams.unharmed()


@pytest.mark.parametrize("step", ["CONNECT", "PREPARE"])
def test_a_target_that_cannot_be_reached_before_anything_is_sent_ends_the_job(
    world: World, streams: Streams, step: str
) -> None:
    source = world.agent(world.at)
    source.arm(f"source.{step}.do.before=delay:500")
    job = world.hop_in_background()
    world.wait_fired(world.at, f"source.{step}.do.before")
    with world.cut_off():
        assert world.wait_job(job) in UNDONE
    streams.unharmed()


@pytest.mark.parametrize("step", ["PAUSE", "HOLD", "EXPORT", "SEND"])
def test_a_target_that_is_cut_off_is_rolled_back_once_it_can_be_asked_again(
    world: World, streams: Streams, step: str
) -> None:
    """The checkpoint may have reached it, and silence is no proof: until it answers, the clients stay held."""
    source = world.agent(world.at)
    source.arm(f"source.{step}.do.before=delay:500,source.SEND.undo.before=delay:0")
    job = world.hop_in_background()
    world.wait_fired(world.at, f"source.{step}.do.before")
    with world.cut_off():
        world.wait_fired(world.at, "source.SEND.undo.before")
        assert world.job_phase(job) == "Switching"
        assert world.held(world.at)["flows"] == 2 * CLIENTS
    assert world.wait_job(job) in UNDONE
    streams.unharmed()


def test_a_target_that_is_cut_off_with_the_address_is_rolled_back_and_the_address_comes_back(
    world: World, streams: Streams
) -> None:
    """Its proof that the address has moved never reaches the source."""
    world.agent(world.away).arm("target.MOVE_ADDRESS.do.before=delay:500")
    world.agent(world.at).arm("source.MOVE_ADDRESS.undo.before=delay:0")
    job = world.hop_in_background()
    world.wait_fired(world.away, "target.MOVE_ADDRESS.do.before")
    with world.cut_off():
        assert world.vpc.fabric.wait_owner(V4, world.away)
        world.wait_fired(world.at, "source.MOVE_ADDRESS.undo.before")
        assert world.job_phase(job) == "Switching"
    assert world.wait_job(job) in UNDONE
    assert world.vpc.fabric.owner(V4) == world.at
    streams.unharmed()


def test_a_target_that_is_cut_off_after_commit_hears_of_it_later(world: World, streams: Streams) -> None:
    world.agent(world.at).arm("source.COMMIT.do.journalled=delay:500")
    job = world.hop_in_background()
    world.wait_fired(world.at, "source.COMMIT.do.journalled")
    with world.cut_off():
        time.sleep(4)  # longer than one try to reach it
        assert world.job_phase(job) == "Committing"
    assert world.wait_job(job) == "Succeeded"
    world.at = world.away
    streams.unharmed()


def test_a_target_agent_that_hangs_and_then_dies_is_rolled_back(world: World, streams: Streams) -> None:
    target = world.agent(world.away)
    target.arm("target.RESTORE.do.after=hang")
    world.agent(world.at).arm("source.SEND.undo.before=delay:0")
    job = world.hop_in_background()
    world.wait_fired(world.away, "target.RESTORE.do.after")
    world.wait_fired(world.at, "source.SEND.undo.before")
    target.process.kill()
    target.process.wait(10)
    assert settle(world, job) in UNDONE
    streams.unharmed()


def test_a_target_pod_that_does_not_answer_refuses_the_streams(world: World, streams: Streams) -> None:
    pod = world.fleet.pods[world.pods[world.away].name].process
    os.kill(pod.pid, signal.SIGSTOP)
    try:
        report = world.hop()
    finally:
        os.kill(pod.pid, signal.SIGCONT)
    assert (report["phase"], report["reason"]) == ("PHASE_FAILED", "peer_timeout")
    streams.unharmed()


def test_a_pod_that_is_too_busy_when_the_source_agent_starts_again_is_asked_until_it_answers(
    world: World, streams: Streams
) -> None:
    """Given up after one try, its streams would stay held for ever, and SYNs silenced."""
    pod = world.fleet.pods[world.source.name].process
    job = kill_at(world, world.at, "source.EXPORT.do.after")
    os.kill(pod.pid, signal.SIGSTOP)
    try:
        world.restart_if_dead()
        agent, end = world.agent(world.at), time.monotonic() + 30
        while "not taken up yet: handoff_timeout" not in agent.log:
            assert time.monotonic() < end, agent.log
            time.sleep(0.05)
    finally:
        os.kill(pod.pid, signal.SIGCONT)
    assert world.wait_job(job) == "RolledBack"
    streams.unharmed()


def test_a_target_pod_of_another_kind_is_refused_by_name(world: World, streams: Streams, tmp_path: Path) -> None:
    """The workload is the same by its label; what the pod says of itself is not."""
    host = world.agent(world.away).host
    before = world.fleet.pods[world.pods[world.away].name].workload
    other = host.add_pod("stranger")
    try:
        world.fleet.run_pod(other, OTHER_SERVER, before)
        world.fleet.wait_ready("stranger")
        report = world.fleet.migrate(world.source.name, world.away, "--target-pod", "stranger")
        assert report["reason"] == "target_kind", report["output"]
    finally:
        world.fleet.pods.pop("stranger", None)
        other.delete()
    streams.unharmed()


def test_an_abort_before_the_point_of_no_return_rolls_back_and_a_second_one_says_that_it_ended(
    world: World, streams: Streams
) -> None:
    world.agent(world.at).arm("source.PREPARE.do.after=delay:1500")
    job = world.hop_in_background()
    world.wait_fired(world.at, "source.PREPARE.do.after")
    assert "being rolled back" in world.fleet.cli("abort", job).stdout
    assert world.wait_job(job) == "Aborted"
    assert "has ended" in world.fleet.cli("abort", job).stdout
    streams.unharmed()


def test_the_deadline_stops_a_job_before_the_point_of_no_return(world: World, streams: Streams) -> None:
    world.agent(world.at).arm("source.PREPARE.do.after=delay:700")
    report: dict[str, Any] = world.hop("--deadline-s", "0.5")
    assert (report["phase"], report["reason"]) == ("PHASE_FAILED", "deadline_passed")
    streams.unharmed()
