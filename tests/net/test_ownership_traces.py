"""Real agents do what the model of docs/ownership.md does: its shortest runs through each row, played on two nodes.

See ownership_replay.py for how, and agent/midstream_agent/model/ownership.pml for the model. The clients check every
byte of their streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import endless
import pytest
from midstream_testbed.fleet import Fleet
from midstream_testbed.vpc import Vpc
from ownership_model import Checker, Row, run_finder
from ownership_replay import Replay
from world import V4, World

CLIENTS = 2
MOVED, THAWED, LOST = "Succeeded", "RolledBack", "Failed"

# A run must have these rows in that order ("+": at once), and end so.
RUNS = [
    ("HEAR_ACTIVATED RELEASE FORGET", MOVED),
    ("HOLD +FAIL THAW_NOTHING_SENT RELEASE SESSION_ENDED", THAWED),
    ("HOLD +ABORT +FAIL THAW_NOTHING_SENT RELEASE SESSION_ENDED", "Aborted"),
    ("HOLD +SOURCE_CRASHES THAW_NOTHING_SENT RELEASE SESSION_ENDED", THAWED),
    ("RESTORE +SOURCE_CRASHES +SESSION_ENDED SOURCE_RESTARTS THAW_DISCARDED RELEASE", THAWED),
    ("RESTORE +TARGET_CRASHES TARGET_RESTARTS FAIL THAW_DISCARDED RELEASE", THAWED),
    ("RESTORED +SOURCE_CRASHES SOURCE_RESTARTS THAW_DISCARDED RELEASE", THAWED),
    ("RESTORED +TARGET_CRASHES FAIL TARGET_RESTARTS DISCARD THAW_DISCARDED RELEASE", THAWED),
    ("RESTORED +LOSE +FAIL THAW_DISCARDED RELEASE", THAWED),
    ("HEAR_RESTORED +SOURCE_CRASHES SOURCE_RESTARTS THAW_DISCARDED RELEASE", THAWED),
    ("HEAR_RESTORED TAKE_ADDRESS ADDRESS_MOVED +FAIL TAKE_ADDRESS_BACK ADDRESS_MOVED THAW_DISCARDED RELEASE", THAWED),
    ("HEAR_RESTORED +FAIL +SOURCE_CRASHES SOURCE_RESTARTS THAW_DISCARDED RELEASE", THAWED),
    ("HEAR_RESTORED +FAIL DISCARD +TARGET_CRASHES TARGET_RESTARTS THAW_DISCARDED RELEASE", THAWED),
    ("HEAR_RESTORED +FAIL DISCARDED +LOSE DISCARD_AGAIN THAW_DISCARDED RELEASE", THAWED),
    ("HEAR_RESTORED +FAIL DISCARDED +SOURCE_CRASHES SOURCE_RESTARTS DISCARD_AGAIN THAW_DISCARDED RELEASE", THAWED),
    ("COMMIT +SOURCE_CRASHES SOURCE_RESTARTS HEAR_ACTIVATED RELEASE FORGET", MOVED),
    ("COMMIT +TARGET_CRASHES TARGET_RESTARTS HEAR_ACTIVATED RELEASE FORGET", MOVED),
    ("ACTIVATED +TARGET_CRASHES TARGET_RESTARTS HEAR_ACTIVATED RELEASE FORGET", MOVED),
    ("GO_LIVE +TARGET_CRASHES TARGET_RESTARTS COMMIT_AGAIN HEAR_ACTIVATED RELEASE FORGET", MOVED),
    ("GO_LIVE +SOURCE_CRASHES SOURCE_RESTARTS COMMIT_AGAIN HEAR_ACTIVATED RELEASE FORGET", MOVED),
    ("GO_LIVE +LOSE COMMIT_AGAIN HEAR_ACTIVATED RELEASE FORGET", MOVED),
    ("HEAR_ACTIVATED +SOURCE_CRASHES SOURCE_RESTARTS HEAR_ACTIVATED RELEASE FORGET", MOVED),
]
NODE_DEATHS = [
    ("RESTORED +TARGET_DIES FAIL THAW_TARGET_GONE RELEASE", THAWED),
    ("COMMIT +TARGET_DIES LOSE_TO_DEAD_TARGET RELEASE", LOST),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Checker:
    return run_finder(tmp_path_factory.mktemp("model") / "runs")


def build_world(folder: Path) -> Iterator[World]:
    with Vpc.create() as vpc, Fleet(vpc, folder) as fleet:
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
    rows = runs.shortest_run(goal)
    world.restart_if_dead()
    world.at = world.vpc.fabric.owner(V4) or world.at
    play(world, rows, end)
    if end == MOVED:
        world.at = world.away


@pytest.mark.parametrize(("goal", "end"), NODE_DEATHS, ids=name_of)
def test_agents_do_what_the_model_does_when_a_node_dies(mortal: World, runs: Checker, goal: str, end: str) -> None:
    play(mortal, runs.shortest_run(goal), end)


def play(world: World, rows: list[Row], end: str) -> None:
    replay = Replay(world, rows)
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
