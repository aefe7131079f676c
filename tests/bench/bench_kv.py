"""KV between two nodes. Writes build/bench/kv.json and build/bench/kv_switch.json.

Copy: bytes a second of blocks of Llama-3-8B's size (2 MiB) from one host's pool into another's, each end a process of
its own as the agents are, and CPU seconds a GB of both together; its reference is iperf3 with the same number of
streams over the same link, in turns with it. LINK is the link's rate where it is shaped; without, the link is a pair
of veths as fast as two cores can copy.

Switch: the longest gap between two tokens that a client sees while its stream changes nodes, from the first round of
the copy to the end, beyond its usual one of PACE_MS, for contexts of 128 tokens to 32k with KV of Llama-3-8B's shape
(synthetic_engine.py). Its reference is the same stream between migrations. Contexts for which this machine has not got
the memory (4.3 GB a node for 32k) are left out, and it says so.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import bench_stall  # noqa: F401 - first: it makes the packages importable
import rows
from bench_stall import longest_gap_ms
from midstream_testbed.certs import Authority
from midstream_testbed.fleet import ENGINE_PYTHON, GATEWAY_PORT, Fleet
from midstream_testbed.machine import Host
from midstream_testbed.namespace import Process
from midstream_testbed.vpc import Vpc

HERE = Path(__file__).parent
BLOCK_BYTES, BLOCKS, STREAMS, ROUNDS = 2 << 20, 256, 8, 5
LINK_MBITS = 2000
IPERF_S = 2
ADDRESS = "10.77.0.100"
CONTEXTS = (128, 2048, 8192, 32_768)
HOPS, PACE_MS = 6, 50
LONG_CONTEXT, LONG_HOPS = 16_384, 3  # gigabytes a hop
QUIET_S, CLI_ENDS_S = 2.0, 0.5  # between two hops; what the command needs to end after its job
TOKENS = 3400  # of an answer that must outlast its hops
SPARE_BLOCKS = TOKENS // 16 + 8
ENGINE_SOCKET = "/run/midstream/engine.sock"


# -- copy -------------------------------------------------------------------------------------------------------------


@dataclass
class Rates:
    """Of each round: bytes a second, CPU seconds a GB of both ends."""

    bytes_per_s: list[float]
    cpu_s_per_gb: list[float]


class End:
    """A kv_end.py."""

    def __init__(self, at: Host, fleet: Fleet, **plan: Any) -> None:
        argv = [sys.executable, str(HERE / "kv_end.py"), json.dumps(plan)]
        self.process: Process = at.popen(argv, env=fleet.env(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.first = self.read()

    def go(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        out: IO[bytes] | None = self.process.stdout
        assert out is not None
        line = out.readline()
        if not line:
            raise RuntimeError(self.process.output()[-3000:])
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


def copy_rates(a: Host, b: Host, fleet: Fleet, pki: Path, tls: bool) -> tuple[Rates, Rates]:
    """Of our copy, and of iperf3 in turns with it."""
    plan = {"host": b.ipv4, "pki": str(pki), "streams": STREAMS, "tls": tls, "slots": BLOCKS, "slot_bytes": BLOCK_BYTES}
    receiver = End(b, fleet, role="receive", **plan)
    sender = End(a, fleet, role="send", **plan, **receiver.first)
    ours, theirs = Rates([], []), Rates([], [])
    receiver.go()
    for _ in range(ROUNDS):
        sent = sender.go()
        received = receiver.go()
        ours.bytes_per_s.append(sent["bytes"] / sent["took_s"])
        ours.cpu_s_per_gb.append((sent["cpu_s"] + received["cpu_s"]) / (sent["bytes"] / 1e9))
        rate, cpu = iperf(a, b)
        theirs.bytes_per_s.append(rate)
        theirs.cpu_s_per_gb.append(cpu)
    for end in (sender, receiver):
        end.close()
    return ours, theirs


def iperf(a: Host, b: Host) -> tuple[float, float]:
    server = b.popen(["iperf3", "-s", "-1", "--forceflush", "-B", b.ipv4], name="iperf3")
    while "listening" not in server.output():
        time.sleep(0.01)
        if server.poll() is not None:
            raise RuntimeError(server.output())
    argv = ["iperf3", "-c", b.ipv4, "-P", str(STREAMS), "-t", str(IPERF_S), "-J"]
    done = a.run(argv, timeout_s=IPERF_S + 20)
    server.wait(10)
    end = json.loads(done.stdout)["end"]
    cpu = end["cpu_utilization_percent"]
    sent = end["sum_received"]
    used_s = (cpu["host_total"] + cpu["remote_total"]) / 100 * sent["seconds"]
    return sent["bits_per_second"] / 8, used_s / (sent["bytes"] / 1e9)


@contextmanager
def shaped(host: Host, mbits: int) -> Iterator[None]:
    """The host's own address sends no faster; 0: as fast as it can."""
    device = host.eth0.name
    if not mbits:
        yield
        return
    rate = ["rate", f"{mbits}mbit", "burst", "2mb", "latency", "10ms"]
    host.run(["tc", "qdisc", "replace", "dev", device, "root", "tbf", *rate])
    try:
        yield
    finally:
        host.run(["tc", "qdisc", "del", "dev", device, "root"])


def copies(folder: Path) -> list[dict[str, Any]]:
    found = []
    with Vpc.create() as vpc, Fleet(vpc, folder / "copy") as fleet:
        a, b = vpc.host("node-a"), vpc.host("node-b")
        authority = Authority(folder / "pki")
        for host in (a, b):
            authority.issue(host.name)
        for mbits in (LINK_MBITS, 0):
            link = f"{mbits // 1000}g" if mbits else "veth"
            for tls, goal in ((False, 0.9), (True, 0.5)):
                with shaped(a, mbits):
                    ours, theirs = copy_rates(a, b, fleet, authority.folder, tls)
                name = f"kv_copy_{link}{'_tls' if tls else ''}"
                shares = [x / y for x, y in zip(ours.bytes_per_s, theirs.bytes_per_s, strict=True)]
                rate, other = (statistics.median(r.bytes_per_s) / 1e6 for r in (ours, theirs))
                print(f"{name}: {rate:.0f} MB/s, iperf3 {other:.0f} MB/s, {STREAMS} streams each")
                found.append(rows.row(f"{name}_share", "of iperf3", shares, goal, "higher",
                                      reference="iperf3, MB/s", reference_value=other))  # fmt: skip
                found.append(rows.row(f"{name}_cpu", "s/GB", ours.cpu_s_per_gb, 4.0 if tls else 2.5, "lower",
                                      reference="iperf3",
                                      reference_value=statistics.median(theirs.cpu_s_per_gb)))  # fmt: skip
    return found


# -- switch -----------------------------------------------------------------------------------------------------------


class Switch:
    """Two hosts with agents, gateways and synthetic engines; one client."""

    def __init__(self, vpc: Vpc, fleet: Fleet, slots: int) -> None:
        self.fleet, self.client = fleet, vpc.client("client")
        self.pods = []
        for name in ("node-a", "node-b"):
            host = vpc.host(name)
            fleet.start_agent(host, "--moved-linger-s", "0.2")
            pod = host.add_pod(f"llm-{name}")
            engine = [ENGINE_PYTHON, str(HERE / "synthetic_engine.py"), ENGINE_SOCKET, str(slots), str(PACE_MS)]
            pod.popen(engine, env=fleet.env(), name="engine")
            argv = [sys.executable, "-m", "midstream_runtime.serve", "--listen", f"[::]:{GATEWAY_PORT}",
                    "--path-mtu", str(vpc.mtu), "--engine", ENGINE_SOCKET]  # fmt: skip
            self.pods.append(fleet.run_pod(pod, argv, "llm"))
        for pod in self.pods:
            fleet.wait_ready(pod.name, 120)
        fleet.attach(self.pods[0], ADDRESS)

    def ask(self, folder: Path, context: int) -> Process:
        """A stream whose prompt has so many tokens and that goes on until it is killed."""
        body = {"model": "synthetic", "prompt": [3 + (i * 7919) % 1000 for i in range(context)], "max_tokens": TOKENS,
                "stream": True, "ignore_eos": True, "temperature": 0}  # fmt: skip
        request, out = folder / f"{context}.json", folder / f"{context}.sse"
        request.write_text(json.dumps(body), encoding="utf-8")
        argv = ["curl", "-sS", "-N", "-o", str(out), "-H", "content-type: application/json",
                "--data-binary", f"@{request}", f"http://{ADDRESS}:{GATEWAY_PORT}/v1/completions"]  # fmt: skip
        curl = self.client.popen(argv, name="curl")
        end = time.monotonic() + 120
        while not out.exists() or out.stat().st_size < 2000:
            if time.monotonic() > end or curl.poll() is not None:
                raise RuntimeError(f"no answer with a context of {context}: {curl.output()}")
            time.sleep(0.1)
        return curl

    def gaps(self, folder: Path, context: int) -> tuple[list[float], list[float]]:
        """Of each hop, and of the time between two of them: the longest gap beyond the usual one, ms."""
        curl = self.ask(folder, context)
        capture = self.client.capture()
        windows = []
        for _ in range(HOPS if context < LONG_CONTEXT else LONG_HOPS):
            time.sleep(QUIET_S)
            report = self.fleet.migrate(self.pods[0].name, self.pods[1].host.name)
            if report["phase"] != "PHASE_SUCCEEDED" or report["kv"].get("blocksRecomputed"):
                raise RuntimeError(f"{report['kv']}\n{report['output']}")
            self.pods.reverse()
            if curl.poll() is not None:
                raise RuntimeError(f"the answer with a context of {context} ended before its hops")
            ended = time.time()
            took_s = max(float(s["startMs"]) + float(s["tookMs"]) for s in report["steps"]) / 1000
            windows.append((ended - took_s - CLI_ENDS_S, ended))
        packets = capture.stop()
        curl.kill()
        curl.wait(10)
        times = [p.ts_ns / 1e9 for p in packets if p.src == ADDRESS and p.length]
        typical = statistics.median(b - a for a, b in pairwise(times)) * 1000
        found = [longest_gap_ms(times, *window) - typical for window in windows]
        quiet = [longest_gap_ms(times, b, c) - typical for (_, b), (c, _) in pairwise(windows)]
        return found, quiet


def switches(folder: Path) -> list[dict[str, Any]]:
    found, medians = [], []
    room = available_bytes() // 3  # two pools, and the rest of the machine
    contexts = [c for c in CONTEXTS if slots_for(c) * BLOCK_BYTES < room]
    if left_out := sorted(set(CONTEXTS) - set(contexts)):
        print(f"not measured, for lack of memory: contexts of {left_out} tokens")
    with Vpc.create() as vpc, Fleet(vpc, folder / "switch", steer=True) as fleet:
        switch = Switch(vpc, fleet, slots_for(contexts[-1]))
        for context in contexts:
            gaps, quiet = switch.gaps(folder, context)
            medians.append(statistics.median(gaps))
            found.append(rows.row(f"kv_switch_gap_{context}", "ms", gaps, 20, "lower",
                                  reference="same stream between migrations",
                                  reference_value=statistics.median(quiet)))  # fmt: skip
    whole = [PACE_MS + median for median in medians]
    found.append(rows.row("kv_switch_gap_growth", "times", [whole[-1] / whole[0]], 1.2, "lower",
                          reference=f"whole gap with {contexts[0]} tokens, ms", reference_value=whole[0]))  # fmt: skip
    return found


def slots_for(context: int) -> int:
    return context // 16 + SPARE_BLOCKS


def available_bytes() -> int:
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    return int(next(x for x in meminfo.splitlines() if x.startswith("MemAvailable")).split()[1]) << 10


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        rows.write("kv", copies(Path(name)))
        rows.write("kv_switch", switches(Path(name)))


if __name__ == "__main__":
    main()
