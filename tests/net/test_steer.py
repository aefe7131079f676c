"""Switchover Steer: streams change nodes in batches, before their address does, through the tunnel.

Every client checks every byte it reads, the pod every byte it gets, while the cloud takes its time with the address,
refuses it, lies about it or takes it back; while agents die at each step; while clients keep coming. Afterwards both
nodes must be what they were: addresses, routes, rules, filters, BPF maps, journals, sockets and descriptors.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from midstream_agent.hold import Hold
from midstream_testbed.fleet import Fleet
from midstream_testbed.namespace import Namespace
from midstream_testbed.vpc import Vpc
from traces import CLIENTS, Streams, Traces, kill_at, settle, start_streams
from world import PORT, V4, V6, World

LONG = bool(os.environ.get("LONG"))
BATCH = 3  # of ten streams: four batches, two at a time
FIRST_BATCH = [
    f"source.{step}.do.{when}"
    for step in ("CONNECT", "PREPARE", "PAUSE", "HOLD", "EXPORT", "SEND")
    for when in ("before", "after")
]
TARGET_DO = ["target.RESTORE.do.before", "target.RESTORE.do.after"]
FURTHER_BATCH = ["source.OPEN.do.after", "source.LET_GO.do.before"]
FORWARD = ["source.COMMIT.do.journalled", "source.COMMIT.do.after", *FURTHER_BATCH, "source.BATCHES.do.after",
           "source.FOLLOW.do.before", "source.FOLLOW.do.after", "source.RELEASE.do.before"]  # fmt: skip
FORWARD_TARGET = ["target.ACTIVATE.do.before", "target.ACTIVATE.do.journalled", "target.ACTIVATE.do.after",
                  "target.reply.commit", "target.MOVE_ADDRESS.do.before", "target.MOVE_ADDRESS.do.after"]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("steer")
    with Vpc.create() as vpc, Fleet(vpc, folder, steer=True) as fleet:
        options = ("--batch-streams", str(BATCH), "--peer-reply-s", "3", "--address-confirm-s", "1.5")
        yield World.build(vpc, fleet, *options)


@pytest.fixture(scope="module")
def traces(world: World) -> Traces:
    return Traces.of(world)


@pytest.fixture
def start(world: World, traces: Traces, request: pytest.FixtureRequest) -> Iterator[Callable[..., Streams]]:
    yield lambda **options: start_streams(traces, sum(request.node.name.encode()), **options)
    fabric = world.vpc.fabric
    fabric.move_seconds, fabric.refuse, fabric.lie = 0, False, False


def steered(world: World, *options: str) -> dict[str, Any]:
    """A hop that must succeed by Steer."""
    report = world.hop(*options)
    assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
    assert report["switchover"] == "Steer"
    return report


def counters(world: World, node: str) -> dict[str, int]:
    with Hold.open(world.agent(node).bpffs) as hold:
        return hold.counters()


def wait_phase(world: World, job: str, phase: str) -> None:
    end = time.monotonic() + 20
    while (seen := world.job_phase(job)) != phase:
        if time.monotonic() > end:
            raise TimeoutError(f"job {job} is {seen!r} and not {phase}")
        time.sleep(0.02)


@contextlib.contextmanager
def after(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """`act` while the block runs."""
    timer = threading.Timer(seconds, act)
    timer.start()
    try:
        yield
    finally:
        timer.join()


@pytest.mark.parametrize("move_s", [0.0, 1.0, *([10.0] if LONG else [])])
def test_no_byte_is_lost_however_long_the_address_takes(
    world: World, start: Callable[..., Streams], move_s: float
) -> None:
    world.vpc.fabric.move_seconds = move_s
    streams = start(seconds=2.5 + 3 * move_s, size=2_000_000)
    before = counters(world, world.at)["tunnel_out"]
    reports = [steered(world) for _ in range(3)]
    assert len(reports[0]["batches"]) == -(-2 * CLIENTS // BATCH)  # later, some streams may have ended
    assert max(counters(world, n)["tunnel_out"] for n in world.fleet.agents) > before  # the tunnel was needed
    streams.unharmed()


def test_clients_wait_for_their_batch_and_not_for_the_address(world: World, start: Callable[..., Streams]) -> None:
    """No clock: every batch is over before the address has moved at all."""
    world.vpc.fabric.move_seconds = 2
    streams = start(seconds=4.0)
    report = steered(world)
    moved_ms = next(s["startMs"] + s["tookMs"] for s in report["steps"] if s["name"] == "FOLLOW")
    assert all(b["startMs"] + b["holdMs"] < moved_ms for b in report["batches"])
    assert world.vpc.fabric.moves()[-1].outcome == "moved"
    streams.unharmed()


def test_an_address_that_is_refused_is_asked_for_again(world: World, start: Callable[..., Streams]) -> None:
    world.vpc.fabric.refuse = True
    streams = start(seconds=4.0)
    with after(2.5, lambda: setattr(world.vpc.fabric, "refuse", False)):
        report = steered(world)
    assert "address_not_moved" in report["output"] and "keep it alive" in report["output"]
    streams.unharmed()


def test_a_yes_that_does_not_happen_is_found(world: World, start: Callable[..., Streams]) -> None:
    world.vpc.fabric.lie = True
    streams = start(seconds=4.0)
    with after(2.5, lambda: setattr(world.vpc.fabric, "lie", False)):
        report = steered(world)
    assert "address_not_moved" in report["output"]
    streams.unharmed()


def test_an_address_that_is_taken_back_at_once_moves_again(world: World, start: Callable[..., Streams]) -> None:
    """The network reverses the move in the middle of it: the target's probes announce the address again."""
    source, target = world.at, world.away
    streams = start(seconds=4.0)
    world.agent(target).arm("target.MOVE_ADDRESS.do.before=delay:400")

    def reverse() -> None:
        if world.vpc.fabric.wait_owner(V4, target):
            world.vpc.fabric.reverse(V4)

    thread = threading.Thread(target=reverse)
    thread.start()
    steered(world)
    thread.join()
    assert [m.target for m in world.vpc.fabric.moves() if m.ip == V4][-3:] == [target, source, target]
    streams.unharmed()


@pytest.mark.parametrize("where", FIRST_BATCH + TARGET_DO)
def test_a_first_batch_that_fails_before_commit_is_undone(
    world: World, start: Callable[..., Streams], where: str
) -> None:
    streams = start()
    world.agent(world.at if where.startswith("source") else world.away).arm(f"{where}=error")
    report = world.hop()
    assert report["phase"] in ("PHASE_ROLLED_BACK", "PHASE_FAILED"), report["output"]
    assert report["reason"] == "failpoint"
    streams.unharmed()


def test_a_further_batch_that_fails_stays_at_the_source_which_serves_it(
    world: World, start: Callable[..., Streams]
) -> None:
    """Its streams finish there, through the tunnel, though the address is at the target."""
    streams = start(seconds=3.0)
    agent = world.agent(world.at)
    agent.arm("source.OPEN.do.after=error*")
    report = world.hop()
    agent.arm("source.OPEN.do.after=delay:0")  # armed once instead of for ever
    assert report["phase"] == "PHASE_FAILED", report["output"]
    assert report["reason"] == "failpoint"
    assert {b["outcome"] for b in report["batches"]} == {"moved", "rolled back"}
    assert report["streams"]["migrated"] == BATCH
    assert report["streams"]["rolledBack"] == report["streams"]["total"] - BATCH
    world.at = world.away
    streams.unharmed()


def test_a_further_batch_that_fails_once_is_tried_again(world: World, start: Callable[..., Streams]) -> None:
    streams = start(seconds=3.0)
    world.agent(world.at).arm("source.OPEN.do.after=error")
    report = steered(world)
    assert report["streams"]["migrated"] == report["streams"]["total"] == 2 * CLIENTS
    assert "are tried again" in report["output"]
    streams.unharmed()


@pytest.mark.parametrize("where", FIRST_BATCH[2:] if LONG else FIRST_BATCH[3::3])
def test_the_source_agent_killed_before_commit_rolls_back(
    world: World, start: Callable[..., Streams], where: str
) -> None:
    streams = start()
    job = kill_at(world, world.at, where)
    assert settle(world, job) in ("RolledBack", "Failed")
    streams.unharmed()


@pytest.mark.parametrize("where", FORWARD)
def test_the_source_agent_killed_after_commit_goes_forward(
    world: World, start: Callable[..., Streams], where: str
) -> None:
    streams = start(seconds=3.0)
    job = kill_at(world, world.at, where)
    # a batch that had not committed when the agent died goes back, and is moved again
    assert settle(world, job) == "Succeeded"
    world.at = world.away
    streams.unharmed()


@pytest.mark.parametrize("where", FORWARD_TARGET)
def test_the_target_agent_killed_after_commit_goes_forward(
    world: World, start: Callable[..., Streams], where: str
) -> None:
    streams = start(seconds=3.0)
    job = kill_at(world, world.away, where)
    assert settle(world, job) == "Succeeded"
    world.at = world.away
    streams.unharmed()


def test_a_partition_round_commit_keeps_every_stream_at_one_place(
    world: World, start: Callable[..., Streams]
) -> None:
    streams = start(seconds=4.0)
    world.agent(world.at).arm("source.COMMIT.do.journalled=delay:500")
    job = world.hop_in_background()
    world.wait_fired(world.at, "source.COMMIT.do.journalled")
    with world.cut_off():
        time.sleep(1.0)
    assert world.wait_job(job) == "Succeeded"
    world.at = world.away
    streams.unharmed()


def test_new_connections_during_the_move_are_all_served(world: World, start: Callable[..., Streams]) -> None:
    """From outside the VPC, in it, and on both nodes, all the while: short connections that come and go."""
    world.vpc.fabric.move_seconds = 1.5
    streams = start(seconds=4.0)
    comers = [
        world.clients(place, 12, 900 + i, address=address, seconds=0.3, spread_s=3.0, size_log10=(2, 5))
        for i, place in enumerate(world.places().values())
        for address in (V4, V6)
    ]
    time.sleep(0.3)
    steered(world)
    results = [c.finish() for c in comers]
    assert [e for r in results for e in r["errors"]] == []
    assert sum(r["ok"] for r in results) == 12 * len(comers)
    streams.unharmed()


def test_one_stream_goes_back_and_forth(world: World, start: Callable[..., Streams]) -> None:
    hops = 100 if LONG else 12
    streams = start(seconds=hops * 0.6, size=3_000_000)
    for _ in range(hops):
        steered(world)
    streams.unharmed()


# -- what is refused, or falls back ------------------------------------------------------------------------


@contextlib.contextmanager
def router_drops(world: World, rule: str) -> Iterator[None]:
    world.vpc.router.nft(f"table inet ms_no {{\nchain c {{\ntype filter hook forward priority -10;\n{rule}\n}}\n}}")
    try:
        yield
    finally:
        world.vpc.router.nft("delete table inet ms_no")


@pytest.mark.parametrize(
    ("rule", "reason"),
    [("udp dport 9445 drop", "tunnel_silent"), ("udp dport 9445 meta length > 2000 drop", "tunnel_mtu")],
)
def test_a_tunnel_that_does_not_work_is_named_before_anything_is_frozen(
    world: World, start: Callable[..., Streams], rule: str, reason: str
) -> None:
    """Auto waits instead, and says why."""
    streams = start(seconds=3.0)
    with router_drops(world, rule):
        report = world.hop("--switchover", "steer")
        assert (report["phase"], report.get("reason")) == ("PHASE_FAILED", reason), report["output"]
        report = world.hop()
    assert report["phase"] == "PHASE_SUCCEEDED", report["output"]
    assert report["switchover"] == "Wait"
    assert "switchover Wait, since" in report["output"]
    streams.unharmed()


def test_steer_can_be_declined(world: World, start: Callable[..., Streams]) -> None:
    streams = start()
    report = world.hop("--switchover", "wait")
    assert (report["phase"], report["switchover"]) == ("PHASE_SUCCEEDED", "Wait"), report["output"]
    streams.unharmed()


def send_forged(where: Namespace, to: str, packet: bytes) -> None:
    """A VXLAN packet (RFC 7348) with a VNI that is a guess."""
    frame = bytes(12) + b"\x08\x00" + packet
    with where.new_socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.sendto(b"\x08\0\0\0" + (4711 << 8).to_bytes(4, "big") + frame, (to, 9445))


def test_a_forged_tunnel_packet_is_dropped_and_counted(world: World, start: Callable[..., Streams]) -> None:
    """An RST for a stream that is on its way, from a host of the VPC that is not the peer."""
    world.vpc.fabric.move_seconds = 1.5
    streams = start(seconds=4.0)
    target = world.away
    job = world.hop_in_background()
    wait_phase(world, job, "Committing")
    before = counters(world, target)["tunnel_peer"]
    packet = bytes.fromhex("4500002800004000400600000a4dc8c80a4d0064") + PORT.to_bytes(2, "big") * 2 + bytes(16)
    for _ in range(20):
        send_forged(world.inside, world.agent(target).host.ipv4, packet)
    assert world.wait_job(job) == "Succeeded"
    world.at = target
    assert counters(world, target)["tunnel_peer"] == before + 20
    streams.unharmed()


def test_a_node_without_a_tunnel_is_named(tmp_path: Path) -> None:
    with Vpc.create() as vpc, Fleet(vpc, tmp_path, steer=True) as fleet:
        world = World.build(vpc, fleet)
        agent = world.agent("node-b")
        agent.process.terminate()
        agent.process.wait(10)
        fleet.restart_agent(agent, "--no-tunnel")
        report = world.hop("--switchover", "steer")
        assert (report["phase"], report["reason"]) == ("PHASE_FAILED", "no_tunnel"), report["output"]
        report = world.hop()
        assert (report["phase"], report["switchover"]) == ("PHASE_SUCCEEDED", "Wait"), report["output"]
