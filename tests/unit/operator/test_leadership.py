"""A Lease that is not renewed in time, which may pass: nothing is decided, written or commanded meanwhile."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from midstream_operator.context import Context
from midstream_operator.errors import NotLeader
from midstream_operator.floating import FloatingIPs
from midstream_operator.jobs import Jobs
from midstream_operator.kube import Kube
from midstream_operator.lease import Epochs, Lease
from midstream_operator.run import Run
from midstream_operator.settings import Settings, Timeouts
from midstream_operator.status import Draft
from midstream_operator.view import View

SETTINGS = Settings(timeouts=Timeouts(retry_s=0.01, lease_give_up_s=60))


class Writes:
    """In place of the API server: whatever is written by a replica that does not lead is a mistake."""

    async def patch(self, path: str, body: Any) -> Any:
        raise AssertionError(f"{path}: {body}")


def context(lease: Lease) -> Context:
    return cast("Context", SimpleNamespace(settings=SETTINGS, view=View(), kube=Writes(), lease=lease))


def test_no_epoch_without_the_lease_and_a_good_one_with_it() -> None:
    lease = Lease(cast("Kube", None), SETTINGS, epochs=Epochs(1000))
    parts = SimpleNamespace(lease=lease)
    with pytest.raises(NotLeader):
        Context.epoch(cast("Context", parts))
    lease._renewed = time.monotonic()
    assert Context.epoch(cast("Context", parts)) == 1001


def test_a_job_is_taken_up_again_from_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was ended as Failed, NotLeader, by a replica that led again a moment later."""
    ctx = context(Lease(cast("Kube", None), SETTINGS))
    jobs = Jobs(ctx, FloatingIPs(ctx))
    obj: dict[str, Any] = {
        "metadata": {"name": "j", "namespace": "default", "uid": "u", "creationTimestamp": "2026-11-25T10:00:00Z"},
        "spec": {"source": {"podName": "llm-0"}},
        "status": {"phase": "Preparing", "message": "written"},
    }
    begun: list[dict[str, Any]] = []

    async def run(self: Run) -> None:
        begun.append(self.draft.status)
        if len(begun) == 1:
            self.draft.say("not written yet")
            raise NotLeader

    monkeypatch.setattr(Run, "run", run)
    asyncio.run(jobs._carry(Run(ctx, jobs, obj)))
    assert [status["message"] for status in begun] == ["not written yet", "written"]
    assert isinstance(Draft(obj, 100).as_written, dict)
