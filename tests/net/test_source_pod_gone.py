"""The source's pod dies before the point of no return: the job ends, says so, and leaves nothing on either node."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from midstream_testbed.fleet import Fleet
from midstream_testbed.vpc import Vpc
from ownership_replay import wait_for
from remains import entries
from world import V4, World

CLIENTS = 3


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path, steer=True) as fleet:
        yield World.build(vpc, fleet, "--peer-reply-s", "2", "--address-confirm-s", "2")


@pytest.mark.parametrize("where", ["source.PREPARE.do.before", "source.HOLD.do.before", "source.SEND.do.before"])
def test_the_job_ends_and_says_so(world: World, where: str) -> None:
    clients = world.clients(world.outside, CLIENTS, 5, kind="both", size=5_000_000, seconds=8.0, idle_s=5)
    world.wait_streams(V4, CLIENTS)
    source = world.agent("node-a")
    source.arm(f"{where}=wait")
    with ThreadPoolExecutor() as pool:
        ends = pool.submit(world.hop)
        wait_for(lambda: where in source.fired(), where)
        process = world.fleet.pods[world.pods["node-a"].name].process  # the pod stays: a container of several
        process.kill()
        process.wait(10)
        source.arm(f"{where}=error")
        report = ends.result()
    assert (report["phase"], report["reason"]) == ("PHASE_FAILED", "source_pod_gone"), report["output"]
    assert clients.finish()["ok"] == 0
    wait_for(lambda: not any(n for a in world.fleet.agents.values() for n in entries(a.bpffs).values()), "the entries")
