"""A job and its target that are made in one breath: the watch of pods may be behind that of jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from midstream_operator.context import Context
from midstream_operator.errors import Final
from midstream_operator.floating import FloatingIPs
from midstream_operator.jobs import Jobs
from midstream_operator.model import LABEL_NOTICE, Json
from midstream_operator.run import Run
from midstream_operator.settings import Settings
from midstream_operator.view import Agent, Node, Pod, View


class ApiServer:
    """What a list of pods would say."""

    def __init__(self, *pods: Json) -> None:
        self.pods, self.asked = list(pods), 0

    async def request(self, method: str, path: str, *, query: Sequence[tuple[str, str]]) -> Json:
        assert (method, path) == ("GET", "/api/v1/namespaces/default/pods")
        assert ("labelSelector", "midstream.dev/enabled=true") in query
        self.asked += 1
        return {"items": self.pods}


def pod(name: str, node: str) -> Json:
    return {
        "metadata": {"name": name, "namespace": "default", "uid": f"uid-{name}", "labels": {"app": "llm"}},
        "spec": {"nodeName": node},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
    }


def run_of(api: ApiServer, **labels: str) -> tuple[Run, Pod]:
    """A job of llm-0 whose view knows no other pod yet."""
    view = View()
    for name in ("a", "b"):
        view.put_node(Node(name, "", "", True, ""))
        view.put_agent(name, Agent(name, "127.0.0.1:1", True, f"agent-{name}"))
    source = Pod.of(pod("llm-0", "a"))
    view.put_pod(source)
    parts = SimpleNamespace(settings=Settings(), kube=api, view=view)
    ctx = cast("Context", parts)
    obj: dict[str, Any] = {
        "metadata": {
            "name": "j",
            "namespace": "default",
            "uid": "u",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels,
        },
        "spec": {"source": {"podName": "llm-0"}},
    }
    return Run(ctx, Jobs(ctx, FloatingIPs(ctx)), obj), source


def test_the_api_server_is_asked_before_a_job_is_refused() -> None:
    api = ApiServer(pod("llm-0", "a"), pod("llm-1", "b"))
    run, source = run_of(api)
    assert asyncio.run(run._choose(source)).pod.name == "llm-1"
    assert api.asked == 1


def test_where_it_knows_of_none_either_the_answer_is_no() -> None:
    run, source = run_of(ApiServer(pod("llm-0", "a")))
    with pytest.raises(Final, match="no other enabled pod"):
        asyncio.run(run._choose(source))


def test_a_job_that_a_notice_made_ends_when_its_pod_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    run, source = run_of(ApiServer(), **{LABEL_NOTICE: "n"})

    async def waiting(self: Run, why: str) -> None:
        self.ctx.view.drop_pod(source.uid)

    monkeypatch.setattr(Run, "_waiting", waiting)
    with pytest.raises(Final, match="has gone while its job waited: no other enabled pod"):
        asyncio.run(run._choose(source))
