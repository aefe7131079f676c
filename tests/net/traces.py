"""What tests of failures share: clients that check every byte, agents that die at a failpoint, what is left behind."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from midstream_testbed import leaks
from world import V4, V6, Clients, World

CLIENTS = 5
LISTEN, TIME_WAIT, FIN_WAIT2 = "0A", "06", "05"


@dataclass
class Traces:
    """What a migration could leave behind, held against the same places when nothing was going on."""

    world: World
    nets: dict[str, frozenset[leaks.Line]] = field(default_factory=dict)  # by where the streams were
    fds: dict[int, Counter[str]] = field(default_factory=dict)  # by process

    @classmethod
    def of(cls, world: World) -> Traces:
        """Two migrations without streams, so that what is made once and kept is there."""
        traces = cls(world)
        for _ in range(2):
            assert world.hop()["phase"] == "PHASE_SUCCEEDED"
            traces.wait(lambda: {k: v for k, v in traces.maps().items() if v})
            traces.nets[world.at] = traces.net()
        for pid in traces.pids():
            traces.fds[pid] = descriptors(pid)
        return traces

    def pids(self) -> list[int]:
        agents = [a.process.pid for a in self.world.fleet.agents.values()]
        return agents + [s.process.pid for s in self.world.fleet.pods.values()]

    def net(self) -> frozenset[leaks.Line]:
        return leaks.snapshot(self.world.a, self.world.b, *self.world.pods.values(), sockets=False)

    def maps(self) -> dict[str, dict[str, int]]:
        return {name: self.world.held(name) for name in self.world.fleet.agents}

    def left(self) -> list[str]:
        """One line for each thing too many or too few."""
        found = [f"{name} holds {held}" for name, held in self.maps().items() if held]
        difference = leaks.difference(self.nets[self.world.at], self.net())
        found += [] if difference == leaks.NOTHING else [str(difference)]
        for agent in self.world.fleet.agents.values():
            found += [str(p) for p in agent.state_dir.rglob("*") if p.is_file() and p.name != "epochs.json"]
        for pod in self.world.pods.values():
            found += [f"{pod.name}: {line}" for line in connections(pod.proc_net("tcp") + pod.proc_net("tcp6"))]
        for pid in self.pids():
            more = descriptors(pid) - self.fds.get(pid, descriptors(pid))
            found += [f"process {pid} has {dict(more)} too many"] if more else []
        return found

    def wait(self, left: Callable[[], Any], timeout_s: float = 20) -> None:
        """MOVED entries linger for two seconds, and a peer's session ends a little after its job."""
        end = time.monotonic() + timeout_s
        while found := left():
            if time.monotonic() > end:
                raise AssertionError(f"left behind: {found}")
            time.sleep(0.1)


def descriptors(pid: int) -> Counter[str]:
    """Open files of a process by kind; event loops' own are left out, they come and go."""
    kinds = (re.sub(r"\d+", "N", what.split(" ", 1)[1]) for _, _, what in leaks.open_fds(pid))
    return Counter(kind for kind in kinds if not kind.startswith("anon_inode:[event"))


def connections(listing: str) -> list[str]:
    """Lines of /proc/net/tcp* that are neither listeners nor on their way out by themselves."""
    fields = (line.split() for line in listing.splitlines())
    return [" ".join(f[1:4]) for f in fields if f[0] != "sl" and f[3] not in (LISTEN, TIME_WAIT, FIN_WAIT2)]


@dataclass
class Streams:
    """Clients on both sides of a failure."""

    traces: Traces
    groups: list[Clients]

    def unharmed(self) -> None:
        """Every byte came both ways, and nothing is left on either node."""
        results = [g.finish() for g in self.groups]
        errors = [e for r in results for e in r["errors"]]
        assert errors == [], errors
        assert sum(r["ok"] for r in results) == len(self.groups) * CLIENTS
        self.traces.wait(self.traces.left)


def start_streams(traces: Traces, seed: int, **options: Any) -> Streams:
    """Both families, uploads and downloads, from outside and from the node that they are on."""
    world = traces.world
    for agent in world.fleet.agents.values():
        agent.failpoint_log.unlink(missing_ok=True)
    world.at = world.vpc.fabric.owner(V4) or world.at  # a test that failed may have left it elsewhere
    kind = {"kind": "both", "size": 800_000, "seconds": 1.2, "spread_s": 0.05, **options}
    groups = [world.clients(world.outside, CLIENTS, seed, address=V4, **kind)]
    groups += [world.clients(world.a, CLIENTS, seed + 50, address=V6, **kind)]
    for address in (V4, V6):
        world.wait_streams(address, CLIENTS)
    return Streams(traces, groups)


def settle(world: World, job: str) -> str:
    """Start killed agents again and wait for the job's end; its phase, by the source's agent."""
    world.restart_if_dead()
    return world.wait_job(job)


def kill_at(world: World, agent: str, where: str, source_fails: str = "") -> str:
    """A migration during which `agent` dies at `where`, maybe after the source failed somewhere; returns its job."""
    victim, kill = world.agent(agent), f"{where}=kill"
    if source_fails:
        error = f"{source_fails}=error"
        world.agent(world.at).arm(f"{error},{kill}" if agent == world.at else error)
    if not source_fails or agent != world.at:
        victim.arm(kill)
    job = world.hop_in_background()
    assert victim.process.wait(20) == -signal.SIGKILL
    assert victim.fired()[-1] == where
    return job
