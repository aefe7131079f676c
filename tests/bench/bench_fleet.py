"""What a thousand interrupted nodes cost the operator: notice to plan, queue, EC2 calls, memory. Writes
build/bench/fleet.json.

The same fleet as in tests/unit/spot/test_fleet.py: real boto3 against the testbed's throttling EC2 and a queue, in one
process with it, so that the figures contain the fake's own work. Each plan asks two agents, by gRPC with mutual TLS
(survey_agents.py). The reference is ten nodes of the same run."""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in ("operator", "agent", "runtime", "tests/testbed", "tests/unit/spot"):
    sys.path.insert(0, str(ROOT / folder))

import rows  # noqa: E402
from fleet import run  # noqa: E402
from midstream_operator.settings import TlsFiles  # noqa: E402
from surveyed_fleet import SurveyedFleet, survey_agents  # noqa: E402

DOOMED, SURVIVORS, FOREIGN, ROUNDS = 1000, 100, 10_000, 3


def rss_mb() -> float:
    """Of this process now, the fake's part included; what a fleet left behind is collected first."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


Agents = tuple[TlsFiles, int]  # the operator's files, and the port on which all agents listen


def one(agents: Agents, doomed: int, survivors: int, foreign: int) -> tuple[list[float], float, int, float]:
    """Seconds from the first notice to each plan, seconds for everything, EC2 calls that moved, memory."""
    tls, port = agents
    fleet = SurveyedFleet(doomed, survivors, tls=tls, port=port)
    began = time.monotonic()
    run(fleet, foreign=foreign)
    first = min(fleet.told_at_s.values())
    planned = [at - first for at in fleet.planned_at_s.values()]
    moved = [call for call in fleet.ec2.called("AssignPrivateIpAddresses") if not call.code]
    assert fleet.owners().total() == doomed
    print(f"{doomed} nodes: {fleet.silent} plans without figures", file=sys.stderr)
    return planned, time.monotonic() - began, len(moved), rss_mb()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, survey_agents(Path(folder)) as agents:
        measure(agents)


def measure(agents: Agents) -> None:
    os.environ.update(AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_REGION="eu-west-1")
    os.environ.update(AWS_EC2_METADATA_DISABLED="true", NO_PROXY="127.0.0.1")
    logging.disable(logging.WARNING)
    few = one(agents, 10, 5, 0)
    planned, took_s, calls, memory_mb = [], [], [], []
    for _ in range(ROUNDS):
        plans, all_s, moves, peak_mb = one(agents, DOOMED, SURVIVORS, FOREIGN)
        planned += [max(plans)]
        took_s.append(all_s)
        calls.append(float(moves))
        memory_mb.append(peak_mb)
    ten = "10 nodes"
    flat = memory_mb[1] * 1.1
    rows.write(
        "fleet",
        [
            rows.row("notice to last plan", "s", planned, 10, "lower", reference=ten, reference_value=max(few[0])),
            rows.row("all addresses moved", "s", took_s, 120, "lower", reference=ten, reference_value=few[1]),
            rows.row("EC2 calls that move", "calls", calls, 300, "lower", reference=ten, reference_value=few[2]),
            rows.row("memory after three fleets", "MB", memory_mb[-1:], flat, "lower", reference="after two",
                     reference_value=memory_mb[1]),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
