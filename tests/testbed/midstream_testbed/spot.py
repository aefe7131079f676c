"""`make demo NOTICE=spot`: EC2 takes an instance back while curl reads from it, and nobody calls `midstream migrate`.

The same play as the demo's, with the product's operator in it, so that it needs the tests' Kubernetes binaries:

1. two hosts that are EC2 instances and nodes, an agent on each, the operator beside a real API server; the operator
   has EC2 assign the floating IP and the agent bring it to the serving pod;
2. EC2's notice appears in the metadata of the source host, at 169.254.169.254 of its own namespace (or comes by
   EventBridge and SQS, or both), and that is all that anybody does;
3. at the end of the notice the testbed terminates the host: interfaces down, processes killed;
4. the client host's capture, the MigrationJobs and the agent's report say what became of it.

`--notice-seconds` shortens EC2's two minutes: the testbed's clock, nothing in the product. Below 25 s the agents copy
no KV: they keep 15 s for the switch, and the operator 5 s off the end.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from midstream_testbed.demo import ADDRESS, Demo, Play, Stream, perform
from midstream_testbed.fleet import Fleet
from midstream_testbed.instances import Interruption
from midstream_testbed.machine import Client, Host
from midstream_testbed.notice_queue import NoticeQueue
from midstream_testbed.operated import ENDED, Json, Operated
from midstream_testbed.verdict import Answer, Network
from midstream_testbed.vpc import Vpc

POOL = f"{ADDRESS}/30"  # the operator takes its first address
MOVE_SECONDS = 3.0  # between EC2's yes and its effect
BEGUN_SHARE = 0.1  # of the answer has come when the notice does
SOURCES = {"imds": ("imds",), "sqs": ("sqs",), "both": ("imds", "sqs")}


@dataclass(slots=True)
class SpotDemo(Demo):
    notice_s: float = 30.0
    source: str = "imds"
    """Who is told of the interruption: a key of SOURCES."""
    deaf: bool = False
    """The control: an agent that asks no metadata."""

    def run(self) -> Play:
        self.say(f"testbed: router, two EC2 instances, a control plane; an address moves {self.move_seconds:g} s "
                 "after EC2's yes")  # fmt: skip
        with contextlib.ExitStack() as stack:
            vpc = stack.enter_context(Vpc.create(move_seconds=self.move_seconds))
            fleet = stack.enter_context(Fleet(vpc, self.folder, self.without_hold, self.steer))
            cluster = stack.enter_context(Operated(fleet, POOL))
            queue = stack.enter_context(NoticeQueue()) if "sqs" in SOURCES[self.source] else None
            source = self._set_up(fleet, cluster, queue)
            return self._play(vpc.client("client"), fleet, cluster, queue, source)

    def _set_up(self, fleet: Fleet, cluster: Operated, queue: NoticeQueue | None) -> Host:
        """Everything that runs before the notice; the host that will get it."""
        options = ("--address-confirm-s", str(self.move_seconds + 20))
        hosts = [cluster.add_node(name, *options, hears=not self.deaf) for name in ("node-a", "node-b")]
        self.say("an agent on each node, listening to its host's metadata")
        cluster.start_operator(queue.url_inside(cluster.plane) if queue else "")
        pods = ("--pace-ms", str(self.pace_ms), "--pool-slots", str(self.pool_slots))
        cluster.add_serving_pod("llm-0", hosts[0], *pods)
        address = cluster.add_floating_ip()
        if address != ADDRESS:
            raise RuntimeError(f"the operator took {address} out of {POOL}, not its first address")
        cluster.add_serving_pod("llm-1", hosts[1], *pods)
        self.say(f"the operator leads; EC2 has given the floating IP {ADDRESS} to node-a")
        return hosts[0]

    def _play(
        self, client: Client, fleet: Fleet, cluster: Operated, queue: NoticeQueue | None, source: Host
    ) -> Play:  # fmt: skip
        references = self._quick_references(fleet, fleet.vpc.hosts["node-b"])
        with client.capture() as capture:
            running = self._start_curls(client, references)
            self._wait_until(running, BEGUN_SHARE)
            upload = self._start_upload(client, references)
            notice = self._give_notice(cluster, queue, source)
            job, report, ended = self._watch(cluster, notice)
            killed_at = cluster.instances.terminate(source)
            share = max(len(s.answer().pieces) for s in running) / self.tokens
            self.say(f"the notice is over: node-a is terminated, {share:.0%} of the answer had arrived")
            if not report:
                self._give_up(cluster, [*running, upload])
            self._finish([*running, upload])
            metrics = self._metrics(client) if report else {}
            packets = capture.stop()
        told = self._told(cluster, fleet, notice, job, report, killed_at)
        network = Network.read(packets, ADDRESS, 8000)
        span = (notice.said_at, ended)
        return Play(running, upload, report, network, capture.dropped or 0, metrics, share, span, told)

    def _give_up(self, cluster: Operated, clients: list[Stream]) -> None:
        """Nothing will ever answer them."""
        self.say("no job had ended when the source did: its streams are lost")
        print(cluster.operator_log(), file=sys.stderr)
        for stream in clients:
            stream.process.kill()

    def _quick_references(self, fleet: Fleet, host: Host) -> dict[str, Answer]:
        """From a pod of their own that decodes as fast as it can: greedy answers do not depend on the pace."""
        pod = fleet.start_gateway(host, "reference", "--pool-slots", str(self.pool_slots), workload="reference")
        fleet.wait_ready("reference")
        found = self._references(pod, "127.0.0.1")
        pod.delete()
        return found

    def _give_notice(self, cluster: Operated, queue: NoticeQueue | None, source: Host) -> Interruption:
        sources = SOURCES[self.source]
        notice = cluster.instances.announce(source, self.notice_s)
        if queue is not None:
            queue.interrupt(cluster.instances.id_of(source.name), notice.deadline)
        if "imds" in sources:
            cluster.instances.tell(notice)
        self.say(f"EC2 by {' and '.join(sources)}: {cluster.instances.id_of(source.name)} is terminated at "
                 f"{notice.deadline:%H:%M:%S} UTC, {self.notice_s:g} s from now. Nobody calls anybody.")  # fmt: skip
        return notice

    def _watch(self, cluster: Operated, notice: Interruption) -> tuple[Json, Json, float]:
        """Until the notice is over: the job as it ended, the agent's report, and when it had ended."""
        job: Json = {}
        report: Json = {}
        seen, ended = "", 0.0
        while time.time() < notice.end_at:
            jobs = [] if report else cluster.jobs()
            for job in jobs:
                phase = str(job.get("status", {}).get("phase", "Pending"))
                if (said := f"{job['metadata']['name']}: {phase}") != seen:
                    self.say(f"  MigrationJob {said}")
                    seen = said
                if phase in ENDED and "agentJob" in job["status"]:
                    report, ended = cluster.report_of(job), time.time()
            time.sleep(min(0.1, max(0.0, notice.end_at - time.time())))
        return job, report, ended or time.time()

    def _told(
        self, cluster: Operated, fleet: Fleet, notice: Interruption, job: Json, report: Json, killed_at: float
    ) -> dict[str, Any]:  # fmt: skip
        """demo.json's "notice"."""
        status = job.get("status") or {}
        spans = {s["name"]: s for s in report.get("steps", [])}
        begun = job_began(fleet.agents[notice.host].log, str(status.get("agentJob", "")))
        paused = begun + spans["PAUSE"]["startMs"] / 1000 if "PAUSE" in spans else float("inf")
        release = spans.get("RELEASE")
        released = begun + (release["startMs"] + release["tookMs"]) / 1000 if release else float("inf")
        return {
            "kind": job.get("spec", {}).get("reason", ""),
            "source": self.source,
            "action": "terminate",
            "seconds": self.notice_s,
            "jobs": len(cluster.jobs()),
            "job": job.get("metadata", {}).get("name", ""),
            "phase": status.get("phase", ""),
            "plan": status.get("plan", ""),
            "notice_to_pause_ms": round((paused - notice.said_at) * 1000, 1) if spans else -1.0,
            "left_at_release_s": round(notice.left_s(released), 3) if release else -1.0,
            "terminated_late_s": round(killed_at - notice.end_at, 3),
            "address_moved_s": cluster.instances.last_move_s(ADDRESS),
            "address_at": cluster.instances.host_of(ADDRESS),
        }


def job_began(log: str, job: str) -> float:
    """When the agent began it, seconds of the epoch: by the line that it logs (local time, to the millisecond)."""
    found = re.search(rf"^(\S+ \S+),(\d+) INFO \S+ job {re.escape(job)}: begins", log, re.MULTILINE) if job else None
    if found is None:
        return float("inf")
    return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(found[2]) / 1000


def main(argv: list[str] | None = None) -> int:
    args = _arguments(argv)
    demo = SpotDemo(args.streams, args.tokens, args.pace_ms, args.move_seconds, notice_s=args.notice_seconds,
                    source=args.source, deaf=args.deaf, steer=args.switchover == "steer")  # fmt: skip
    return perform(demo, args.json)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    env = os.environ
    parser = argparse.ArgumentParser(prog="make demo NOTICE=spot")
    parser.add_argument("--streams", type=int, default=int(env.get("STREAMS") or 1))
    parser.add_argument("--notice-seconds", type=float, default=float(env.get("DEMO_NOTICE_SECONDS") or 30),
                        help="from the notice to the end of the instance; EC2 gives 120")  # fmt: skip
    parser.add_argument("--source", choices=SOURCES, default=env.get("DEMO_NOTICE_SOURCE") or "imds")
    parser.add_argument("--switchover", choices=("steer", "wait"), default=env.get("DEMO_SWITCHOVER") or "steer")
    parser.add_argument("--deaf", action="store_true", help="the control: agents that ask no metadata; must fail")
    parser.add_argument("--tokens", type=int, help="of each answer; default: the source ends in mid-answer")
    parser.add_argument("--pace-ms", type=float, default=0.0, help="between two tokens; default: the notice's seconds")
    parser.add_argument("--move-seconds", type=float, default=float(env.get("DEMO_MOVE_SECONDS") or MOVE_SECONDS))
    parser.add_argument("--json", type=Path, default=Path("build/demo.json"))
    args = parser.parse_args(argv)
    args.pace_ms = args.pace_ms or args.notice_seconds
    if args.tokens is None:
        args.tokens = int(args.notice_seconds * 1000 / args.pace_ms / (2 / 3 - BEGUN_SHARE) * 1.2)
    for name, least in (("streams", 1), ("tokens", 60), ("pace_ms", 1), ("move_seconds", 0), ("notice_seconds", 15)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    return args


if __name__ == "__main__":
    sys.exit(main())
