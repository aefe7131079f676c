"""All MigrationJobs: a run for each that has not ended, limits between them, and who of the finished may go.

Level-triggered: an event only says "look"; what is done follows from the object, so a missed event costs a resync
and not a migration. Finished jobs are kept as five fields each, ten thousand of them cost nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from midstream_operator import planning
from midstream_operator.context import Context
from midstream_operator.errors import Final, NotLeader
from midstream_operator.floating import FloatingIPs
from midstream_operator.kube import KubeError, ours
from midstream_operator.model import JOBS, FipSpec, Json, Phase, Provider, Reason, Switchover, now, phase_of
from midstream_operator.picker import Scene, refusal
from midstream_operator.plan_model import Switchover as PlanSwitchover
from midstream_operator.retention import Finished, expired
from midstream_operator.run import Run
from midstream_operator.tasks import Tasks
from midstream_operator.view import Node, Pod

log = logging.getLogger(__name__)
NOT_FOUND = 404
DELETED_AT_ONCE = 20  # finished jobs a pass: ten thousand that expire together must not flood the API server
_INTERRUPTED = frozenset({Reason.SPOT_INTERRUPTION, Reason.CAPACITY_RESERVATION, Reason.DRAIN, Reason.MAINTENANCE})


@dataclass(slots=True)
class Slot:
    """What a run that has begun takes up."""

    pod_uid: str
    node: str
    reason: Reason
    target: str = ""  # node; empty: not chosen yet
    stands_by: bool = False  # for a move, or a target, that may never come: no limit counts it


@dataclass(slots=True)
class Jobs:
    ctx: Context
    fips: FloatingIPs
    open: dict[str, Json] = field(default_factory=dict)  # by uid: not ended
    finished: dict[str, Finished] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    slots: dict[str, Slot] = field(default_factory=dict)
    _tasks: Tasks | None = None  # while this replica leads

    def __post_init__(self) -> None:
        self.ctx.view.pod_listeners.append(self._pod_changed)
        self.ctx.view.node_listeners.append(self._node_changed)

    # -- the objects, as kopf sees them --------------------------------------------------------------------

    def seen(self, obj: Json) -> None:
        uid = obj["metadata"]["uid"]
        if phase_of(obj).ended:
            self.finished[uid] = Finished.of(obj)
            self.open.pop(uid, None)
        elif uid not in self.finished:  # the watch may be behind what we wrote
            obj["metadata"].pop("managedFields", None)
            self.open[uid] = obj
            self._look(uid)

    def gone(self, uid: str) -> None:
        self.open.pop(uid, None)
        self.finished.pop(uid, None)
        run = self.runs.get(uid)
        if run is not None:
            run.deleted = True
            run.news.set()

    def _pod_changed(self, pod: Pod) -> None:
        self._wake_pending()

    def _node_changed(self, node: Node) -> None:
        self._wake_pending()

    def _wake_pending(self) -> None:
        """A pod or node has changed: who waits for a turn or a target may have one now."""
        for run in self.runs.values():
            if run.draft.phase is Phase.PENDING:
                run.news.set()

    # -- the leader's loop ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """While this replica leads. Runs end with it: agents go on, and the next leader follows them again."""
        self._tasks = Tasks()
        try:
            while True:
                for uid in list(self.open):
                    self._look(uid)
                self._count()
                await self._clean()
                await asyncio.sleep(self.ctx.settings.timeouts.resync_s)
        finally:
            tasks, self._tasks = self._tasks, None
            await tasks.stop()
            self.runs.clear()
            self.slots.clear()
            self.fips.busy.clear()

    def _look(self, uid: str) -> None:
        run = self.runs.get(uid)
        if run is not None:
            run.changed(self.open[uid])
        elif self._tasks is not None:
            run = self.runs[uid] = Run(self.ctx, self, self.open[uid])
            self._tasks.start(f"job {run.namespace}/{run.name}", self._carry(run))

    async def _carry(self, run: Run) -> None:
        """A run to its end. What nobody foresaw is tried again from the status, and said there."""
        pause_s = self.ctx.settings.timeouts.retry_s
        while True:
            try:
                await run.run()
                break
            except NotLeader as e:  # a renewal that took long, and passes; or this task is cancelled soon
                log.warning("job %s: %s", run.name, e, extra={"job": run.uid})
                await asyncio.sleep(pause_s)
                run = self._afresh(run, run.draft.as_written)
            except Exception as e:
                log.exception("job %s: begun again from its status", run.name, extra={"job": run.uid})
                run = await self._again(run, e, pause_s)
                pause_s = min(pause_s * 2, self.ctx.settings.timeouts.retry_max_s)
        self._ended(run)

    async def _again(self, run: Run, e: Exception, pause_s: float) -> Run:
        run.draft.say(f"internal: {type(e).__name__}: {e}; tried again")
        await run.write()
        await asyncio.sleep(pause_s)
        return self._afresh(run, run.draft.status)

    def _afresh(self, run: Run, status: Json) -> Run:
        fresh = Run(self.ctx, self, {**run.obj, "status": status})
        fresh.deleted = run.deleted
        self.runs[run.uid] = fresh
        return fresh

    def _ended(self, run: Run) -> None:
        uid = run.uid
        self.runs.pop(uid, None)
        self.open.pop(uid, None)
        if not run.deleted:
            self.finished[uid] = Finished.of({**run.obj, "status": run.draft.status})
        self._leave(uid)
        self._wake_pending()

    # -- who may begin -------------------------------------------------------------------------------------

    def begin(self, run: Run, pod_uid: str, node: str) -> None:
        self.slots[run.uid] = Slot(pod_uid, node, run.spec.reason, run.target_node)
        self.fips.busy.add(pod_uid)

    def goes_to(self, run: Run, node: str) -> None:
        """The next choice of a target takes it into account."""
        self.slots[run.uid].target = node

    def stands_by(self, run: Run, yes: bool) -> None:
        """For hours perhaps, in which nobody shall wait for it."""
        slot = self.slots.get(run.uid)
        if slot is not None and slot.stands_by is not yes:
            slot.stands_by = yes
            self._wake_pending()

    def unfit(self, run: Run, source: Pod) -> str:
        """Why the target that was chosen cannot take over any more; empty: it can."""
        target = self.ctx.view.pods.get(run.target_uid)
        return refusal(source, target, self.scene(run, source)) if target is not None else "has gone"

    def _leave(self, uid: str) -> None:
        slot = self.slots.pop(uid, None)
        if slot is not None and all(s.pod_uid != slot.pod_uid for s in self.slots.values()):
            self.fips.busy.discard(slot.pod_uid)
            self.fips.wake_pod(slot.pod_uid)

    def must_wait(self, run: Run, source: Pod) -> str:
        """Why this run has to wait; empty: it may begin."""
        limits = self.ctx.settings.limits
        if any(s.pod_uid == source.uid for u, s in self.slots.items() if u != run.uid):
            return "another job moves its streams, this one waits for its end"
        moving = [s for s in self.slots.values() if not s.stands_by]
        if len(self.runs) > limits.jobs and self._behind(run) >= limits.jobs - len(moving):
            return f"{limits.jobs} migrations run in the cluster, its limit"
        here = sum(s.node == source.node for s in moving)
        if self._behind(run, source.node) >= limits.jobs_per_node - here:
            return f"{limits.jobs_per_node} migrations leave node {source.node}, its limit"
        return ""

    def _behind(self, run: Run, node: str = "") -> int:
        """How many waiting runs come first."""
        others = (r for u, r in self.runs.items() if u not in self.slots and r is not run)
        return sum(1 for r in others if (not node or r.leaving == node) and r.rank < run.rank)

    def scene(self, run: Run, source: Pod) -> Scene:
        """What the choice of a target depends on, now."""
        return self._scene(source, [s for u, s in self.slots.items() if u != run.uid])

    def _scene(self, source: Pod, others: Sequence[Slot]) -> Scene:
        view = self.ctx.view
        return Scene(
            pods=list(view.pods_of(source.namespace)),
            nodes=view.nodes,
            agents=frozenset(a.node for a in view.agent_pods.values() if a.ready),
            zone=self._zone(source),
            interrupted=frozenset(s.node for s in others if s.reason in _INTERRUPTED),
            taking=frozenset(s.pod_uid for s in others),
            addresses=self.fips.addresses_per_pod(),
            incoming=Counter(s.target for s in others if s.target),
        )

    # -- plans ---------------------------------------------------------------------------------------------

    async def reckon(self, run: Run, source: Pod, target: Pod) -> planning.Reckoning:
        switchover = PlanSwitchover.WAIT if run.spec.switchover is Switchover.WAIT else PlanSwitchover.STEER
        sharing = max(1, sum(s.node == source.node and not s.stands_by for s in self.slots.values()))
        by_api = self._by_api([source])
        return await planning.for_job(self.ctx, source, target, run.deadline, switchover, by_api, sharing)

    def node_facts(self, node: str) -> planning.NodeFacts:
        """For a plan of a node that nobody has given notice of."""
        view, held = self.ctx.view, self.fips.addresses_per_pod()
        if node not in view.nodes:
            raise Final("unknown_node", f"there is no node {node}, or it is not among those that the operator watches")
        pods = sorted((p for p in view.pods.values() if p.node == node and held[p.uid]), key=lambda p: p.name)
        others = {p.uid: self._takers(p) for p in pods}
        return planning.NodeFacts(node, pods, others, self._by_api(pods))

    def _takers(self, source: Pod) -> list[Pod]:
        slots = self.slots.values()
        scene = self._scene(source, [s for s in slots if s.pod_uid != source.uid])
        pods = (p for p in scene.pods if p.uid != source.uid and not refusal(source, p, scene))
        return sorted(pods, key=lambda p: (scene.addresses.get(p.uid, 0), p.name))

    def _by_api(self, pods: Iterable[Pod]) -> bool:
        """Whether a cloud's API moves their addresses."""
        fips = [fip for pod in pods for fip in self.fips.on_pod(pod.uid)]
        return any(FipSpec.of(fip).provider == Provider.EC2 for fip in fips)

    def _zone(self, source: Pod) -> str:
        zones = {self.fips.checked_pool(f).zone for f in self.fips.on_pod(source.uid)} - {""}
        if len(zones) > 1:
            raise Final(
                "two_zones", f"addresses of {source.name} are of zones {', '.join(sorted(zones))}: no node is in both"
            )
        return zones.pop() if zones else ""

    # -- housekeeping --------------------------------------------------------------------------------------

    def _count(self) -> None:
        metrics = self.ctx.metrics
        metrics.jobs.labels("open").set(len(self.open))
        metrics.jobs.labels("finished").set(len(self.finished))
        phases = Counter(r.draft.phase for r in self.runs.values())
        for phase in Phase:
            if not phase.ended:
                metrics.active.labels(phase.value).set(phases[phase])

    async def _clean(self) -> None:
        limits = self.ctx.settings.limits
        gone = expired(self.finished.values(), now(), limits.kept_per_workload, limits.job_ttl_s)
        for job in gone[:DELETED_AT_ONCE]:
            try:
                await self.ctx.kube.delete(ours(JOBS, job.namespace, job.name), job.uid)
            except KubeError as e:
                if e.status != NOT_FOUND:
                    log.warning("finished job %s not deleted: %s", job.name, e)
                    continue
            self.finished.pop(job.uid, None)
