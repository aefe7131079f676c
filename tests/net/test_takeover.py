"""The source's node dies in the middle of a move, for good: what has come to the target whole goes on there.

Until somebody proves that the node is gone nothing goes live: silence is no proof. Afterwards no byte may be missing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from midstream_agent.hold import Hold
from midstream_testbed.fleet import Fleet
from midstream_testbed.vpc import Vpc
from ownership_replay import DECLARE_GONE
from world import V4, V6, World

CLIENTS = 6
BATCH = 4  # of twelve streams
MOVE_S = 2.0  # the network takes its time, and the dead node carries nothing meanwhile


@pytest.fixture
def world(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    steer = request.param == "steer"
    with Vpc.create(move_seconds=MOVE_S if steer else 0) as vpc, Fleet(vpc, tmp_path, steer=steer) as fleet:
        yield World.build(vpc, fleet, "--batch-streams", str(BATCH), "--parallel-batches", "1")


def declare_gone(world: World, job: str, gone: str, to: str, *epoch: str) -> dict[str, Any]:
    """What the operator says once the cloud has told it; `epoch`: instead of one of right now."""
    argv = [sys.executable, "-c", DECLARE_GONE, str(world.fleet.inventory), to, job, gone, *epoch]
    done = world.fleet.operator.run(argv, env=world.fleet.env(), check=False)
    if done.returncode:
        return {"error": done.stderr}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def die_at(world: World, where: str) -> tuple[str, list[Any]]:
    """Streams, and a move whose source's node dies at a failpoint."""
    kind = {"kind": "both", "size": 1_500_000, "seconds": 2.5, "spread_s": 0.05}
    clients = [world.clients(world.outside, CLIENTS, 7, address=a, **kind) for a in (V4, V6)]
    for address in (V4, V6):
        world.wait_streams(address, CLIENTS)
    world.agent("node-a").arm(f"{where}=delay:60000")
    job = world.hop_in_background()
    world.wait_fired("node-a", where)
    world.a.delete()
    return job, clients


def held(world: World) -> int:
    with Hold.open(world.agent("node-b").bpffs) as hold:
        return len(hold.flow_keys())


def finish(clients: list[Any]) -> tuple[int, list[str]]:
    results = [c.finish() for c in clients]
    return sum(r["ok"] for r in results), [e for r in results for e in r["errors"]]


@pytest.mark.parametrize("world", ["steer"], indirect=True)
@pytest.mark.parametrize("where", ["source.BATCHES.do.after", "source.FOLLOW.do.before"])
def test_streams_that_had_moved_go_on_when_their_address_had_not(world: World, where: str) -> None:
    job, clients = die_at(world, where)
    earlier = str(time.time_ns() // 1_000_000)
    said = declare_gone(world, job, "node-a", "node-b")
    assert said["streams"] == 2 * CLIENTS, said
    assert finish(clients) == (2 * CLIENTS, [])
    assert held(world) == 0
    assert declare_gone(world, job, "node-a", "node-b") == said  # the operator did not hear the answer
    # after the job began, and before the last word of this kind
    assert "stale_epoch" in declare_gone(world, job, "node-a", "node-b", earlier)["error"]


@pytest.mark.parametrize("world", ["wait", "steer"], indirect=True)
def test_whole_checkpoints_go_live_when_their_source_is_gone_and_not_before(world: World) -> None:
    """In a first batch by Steer, and in the only one by Wait: the rest died with the node."""
    job, clients = die_at(world, "source.COMMIT.do.before")
    time.sleep(1)
    whole = held(world)
    world.at = "node-b"
    assert whole == world.established(V4) + world.established(V6) > 0
    said = declare_gone(world, job, "node-b", "node-b")
    assert "peer_identity" in said["error"]
    for stale in ("0", "1"):  # older than the command that began the job
        said = declare_gone(world, job, "node-a", "node-b", stale)
        assert "stale_epoch" in said["error"]
    assert held(world) == whole
    said = declare_gone(world, job, "node-a", "node-b")
    assert said["streams"] == whole, said
    assert held(world) == 0
    ok, errors = finish(clients)
    assert ok == whole
    assert len(errors) == 2 * CLIENTS - whole
