"""Real agents do what the model of docs/ownership.md does, by switchover Steer: as test_ownership_traces.py by Wait.

The runs that a move by Steer has of its own: the address follows after COMMIT, is lost by the network, or by an agent
that dies meanwhile; the target's node dies with it, or the source's before it has moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import endless
import pytest
from midstream_testbed.fleet import Fleet
from midstream_testbed.vpc import Vpc
from ownership_model import Checker, run_finder
from ownership_replay_steer import SteerReplay
from world import V4, World

CLIENTS = 2
MOVED, THAWED, LOST, NO_JOB = "Succeeded", "RolledBack", "Failed", ""
FORWARD = "HEAR_ACTIVATED MOVE_ADDRESS ADDRESS_MOVED"

# A run must have these rows in that order ("+": at once), and end so.
RUNS = [
    (f"{FORWARD} FOLLOW RELEASE FORGET", MOVED),
    ("HOLD +FAIL THAW_NOTHING_SENT RELEASE SESSION_ENDED", THAWED),
    ("HOLD +SOURCE_CRASHES THAW_NOTHING_SENT RELEASE SESSION_ENDED", THAWED),
    ("RESTORE +SOURCE_CRASHES +SESSION_ENDED SOURCE_RESTARTS THAW_DISCARDED RELEASE", THAWED),
    ("RESTORED +TARGET_CRASHES FAIL TARGET_RESTARTS DISCARD THAW_DISCARDED RELEASE", THAWED),
    ("HEAR_RESTORED +SOURCE_CRASHES SOURCE_RESTARTS THAW_DISCARDED RELEASE", THAWED),
    ("HEAR_RESTORED +FAIL DISCARDED +LOSE DISCARD_AGAIN THAW_DISCARDED RELEASE", THAWED),
    (f"COMMIT +SOURCE_CRASHES SOURCE_RESTARTS {FORWARD} FOLLOW RELEASE FORGET", MOVED),
    (f"COMMIT +TARGET_CRASHES TARGET_RESTARTS {FORWARD} FOLLOW RELEASE FORGET", MOVED),
    (f"ACTIVATED +TARGET_CRASHES TARGET_RESTARTS {FORWARD} FOLLOW RELEASE FORGET", MOVED),
    (f"GO_LIVE +LOSE COMMIT_AGAIN {FORWARD} FOLLOW RELEASE FORGET", MOVED),
    (f"HEAR_ACTIVATED +SOURCE_CRASHES SOURCE_RESTARTS {FORWARD} FOLLOW RELEASE FORGET", MOVED),
    (f"{FORWARD} +SOURCE_CRASHES SOURCE_RESTARTS HEAR_ACTIVATED FOLLOW RELEASE FORGET", MOVED),
    (f"{FORWARD} +TARGET_CRASHES TARGET_RESTARTS FOLLOW RELEASE FORGET", MOVED),
    (f"{FORWARD} +ADDRESS_REVERSED ADDRESS_MOVED FOLLOW RELEASE FORGET", MOVED),
    (f"{FORWARD} FOLLOW +SOURCE_CRASHES SOURCE_RESTARTS HEAR_ACTIVATED FOLLOW RELEASE FORGET", MOVED),
]
NODE_DEATHS = [
    ("RESTORED +TARGET_DIES FAIL THAW_TARGET_GONE RELEASE", THAWED),
    ("COMMIT +TARGET_DIES LOSE_TO_DEAD_TARGET RELEASE", LOST),
    ("HEAR_ACTIVATED MOVE_ADDRESS +TARGET_DIES MOVE_BACK RELEASE", LOST),
    (f"{FORWARD} +TARGET_DIES MOVE_BACK ADDRESS_MOVED RELEASE", LOST),
    ("HEAR_ACTIVATED +SOURCE_DIES MOVE_ADDRESS ADDRESS_MOVED", NO_JOB),
    ("RESTORED +SOURCE_DIES SOURCE_GONE GO_LIVE MOVE_ADDRESS ADDRESS_MOVED", NO_JOB),
    ("COMMIT +SOURCE_DIES SOURCE_GONE GO_LIVE MOVE_ADDRESS ADDRESS_MOVED", NO_JOB),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Checker:
    return run_finder(tmp_path_factory.mktemp("model") / "runs", steer=True)


def build_world(folder: Path) -> Iterator[World]:
    with Vpc.create() as vpc, Fleet(vpc, folder, steer=True) as fleet:
        yield World.build(vpc, fleet, "--peer-reply-s", "4", "--address-confirm-s", "3")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield from build_world(tmp_path_factory.mktemp("ownership"))


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[World]:
    """A world of its own for a test that takes a node from it."""
    yield from build_world(tmp_path)


def name_of(value: object) -> str:
    return str(value).replace(" +", ">").replace(" ", "-").lower()


@pytest.mark.parametrize(("goal", "end"), RUNS, ids=name_of)
def test_agents_do_what_the_model_does(world: World, runs: Checker, goal: str, end: str) -> None:
    world.restart_if_dead()
    world.at = world.vpc.fabric.owner(V4) or world.at
    play(world, runs, goal, end)
    if end == MOVED:
        world.at = world.away


@pytest.mark.parametrize(("goal", "end"), NODE_DEATHS, ids=name_of)
def test_agents_do_what_the_model_does_when_a_node_dies(mortal: World, runs: Checker, goal: str, end: str) -> None:
    play(mortal, runs, goal, end)


def play(world: World, runs: Checker, goal: str, end: str) -> None:
    replay = SteerReplay(world, runs.shortest_run(goal))
    clients = endless.start(world, world.outside, V4, CLIENTS, 7)
    world.wait_streams(V4, CLIENTS)
    try:
        replay.play()
        assert replay.end() == end
        if end != LOST:
            endless.all_go_on(clients, CLIENTS)
    except BaseException:
        replay.give_up()
        raise
    finally:
        clients.kill()
        clients.wait()
