"""Byte-exact both ways: random sizes, random pauses of reader and writer, migrations at random instants, several hops.

Each case runs clients from four places at once (outside the VPC, in it, on the source node, on the target node) while
the pod's streams hop between the two hosts. Every client checks every byte it reads, the pod every byte it gets, and
a reset, a hang or a byte that differs is an error of that connection. The last test of the file looks at all of them
together: how many connections were migrated, and how many had bytes in a queue when they were frozen.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from world import V4, V6, World

MIGRATED_WANTED = 3000
HOPS = 7
CLIENTS_A_PLACE = 16


@dataclass
class Tally:
    """Over all cases of the session."""

    migrated: int = 0
    with_bytes: int = 0
    histogram: Counter[str] = field(default_factory=Counter)

    def add(self, report: dict[str, Any]) -> None:
        self.migrated += int(report["streams"].get("migrated", 0))
        queues = report.get("queues", {})
        self.with_bytes += int(queues.get("withBytes", 0))
        for bucket, count in zip(BUCKETS, queues.get("histogram", []), strict=False):
            self.histogram[bucket] += int(count)


BUCKETS = ("0", "1-1k", "1k-16k", "16k-256k", "256k-4M", ">4M")
tally = Tally()


def run_case(world: World, seed: int, **options: Any) -> None:
    r = random.Random(seed)
    groups = [
        world.clients(place, CLIENTS_A_PLACE, seed * 1000 + 100 * i, **{"spread_s": 0.3, **options})
        for i, place in enumerate(world.places().values())
    ]
    world.wait_streams(options["address"], CLIENTS_A_PLACE)
    for _ in range(HOPS):
        time.sleep(r.uniform(0.05, 0.4))
        report = world.hop()
        assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
        tally.add(report)
    results = [g.finish() for g in groups]
    errors = [e for result in results for e in result["errors"]]
    assert errors == []
    assert sum(result["ok"] for result in results) == 4 * CLIENTS_A_PLACE


# long enough to live through most of the hops
SLOW = {"size": 4_000_000, "seconds": 6.0}


@pytest.mark.parametrize("address", [V4, V6], ids=["v4", "v6"])
@pytest.mark.parametrize("kind", ["up", "down", "both"])
def test_no_byte_is_lost_with_jumbo_frames(world: World, address: str, kind: str) -> None:
    run_case(world, 100 + 10 * ["up", "down", "both"].index(kind) + (address == V6), address=address, kind=kind, **SLOW)


@pytest.mark.parametrize("congestion", ["reno", "cubic", "bbr"])
@pytest.mark.parametrize("address", [V4, V6], ids=["v4", "v6"])
def test_no_byte_is_lost_under_each_congestion_control(small_world: World, address: str, congestion: str) -> None:
    seed = 200 + 10 * ["reno", "cubic", "bbr"].index(congestion) + (address == V6)
    for pod in small_world.pods.values():
        pod.set_congestion_control(congestion)
    run_case(small_world, seed, address=address, congestion=congestion, **SLOW)


def test_clients_with_small_buffers_keep_the_send_queue_full(world: World) -> None:
    """Server blocked: the client reads slowly into 16 kB, so nearly every freeze finds a full send queue."""
    run_case(world, 300, address=V4, kind="down", rcvbuf=16384, size=1_500_000, seconds=6.0)


def test_short_connections_come_and_go_while_the_pod_moves(world: World) -> None:
    run_case(world, 310, address=V4, seconds=1.5, spread_s=3.0)


def test_enough_connections_were_migrated_with_bytes_in_their_queues() -> None:
    """Reads what the cases above left; on its own it has nothing to say and fails."""
    print(f"\nmigrated connections: {tally.migrated}, with bytes in a queue at the freeze: {tally.with_bytes}")
    for bucket in BUCKETS:
        print(f"  {bucket:>9} bytes queued: {tally.histogram[bucket]}")
    assert tally.migrated >= MIGRATED_WANTED
    assert tally.with_bytes >= tally.migrated / 2
