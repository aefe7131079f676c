"""Nothing is left behind after many migrations by Steer: 40, or 500 with LONG=1.

Streams that live through all of them and short ones that come and go, from outside the VPC, in it, and on both nodes;
their address takes its time each time. What is counted is said in remains.py; each kind of thing is left once on
purpose, to see that it is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace

import pytest
from endless import streams
from midstream_agent import tcp
from midstream_agent.hold import Hold
from midstream_agent.hold_layout import BORN_HERE, FLOW_MOVED
from midstream_agent.node import CTL
from midstream_testbed.fleet import AGENT_PORT
from remains import RSS_MARGIN_KB, Remains
from world import PORT, V4, V6, World

HOPS = 500 if os.environ.get("LONG") else 40
WARM_UP = 100 if os.environ.get("LONG") else 12
"""An even number: the streams are then where they were. With 500, beyond what agents remember of ended jobs."""
COMERS_EVERY = 10


def hop_often(world: World, times: int) -> None:
    with streams(world, 2, 5, V4), streams(world, 1, 900, V6):
        for i in range(times):
            comers = []
            if i % COMERS_EVERY == 0:
                comers = [world.clients(p, 4, i, seconds=0.2, size_log10=(2, 4)) for p in world.places().values()]
            report = world.hop()
            assert (report["phase"], report["switchover"]) == ("PHASE_SUCCEEDED", "Steer"), report["output"]
            results = [c.finish() for c in comers]
            assert [e for r in results for e in r["errors"]] == []


def test_nothing_is_left_after_many_migrations(steer_world: World) -> None:
    steer_world.vpc.fabric.move_seconds = 0.1
    hop_often(steer_world, WARM_UP)
    before = Remains.settled(steer_world)
    hop_often(steer_world, HOPS)
    after = before.wait_nothing_new()
    steer_world.vpc.fabric.move_seconds = 0
    grown = {name: after.rss_kb[pid] - before.rss_kb[pid] for pid, name in after.names.items()}
    print(f"\n{HOPS} migrations; memory grew by, in kB: {grown}")


# -- the counting itself -----------------------------------------------------------------------------------

KEY = tcp.mapped(V4) + tcp.mapped("10.77.0.99") + bytes(4)


@contextmanager
def flow(world: World) -> Iterator[None]:
    with Hold.open(world.agent("node-a").bpffs) as hold:
        hold.set_flows(KEY, CTL.pack(FLOW_MOVED, 0, 0, 0, 0, 0, 0, 0), 1)
        yield
        hold.delete_flows(KEY, 1)


@contextmanager
def birth(world: World) -> Iterator[None]:
    with Hold.open(world.agent("node-b").bpffs) as hold:
        hold._births.update(KEY, BORN_HERE.to_bytes(4, "little"))
        yield
        hold.end_births(V4)


@contextmanager
def route(world: World) -> Iterator[None]:
    lo = {"dst": "203.0.113.9/32", "oif": 1}
    world.a.netlink(lambda ip: ip.route("add", **lo))
    yield
    world.a.netlink(lambda ip: ip.route("del", **lo))


@contextmanager
def device(world: World) -> Iterator[None]:
    world.b.netlink(lambda ip: ip.link("add", ifname="ms-left", kind="veth", peer={"ifname": "ms-left-2"}))
    yield
    world.b.netlink(lambda ip: ip.link("del", index=ip.link_lookup(ifname="ms-left")[0]))


@contextmanager
def neighbour(world: World) -> Iterator[None]:
    eth1 = world.a.netlink(lambda ip: ip.link_lookup(ifname="eth1")[0])
    entry = {"dst": "10.77.0.222", "lladdr": "02:00:00:00:00:09", "ifindex": eth1}
    world.a.netlink(lambda ip: ip.neigh("add", **entry))
    yield
    world.a.netlink(lambda ip: ip.neigh("del", **entry))


@contextmanager
def journal(world: World) -> Iterator[None]:
    path = world.agent("node-a").state_dir / "left.jsonl"
    path.touch()
    yield
    path.unlink()


def stream(world: World) -> AbstractContextManager[object]:
    return closing(world.inside.connect(V4, PORT))


def descriptor(world: World) -> AbstractContextManager[object]:
    """Of an agent: somebody who connects and says nothing."""
    return closing(world.fleet.operator.connect(world.b.ipv4, AGENT_PORT))


@pytest.mark.parametrize(
    ("leave", "found"),
    [(flow, "holds 1 flows"), (birth, "holds 1 births"), (route, "203.0.113.9"), (device, "ms-left"),
     (neighbour, "10.77.0.222"), (journal, "left.jsonl"), (stream, "stream ESTABLISHED"),
     (descriptor, "agent of node-b has {'socket:[N]': 1} too many")],
)  # fmt: skip
def test_what_is_left_is_found(
    steer_world: World, leave: Callable[[World], AbstractContextManager[object]], found: str
) -> None:
    before = Remains.settled(steer_world)
    with leave(steer_world):
        assert found in "\n".join(before.new_in(Remains.of(steer_world)))
    before.wait_nothing_new()


def test_memory_that_grows_is_found(steer_world: World) -> None:
    now = Remains.settled(steer_world)
    less = replace(now, rss_kb={pid: kb - RSS_MARGIN_KB - 1 for pid, kb in now.rss_kb.items()})
    assert [line for line in less.new_in(now) if "has grown by" in line] == [
        f"{name} has grown by {RSS_MARGIN_KB + 1} kB" for name in now.names.values()
    ]
