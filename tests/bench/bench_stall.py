"""What clients notice of a migration, and what an agent costs while it waits. Writes build/bench/stall.json.

One stream: 200 migrations of one connection, back and forth, address move at 0 s; the stall of each is the longest
gap between payload packets in the client host's capture, from the CLI's call to its end, minus the median gap of the
stream. Its reference is the same figure in windows of the same length without a migration: what the machine adds.
1,000 streams: the longest that any client was kept waiting over one migration of all of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for outer in ("operator", "agent", "runtime", "tests/testbed"):
    sys.path.insert(0, str(ROOT / outer))

import rows  # noqa: E402
from midstream_testbed.fleet import Fleet  # noqa: E402
from midstream_testbed.machine import Client, Pod  # noqa: E402
from midstream_testbed.vpc import Vpc  # noqa: E402

HERE = Path(__file__).parent
ADDRESS, PORT = "10.77.0.100", 8000
PERIOD_MS = 4
MIGRATIONS = 200
MANY, MANY_PERIOD_MS, MANY_ROUNDS = 1000, 500, 6


class Bench:
    """Two hosts, agents, ticker pods, a client outside the VPC."""

    def __init__(self, vpc: Vpc, fleet: Fleet, period_ms: float) -> None:
        self.fleet = fleet
        self.client: Client = vpc.client("client")
        self.hosts = [vpc.host("node-a"), vpc.host("node-b")]
        for host in self.hosts:
            fleet.start_agent(host, "--moved-linger-s", "0.2")
        argv = [sys.executable, str(HERE / "ticker_pod.py"), str(PORT), str(period_ms)]
        self.pods: list[Pod] = [fleet.run_pod(h.add_pod(f"ticker-{h.name}"), argv, "ticker") for h in self.hosts]
        for pod in self.pods:
            fleet.wait_ready(pod.name)
        fleet.attach(self.pods[0], ADDRESS)

    def hop(self) -> tuple[float, float, dict[str, Any]]:
        """Migrate; when it began and ended (s, epoch) and the job's report."""
        began = time.time()
        report = self.fleet.migrate(self.pods[0].name, self.pods[1].host.name)
        if report["phase"] != "PHASE_SUCCEEDED":
            raise RuntimeError(report["output"])
        self.pods.reverse()
        return began, time.time(), report

    def start_client(self, count: int, seconds: float) -> subprocess.Popen[bytes]:
        argv = [sys.executable, str(HERE / "ticker_client.py"), ADDRESS, str(PORT), str(count), str(seconds)]
        return self.client.popen(argv, stdout=subprocess.PIPE, name="ticker-client")

    def wait_connections(self, wanted: int) -> None:
        end = time.monotonic() + 30
        while (seen := sum(x.split()[3] == "01" for x in self.pods[0].proc_net("tcp6").splitlines()[1:])) < wanted:
            if time.monotonic() > end:
                raise TimeoutError(f"{seen} of {wanted} clients are connected")
            time.sleep(0.05)


def longest_gap_ms(times: list[float], began: float, ended: float) -> float:
    first, last = max(bisect_left(times, began) - 1, 0), bisect_left(times, ended) + 1
    window = times[first : last + 1]
    return max(b - a for a, b in pairwise(window)) * 1000


def one_stream(bench: Bench) -> list[dict[str, Any]]:
    client = bench.start_client(1, MIGRATIONS * 2.0)
    bench.wait_connections(1)
    capture = bench.client.capture()
    windows, reports = [], []
    for _ in range(MIGRATIONS):
        began, ended, report = bench.hop()
        windows.append((began, ended))
        reports.append(report)
    packets = capture.stop()
    client.kill()
    if capture.dropped:
        raise RuntimeError(f"the capture missed {capture.dropped} packets: its gaps mean nothing")
    times = [p.ts_ns / 1e9 for p in packets if p.src == ADDRESS and p.length]
    typical = statistics.median(b - a for a, b in pairwise(times)) * 1000
    stalls = [longest_gap_ms(times, a, b) - typical for a, b in windows]
    # between two migrations, windows as long as a hold
    quiet = [longest_gap_ms(times, b, c) - typical for (_, b), (c, _) in pairwise(windows)]
    holds = [float(r.get("holdMs", 0)) for r in reports]
    other = "same stream between migrations"
    p99 = sorted(stalls)[int(len(stalls) * 0.99)]
    quiet_p99 = sorted(quiet)[int(len(quiet) * 0.99)]
    print(f"the agent's own account of the hold: p50 {statistics.median(holds):.2f} ms")
    show_steps(reports)
    return [
        rows.row("stall_1_p50", "ms", stalls, 5, "lower", reference=other, reference_value=statistics.median(quiet)),
        rows.row("stall_1_p99", "ms", stalls, 20, "lower", value=p99, reference=other, reference_value=quiet_p99),
    ]


def show_steps(reports: list[dict[str, Any]]) -> None:
    names = [s["name"] for s in reports[0]["steps"]]
    for i, name in enumerate(names):
        took = [float(r["steps"][i].get("tookMs", 0)) for r in reports if len(r["steps"]) > i]
        print(f"  {name:14} median {statistics.median(took):7.2f} ms")


def many_streams(bench: Bench) -> list[dict[str, Any]]:
    longest: list[float] = []
    quiet: list[float] = []
    for migrate in [True, False] * (MANY_ROUNDS // 2):
        client = bench.start_client(MANY, 12)
        bench.wait_connections(MANY)
        time.sleep(1.5)  # the clients' first lines
        if migrate:
            _, _, report = bench.hop()
            if int(report["streams"]["migrated"]) != MANY:
                raise RuntimeError(f"{report['streams']} of {MANY} streams migrated")
            show_steps([report])
        out, _ = client.communicate(timeout=60)
        seen = json.loads(out)
        (longest if migrate else quiet).append(seen["longest_ms"][-1])
    return [
        rows.row("stall_1000_all_over", "ms", longest, 600, "lower",
                 reference="same clients, no migration", reference_value=statistics.median(quiet))
    ]  # fmt: skip


def agent_rss(bench: Bench) -> dict[str, Any]:
    values = []
    for agent in bench.fleet.agents.values():
        status = Path(f"/proc/{agent.process.pid}/status").read_text(encoding="ascii")
        values.append(int(next(x for x in status.splitlines() if x.startswith("VmRSS")).split()[1]) / 1024)
    bare = subprocess.run(
        [sys.executable, "-c", "import grpc.aio, pyroute2, uvloop, prometheus_client;"
         "print(next(x for x in open('/proc/self/status') if x.startswith('VmRSS')).split()[1])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = int(bare.stdout) / 1024
    return rows.row(
        "agent_idle_rss", "MB", values, 80, "lower", reference="its libraries, imported", reference_value=imported
    )


def main() -> None:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        with Vpc.create() as vpc, Fleet(vpc, Path(folder, "one")) as fleet:
            bench = Bench(vpc, fleet, PERIOD_MS)
            found.append(agent_rss(bench))
            found += one_stream(bench)
        with Vpc.create() as vpc, Fleet(vpc, Path(folder, "many")) as fleet:
            found += many_streams(Bench(vpc, fleet, MANY_PERIOD_MS))
    rows.write("stall", found)


if __name__ == "__main__":
    main()
