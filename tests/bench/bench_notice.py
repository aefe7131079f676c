"""From EC2's notice to the PAUSE of the streams, with nobody in between: build/bench/notice.json.

The world of `make demo NOTICE=spot`: IMDS in the host's own namespace, the agent that asks it once a second, the
operator with a real API server, a job, the source's agent. Each round interrupts a new instance with a pod and a client
of its own; notices come at any moment of the agent's second. The reference is the part that is waiting: until the agent
has heard.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in ("operator", "agent", "runtime", "tests/testbed"):
    sys.path.insert(0, str(ROOT / folder))

import rows  # noqa: E402
from midstream_testbed.fleet import GATEWAY_PORT, Fleet  # noqa: E402
from midstream_testbed.operated import Json, Operated, wait_until  # noqa: E402
from midstream_testbed.spot import job_began  # noqa: E402
from midstream_testbed.vpc import Vpc  # noqa: E402

ROUNDS = 20
GOAL_S = 2.0  # p99, of the two minutes that EC2 gives
POOL = "10.77.0.224/27"
KIND = "p4d.24xlarge"  # its interfaces hold an address of every round
SERVE = ("--pace-ms", "20", "--pool-slots", "256")
BODY = '{"model": "midstream-tiny", "prompt": "The system reads", "max_tokens": 1000, "stream": true}'
HEARD = re.compile(r"^(\S+ \S+),(\d+) WARNING \S+ notice: SpotInterruption", re.MULTILINE)


def one(cluster: Operated, fleet: Fleet, number: int) -> tuple[float, float]:
    """Seconds from the notice until the agent had heard it, and until PAUSE."""
    name = f"source-{number}"
    host = cluster.add_node(name)
    cluster.add_serving_pod(f"llm-{number}", host, *SERVE)
    address = cluster.add_floating_ip(f"ip-{number}", pod=f"llm-{number}")
    client = cluster.vpc.clients["client"]
    url = f"http://{address}:{GATEWAY_PORT}/v1/completions"
    curl = client.popen(["curl", "-sSN", "--max-time", "60", "-H", "content-type: application/json", "-d", BODY, url])
    wait_until("the answer has begun", lambda: "data: " in curl.output(), 20)
    time.sleep(0.07 * number % 1)  # at any moment of the agent's second
    notice = cluster.instances.announce(host, 120)
    cluster.instances.tell(notice)

    def through() -> Json:
        mine = [j for j in cluster.jobs() if j["spec"]["source"]["podName"] == f"llm-{number}"]
        return mine[0] if mine and mine[0].get("status", {}).get("phase") == "Succeeded" else {}

    job = wait_until("the job has succeeded", through, 60, cluster.operator_log)
    report, log = cluster.report_of(job), fleet.agents[name].log
    pause_ms = next(s["startMs"] for s in report["steps"] if s["name"] == "PAUSE")
    paused = job_began(log, job["status"]["agentJob"]) + pause_ms / 1000
    curl.kill()
    cluster.terminate(host)
    return heard_at(log) - notice.said_at, paused - notice.said_at


def heard_at(log: str) -> float:
    found = HEARD.search(log)
    assert found is not None, log
    return datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(found[2]) / 1000


def p99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.99))]


def main() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="midstream-bench-") as folder,
        Vpc.create() as vpc,
        Fleet(vpc, Path(folder), steer=True) as fleet,
        Operated(fleet, POOL, kind=KIND) as cluster,
    ):
        vpc.client("client")
        target = cluster.add_node("target")
        cluster.start_operator()
        cluster.add_serving_pod("target", target, "--pace-ms", "20", "--pool-slots", "4096")
        found = [one(cluster, fleet, number) for number in range(ROUNDS)]
    heard, paused = [h for h, _ in found], [p for _, p in found]
    rows.write(
        "notice",
        [
            rows.row("notice to PAUSE by IMDS, p99", "s", paused, GOAL_S, "lower", value=p99(paused),
                     reference="until the agent has heard, p99", reference_value=p99(heard)),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
