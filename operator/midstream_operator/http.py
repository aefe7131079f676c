"""The operator's own HTTP port: probes, Prometheus, the doctor's report and plans for the CLI.

    /healthz   the event loop turns and no background task has died: else the kubelet starts the process anew
    /readyz    everything is loaded, so this replica could take over
    /metrics   Prometheus
    /doctor    every agent's findings and our own, as JSON
    /plan/NODE/SECONDS   what would become of the node's streams if its notice came now, as `midstream plan` prints it

It is reached through the API server's proxy (`kubectl get --raw .../services/midstream-operator:http/proxy/doctor`),
so a user's right to `services/proxy` there is the right to read it; the chart's NetworkPolicy keeps pods out.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from midstream_operator.errors import Final
from midstream_operator.metrics import Metrics
from midstream_operator.model import Json

Report = Callable[[], Awaitable[list[Json]]]
Plan = Callable[[str, float], Awaitable[str]]


async def serve(
    port: int, metrics: Metrics, ready: Callable[[], bool], report: Report, plan: Plan
) -> web.AppRunner:  # fmt: skip
    """Listening when it returns; the caller cleans the runner up."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready() else web.Response(status=503, text="still loading\n")

    async def told(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def doctor(_: web.Request) -> web.Response:
        return web.Response(text=json.dumps({"findings": await report()}), content_type="application/json")

    async def planned(request: web.Request) -> web.Response:
        try:
            text = await plan(request.match_info["node"], float(request.match_info["seconds"]))
        except Final as e:
            return web.Response(status=404, text=f"{e.code}: {e.message}")
        return web.Response(text=text)

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", told)
    app.router.add_get("/doctor", doctor)
    app.router.add_get(r"/plan/{node}/{seconds:\d{1,5}}", planned)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, port=port).start()
    return runner
