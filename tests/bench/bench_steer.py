"""What clients notice of a migration by Steer while the network takes three seconds to move the address. Writes
build/bench/steer.json.

One stream: as bench_stall.py measures it. Its references, in the same run: `Wait` over the same network, and what a
user-space proxy, which moves nothing, adds to a stream in windows as long as a migration. 1,000 and 10,000 streams in
batches: the longest that each client was kept waiting over one migration of all of them, and the time from the first
PAUSE to the last ACTIVATED, by the agent's own account. LONG=1: 500 migrations of one stream instead of 40.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import bench_stall  # noqa: F401 - first: it makes the packages importable
import rows
from bench_stall import ADDRESS, HERE, PERIOD_MS, PORT, Bench, longest_gap_ms
from midstream_testbed.fleet import Fleet, wait_for_line
from midstream_testbed.vpc import Vpc

MOVE_S = 3.0
MIGRATIONS = 500 if os.environ.get("LONG") else 40
WAITS = 4
PROXY_PORT, PROXY_WINDOWS, PROXY_WINDOW_S = 8001, 60, 0.5


@dataclass(frozen=True)
class Crowd:
    """So many streams at once, and what is wanted for them; 2,000 lines a second whatever their number, since the
    testbed's one server and one client process share two cores with both agents."""

    count: int
    rounds: int
    p99_ms: float
    all_over_ms: float

    @property
    def period_ms(self) -> float:
        return self.count / 2


CROWDS = (Crowd(1000, 3, 50, 600), Crowd(10_000, 1, 100, 5000))


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


def proxied_ms(bench: Bench) -> list[float]:
    """Longest gap of a stream through a proxy on the pod's node, in windows without any migration."""
    proxy = bench.hosts[0].popen(
        [sys.executable, str(HERE / "proxy_reference.py"), bench.hosts[0].ipv4, str(PROXY_PORT), ADDRESS, str(PORT)],
        name="proxy",
    )  # fmt: skip
    wait_for_line(proxy, "^ready", 10)
    seconds = PROXY_WINDOWS * PROXY_WINDOW_S
    argv = [sys.executable, str(HERE / "ticker_client.py"), bench.hosts[0].ipv4, str(PROXY_PORT), "1", str(seconds + 4)]
    client = bench.client.popen(argv, stdout=subprocess.PIPE, name="ticker-client")
    bench.wait_connections(1)
    capture = bench.client.capture()
    began = time.time()
    time.sleep(seconds)
    packets = capture.stop()
    for process in (client, proxy):
        process.kill()
    times = [p.ts_ns / 1e9 for p in packets if p.src == bench.hosts[0].ipv4 and p.length]
    typical = statistics.median(b - a for a, b in pairwise(times)) * 1000
    starts = [began + i * PROXY_WINDOW_S for i in range(PROXY_WINDOWS)]
    return [longest_gap_ms(times, a, a + PROXY_WINDOW_S) - typical for a in starts]


def one_stream(folder: Path) -> list[dict[str, Any]]:
    found = {}
    for steer, hops in ((True, MIGRATIONS), (False, WAITS)):
        with Vpc.create(move_seconds=MOVE_S) as vpc, Fleet(vpc, folder / f"one-{steer}", steer=steer) as fleet:
            bench = Bench(vpc, fleet, PERIOD_MS)
            found[steer] = stalls_ms(bench, hops, "Steer" if steer else "Wait")
    with Vpc.create() as vpc, Fleet(vpc, folder / "proxy") as fleet:
        proxied = proxied_ms(Bench(vpc, fleet, PERIOD_MS))
    steered = found[True]
    print(f"through a proxy, without any migration: p50 {statistics.median(proxied):.2f} ms, p99 {p99(proxied):.2f} ms")
    return [
        rows.row("steer_1_p50", "ms", steered, 3, "lower",
                 reference="switchover Wait, same network", reference_value=statistics.median(found[False])),
        rows.row("steer_1_p99", "ms", steered, 10, "lower", value=p99(steered),
                 reference="user-space proxy, no migration", reference_value=p99(proxied)),
    ]  # fmt: skip


def p99(values: list[float]) -> float:
    return sorted(values)[int(len(values) * 0.99)]


def many_streams(folder: Path, crowd: Crowd) -> list[dict[str, Any]]:
    waited: list[float] = []
    quiet: list[float] = []
    spans: list[float] = []
    with Vpc.create(move_seconds=MOVE_S) as vpc, Fleet(vpc, folder / f"{crowd.count}", steer=True) as fleet:
        bench = Bench(vpc, fleet, crowd.period_ms)
        for migrate in [True, False] * crowd.rounds:
            client = bench.start_client(crowd.count, 12 + crowd.count / 500)
            bench.wait_connections(crowd.count)
            time.sleep(1.5)
            if migrate:
                _, _, report = bench.hop()
                if int(report["streams"]["migrated"]) != crowd.count:
                    raise RuntimeError(f"{report['streams']} of {crowd.count} streams migrated\n{report['output']}")
                batches = report["batches"]
                spans.append(max(b["startMs"] + b["holdMs"] for b in batches) - min(b["startMs"] for b in batches))
                holds = sorted(b["holdMs"] for b in batches)
                print(f"{len(batches)} batches: held p50 {statistics.median(holds):.1f} ms, most {holds[-1]:.1f} ms")
            out, _ = client.communicate(timeout=120)
            (waited if migrate else quiet).extend(json.loads(out)["longest_ms"])
    return [
        rows.row(f"steer_{crowd.count}_p99", "ms", waited, crowd.p99_ms, "lower", value=p99(waited),
                 reference="same clients, no migration", reference_value=p99(quiet)),
        rows.row(f"steer_{crowd.count}_all_over", "ms", spans, crowd.all_over_ms, "lower"),
    ]  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        rows.write("steer", one_stream(path) + [row for crowd in CROWDS for row in many_streams(path, crowd)])


if __name__ == "__main__":
    main()
