"""Kubernetes Events: the story of a job for `kubectl describe`. Posted in the background, in order, a few at a time."""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field

from midstream_operator.kube import Kube, KubeError, core
from midstream_operator.model import API_VERSION, Json, format_time, now

log = logging.getLogger(__name__)
QUEUE = 10_000  # events wait here while the API server is slow; beyond, the newest is dropped and logged
MESSAGE_CHARS = 1000  # the API server's own limit is 1024


def reference(obj: Json, kind: str) -> Json:
    meta = obj["metadata"]
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "namespace": meta["namespace"],
        "name": meta["name"],
        "uid": meta["uid"],
    }


def pod_reference(namespace: str, name: str, uid: str) -> Json:
    return {"apiVersion": "v1", "kind": "Pod", "namespace": namespace, "name": name, "uid": uid}


@dataclass(slots=True)
class Recorder:
    kube: Kube
    reporter: str
    _queue: asyncio.Queue[Json] = field(default_factory=lambda: asyncio.Queue(QUEUE))

    def note(self, about: Json, reason: str, message: str, warning: bool = False) -> None:
        at = format_time(now())
        event: Json = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{about['name'][:200]}.{secrets.token_hex(8)}", "namespace": about["namespace"]},
            "involvedObject": about,
            "reason": reason,
            "message": message[:MESSAGE_CHARS],
            "type": "Warning" if warning else "Normal",
            "firstTimestamp": at,
            "lastTimestamp": at,
            "count": 1,
            "source": {"component": "midstream-operator"},
            "reportingComponent": "midstream.dev/operator",
            "reportingInstance": self.reporter,
        }
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            log.warning("event dropped, too many wait: %s %s", reason, message)

    async def run(self) -> None:
        while True:
            event = await self._queue.get()
            try:
                await self.kube.create(core("events", event["metadata"]["namespace"]), event)
            except KubeError as e:
                # an Event is a courtesy: the status has the same words, and the namespace may be going away
                log.warning("event not posted: %s", e)
