"""A notice becomes MigrationJobs: one for each serving pod that it concerns.

A job is named after the notice and the pod, so the same notice heard twice, or by two replicas, finds the job that
is there. It carries labels and no owner reference. `handle` returns when every job is recorded in the API server:
only then may a source acknowledge.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from midstream_operator.context import Context
from midstream_operator.jobs import Jobs
from midstream_operator.kube import KubeError, ours, until_done
from midstream_operator.model import (
    ANNOTATION_COMMIT,
    ANNOTATION_DEADLINE,
    API_VERSION,
    JOBS,
    LABEL_NOTICE,
    LABEL_POD,
    LABEL_POD_UID,
    LABEL_WORKLOAD,
    Json,
    Reason,
    format_time,
    label_value,
)
from midstream_operator.notices.base import Notice, NoticeKind
from midstream_operator.view import Pod

log = logging.getLogger(__name__)
CONFLICT = 409
REASONS = {
    NoticeKind.SPOT_INTERRUPTION: Reason.SPOT_INTERRUPTION,
    NoticeKind.REBALANCE: Reason.REBALANCE,
    NoticeKind.CAPACITY_RESERVATION: Reason.CAPACITY_RESERVATION,
    NoticeKind.MAINTENANCE: Reason.MAINTENANCE,
    NoticeKind.DRAIN: Reason.DRAIN,
    NoticeKind.SCALE_IN: Reason.SCALE_IN,
    NoticeKind.STATE_CHANGE: Reason.SPOT_INTERRUPTION,
    NoticeKind.LIFECYCLE: Reason.SCALE_IN,
}


@dataclass(slots=True)
class Responder:
    ctx: Context
    jobs: Jobs
    _turns: dict[str, asyncio.Lock] = field(default_factory=dict)  # by the pod's uid
    _waiting: Counter[str] = field(default_factory=Counter)

    async def handle(self, notice: Notice) -> None:
        self.ctx.metrics.notices.labels(notice.kind.value, notice.source).inc()
        for pod in self.concerned(notice):
            async with self.turn(pod.uid):
                if not await self._answered(pod, notice):
                    await self._create(pod, notice)

    @contextlib.asynccontextmanager
    async def turn(self, pod_uid: str) -> AsyncIterator[None]:
        """One notice at a time looks for a pod's job and makes it: an eviction, a taint and the node's deletion come in
        the same instant, and each would find none."""
        lock = self._turns.setdefault(pod_uid, asyncio.Lock())
        self._waiting[pod_uid] += 1
        try:
            async with lock:
                yield
        finally:
            self._waiting[pod_uid] -= 1
            if not self._waiting[pod_uid]:
                del self._waiting[pod_uid], self._turns[pod_uid]

    def concerned(self, notice: Notice) -> list[Pod]:
        """Pods with floating addresses: on the others there is nothing that could move."""
        view = self.ctx.view
        if notice.pod_uid:
            pods = [view.pods[notice.pod_uid]] if notice.pod_uid in view.pods else []
        else:
            node = notice.node or self._node_of(notice.instance_id)
            pods = [p for p in view.pods.values() if node and p.node == node]
        held = self.jobs.fips.addresses_per_pod()
        return sorted((p for p in pods if p.running and held[p.uid]), key=lambda p: (p.namespace, p.name))

    def _node_of(self, instance_id: str) -> str:
        """aws:///eu-west-1a/i-0123 ends in the instance's id."""
        nodes = self.ctx.view.nodes.values()
        return next((n.name for n in nodes if instance_id and n.provider_id.endswith(f"/{instance_id}")), "")

    async def _answered(self, pod: Pod, notice: Notice) -> bool:
        """Whether a job for this pod is under way that answers the notice, too: an interruption, its taint and the
        eviction that follows are three notices and one move. One that a rebalance has prepared is told to go."""
        mine = [r for r in self.jobs.runs.values() if r.pod_uid == pod.uid]
        if notice.kind is NoticeKind.REBALANCE:
            return bool(mine)
        for run in mine:
            if run.spec.reason not in (Reason.REBALANCE, Reason.MANUAL):
                return True
            if run.spec.reason is Reason.REBALANCE:
                said = {ANNOTATION_COMMIT: "true"}
                if notice.deadline is not None:
                    said[ANNOTATION_DEADLINE] = format_time(notice.deadline)
                body = {"metadata": {"annotations": said}}
                path = ours(JOBS, run.namespace, run.name)
                await self._until_done(partial(self.ctx.kube.patch, path, body))
                return True
        return False

    async def _create(self, pod: Pod, notice: Notice) -> None:
        body = notice_job(pod, notice)
        try:
            # known at once: the watch tells of it only after others have asked
            self.jobs.seen(await self._until_done(lambda: self.ctx.kube.create(ours(JOBS, pod.namespace), body)))
            log.info("%s of %s: job %s", notice.kind, pod.name, body["metadata"]["name"])
        except KubeError as e:
            if e.status != CONFLICT:
                raise

    async def _until_done(self, request: Callable[[], Awaitable[Json]]) -> Json:
        timeouts = self.ctx.settings.timeouts
        return await until_done(request, timeouts.retry_s, timeouts.retry_max_s, refused=(CONFLICT,))


def notice_job(pod: Pod, notice: Notice) -> Json:
    spec: Json = {"source": {"podName": pod.name}, "reason": REASONS[notice.kind].value}
    if notice.deadline is not None:
        spec["deadline"] = format_time(notice.deadline)
    return {
        "apiVersion": API_VERSION,
        "kind": "MigrationJob",
        "metadata": {
            "name": f"{pod.name[:29].rstrip('.-')}-{notice.kind.value.lower()[:16]}-{job_id(pod, notice)}",
            "labels": {
                LABEL_NOTICE: notice.id,
                LABEL_POD: label_value(pod.name),
                LABEL_POD_UID: pod.uid,
                LABEL_WORKLOAD: label_value(pod.workload),
            },
        },
        "spec": spec,
    }


def job_id(pod: Pod, notice: Notice) -> str:
    """Of the notice and the pod: a pod that came back under its old name is another one."""
    return Notice(notice.kind, "", pod_uid=f"{notice.id}/{pod.uid}").id
