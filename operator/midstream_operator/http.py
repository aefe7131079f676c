"""The operator's own HTTP port: probes, Prometheus, and the doctor's report that `midstream doctor` fetches.

    /healthz   the event loop turns and no background task has died: else the kubelet starts the process anew
    /readyz    everything is loaded, so this replica could take over
    /metrics   Prometheus
    /doctor    every agent's findings and our own, as JSON

It is reached through the API server's proxy (`kubectl get --raw .../services/midstream-operator:http/proxy/doctor`),
so a user's right to `services/proxy` there is the right to read it; the chart's NetworkPolicy keeps pods out.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from midstream_operator.metrics import Metrics
from midstream_operator.model import Json

Report = Callable[[], Awaitable[list[Json]]]


async def serve(port: int, metrics: Metrics, ready: Callable[[], bool], report: Report) -> web.AppRunner:
    """Listening when it returns; the caller cleans the runner up."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready() else web.Response(status=503, text="still loading\n")

    async def told(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def doctor(_: web.Request) -> web.Response:
        return web.Response(text=json.dumps({"findings": await report()}), content_type="application/json")

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", told)
    app.router.add_get("/doctor", doctor)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
