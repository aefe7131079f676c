"""What clients notice of a migration by Steer while the network takes three seconds to move the address. Writes
build/bench/steer.json.

One stream: as bench_stall.py measures it; its reference is `Wait` over the same network in the same run. 1,000 streams
in batches: the longest gap of each client over one migration of all of them, and the time from the first PAUSE to the
last ACTIVATED, by the agent's own account. LONG=1: 500 migrations instead of 40.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import bench_stall  # noqa: F401 - first: it makes the packages importable
import rows
from bench_stall import ADDRESS, MANY, MANY_PERIOD_MS, PERIOD_MS, Bench, longest_gap_ms
from midstream_testbed.fleet import Fleet
from midstream_testbed.vpc import Vpc

MOVE_S = 3.0
MIGRATIONS = 500 if os.environ.get("LONG") else 40
WAITS = 4
MANY_ROUNDS = 3


def stalls_ms(bench: Bench, hops: int, switchover: str) -> list[float]:
    """Of one stream, one a migration, without its usual gap."""
    client = bench.start_client(1, hops * (MOVE_S + 3))
    bench.wait_connections(1)
    capture = bench.client.capture()
    windows = []
    for _ in range(hops):
        began, ended, report = bench.hop()
        if report["switchover"] != switchover:
            raise RuntimeError(f"switchover {report['switchover']}: {report['output']}")
        windows.append((began, ended))
    packets = capture.stop()
    client.kill()
    if capture.dropped:
        raise RuntimeError(f"the capture missed {capture.dropped} packets: its gaps mean nothing")
    times = [p.ts_ns / 1e9 for p in packets if p.src == ADDRESS and p.length]
    typical = statistics.median(b - a for a, b in pairwise(times)) * 1000
    return [longest_gap_ms(times, a, b) - typical for a, b in windows]


def one_stream(folder: Path) -> list[dict[str, Any]]:
    found = {}
    for steer, hops in ((True, MIGRATIONS), (False, WAITS)):
        with Vpc.create(move_seconds=MOVE_S) as vpc, Fleet(vpc, folder / f"one-{steer}", steer=steer) as fleet:
            found[steer] = stalls_ms(Bench(vpc, fleet, PERIOD_MS), hops, "Steer" if steer else "Wait")
    steered, waited = found[True], statistics.median(found[False])
    p99 = sorted(steered)[int(len(steered) * 0.99)]
    other = "switchover Wait, same network"
    return [
        rows.row("steer_1_p50", "ms", steered, 3, "lower", reference=other, reference_value=waited),
        rows.row("steer_1_p99", "ms", steered, 10, "lower", value=p99, reference=other, reference_value=waited),
    ]


def many_streams(folder: Path) -> list[dict[str, Any]]:
    gaps: list[float] = []
    quiet: list[float] = []
    spans: list[float] = []
    with Vpc.create(move_seconds=MOVE_S) as vpc, Fleet(vpc, folder / "many", steer=True) as fleet:
        bench = Bench(vpc, fleet, MANY_PERIOD_MS)
        for migrate in [True, False] * MANY_ROUNDS:
            client = bench.start_client(MANY, 14)
            bench.wait_connections(MANY)
            time.sleep(1.5)  # the clients' first lines
            if migrate:
                _, _, report = bench.hop()
                if int(report["streams"]["migrated"]) != MANY:
                    raise RuntimeError(f"{report['streams']} of {MANY} streams migrated")
                batches = report["batches"]
                spans.append(max(b["startMs"] + b["holdMs"] for b in batches) - min(b["startMs"] for b in batches))
            out, _ = client.communicate(timeout=60)
            longest = [ms - MANY_PERIOD_MS for ms in json.loads(out)["longest_ms"]]
            (gaps if migrate else quiet).extend(longest)
    p99 = [sorted(x)[int(len(x) * 0.99)] for x in (gaps, quiet)]
    return [
        rows.row("steer_1000_p99", "ms", gaps, 50, "lower", value=p99[0], reference="same clients, no migration",
                 reference_value=p99[1]),
        rows.row("steer_1000_all_over", "ms", spans, 600, "lower"),
    ]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows.write("steer", one_stream(Path(folder)) + many_streams(Path(folder)))


if __name__ == "__main__":
    main()
