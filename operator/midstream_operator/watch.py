"""Own list-and-watch of pods, nodes and agents, with selectors that the API server applies.

kopf lists a kind as a whole and filters on our side: a handler on Pods would pull every pod of the cluster. These
watchers ask for labelled objects only, keep small digests (view.py), and put no finalizer or annotation on anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from midstream_operator.kube import Kube, KubeError, core
from midstream_operator.model import Json
from midstream_operator.settings import Settings
from midstream_operator.view import Agent, Node, Pod, View

log = logging.getLogger(__name__)
PAGE = "500"
GONE = 410  # the resource version is too old: list again


@dataclass(slots=True)
class Watcher:
    """One kind with one selector. `put` gets each object, `drop` the key of one that is gone."""

    name: str
    path: str
    selector: str
    key: Callable[[Json], str]
    put: Callable[[Json], None]
    drop: Callable[[str], None]
    watch_s: int
    synced: asyncio.Event = field(default_factory=asyncio.Event)
    _known: set[str] = field(default_factory=set)

    async def run(self, kube: Kube, pause_s: float, pause_max_s: float) -> None:
        """Until cancelled; a broken watch is opened again from where it was."""
        wait_s, version = pause_s, ""
        while True:
            try:
                version = version or await self._list(kube)
                version = await self._watch(kube, version)
                wait_s = pause_s
            except KubeError as e:
                version = "" if e.status == GONE else version
                if e.status != GONE:
                    log.warning("watching %s: %s", self.name, e)
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, pause_max_s)

    async def _list(self, kube: Kube) -> str:
        seen, token = set(), ""
        while True:
            page = await kube.request("GET", self.path, query=[*self._query(), ("limit", PAGE), ("continue", token)])
            for item in page["items"]:
                seen.add(self._take(item))
            token = page["metadata"].get("continue", "")
            if not token:
                break
        for key in self._known - seen:
            self._lose(key)
        self.synced.set()
        return str(page["metadata"]["resourceVersion"])

    async def _watch(self, kube: Kube, version: str) -> str:
        query = [
            *self._query(),
            ("resourceVersion", version),
            ("timeoutSeconds", str(self.watch_s)),
            ("allowWatchBookmarks", "true"),
        ]
        async for event in kube.watch(self.path, query, self.watch_s + 30.0):
            obj = event["object"]
            version = obj["metadata"]["resourceVersion"]
            if event["type"] == "DELETED":
                self._lose(self.key(obj))
            elif event["type"] != "BOOKMARK":
                self._take(obj)
        return version

    def _query(self) -> list[tuple[str, str]]:
        return [("labelSelector", self.selector)] if self.selector else []

    def _take(self, obj: Json) -> str:
        key = self.key(obj)
        self._known.add(key)
        self.put(obj)
        return key

    def _lose(self, key: str) -> None:
        self._known.discard(key)
        self.drop(key)


def watchers(settings: Settings, view: View) -> list[Watcher]:
    """Serving pods of all namespaces, nodes, and the agents of our own namespace."""

    def uid(obj: Json) -> str:
        return str(obj["metadata"]["uid"])

    def put_agent(obj: Json) -> None:
        view.put_agent(uid(obj), Agent.of(obj, settings.agent_port))

    seconds = settings.timeouts.watch_s
    return [
        Watcher(
            "pods",
            core("pods"),
            f"{settings.enabled_label}=true",
            uid,
            lambda o: view.put_pod(Pod.of(o)),
            view.drop_pod,
            seconds,
        ),
        Watcher(
            "nodes",
            core("nodes"),
            settings.node_selector,
            lambda o: str(o["metadata"]["name"]),
            lambda o: view.put_node(Node.of(o)),
            view.drop_node,
            seconds,
        ),
        Watcher(
            "agents",
            core("pods", settings.namespace),
            settings.agent_selector,
            uid,
            put_agent,
            view.drop_agent,
            seconds,
        ),
    ]
