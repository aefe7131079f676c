"""The byte-exact cases (test_byte_exact.py) by switchover Steer, with a network that takes its time or misbehaves.

Streams hop in small batches while the network moves their address at once, after a second or (LONG=1) ten, after having
refused once, after having said yes and done nothing, and with the address taken back in between. CI sees a part of each
kind, LONG=1 all of them with ten seeds.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from byte_cases import run_case
from remains import Remains
from world import V4, V6, World

LONG = bool(os.environ.get("LONG"))
SEEDS = pytest.mark.parametrize("seed", range(1, 11 if LONG else 2))
MOVES_S = (0.0, 1.0, 10.0) if LONG else (0.0, 1.0)
FAULT_S = 1.0


@pytest.fixture(autouse=True)
def quick_again(steer_world: World, small_steer_world: World) -> Iterator[None]:
    yield
    for world in (steer_world, small_steer_world):
        fabric = world.vpc.fabric
        fabric.move_seconds, fabric.refuse, fabric.lie = 0, False, False
        Remains.settled(world)


def plain(world: World) -> dict[str, Any]:
    report = world.hop()
    assert report.get("switchover") == "Steer", report["output"]
    return report


def with_flag(name: str) -> Callable[[World], dict[str, Any]]:
    """The network does so at first."""

    def hop(world: World) -> dict[str, Any]:
        fabric = world.vpc.fabric
        setattr(fabric, name, True)
        timer = threading.Timer(FAULT_S, setattr, (fabric, name, False))
        timer.start()
        try:
            return plain(world)
        finally:
            timer.join()

    return hop


def reversed_once(world: World) -> dict[str, Any]:
    """The network gives every address back as soon as it has moved."""
    target = world.away
    world.agent(target).arm("target.MOVE_ADDRESS.do.before=delay:300")

    def reverse(address: str) -> None:
        if world.vpc.fabric.wait_owner(address, target):
            world.vpc.fabric.reverse(address)

    threads = [threading.Thread(target=reverse, args=(a,)) for a in (V4, V6)]
    for thread in threads:
        thread.start()
    try:
        return plain(world)
    finally:
        for thread in threads:
            thread.join()


FAULTS = {"refused": with_flag("refuse"), "lied": with_flag("lie"), "reversed": reversed_once}
CONGESTION = ("reno", "cubic", "bbr")
# name, MTU is small, addresses, hops, options: those of test_byte_exact.py
CASES: dict[str, tuple[bool, tuple[str, ...], dict[str, Any]]] = {
    **{
        f"{'small' if small else 'jumbo'}-{'v6' if address == V6 else 'v4'}-{cc}": (
            small, (address,), {"congestion": cc, "size": 2_000_000},
        )
        for small in (False, True) for address in (V4, V6) for cc in CONGESTION
    },
    **{f"sizes-{kind}": (False, (V4, V6), {"kind": kind, "size_log10": (2, 6.7)}) for kind in ("up", "down", "both")},
    "blocked": (False, (V4,), {"kind": "down", "rcvbuf": 16_384, "size": 1_500_000, "slow": "reader"}),
    "unread": (True, (V6,), {"kind": "up", "size": 2_000_000, "slow": "reader"}),
    "families": (True, (V4, V6), {"size": 2_000_000}),
    "short": (False, (V4, V6), {"seconds": 0.5, "spread_s": 4.0, "size_log10": (2, 5)}),
}  # fmt: skip
IN_CI = {("jumbo-v6-bbr", 0.0), ("small-v4-cubic", 1.0), ("blocked", 1.0), ("short", 1.0)}
RUNS = [(case, move_s) for case in CASES for move_s in MOVES_S if LONG or (case, move_s) in IN_CI]


@SEEDS
@pytest.mark.parametrize(("case", "move_s"), RUNS)
def test_no_byte_is_lost(steer_world: World, small_steer_world: World, case: str, move_s: float, seed: int) -> None:
    small, addresses, options = CASES[case]
    world = small_steer_world if small else steer_world
    world.set_congestion_control(options.get("congestion", "cubic"))
    world.vpc.fabric.move_seconds = move_s
    hops = 5 if LONG else 3
    options = {"seconds": 1.0 + hops * (0.5 + move_s), **options}
    run_case(world, f"steer {case} {move_s}", seed, *addresses, hops=hops, hop=lambda: plain(world), **options)


@SEEDS
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("small", [False, True] if LONG else [False], ids=lambda small: "small" if small else "jumbo")
def test_no_byte_is_lost_when_the_network_misbehaves(
    steer_world: World, small_steer_world: World, small: bool, fault: str, seed: int
) -> None:
    world = small_steer_world if small else steer_world
    options = {"size": 1_000_000, "seconds": 4.0}
    hop = FAULTS[fault]
    run_case(world, f"steer {fault}", seed, V4, V6, hops=2, hop=lambda: hop(world), **options)
