"""What the tunnel costs those who are steered, and the programs those who are not. Writes build/bench/tunnel.json.

Steered: a stream that has moved while its address has not, so that its packets go through both nodes and, since the
network might take them from either, leave both. It takes turns with a stream that goes to the same node directly.
Not steered: the run time of our programs, by the kernel's own account, of a transfer through a pod that has them and
moves nowhere, every segment a packet, beside the time of the transfer (of one CPU, though it takes more than one).
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_stall
import rows

sys.path.insert(0, str(bench_stall.ROOT / "tests" / "net"))

from hold_world import HoldWorld, Job, Stream, until
from midstream_agent import bpf
from midstream_agent.hold import Hold

MOVE_S = 600.0  # until it is said to be over
TURNS, BYTES, ECHOES = 30, 32 << 20, 400
MTUS = (1500, 9001)
STEERED, DIRECT = "moves", "stays"
MOVED = "source.BATCHES.do.after"


def download(stream: Stream) -> float:
    """Bytes a second."""
    room = memoryview(bytearray(1 << 20))
    left, began = BYTES, time.perf_counter()
    stream.say("get", bytes=BYTES)
    while left:
        got = stream.sock.recv_into(room, min(left, len(room)))
        if not got:
            raise RuntimeError("end of stream")
        left -= got
    return BYTES / (time.perf_counter() - began)


def upload(stream: Stream) -> float:
    began, piece = time.perf_counter(), bytes(1 << 20)
    stream.say("sink", bytes=BYTES)
    for _ in range(BYTES // len(piece)):
        stream.sock.sendall(piece)
    stream.read(8)
    return BYTES / (time.perf_counter() - began)


def round_trip(stream: Stream) -> float:
    """Microseconds of one line there and back."""
    began = time.perf_counter()
    stream.echo("tick")
    return (time.perf_counter() - began) * 1e6


@contextlib.contextmanager
def steered(world: HoldWorld) -> Iterator[Job]:
    """While the block runs the pair's streams are at the other node, and its address is not."""
    world.vpc.fabric.move_seconds = MOVE_S
    job = world.hop(world.pairs[STEERED], f"{MOVED}=delay:1", "--switchover", "steer")
    try:
        job.wait(MOVED)
        yield job
    finally:
        job.process.terminate()


def compare(world: HoldWorld) -> dict[str, list[tuple[float, float]]]:
    """(steered, direct) of each turn."""
    steered_, direct = (world.connect(world.pairs[name]) for name in (STEERED, DIRECT))
    found: dict[str, list[tuple[float, float]]] = {"download": [], "upload": [], "rtt": []}
    with steered(world):
        steered_.echo("there")
        for _ in range(TURNS):
            found["download"].append((download(steered_), download(direct)))
            found["upload"].append((upload(steered_), upload(direct)))
        for _ in range(ECHOES):
            found["rtt"].append((round_trip(steered_), round_trip(direct)))
    return found


@dataclass
class Cost:
    """What our programs of one node took, in all and a run."""

    run_time_ns: int
    runs: int

    @classmethod
    def of(cls, hold: Hold) -> Cost:
        programs = hold.programs().values()
        return cls(sum(p.run_time_ns for p in programs), sum(p.runs for p in programs))


def share(world: HoldWorld) -> tuple[list[float], float]:
    """Part of a transfer's time that our programs take (percent, one a transfer); ns a run."""
    pair = world.pairs[DIRECT]
    stream = world.connect(pair)
    off = ["tso", "off", "gso", "off", "gro", "off"]
    for machine, interface in ((world.b, "eth0"), (world.b, "eth1"), (world.outside, "eth0")):
        machine.run(["ethtool", "-K", interface, *off])
    found, cost = [], []
    stats = bpf.enable_stats()
    try:
        with Hold.open(world.agent(pair.at).bpffs) as hold:
            for _ in range(TURNS):
                before, began = Cost.of(hold), time.perf_counter_ns()
                download(stream)
                took, after = time.perf_counter_ns() - began, Cost.of(hold)
                found.append(100 * (after.run_time_ns - before.run_time_ns) / took)
                cost.append((after.run_time_ns - before.run_time_ns) / max(after.runs - before.runs, 1))
    finally:
        os.close(stats)
    return found, statistics.median(cost)


def measure(folder: Path, mtu: int) -> list[dict[str, Any]]:
    with HoldWorld.build(folder / str(mtu), [STEERED, f"{DIRECT}@node-b"], mtu, steer=True) as world:
        until(lambda: world.pairs[DIRECT].at == "node-b", "the pair that stays")
        percent, ns_a_run = share(world)
    with HoldWorld.build(folder / f"{mtu}-steered", [STEERED, f"{DIRECT}@node-b"], mtu, steer=True) as world:
        found = compare(world)
    print(f"mtu {mtu}: {ns_a_run:.0f} ns a run of a program")
    direct = {way: statistics.median(b for _, b in turns) for way, turns in found.items()}
    ratios = [
        rows.row(f"steered_{way}_{mtu}", "of direct", [a / b for a, b in found[way]], 0.7, "higher",
                 reference="direct, Gb/s", reference_value=direct[way] * 8e-9)
        for way in ("download", "upload")
    ]  # fmt: skip
    added = [a - b for a, b in found["rtt"]]
    return [
        *ratios,
        rows.row(f"steered_rtt_added_{mtu}", "us", added, 100, "lower",
                 reference="direct round trip", reference_value=direct["rtt"]),
        rows.row(f"unsteered_cpu_{mtu}", "percent", percent, 2, "lower",
                 reference="ns a run", reference_value=ns_a_run),
    ]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows.write("tunnel", [row for mtu in MTUS for row in measure(Path(folder), mtu)])


if __name__ == "__main__":
    main()
