"""The target's node dies after streams have moved to it, before their address has: what had moved is lost by name,
everything else goes on at the source, and new clients find the pod there. It may die for good, which the operator says,
or come back from a reboot with nothing of what it had, which its boot id says.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import endless
import pytest
from midstream_testbed.fleet import Fleet, unpin
from midstream_testbed.namespace import Process
from midstream_testbed.vpc import Vpc
from ownership_replay import DECLARE_GONE
from remains import entries
from world import V4, V6, World

CLIENTS = 6
BATCH = 4  # of twelve streams
OPTIONS = ("--batch-streams", str(BATCH), "--parallel-batches", "1", "--peer-reply-s", "2", "--address-confirm-s", "2")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path, steer=True) as fleet:
        yield World.build(vpc, fleet, *OPTIONS)


def start(world: World, patience_s: float = 6) -> list[Process]:
    clients = [endless.start(world, world.outside, a, CLIENTS, 7, patience_s) for a in (V4, V6)]
    for address in (V4, V6):
        world.wait_streams(address, CLIENTS)
    return clients


def lose_target(world: World, node: str, where: str) -> dict[str, Any]:
    """A move during which the target's node dies while `node` is at a failpoint, and the operator tells the source; the
    job's report."""
    world.agent(node).arm(f"{where}={'wait' if node == 'node-a' else 'delay:60000'}")
    with ThreadPoolExecutor() as pool:
        ends = pool.submit(world.hop, "--job", "gone")
        world.wait_fired(node, where)
        world.b.delete()
        argv = [sys.executable, "-c", DECLARE_GONE, str(world.fleet.inventory), "node-a", "gone", "node-b"]
        refused = world.fleet.operator.run([*argv, "1"], env=world.fleet.env(), check=False)
        assert "stale_epoch" in refused.stderr
        world.fleet.operator.run(argv, env=world.fleet.env())
        world.agent("node-a").arm("source.RELEASE.do.after=delay:0")  # go on, if it waits
        report = ends.result()
    assert (report["phase"], report["reason"]) == ("PHASE_FAILED", "target_lost"), report["output"]
    return report


def remove_link(name: str, ip: Any) -> None:
    ip.link("del", index=ip.link_lookup(ifname=name)[0])


def reboot(world: World, name: str) -> None:
    """What is left is the disk: pods, sockets, BPF programs and maps, devices have gone."""
    agent, host = world.agent(name), world.agent(name).host
    agent.process.kill()
    agent.process.wait(10)
    world.pods[name].delete()
    for device in ("msvx0", "msrt0"):
        host.netlink(functools.partial(remove_link, device))
    unpin(agent.bpffs)
    world.fleet.load_bpf(host, agent.bpffs)
    world.fleet.restart_agent(agent, "--boot-id", "another-boot")


def served(world: World) -> int:
    """New clients of both families that are served, of four."""
    groups = [world.clients(world.outside, 2, 90, address=a, seconds=0.2, size_log10=(3, 4)) for a in (V4, V6)]
    return sum(int(g.finish()["ok"]) for g in groups)


def still_served(clients: list[Process]) -> int:
    """Both groups at once: those that are lost are given all of their patience."""
    with ThreadPoolExecutor() as pool:
        return sum(int(found["ok"]) for found in pool.map(endless.end, clients))


def counts(report: dict[str, Any]) -> tuple[int, int, int]:
    """Streams migrated, lost, rolled back."""
    migrated, lost, back = (int(report["streams"].get(k, 0)) for k in ("migrated", "lost", "rolledBack"))
    return migrated, lost, back


def wait_nothing_held(world: World) -> None:
    """At the source, once late packets can no longer come."""
    end = time.monotonic() + 10
    while any((held := entries(world.agent("node-a").bpffs)).values()):
        if time.monotonic() > end:
            raise AssertionError(f"left: {held}")
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("node", "where", "moved"),
    [
        ("node-a", "source.OPEN.do.before", BATCH),  # of a second batch
        ("node-a", "source.FOLLOW.do.before", 2 * CLIENTS),
        ("node-b", "target.MOVE_ADDRESS.do.before", 0),  # beside the batches: how many is chance
        ("node-b", "target.MOVE_ADDRESS.do.after", 0),  # the network brings the address to a node that has gone
    ],
)
def test_the_job_ends_and_the_source_serves_what_is_left(world: World, node: str, where: str, moved: int) -> None:
    clients = start(world)
    migrated, lost, back = counts(lose_target(world, node, where))
    assert migrated == 0
    assert lost >= BATCH
    assert lost + back == 2 * CLIENTS
    assert not moved or lost == moved
    assert served(world) == 4
    assert still_served(clients) == back
    wait_nothing_held(world)


@pytest.mark.parametrize(
    ("node", "where", "moved"),
    [
        ("node-a", "source.OPEN.do.before", BATCH),
        ("node-a", "source.FOLLOW.do.before", 2 * CLIENTS),
        ("node-b", "target.MOVE_ADDRESS.do.before", 0),
        ("node-b", "target.MOVE_ADDRESS.do.after", 0),
    ],
)
def test_a_target_that_has_rebooted_is_known_by_its_boot_id(world: World, node: str, where: str, moved: int) -> None:
    """Nobody says anything: the source asks again, and hears it. Meanwhile the network may bring the address to a node
    that knows nothing of it: what the source still serves waits for TCP's own timers, which have doubled by then."""
    clients = start(world, patience_s=20)
    world.agent(node).arm(f"{where}={'wait' if node == 'node-a' else 'delay:60000'}")
    with ThreadPoolExecutor() as pool:
        ends = pool.submit(world.hop, "--job", "rebooted")
        world.wait_fired(node, where)
        reboot(world, "node-b")
        world.agent("node-a").arm("source.RELEASE.do.after=delay:0")  # go on, if it waits
        report = ends.result()
    assert (report["phase"], report["reason"]) == ("PHASE_FAILED", "target_lost"), report["output"]
    migrated, lost, back = counts(report)
    assert migrated == 0
    assert lost >= BATCH
    assert lost + back == 2 * CLIENTS
    assert not moved or lost == moved
    assert served(world) == 4
    assert still_served(clients) == back
    wait_nothing_held(world)
