"""The Kubernetes API, as thin as it can be: the official client's connection and credentials; JSON in, JSON out.

The client's models are not used: of ten thousand pods they would build every field to have one read. What the API
server refuses is a KubeError with the status code and its message.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
from kubernetes.aio import client, config

from midstream_operator.errors import Final, Retryable
from midstream_operator.model import GROUP, VERSION, Json

MERGE_PATCH = "application/merge-patch+json"
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_PASSES = (408, 409, 429, 500, 502, 503, 504)


class KubeError(Exception):
    """The API server said no. `status` 0: it did not answer."""

    def __init__(self, status: int, what: str, message: str) -> None:
        super().__init__(f"{what}: {status} {message}")
        self.status = status
        self.message = message

    @property
    def passes(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status == 0 or self.status in _PASSES


async def connect() -> Kube:
    """By $KUBECONFIG, by ~/.kube/config, or as the pod's service account."""
    configuration = client.Configuration()
    try:
        if in_cluster():
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(client_configuration=configuration)
    except (config.ConfigException, OSError) as e:
        raise Final("no_cluster", f"cannot tell which cluster: {e}; set KUBECONFIG") from e
    return Kube(client.ApiClient(configuration))


def in_cluster() -> bool:
    return _SERVICE_ACCOUNT.exists() and not os.environ.get("KUBECONFIG")


def server_address() -> str:
    """The API server's, as the kubelet tells each container."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


class Kube:
    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    async def close(self) -> None:
        await self._api.close()

    async def get(self, path: str) -> Json:
        return await self.request("GET", path)

    async def create(self, path: str, body: Json) -> Json:
        return await self.request("POST", path, body)

    async def patch(self, path: str, body: Json) -> Json:
        """A JSON merge patch: null deletes, lists are replaced."""
        return await self.request("PATCH", path, body, content_type=MERGE_PATCH)

    async def replace(self, path: str, body: Json) -> Json:
        return await self.request("PUT", path, body)

    async def delete(self, path: str, uid: str = "") -> None:
        body: Json = {"preconditions": {"uid": uid}} if uid else {}
        await self.request("DELETE", path, body)

    async def request(
        self,
        method: str,
        path: str,
        body: Json | list[Json] | None = None,
        query: Sequence[tuple[str, str]] = (),
        content_type: str = "application/json",
        timeout_s: float = 30.0,
    ) -> Json:
        what = f"{method} {path}"
        try:
            response = await self._send(method, path, body, query, content_type, timeout_s)
            data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise KubeError(0, what, f"{type(e).__name__}: {e}") from e
        return _parsed(what, response.status, data)

    async def watch(self, path: str, query: Sequence[tuple[str, str]], timeout_s: float) -> AsyncIterator[Json]:
        """Events until the server ends the watch; KubeError 410 when the resource version is too old."""
        what = f"watch {path}"
        try:
            response = await self._send("GET", path, None, [*query, ("watch", "true")], "", timeout_s)
            if response.status != 200:
                _parsed(what, response.status, await response.read())
            async for line in response.response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    raise KubeError(int(status.get("code", 500)), what, str(status.get("message", "")))
                yield event
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise KubeError(0, what, f"{type(e).__name__}: {e}") from e

    async def _send(
        self, method: str, path: str, body: Any, query: Sequence[tuple[str, str]], content_type: str, timeout_s: float
    ) -> Any:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = content_type
        arguments = await self._api.param_serialize(
            method,
            path,
            header_params=headers,
            query_params=list(query),
            body=body,
            auth_settings=["BearerToken"],
        )
        return await self._api.call_api(*arguments, _request_timeout=timeout_s)


def _parsed(what: str, status: int, data: bytes) -> Json:
    if status < 300:
        return json.loads(data) if data else {}
    try:
        message = str(json.loads(data).get("message", ""))
    except ValueError:
        message = data[:200].decode(errors="replace")
    raise KubeError(status, what, message)


async def until_done(
    request: Callable[[], Awaitable[Json]], pause_s: float, pause_max_s: float, refused: Sequence[int] = ()
) -> Json:
    """`request()` again until it is answered; what will not pass, or is in `refused`, is raised. Nothing is lost."""
    while True:
        try:
            return await request()
        except KubeError as e:
            if not e.passes or e.status in refused:
                raise
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, pause_max_s)


def as_error(e: KubeError, code: str) -> Final | Retryable:
    """The same, in the operator's own tree."""
    return (Retryable if e.passes else Final)(code, str(e))


def core(kind: str, namespace: str = "", name: str = "") -> str:
    return _path("/api/v1", kind, namespace, name)


def ours(kind: str, namespace: str = "", name: str = "") -> str:
    return _path(f"/apis/{GROUP}/{VERSION}", kind, namespace, name)


def apps(kind: str, namespace: str, name: str) -> str:
    return _path("/apis/apps/v1", kind, namespace, name)


def slices(namespace: str, name: str = "") -> str:
    return _path("/apis/discovery.k8s.io/v1", "endpointslices", namespace, name)


def leases(namespace: str, name: str = "") -> str:
    return _path("/apis/coordination.k8s.io/v1", "leases", namespace, name)


def _path(base: str, kind: str, namespace: str, name: str) -> str:
    inside = f"/namespaces/{quote(namespace)}" if namespace else ""
    return f"{base}{inside}/{kind}{f'/{quote(name)}' if name else ''}"
