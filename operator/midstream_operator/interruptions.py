"""Notices about nodes, carried out: what handling.py decides is written to the API server, again while a notice stands.

`handle` returns when everything that the notice asks for now is recorded: only then may its source acknowledge. The
loop looks after what stands: an attempt that failed is made again, a target that goes itself is given up, a lifecycle
action is completed when the streams are off. Notices about one pod (evictions) go to the Responder as they are.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import datetime

from midstream_operator.context import Context
from midstream_operator.handling import (
    Abort,
    Commit,
    Create,
    Facts,
    HandlingSettings,
    Moving,
    RebalancePolicy,
    Serving,
    Step,
    Taint,
    decide,
    stands,
)
from midstream_operator.jobs import Jobs
from midstream_operator.kube import KubeError, core, ours, until_done
from midstream_operator.model import (
    ANNOTATION_CALLED_BACK,
    ANNOTATION_COMMIT,
    ANNOTATION_DEADLINE,
    JOBS,
    Json,
    KvMode,
    Phase,
    Reason,
    format_time,
    now,
)
from midstream_operator.notices.base import Notice, NoticeKind
from midstream_operator.notices.lifecycle import LifecycleActions
from midstream_operator.respond import Responder, notice_job
from midstream_operator.run import Run
from midstream_operator.view import LEAVING_TAINTS, Pod

log = logging.getLogger(__name__)
CONFLICT, NOT_FOUND = 409, 404
TAINT = "midstream.dev/interrupted"  # among LEAVING_TAINTS: no job picks such a node
assert TAINT.startswith(LEAVING_TAINTS)


@dataclass(slots=True)
class Interruptions:
    ctx: Context
    jobs: Jobs
    responder: Responder
    settings: HandlingSettings
    lifecycle: LifecycleActions | None = None
    standing: dict[str, tuple[Notice, datetime]] = field(default_factory=dict)  # by id, since when
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)

    async def handle(self, notice: Notice) -> None:
        if notice.pod_uid:
            await self.responder.handle(notice)
            return
        self.ctx.metrics.notices.labels(notice.kind.value, notice.source).inc()
        if self.lifecycle is not None and notice.kind is NoticeKind.LIFECYCLE:
            self.lifecycle.hold(notice)
        notice = self._dated(notice)
        await self._look(notice)
        if notice.id not in self.standing:
            log.warning("%s of %s by %s, deadline %s", notice.kind, notice.node, notice.source, notice.deadline)
            self.standing[notice.id] = notice, now()
        elif notice.deadline is not None and self.standing[notice.id][0].deadline is None:
            self.standing[notice.id] = notice, self.standing[notice.id][1]  # this source knows until when

    def _dated(self, notice: Notice) -> Notice:
        """A taint says neither since when nor until when: what is known of this notice, or the instant it was heard."""
        if notice.deadline is not None or notice.issued_at is not None:
            return notice
        known = self.standing.get(notice.id)
        if known is None:
            return replace(notice, issued_at=now())
        return replace(notice, issued_at=known[0].issued_at or known[1], deadline=known[0].deadline)

    async def run(self) -> None:
        """While this replica leads."""
        while True:
            await asyncio.sleep(self.settings.pass_s)
            for id, (notice, since) in list(self.standing.items()):
                if not stands(notice, self.settings, since, now(), notice.node in self.ctx.view.nodes):
                    del self.standing[id]
                    self._locks.pop(id, None)
                    continue
                try:
                    await self._look(notice)
                except KubeError as e:
                    log.warning("%s of %s: %s; again in %g s", notice.kind, notice.node, e, self.settings.pass_s)

    def is_off(self, notice: Notice) -> bool:
        """Nothing is left to move from the node: its lifecycle action may be completed."""
        facts = self._facts(notice)
        uids = {pod.uid for pod in facts.pods}
        missing = any(isinstance(step, Create | Commit) for step in decide(facts, self.settings, now()))
        return not missing and not any(job.pod_uid in uids for job in facts.jobs)

    # -- what is there

    def _facts(self, notice: Notice) -> Facts:
        pods = [_serving(pod) for pod in self.responder.concerned(notice)]
        ended: dict[str, list[Phase]] = {}
        mine = [job for job in self.jobs.finished.values() if job.notice == notice.id]
        for job in mine:
            ended.setdefault(job.pod_uid, []).append(job.phase)
        declined = frozenset(j.pod_uid for j in mine if j.phase is Phase.ABORTED and not j.called_back)
        return Facts(notice, pods, [_moving(run) for run in self.jobs.runs.values()], ended, declined)

    async def _look(self, notice: Notice) -> None:
        """One pass at a time for a notice: two sources may bring it in the same instant."""
        async with self._locks.setdefault(notice.id, asyncio.Lock()):
            for step in decide(self._facts(notice), self.settings, now()):
                await self._do(notice, step)

    async def _do(self, notice: Notice, step: Step) -> None:
        match step:
            case Taint():
                await self._taint(step)
            case Create():
                await self._create(notice, step)
            case Commit(job, deadline):
                said: Json = {ANNOTATION_COMMIT: "true"}
                if deadline is not None:
                    said[ANNOTATION_DEADLINE] = format_time(deadline)
                body = {"metadata": {"annotations": said}}
                await self._until_done(lambda: self.ctx.kube.patch(ours(JOBS, job.namespace, job.name), body))
            case Abort(job, why):
                log.warning("job %s is called back: %s", job.name, why)
                abort: Json = {"metadata": {"annotations": {ANNOTATION_CALLED_BACK: why}}, "spec": {"abort": True}}
                await self._until_done(lambda: self.ctx.kube.patch(ours(JOBS, job.namespace, job.name), abort))

    async def _create(self, notice: Notice, step: Create) -> None:
        pod = self.ctx.view.pods.get(step.pod.uid)
        if pod is None:
            return
        body = job_body(pod, notice, step)
        async with self.responder.turn(pod.uid):
            if any(run.pod_uid == pod.uid for run in self.jobs.runs.values()):
                return  # an eviction was quicker
            made = await self._until_done(lambda: self.ctx.kube.create(ours(JOBS, pod.namespace), body))
            if made is not None:
                self.jobs.seen(made)

    async def _until_done(self, request: Callable[[], Awaitable[Json]]) -> Json | None:
        """None where there is nothing to do: the job is there already (409), or has just gone (404)."""
        timeouts = self.ctx.settings.timeouts
        try:
            return await until_done(request, timeouts.retry_s, timeouts.retry_max_s, refused=(CONFLICT, NOT_FOUND))
        except KubeError as e:
            if e.status not in (CONFLICT, NOT_FOUND):
                raise
        return None

    async def _taint(self, step: Taint) -> None:
        """NoSchedule: nothing new comes; who serves there goes on. Our own view knows it before the watch does."""
        view = self.ctx.view
        node = view.nodes.get(step.node)
        if node is None or node.leaving:
            return
        view.put_node(replace(node, leaving=TAINT))
        path = core("nodes", name=step.node)

        async def add() -> Json:
            found = await self.ctx.kube.get(path)
            taints = list(found["spec"].get("taints") or [])
            if any(taint["key"] == TAINT for taint in taints):
                return found
            taints.append({"key": TAINT, "value": step.why, "effect": "NoSchedule"})
            version = found["metadata"]["resourceVersion"]
            return await self.ctx.kube.patch(
                path, {"metadata": {"resourceVersion": version}, "spec": {"taints": taints}}
            )

        timeouts = self.ctx.settings.timeouts
        try:
            await until_done(add, timeouts.retry_s, timeouts.retry_max_s, refused=(NOT_FOUND,))
        except KubeError as e:
            if e.status != NOT_FOUND:
                raise


def job_body(pod: Pod, notice: Notice, step: Create) -> Json:
    body = notice_job(pod, replace(notice, deadline=None))
    body["spec"]["reason"] = step.reason.value
    if step.attempt > 1:
        body["metadata"]["name"] += f"-{step.attempt}"
    if step.deadline is not None:
        body["spec"]["deadline"] = format_time(step.deadline)
    if step.replay:
        body["spec"]["kv"] = {"mode": KvMode.REPLAY.value}
    if step.commit:
        body["metadata"]["annotations"] = {ANNOTATION_COMMIT: "true"}
    return body


def _serving(pod: Pod) -> Serving:
    policy = RebalancePolicy(pod.rebalance) if pod.rebalance in set(RebalancePolicy) else None
    return Serving(pod.uid, pod.namespace, pod.name, policy)


def _moving(run: Run) -> Moving:
    annotations = run.obj["metadata"].get("annotations") or {}
    committed = run.spec.reason is Reason.REBALANCE and annotations.get(ANNOTATION_COMMIT) == "true"
    return Moving(run.namespace, run.name, run.pod_uid, run.target_node, run.spec.reason, run.draft.phase, committed)
