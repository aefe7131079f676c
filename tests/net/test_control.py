"""The control of the byte-exact test: the same run passes with the hold, and fails when the hold is left out.

Without it a migration still checkpoints, ships and restores; only the BPF programs let everything pass. Bytes that
arrive after the checkpoint are then acknowledged by nobody's queue, and packets that meet no socket draw an RST.

Both runs make the same number of hops that succeed. With the hold each hop must; without it one may roll back, as
clients go on filling the queues of paused streams, which change under the dump or outgrow it. That harms no stream and
shows nothing, so it is not counted, and made again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream_testbed.fleet import Fleet
from midstream_testbed.pcap import ACK, Packet, before, flows, max_ack
from midstream_testbed.vpc import Vpc
from world import PORT, V4, World

HOPS = 5
TRIES = 3 * HOPS
CLIENTS = 16


@dataclass
class Outcome:
    errors: list[str]  # as the clients, or the server, found them in the bytes
    resets: int  # RSTs of the server's side
    unacknowledged: int  # bytes that the server once acknowledged, and at the end had not got


def taken_back(packets: list[Packet]) -> int:
    """Bytes that the server acknowledged to a client and whose acknowledgement its last segment takes back."""
    total = 0
    for (_, sport, _, _), flow in flows(packets).items():
        acks = [p for p in flow if p.flags & ACK and not p.rst]
        highest = max_ack(acks)
        if sport == PORT and highest is not None and before(acks[-1].ack, highest):
            total += (highest - acks[-1].ack) & 0xFFFFFFFF
    return total


def hop_until_enough(world: World, tries: int) -> None:
    """Make HOPS hops that succeed, in at most `tries`."""
    left, rolled_back = HOPS, []
    for _ in range(tries):
        time.sleep(0.15)  # streams go on between two hops
        report = world.hop()
        if report["phase"] == "PHASE_SUCCEEDED":
            left -= 1
        else:
            rolled_back.append(f"{report['phase']} {report.get('reason')}: {report.get('message')}")
        if not left:
            break
    for why in rolled_back:
        print(f"\nnot counted: {why}", end="")
    assert not left, f"{left} of {HOPS} hops are missing after {tries} tries: {rolled_back}"
    assert all(why.startswith("PHASE_ROLLED_BACK") for why in rolled_back)


def run(folder: Path, without_hold: bool) -> Outcome:
    """Uploads and downloads from outside the VPC while the pod's streams hop, and what their capture shows."""
    with Vpc.create() as vpc, Fleet(vpc, folder, without_hold=without_hold) as fleet:
        world = World.build(vpc, fleet)
        with world.outside.capture(expression=f"tcp port {PORT}", snaplen=160) as capture:
            options: dict[str, Any] = {"address": V4, "kind": "both", "size": 4_000_000, "seconds": 6.0, "idle_s": 8}
            clients = world.clients(world.outside, CLIENTS, 500, **options)
            world.wait_streams(V4, CLIENTS)
            hop_until_enough(world, tries=TRIES if without_hold else HOPS)
            result = clients.finish()
        assert result["ok"] + len(result["errors"]) == CLIENTS
        assert capture.dropped == 0
        packets = capture.packets
        return Outcome(result["errors"], sum(p.rst and p.sport == PORT for p in packets), taken_back(packets))


def test_with_the_hold_all_streams_survive(tmp_path: Path) -> None:
    assert run(tmp_path, without_hold=False) == Outcome([], 0, 0)


def test_without_the_hold_streams_break_and_acknowledged_bytes_are_lost(tmp_path: Path) -> None:
    outcome = run(tmp_path, without_hold=True)
    broken = f"{len(outcome.errors)} of {CLIENTS} streams broke"
    print(f"\n{broken}; {outcome.resets} RSTs; {outcome.unacknowledged} acknowledged bytes lost")
    assert outcome.errors, "each client checks its bytes"
    assert outcome.resets or outcome.unacknowledged, "and the same capture shows why"
