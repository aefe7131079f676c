"""Checkpoint and restore of 1,000 sockets, against a bare C loop of the same system calls. Writes build/bench/tcp.json.

Both ways take turns in one process (bare_tcp.c) over loopback in a network namespace of its own, each round with new
connections, and first the one, then the other. A figure is the median of the rounds' ratios: load of other programs
drifts over seconds and would be in the ratio of two medians. The library's times include making and reading the
checkpoint's bytes and all memory; the loop makes no bytes, and its memory is there before its time begins. That both
make the same system calls is counted by strace, not assumed. Needs root."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections import defaultdict
from pathlib import Path

import rows

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "build" / "bench" / "bare_tcp"
SOCKETS = 1000
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "40"))
GOAL = 1.2
MEMORY = {"brk", "mmap", "munmap", "mremap", "madvise"}  # the allocator's, not the work's

# The clients never hear of the 300 bytes: they stay in flight, as at a gate.
_NAMESPACE = """
set -e
ip link set lo up mtu 1500
nft -f - <<RULES
table inet bench {
  chain in {
    type filter hook input priority 0
    tcp sport 7777 meta length > 300 drop
  }
}
RULES
exec "$@"
"""


def build() -> None:
    subprocess.run(["make", "-s", "-C", str(ROOT / "csrc")], check=True, timeout=120)
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    library = ROOT / "build" / "csrc"
    source = str(ROOT / "tests" / "bench" / "bare_tcp.c")
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-l:libmidstream_tcp.so.1"]
    paths = [f"-I{ROOT}/csrc/include", f"-I{ROOT}/bpf", f"-L{library}", f"-Wl,-rpath,{library}"]
    subprocess.run([os.environ.get("CC", "cc"), "-o", str(PROGRAM), source, *paths, *flags], check=True, timeout=120)


def in_namespace(*argv: str) -> str:
    command = ["unshare", "-n", "sh", "-c", _NAMESPACE, "sh", *argv]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout


def times() -> dict[str, list[tuple[float, float]]]:
    """Microseconds a socket, (checkpoint, restore) of each round, by way."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in in_namespace(str(PROGRAM), "time", str(SOCKETS), str(ROUNDS)).splitlines():
        way, *numbers = line.split()
        checkpoint, restore, encode, decode = map(float, numbers)
        found[way].append((checkpoint + encode, decode + restore))
    return found


def system_calls(way: str) -> dict[str, int]:
    """How often a round of this way makes each system call, its connections included."""
    table = in_namespace("strace", "-f", "-c", "-U", "calls,name", "-o", "/dev/stdout", str(PROGRAM), way, str(SOCKETS))
    cells = [line.split() for line in table.splitlines()]
    return {row[1]: int(row[0]) for row in cells if len(row) == 2 and row[0].isdigit() and row[1] != "total"}


def main() -> None:
    build()
    found = times()
    out = []
    for index, name in enumerate(("checkpoint", "restore")):
        library, bare = ([one[index] for one in found[way]] for way in ("library", "bare"))
        median = statistics.median(bare)
        print(f"{name}: library {statistics.median(library):.2f} us a socket, bare loop {median:.2f}")
        out.append(
            rows.row(
                f"tcp_{name}_by_bare_loop",
                "x",
                [mine / theirs for mine, theirs in zip(library, bare, strict=True)],
                GOAL,
                "lower",
                reference="bare C loop, us a socket",
                reference_value=median,
            )
        )
    calls = {way: system_calls(way) for way in ("library", "bare")}
    names = sorted((set(calls["library"]) | set(calls["bare"])) - MEMORY)
    counts = {name: (calls["library"].get(name, 0), calls["bare"].get(name, 0)) for name in names}
    for name, (mine, theirs) in counts.items():
        print(f"  {name:16} library {mine:6} bare {theirs:6}{'' if mine == theirs else '   DIFFERENT'}")
    out.append(
        rows.row(
            "tcp_system_calls_beyond_bare_loop",
            "calls",
            [sum(abs(mine - theirs) for mine, theirs in counts.values())],
            0,
            "lower",
            reference="calls of a round of the bare loop",
            reference_value=sum(theirs for _, theirs in counts.values()),
        )
    )
    rows.write("tcp", out)


if __name__ == "__main__":
    main()
