"""A real agent and AWS's own mock of the metadata service: bodies that nobody of this project has written."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from midstream_testbed import imds_mock
from midstream_testbed.fleet import Fleet
from midstream_testbed.imds import ADDRESS
from midstream_testbed.instances import IMDS
from midstream_testbed.vpc import Vpc

HERE = Path(__file__).resolve().parent
PATHS = ("spot/instance-action", "events/recommendations/rebalance", "events/maintenance/scheduled")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """By kind, and "metadata": what the agent of a host says that runs beside the mock."""
    with Vpc.create() as vpc, Fleet(vpc, tmp_path_factory.mktemp("mock")) as fleet:
        host = vpc.host("node-a")
        imds_mock.start(host)
        fleet.start_agent(host, *IMDS)
        argv = [sys.executable, str(HERE / "notices_call.py"), str(fleet.inventory), host.name, str(len(PATHS))]
        done = fleet.operator.run(argv, env=fleet.env(), timeout_s=60, check=False)
        assert done.returncode == 0, done.stderr
        *notices, metadata = [json.loads(line) for line in done.stdout.splitlines()]
        elsewhere = vpc.client("elsewhere", in_vpc=True).run(
            ["curl", "-sS", "--max-time", "2", f"http://{ADDRESS}/latest/meta-data/"], check=False
        )
        assert elsewhere.returncode != 0, "nobody outside the host's namespace reaches it"
        yield {**{notice["kind"]: notice for notice in notices}, "metadata": metadata}


def at(notice: dict[str, Any], name: str) -> datetime:
    return datetime.fromtimestamp(int(notice[name]) / 1000, UTC)


def test_a_spot_notice_with_its_end(told: dict[str, dict[str, Any]]) -> None:
    notice = told["SpotInterruption"]
    assert notice["details"] == {"action": "terminate"}
    assert timedelta(0) < at(notice, "deadlineUnixMs") - datetime.now(UTC) <= timedelta(seconds=120)


def test_a_rebalance_recommendation_says_since_when(told: dict[str, dict[str, Any]]) -> None:
    notice = told["Rebalance"]
    assert timedelta(0) <= datetime.now(UTC) - at(notice, "issuedUnixMs") < timedelta(minutes=5)
    assert "deadlineUnixMs" not in notice


def test_scheduled_maintenance_says_from_when(told: dict[str, dict[str, Any]]) -> None:
    notice = told["Maintenance"]
    assert notice["details"]["code"] == "system-reboot" and notice["details"]["event"].startswith("instance-event-")
    assert abs(at(notice, "deadlineUnixMs") - datetime.now(UTC)) < timedelta(minutes=5), "the mock's begins at once"


def test_the_instance_and_an_interface_that_it_does_not_know(told: dict[str, dict[str, Any]]) -> None:
    assert all(told[kind]["instanceId"].startswith("i-") for kind in ("SpotInterruption", "Rebalance", "Maintenance"))
    assert "IMDS knows no interface" in told["metadata"]["absent"]
