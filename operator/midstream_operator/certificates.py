"""mTLS without cert-manager: the operator keeps an authority in a Secret, and signs what the nodes' agents ask for.

    Secret midstream-authority      tls.crt, tls.key    made once by whichever replica comes first
    ConfigMap midstream-authority   ca.crt              what agents trust; their pods wait for it
    CertificateSigningRequests      midstream.dev/agent signed by the leader, or denied with the reason

Both replicas issue their own certificate at start and well before it runs out. `tls.issuer: files` turns all of this
off: then the files are somebody else's (cert-manager's), and this module is never run.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

from midstream_operator import authority
from midstream_operator.authority import SIGNER, Pair
from midstream_operator.context import Context
from midstream_operator.errors import Final
from midstream_operator.kube import Kube, KubeError, core, until_done
from midstream_operator.model import Json
from midstream_operator.settings import Settings

log = logging.getLogger(__name__)
NAME = "midstream-authority"
REQUESTS = "/apis/certificates.k8s.io/v1/certificatesigningrequests"
NOT_FOUND, CONFLICT = 404, 409


async def prepare(kube: Kube, settings: Settings) -> Pair:
    """The authority, made if there is none, and our own files written. Before anything speaks to an agent."""
    found = await _authority(kube, settings)
    await _publish(kube, settings, found.cert)
    write_own(settings, found)
    return found


def write_own(settings: Settings, found: Pair) -> None:
    names = [authority.OPERATOR_NAME, *_webhook_names(settings)]
    own = authority.issue(found, names, settings.certificate_days)
    for path, content in ((settings.tls.ca, found.cert), (settings.tls.cert, own.cert), (settings.tls.key, own.key)):
        _replace(path, content)


def _webhook_names(settings: Settings) -> list[str]:
    service = f"midstream-webhook.{settings.namespace}.svc"
    return [service, f"{service}.cluster.local", "localhost"]


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all, and for our eyes only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as out:
        out.write(content)
    new.replace(path)


async def _authority(kube: Kube, settings: Settings) -> Pair:
    path = core("secrets", settings.namespace, NAME)
    try:
        return _read(await _patiently(kube, settings, path))
    except KubeError as e:
        if e.status != NOT_FOUND:
            raise Final("no_authority", f"the Secret {NAME} cannot be read: {e}") from e
    made = authority.new_authority()
    data = {"tls.crt": _encode(made.cert), "tls.key": _encode(made.key)}
    secret = {"metadata": {"name": NAME}, "type": "kubernetes.io/tls", "data": data}
    try:
        await kube.create(core("secrets", settings.namespace), secret)
    except KubeError as e:
        if e.status != CONFLICT:
            raise Final("no_authority", f"the Secret {NAME} cannot be made: {e}") from e
        return _read(await _patiently(kube, settings, path))  # the other replica was first
    return made


async def _patiently(kube: Kube, settings: Settings, path: str) -> Json:
    return await until_done(lambda: kube.get(path), settings.timeouts.retry_s, settings.timeouts.retry_max_s)


def _read(secret: Json) -> Pair:
    try:
        return Pair(*(base64.b64decode(secret["data"][key]) for key in ("tls.crt", "tls.key")))
    except (KeyError, ValueError) as e:
        raise Final("no_authority", f"the Secret {NAME} has no tls.crt and tls.key: delete it to have it made") from e


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def _publish(kube: Kube, settings: Settings, ca: bytes) -> None:
    """What agents trust. Written again when the authority is another one than before."""
    path, data = core("configmaps", settings.namespace, NAME), {"ca.crt": ca.decode()}
    try:
        if (await _patiently(kube, settings, path)).get("data") != data:
            await kube.patch(path, {"data": data})
    except KubeError as e:
        if e.status != NOT_FOUND:
            raise Final("no_authority", f"the ConfigMap {NAME} cannot be written: {e}") from e
        try:
            await kube.create(core("configmaps", settings.namespace), {"metadata": {"name": NAME}, "data": data})
        except KubeError as e2:
            if e2.status != CONFLICT:
                raise Final("no_authority", f"the ConfigMap {NAME} cannot be written: {e2}") from e2


class Signer:
    """The leader's task: answers requests, renews this process's own files. Every request is looked at again at each
    resync, so none is lost with a leader."""

    def __init__(self, ctx: Context, found: Pair) -> None:
        self._ctx = ctx
        self._authority = found
        self._account = f"system:serviceaccount:{ctx.settings.namespace}:{ctx.settings.agent_account}"

    async def run(self) -> None:
        timeouts = self._ctx.settings.timeouts
        while True:
            self._renew_own()
            if self._ctx.lease.held:
                try:
                    await self._watch()
                except KubeError as e:
                    log.warning("certificate requests: %s", e)
            await asyncio.sleep(timeouts.retry_s)

    def _renew_own(self) -> None:
        left = authority.expires(self._ctx.settings.tls.cert.read_bytes()) - datetime.now(UTC)
        if left < timedelta(days=self._ctx.settings.certificate_days) / 3:
            write_own(self._ctx.settings, self._authority)

    async def _watch(self) -> None:
        """List, then watch until the next resync; without the Lease only the present event is finished."""
        chosen = [("fieldSelector", f"spec.signerName={SIGNER}")]
        page = await self._ctx.kube.request("GET", REQUESTS, query=chosen)
        for csr in page["items"]:
            await self.answer(csr)
        seconds = self._ctx.settings.timeouts.resync_s
        version = page["metadata"]["resourceVersion"]
        query = [*chosen, ("resourceVersion", version), ("timeoutSeconds", str(int(seconds)))]
        async for event in self._ctx.kube.watch(REQUESTS, query, seconds + 30.0):
            if not self._ctx.lease.held:
                return
            if event["type"] in ("ADDED", "MODIFIED"):
                await self.answer(event["object"])

    async def answer(self, csr: Json) -> None:
        """Approve and sign, or deny with the reason; once for each request."""
        status = csr.get("status") or {}
        decided = {c["type"] for c in status.get("conditions") or []}
        if status.get("certificate") or decided & {"Denied", "Failed"}:
            return
        nodes = {uid: agent.node for uid, agent in self._ctx.view.agent_pods.items()}
        try:
            request, node = authority.examine(csr, self._account, nodes)
        except Final as e:
            log.warning("certificate request %s denied: %s", csr["metadata"]["name"], e)
            await self._decide(csr, "Denied", e.code, e.message)
            return
        if "Approved" not in decided:
            csr = await self._decide(csr, "Approved", "AgentOfItsNode", f"asked by the agent of {node}")
        cert = authority.sign_request(self._authority, request, node, self._ctx.settings.certificate_days)
        signed = {**csr, "status": {**csr["status"], "certificate": _encode(cert)}}
        await self._ctx.kube.replace(f"{REQUESTS}/{csr['metadata']['name']}/status", signed)

    async def _decide(self, csr: Json, kind: str, reason: str, message: str) -> Json:
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        decided = {**csr, "status": {**(csr.get("status") or {}), "conditions": [condition]}}
        return await self._ctx.kube.replace(f"{REQUESTS}/{csr['metadata']['name']}/approval", decided)
