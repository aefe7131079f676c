"""The mutating webhook: AdmissionReview in, AdmissionReview out, over HTTPS with the operator's own certificate.

Both replicas answer; the one that starts tells the API server which authority to trust. A pod that is refused is told
why by name, and so is whoever creates it.
"""

from __future__ import annotations

import base64
import json
import ssl

from aiohttp import web

from midstream_operator.authority import Pair
from midstream_operator.errors import Final
from midstream_operator.injection import inject
from midstream_operator.kube import Kube, KubeError, as_error
from midstream_operator.model import Json
from midstream_operator.settings import Settings, Webhook

CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"
NAME = "inject.midstream.dev"


def review(body: Json, settings: Webhook) -> Json:
    """The answer to one AdmissionReview."""
    request = body["request"]
    answer: Json = {"uid": request["uid"], "allowed": True}
    try:
        done = inject(request["object"], settings)
    except Final as e:
        answer |= {"allowed": False, "status": {"code": 422, "reason": "Invalid", "message": f"midstream: {e}"}}
    else:
        if done.patch:
            patch = base64.b64encode(json.dumps(done.patch).encode()).decode()
            answer |= {"patchType": "JSONPatch", "patch": patch}
        if done.warnings:
            answer["warnings"] = [f"midstream: {text}" for text in done.warnings]
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": answer}


async def serve(settings: Settings) -> web.AppRunner:
    """Listening when it returns; the caller cleans the runner up."""

    async def injected(request: web.Request) -> web.Response:
        return web.json_response(review(await request.json(), settings.webhook))

    app = web.Application(client_max_size=4 << 20)  # a pod has 1.5 MB at most
    app.router.add_post("/inject", injected)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.tls.cert, settings.tls.key)
    await web.TCPSite(runner, port=settings.webhook.port, ssl_context=context).start()
    return runner


async def trust(kube: Kube, settings: Settings, authority: Pair) -> None:
    """Have the API server trust our certificate: without it every call of the webhook fails."""
    bundle = base64.b64encode(authority.cert).decode()
    patch = [{"op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": bundle}]
    path = f"{CONFIGURATIONS}/{settings.webhook.configuration}"
    try:
        await kube.request("PATCH", path, patch, content_type="application/json-patch+json")
    except KubeError as e:
        raise as_error(e, "webhook_not_trusted") from e
