"""What many migrations could leave behind, counted: in the kernel's tables, in BPF maps, in files, in processes.

    before = Remains.settled(world)
    ...migrate, again and again...
    before.wait_nothing_new()

More than `traces.Traces` looks at, which is for single migrations: neighbours and connections tracked by the hosts,
which come and go by themselves, are held against what they were when everything was warm, and so is memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream_agent.hold import Hold
from midstream_testbed import leaks
from traces import connections, descriptors
from world import PORT, World

RSS_MARGIN_KB = 4 << 10
"""Seen in 40 migrations: 1.8 MB for the jobs that an agent remembers (64 at most), nothing in a serving process."""
TRANSIENT_S = 300
"""Longest timeout of a tracked connection that is ending or was never answered (tcp_timeout_unacknowledged). Steering
leaves some: a SYN that is dropped behind the host's routing, a copy that comes after the connection's end."""
PATIENCE_S = 20.0
NUD_NOARP = 0x40
Line = tuple[str, str, str]


@dataclass
class Remains:
    world: World
    names: dict[int, str]  # of processes, by pid; so is what follows in terms of pids
    maps: dict[str, dict[str, int]]
    net: frozenset[leaks.Line]
    neighbours: frozenset[Line]
    tracked: Counter[str]
    files: frozenset[str]
    fds: dict[int, Counter[str]]
    threads: dict[int, int]
    rss_kb: dict[int, int]

    @classmethod
    def of(cls, world: World) -> Remains:
        pids = processes(world)
        hosts, pods = (world.a, world.b), tuple(world.pods.values())
        return cls(
            world,
            pids,
            maps={name: entries(agent.bpffs) for name, agent in world.fleet.agents.items()},
            net=leaks.snapshot(*hosts, *pods, sockets=False),
            neighbours=frozenset(line for n in (*hosts, *pods) for line in n.netlink(neighbours_of(n.name))),
            tracked=sum((tracked_flows(h.name, h.proc_net("nf_conntrack")) for h in hosts), Counter[str]()),
            files=frozenset(str(p) for a in world.fleet.agents.values() for p in a.state_dir.rglob("*") if p.is_file()),
            fds={pid: descriptors(pid) for pid in pids},
            threads={pid: status_of(pid, "Threads") for pid in pids},
            rss_kb={pid: status_of(pid, "VmRSS") for pid in pids},
        )

    @classmethod
    def settled(cls, world: World) -> Remains:
        """What there is once nothing lingers any more."""
        return _wait(world, cls.lingering)

    def lingering(self) -> list[str]:
        """One line for each thing that must not be there between two jobs, whatever was there before."""
        found = [f"{node} holds {count} {kind}" for node, m in self.maps.items() for kind, count in m.items() if count]
        found += [f"{n} tracked: {what}" for what, n in self.tracked.items() if " stream " in what]
        found += [f"file {name}" for name in sorted(self.files) if not name.endswith("/epochs.json")]
        for pod in self.world.pods.values():
            found += [f"{pod.name}: {line}" for line in connections(pod.proc_net("tcp") + pod.proc_net("tcp6"))]
        return found

    def new_in(self, now: Remains) -> list[str]:
        """One line for each thing that is there now and was not."""
        difference = leaks.difference(self.net, now.net)
        found = [] if difference == leaks.NOTHING else [str(difference)]
        found += [f"neighbour {' '.join(line)}" for line in sorted(now.neighbours - self.neighbours)]
        found += [f"{n} tracked: {what}" for what, n in (now.tracked - self.tracked).items()]
        return now.lingering() + found + self._in_processes(now)

    def _in_processes(self, now: Remains) -> list[str]:
        found = []
        for pid, name in now.names.items():
            more = now.fds[pid] - self.fds[pid]
            found += [f"{name} has {dict(more)} too many"] if more else []
            threads, kb = now.threads[pid] - self.threads[pid], now.rss_kb[pid] - self.rss_kb[pid]
            found += [f"{name} has {threads} threads too many"] if threads > 0 else []
            found += [f"{name} has grown by {kb} kB"] if kb > RSS_MARGIN_KB else []
        return found

    def wait_nothing_new(self) -> Remains:
        """What lingers goes by itself within seconds; AssertionError with what does not. Returns what there is."""
        return _wait(self.world, self.new_in)


def _wait(world: World, left: Callable[[Remains], list[str]]) -> Remains:
    end = time.monotonic() + PATIENCE_S
    while found := left(now := Remains.of(world)):
        if time.monotonic() > end:
            raise AssertionError("left behind:\n" + "\n".join(found))
        time.sleep(0.5)
    return now


def processes(world: World) -> dict[int, str]:
    """Agents and serving processes by pid."""
    found = {agent.process.pid: f"agent of {name}" for name, agent in world.fleet.agents.items()}
    return found | {serving.process.pid: name for name, serving in world.fleet.pods.items()}


def entries(bpffs: Path) -> dict[str, int]:
    """How many keys each map has."""
    with Hold.open(bpffs) as hold:
        keys = {"flows": hold.flow_keys(), "notes": hold.note_keys(), "addrs": hold.addr_keys()}
        return {name: len(k) for name, k in keys.items()} | {"births": len(hold.birth_keys())}


def neighbours_of(name: str) -> Any:
    """For Namespace.netlink: the neighbours that it has learnt, by device; not those that need no asking (multicast,
    devices without ARP), which the kernel notes and forgets as it likes."""

    def read(ip: Any) -> list[Line]:
        names = {link["index"]: str(link.get("ifname")) for link in ip.get_links()}
        learnt = (n for n in ip.get_neighbours() if not n["state"] & NUD_NOARP)
        return [(name, names.get(n["ifindex"], "?"), str(n.get("dst"))) for n in learnt]

    return read


def tracked_flows(host: str, listing: str) -> Counter[str]:
    """Connections that a host tracks for longer than `TRANSIENT_S`: those that it takes for alive."""
    lines = (line.split() for line in listing.splitlines())
    alive = (f for f in lines if f[2] == "tcp" and int(f[4]) > TRANSIENT_S)
    return Counter(f"{host} {'stream' if f'dport={PORT}' in f else 'tcp'} {f[5]}" for f in alive)


def status_of(pid: int, field: str) -> int:
    """A number of /proc/PID/status; sizes in kB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
