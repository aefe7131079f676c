"""KV that is at the target before anybody knows whether there will be a move: what a rebalance recommendation asks for.

Real agents and engines. The move that follows sends what came since, and nothing twice; where none follows nothing of
the copy is left but cache.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from midstream_testbed.fleet import Fleet
from midstream_testbed.vpc import Vpc
from test_kv_moves import KvWorld, agents_fds, kv_of, nothing_left, prompts, slot_bytes

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KvWorld]:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path_factory.mktemp("ahead"), steer=True) as fleet:
        made = KvWorld(vpc, fleet)
        for _ in range(2):  # what is made once and kept is there
            made.hop()
        yield made


def warm(world: KvWorld, job: str, *cancel_after_s: str) -> dict[str, Any]:
    here, there = (pod.name for pod in world.pods)
    argv = [sys.executable, str(HERE / "warm_call.py"), str(world.fleet.inventory), here, there, job, *cancel_after_s]
    done = world.fleet.operator.run(argv, env=world.fleet.env(), timeout_s=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    return found


def test_a_move_sends_what_came_since_the_copy_ahead_of_it(world: KvWorld) -> None:
    asked_for = prompts("warm", 4)
    world.reference(*asked_for)
    fds = agents_fds(world)
    asked = world.begin(*asked_for, events=200)
    told = warm(world, "ahead")
    sent = int(told["kv"]["bytesSent"])
    assert told["streams"] == 4 and sent >= 4 * (200 // 16) * slot_bytes(world)
    assert "reason" not in told["kv"]
    again = warm(world, "ahead")
    assert int(again["kv"].get("bytesSent", 0)) < sent / 2 and int(again["kv"]["bytesShared"]) >= sent
    kv = world.moved()
    assert kv["bytesShared"] >= sent, "it is there, under its hashes, for a job that knows nothing of the copies"
    assert kv["bytesSent"] < sent and (kv["blocksRecomputed"], kv["reason"]) == (0, "")
    for one in asked:
        one.unchanged()
    nothing_left(world, fds)


@pytest.mark.parametrize("after_s", ["0.02", "0.1"])
def test_a_copy_that_is_called_off_leaves_nothing_and_disturbs_no_move(world: KvWorld, after_s: str) -> None:
    asked_for = prompts(f"off {after_s}", 3)
    world.reference(*asked_for)
    fds = agents_fds(world)
    asked = world.begin(*asked_for)
    warm(world, "off", after_s)
    kv = kv_of(world.hop())
    assert kv["reason"] == ""
    for one in asked:
        one.unchanged()
    nothing_left(world, fds)


def test_a_pod_without_streams_is_warm_already(world: KvWorld) -> None:
    assert warm(world, "idle").get("kv", {}) == {}
