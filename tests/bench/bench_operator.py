"""A thousand migrations at once in a cluster with thirty thousand pods that are none of the operator's business: how
soon each is planned, what it costs the API server, and the operator's memory. Writes build/bench/operator.json.

The API server is real, nodes and pods are objects, the agents are simulated (tests/cluster/simulated_agents.py: the
real gRPC with mutual TLS, in another process). All jobs are created as fast as eight connections can.

    python tests/bench/bench_operator.py [--jobs 1000] [--foreign 30000]
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / p) for p in ("operator", "agent", "runtime", "tests/testbed", "tests/cluster")]

import rows  # noqa: E402
from cluster_world import ACCOUNT, Place, World, wait_for  # noqa: E402
from midstream_testbed.cluster import BINARIES  # noqa: E402

CONNECTIONS = 8
PODS_PER_NODE = 20
QUIET_S = 2.0  # without a request: what was to be written is written
Json = dict[str, Any]


class Writers:
    """Kept connections to the API server: a TLS handshake costs more than the request."""

    def __init__(self, world: World) -> None:
        self._plane = world.plane
        self._own = threading.local()

    def connection(self) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection("127.0.0.1", self._plane.port, context=self._plane.context(), timeout=300)

    def request(self, method: str, path: str, body: Json, content: str = "application/json") -> Json:
        connection: http.client.HTTPSConnection | None = getattr(self._own, "connection", None)
        if connection is None:
            connection = self._own.connection = self.connection()
        connection.request(method, path, json.dumps(body), {"Content-Type": content})
        answer = connection.getresponse()
        data: Json = json.loads(answer.read())
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {data.get('message')}")
        return data

    def all(self, work: Callable[[int], object], numbers: Iterable[int]) -> None:
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(work, numbers))


def pod(name: str, node: str, labels: Json) -> Json:
    containers = [{"name": "c", "image": "none"}]
    return {"metadata": {"name": name, "labels": labels}, "spec": {"nodeName": node, "containers": containers}}


class Fleet:
    """Half of the nodes serve, the other half could take over."""

    def __init__(self, world: World, place: Place, jobs: int) -> None:
        self.world, self.place, self.jobs = world, place, jobs
        self.writers = Writers(world)
        self.nodes = [f"n{i:03}" for i in range(max(1, jobs // PODS_PER_NODE))]
        self.uids: dict[str, tuple[str, str]] = {}

    def build(self, foreign: int) -> None:
        for name in [*self.nodes, *(f"{n}-t" for n in self.nodes)]:
            self.world.add_node(name)
        self.writers.all(self._serving, range(self.jobs))
        self.writers.all(self._target, range(len(self.nodes)))
        for node, uid in self.uids.values():
            self.world.agents.do("pod", node=node, uid=uid)
        self.writers.all(self._foreign, range(foreign))

    def _serving(self, i: int) -> None:
        labels = {"midstream.dev/enabled": "true", "midstream.dev/workload": "llm", "serves": f"s{i}"}
        self._made(f"s{i}", self.nodes[i % len(self.nodes)], labels)

    def _target(self, i: int) -> None:
        labels = {"midstream.dev/enabled": "true", "midstream.dev/workload": "llm", "serves": "nothing"}
        self._made(f"t{i}", f"{self.nodes[i]}-t", labels)

    def _made(self, name: str, node: str, labels: Json) -> None:
        pods = self.place.path("pods", "", "v1")
        made = self.writers.request("POST", pods, pod(name, node, labels))
        conditions = [{"type": "Ready", "status": "True"}]
        status = {"status": {"phase": "Running", "podIP": "10.1.0.1", "conditions": conditions}}
        self.writers.request("PATCH", f"{pods}/{name}/status", status, "application/merge-patch+json")
        self.uids[name] = node, str(made["metadata"]["uid"])

    def _foreign(self, i: int) -> None:
        self.writers.request("POST", self.place.path("pods", "", "v1"), pod(f"f{i}", self.nodes[0], {"app": "other"}))

    def attach(self) -> float:
        """A floating address for each; the seconds until all are Ready."""
        began = time.monotonic()
        self.writers.all(self._fip, range(self.jobs))
        wait_for("addresses", lambda: self._count("floatingips", _ready) == self.jobs, 600)
        return time.monotonic() - began

    def _fip(self, i: int) -> None:
        selector = {"matchLabels": {"serves": f"s{i}"}}
        spec = {"pool": "large", "provider": "l2", "podSelector": selector}
        self.writers.request("POST", self.place.path("floatingips"), self._object("FloatingIP", f"a{i}", spec))

    def _object(self, kind: str, name: str, spec: Json) -> Json:
        return {"apiVersion": "midstream.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec}

    def _count(self, plural: str, good: Callable[[Json], bool]) -> int:
        return sum(good(o) for o in self.world.plane.request("GET", self.place.path(plural))["items"])

    def migrate(self, pods: Sequence[str]) -> Times:
        """A job for each of these pods, all at once, to the end of the last one."""
        version = self.world.plane.request("GET", self.place.path("migrationjobs"))["metadata"]["resourceVersion"]
        times = Times()

        def create(i: int) -> None:
            body = self._object("MigrationJob", f"j-{pods[i]}", {"source": {"podName": pods[i]}})
            self.writers.request("POST", self.place.path("migrationjobs"), body)
            times.created[f"j-{pods[i]}"] = time.monotonic()

        maker = threading.Thread(target=self.writers.all, args=(create, range(len(pods))))
        maker.start()
        self._follow(version, times, len(pods))
        maker.join()
        if times.phases.keys() != {"Succeeded"}:
            raise RuntimeError(f"not all succeeded: {dict(times.phases)}")
        return times

    def _follow(self, version: str, times: Times, jobs: int) -> None:
        """By a watch: asking again and again for a thousand jobs would be the API server's greatest load."""
        connection = self.writers.connection()
        lines: Iterator[bytes] = iter(())
        while len(times.ended) < jobs:
            line = next(lines, b"")
            if not line:  # ended by the server, which does that to whoever reads too slowly
                connection.close()
                connection.request("GET", f"{self.place.path('migrationjobs')}?watch=true&resourceVersion={version}")
                lines = iter(connection.getresponse())
                continue
            job = json.loads(line)["object"]
            version = job["metadata"]["resourceVersion"]
            name, status, at = job["metadata"]["name"], job.get("status", {}), time.monotonic()
            if status.get("plan"):
                times.planned.setdefault(name, at)
            if status.get("completionTime") and name not in times.ended:
                times.ended[name] = at
                times.phases[status["phase"]] += 1
        connection.close()


@dataclass
class Times:
    """Of jobs by name, monotonic."""

    created: dict[str, float] = field(default_factory=dict)
    planned: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    phases: collections.Counter[str] = field(default_factory=collections.Counter)

    def to_plan_s(self) -> list[float]:
        return [self.planned[name] - at for name, at in self.created.items()]

    def all_s(self) -> float:
        return max(self.ended.values()) - min(self.created.values())


def _ready(obj: Json) -> bool:
    return any(c["status"] == "True" for c in obj.get("status", {}).get("conditions", []))


def memory_mb(pid: int, what: str) -> float:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(text.partition(f"{what}:")[2].split()[0]) / 1024


class Requests:
    """What the operator asks of the API server, from the audit log, since this was made."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._before = self._settled()

    def all(self) -> list[Json]:
        """With what it does afterwards: Events are posted in the background, one after the other."""
        return self._work()[: self._settled()][self._before :]

    def _settled(self) -> int:
        count = -1
        while count != (count := len(self._work())):
            time.sleep(QUIET_S)
        return count

    def _work(self) -> list[Json]:
        """Without what it does all the time, job or no job."""
        audit = self._world.plane.audit(ACCOUNT)
        return [e for e in audit if e.get("objectRef", {}).get("resource") != "leases" and e["verb"] != "watch"]


def measure(world: World, fleet: Fleet) -> list[Json]:
    """First one job alone, for comparison, then all others at once."""
    attach_s = fleet.attach()
    pid = world.operators.running["op"].pid
    rss = memory_mb(pid, "VmRSS")
    first, *others = (f"s{i}" for i in range(fleet.jobs))
    requests = Requests(world)
    alone_s = fleet.migrate([first]).to_plan_s()[0]
    alone = len(requests.all())
    requests = Requests(world)
    times = fleet.migrate(others)
    seconds, asked = times.to_plan_s(), requests.all()
    lists = sum(entry["verb"] == "list" for entry in asked)
    small = ("before the jobs", rss)
    return [
        row("job_to_plan", "s", seconds, 10.0, ("one job alone", alone_s), value=max(seconds)),
        row("all_jobs", "s", [times.all_s()], 120.0, ("all addresses attached", attach_s)),
        row("api_requests_a_job", "requests", [len(asked) / len(others)], 16.0, ("one job alone", alone)),
        row("api_lists", "requests", [lists], 0.0, ("one a job", len(others))),
        row("rss", "MB", [memory_mb(pid, "VmRSS")], 250.0, small),
        row("rss_peak", "MB", [memory_mb(pid, "VmHWM")], 250.0, small),
    ]


def row(name: str, unit: str, values: list[float], goal: float, beside: tuple[str, float], **more: float) -> Json:
    return rows.row(name, unit, values, goal, "lower", reference=beside[0], reference_value=beside[1], **more)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--foreign", type=int, default=30_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, World.create(Path(folder), BINARIES) as world:
        world.operators.config["pools"].append({"name": "large", "provider": "l2", "cidrs": ["10.96.128.0/20"]})
        world.operators.config["limits"] = {"jobs": 10_000, "jobsPerNode": 10_000}  # none has to wait for another
        world.operators.config["timeouts"] = {}
        world.plane.kubectl("create", "namespace", "bench")
        fleet = Fleet(world, Place(world, "bench"), args.jobs)
        fleet.build(args.foreign)
        world.operators.start("op")
        world.operators.ensure()
        rows.write("operator", measure(world, fleet))
        world.operators.stop_all()
    return 0


if __name__ == "__main__":
    sys.exit(main())
