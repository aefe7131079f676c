"""One MigrationJob, from what its status says to its end.

    Pending      refused, or waiting for its turn or a target; then one write has plan, target, epoch and addresses
    Preparing .. the source's agent carries it out; this side follows its events and writes them down
    Committing   the agent is through: the network follows (FloatingIPs.moved), then the job has succeeded

Everything that a restart needs is in the status before it is acted on, and an agent that is asked for a job it has
already answers with that job's events. So a run that is cut off anywhere is begun again from the status, by this
process or another.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from midstream_agent.contract import agent_pb2 as pb

from midstream_operator import capacity, standby
from midstream_operator.context import Context
from midstream_operator.errors import Final, OperatorError, Retryable
from midstream_operator.events import pod_reference, reference
from midstream_operator.kube import KubeError, core, ours, until_done
from midstream_operator.model import (
    ANNOTATION_COMMIT,
    ANNOTATION_DEADLINE,
    JOBS,
    LABEL_NOTICE,
    LABEL_POD,
    LABEL_POD_UID,
    LABEL_WORKLOAD,
    JobSpec,
    Json,
    KvMode,
    OnFailure,
    Phase,
    Reason,
    Switchover,
    label_value,
    now,
    parse_time,
)
from midstream_operator.picker import Choice, explain, pick
from midstream_operator.status import PHASES, Draft
from midstream_operator.tasks import Tasks
from midstream_operator.view import OUT_OF_SERVICE, Pod

if TYPE_CHECKING:
    from midstream_operator.jobs import Jobs

log = logging.getLogger(__name__)
NOT_FOUND = 404
SWITCHOVERS = {
    Switchover.AUTO: pb.SWITCHOVER_UNSPECIFIED,
    Switchover.WAIT: pb.SWITCHOVER_WAIT,
    Switchover.STEER: pb.SWITCHOVER_STEER,
}
_MOVE_ADDRESS = "MOVE_ADDRESS"  # a step of Wait alone: the agents go on when packets take the new path
_AFTER_LAST_BATCH = ("FOLLOW", "RELEASE")  # steps of the agents' saga
_PROVES = ("FOLLOW", _MOVE_ADDRESS)  # they end when packets take the new path both ways
_OURS = ("tls_files", "not_operator")  # this side's own trouble, which says nothing about the job
KV_MODES = {KvMode.AUTO: pb.KV_MODE_AUTO, KvMode.COPY: pb.KV_MODE_COPY, KvMode.REPLAY: pb.KV_MODE_REPLAY}


class Aborted(Exception):
    """The user's word, before anything was begun."""


@dataclass(slots=True)
class Run:
    """A job that has not ended. `obj` is replaced whenever the watch brings a newer one."""

    ctx: Context
    jobs: Jobs
    obj: Json
    spec: JobSpec = field(init=False)
    draft: Draft = field(init=False)
    rank: tuple[float, datetime, str] = field(init=False)
    leaving: str = ""  # the source's node, as soon as it is known
    news: asyncio.Event = field(default_factory=asyncio.Event)
    deleted: bool = False
    _asking: asyncio.Event = field(default_factory=asyncio.Event)  # where the addresses shall be has changed
    _at_target: bool = False  # where that is
    _left: bool = False  # they were to leave the source at some time
    _dirty: asyncio.Event = field(default_factory=asyncio.Event)
    _phase_changed: asyncio.Event = field(default_factory=asyncio.Event)
    _write_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _proved: bool = False  # the agents have seen packets take the new path
    _proving_since: float = float("inf")  # by the loop's clock
    _all_moved: bool = False  # no stream that could move is left at the source
    _replay: bool = False  # the plan gives all KV up: no time is spent on copying it
    asked_capacity: bool = False  # in this process
    _plan: str = ""  # where to, and why there; the planner's words follow it
    _fresh: bool = False  # this process has planned the job and no agent has been asked yet

    def __post_init__(self) -> None:
        self.spec = JobSpec.of(self.obj)
        self.draft = Draft(self.obj, self.ctx.settings.limits.message_chars)
        self.leaving = self.source_node
        self.rank = self._ranked()
        if self.draft.phase is Phase.COMMITTING:
            self._shall_be(at_target=True)

    # -- what it is --------------------------------------------------------------------------------------

    @property
    def uid(self) -> str:
        return str(self.obj["metadata"]["uid"])

    @property
    def name(self) -> str:
        return str(self.obj["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.obj["metadata"]["namespace"])

    @property
    def created(self) -> datetime:
        return parse_time(self.obj["metadata"]["creationTimestamp"])

    @property
    def agent_job(self) -> str:
        """The id at the agents: the name to read, the uid to be unique, within their 63 characters."""
        return str(self.draft.status.get("agentJob") or f"{self.name[:26].rstrip('.-')}-{self.uid}")

    @property
    def source_uid(self) -> str:
        return str((self.draft.status.get("source") or {}).get("podUID", ""))

    @property
    def pod_uid(self) -> str:
        """Also before the job is planned, where a notice made it."""
        return self.source_uid or str((self.obj["metadata"].get("labels") or {}).get(LABEL_POD_UID, ""))

    @property
    def source_node(self) -> str:
        return str((self.draft.status.get("source") or {}).get("nodeName", ""))

    @property
    def target_uid(self) -> str:
        return str((self.draft.status.get("target") or {}).get("podUID", ""))

    @property
    def target_node(self) -> str:
        return str((self.draft.status.get("target") or {}).get("nodeName", ""))

    def _ranked(self) -> tuple[float, datetime, str]:
        """Who goes first when not all can: the nearest deadline, then the oldest. Asked for a million times where a
        thousand jobs wait for each other."""
        deadline = self.deadline
        return deadline.timestamp() if deadline else float("inf"), self.created, self.name

    @property
    def told(self) -> bool:
        """Of a rebalance's job: it waits no longer."""
        return (self.obj["metadata"].get("annotations") or {}).get(ANNOTATION_COMMIT) == "true"

    @property
    def deadline(self) -> datetime | None:
        """The spec's, or what the interruption said that came after a rebalance. Checked in `_check_stop`."""
        try:
            return self.spec.deadline or self._said_later()
        except ValueError:
            return None

    def _said_later(self) -> datetime | None:
        said = (self.obj["metadata"].get("annotations") or {}).get(ANNOTATION_DEADLINE)
        return parse_time(said).astimezone(UTC) if said else None

    def changed(self, obj: Json) -> None:
        self.obj, self.spec = obj, JobSpec.of(obj)
        self.rank = self._ranked()
        self.news.set()

    # -- the whole of it ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the job has ended and its last status is written."""
        tasks = Tasks()
        tasks.start(f"status of {self.name}", self._write_progress())
        try:
            await self._to_the_end(tasks)
        finally:
            await tasks.stop()

    async def _to_the_end(self, tasks: Tasks) -> None:
        try:
            if self.draft.phase is Phase.PENDING:
                if not await self._pending():
                    return
            else:
                self.jobs.begin(self, self.source_uid, self.source_node)
            if self.spec.reason is Reason.REBALANCE and self.draft.phase is Phase.PREPARING:
                await standby.until_told(self)
            tasks.start(f"abort of {self.name}", self._abort_when_asked())
            tasks.start(f"witness of {self.name}", self._declare_gone())
            tasks.start(f"network of {self.name}", self._ask_network())
            await self._carry_out()
        except Aborted:
            await self._end(Phase.ABORTED, "aborted", "aborted before anything was begun")
        except Final as e:
            if self.draft.phase in (Phase.PENDING, Phase.PREPARING):
                self.ctx.metrics.refused.labels(e.code).inc()
            await self._end(Phase.FAILED, e.code, e.message)

    # -- Pending -----------------------------------------------------------------------------------------

    async def _pending(self) -> bool:
        """Whether there is something to carry out now."""
        self.draft.enter(Phase.PENDING, now())
        self._check_spec()
        source = await self._source()
        self.leaving = source.node
        behind = await self._turn(source)
        if behind and not self.jobs.fips.on_pod(source.uid):
            await self._end(Phase.SUCCEEDED, "nothing_to_move", f"nothing is left on {source.name}: {behind}")
            return False
        await self.aim(source)
        if self.spec.dry_run:
            await self._end(Phase.SUCCEEDED, "dry_run", f"planned only: {self.draft.status['plan']}")
            return False
        self.draft.enter(Phase.PREPARING, now())
        self._fresh = True
        await self.write()
        self.ctx.metrics.planned.observe((now() - self.created).total_seconds())
        self._note("Planned", self.draft.status["plan"])
        await self._label(source)
        return True

    async def aim(self, source: Pod) -> None:
        """A target, with reasons, into the status."""
        choice = await self._choose(source)
        self.jobs.goes_to(self, choice.pod.node)
        self._write_down(source, choice, self._addresses(source))
        await self.reckon(source, choice.pod)

    def _check_spec(self) -> None:
        self._check_stop()
        if self.spec.on_failure is OnFailure.DROP_STREAMS:
            raise Final("unsupported", "onFailure DropStreams: this version keeps the source; leave it out")

    def _check_stop(self) -> None:
        if self.spec.abort or self.deleted:
            raise Aborted
        try:
            self._said_later()
        except ValueError as e:
            raise Final("bad_deadline", f"annotation {ANNOTATION_DEADLINE}: {e}; as in 2026-11-25T10:02:00Z") from e
        deadline = self.deadline
        if deadline is not None and now() >= deadline:
            waited = f": {self.draft.status['message']}" if self.draft.status.get("message") else ""
            raise Final("deadline_passed", f"the deadline {deadline:%H:%M:%S} passed before the job began{waited}")

    async def pause(self, seconds: float) -> None:
        """Wait for news, no longer than this; then abort and deadline are looked at."""
        if self.deadline is not None:
            seconds = max(0.0, min(seconds, (self.deadline - now()).total_seconds()))
        try:
            async with asyncio.timeout(seconds):
                await self.news.wait()
        except TimeoutError:
            pass
        self.news.clear()
        self._check_stop()

    async def _source(self) -> Pod:
        """The pod to leave, or the name of what is wrong with it."""
        name = self.spec.pod
        pod = self.ctx.view.pod(self.namespace, name)
        if pod is None:
            await self._missing(name)
            pod = await self._late(name)
        if not pod.node:
            raise Final("unknown_pod", f"pod {name} is on no node yet: there is nothing to move")
        if pod.host_network:
            raise Final("host_network", f"pod {name} is on its node's network: it has no address that could move")
        if self.ctx.view.agent(pod.node) is None:
            raise Final("no_agent", f"no agent on node {pod.node}: does the DaemonSet cover it?")
        for fip in self.jobs.fips.on_pod(pod.uid):
            self.jobs.fips.checked_pool(fip)
        return pod

    async def _missing(self, name: str) -> None:
        """It is not among the labelled pods: find out why."""
        label = self.ctx.settings.enabled_label
        try:
            found = await self.ctx.kube.get(core("pods", self.namespace, name))
        except KubeError as e:
            if e.status == NOT_FOUND:
                raise Final("unknown_pod", f"there is no pod {name} in namespace {self.namespace}") from e
            raise Retryable("api_unreachable", str(e)) from e
        if (found["metadata"].get("labels") or {}).get(label) != "true":
            raise Final("not_enabled", f"pod {name} lacks the label: kubectl label pod {name} {label}=true")

    async def _late(self, name: str) -> Pod:
        """The API server has it with its label; the watch is a moment behind."""
        while (pod := self.ctx.view.pod(self.namespace, name)) is None:
            await self.pause(self.ctx.settings.timeouts.retry_s)
        return pod

    async def _turn(self, source: Pod) -> str:
        """One job a pod, and no more than the limits; what was waited for last."""
        waited = ""
        while why := self.jobs.must_wait(self, source):
            waited = why
            await self._waiting(why)
        self.jobs.begin(self, source.uid, source.node)
        return waited

    async def _choose(self, source: Pod) -> Choice:
        """Who asked with a deadline, or did not ask but was given notice, waits for a target that may still come. To
        a person without one the answer is no, after a look at more than the watches have told."""
        told, looked = self.ctx.settings.limits.refusals_told, False
        waits = self.deadline is not None or LABEL_NOTICE in (self.obj["metadata"].get("labels") or {})
        while True:
            try:
                choice = pick(source, self.spec.target, self.jobs.scene(self, source), told)
                self.jobs.stands_by(self, False)
                return choice
            except OperatorError as e:
                if not looked:
                    looked = True
                    await self._look_at_pods(source.namespace)
                    continue
                if not (waits and isinstance(e, Retryable)):
                    raise Final(e.code, e.message) from e
                await self._wait_for_target(source, e.message)

    async def _wait_for_target(self, source: Pod, why: str) -> None:
        """Without a deadline it may take for ever: nobody shall wait for this job's turn meanwhile."""
        await capacity.ask(self, source)
        self.jobs.stands_by(self, self.deadline is None)
        await self._waiting(why)
        if source.uid not in self.ctx.view.pods:
            raise Final("unknown_pod", f"{source.name} has gone while its job waited: {why}")

    async def _look_at_pods(self, namespace: str) -> None:
        """A job and its target that are made in one breath come on two watches, and either may be behind."""
        selector = [("labelSelector", f"{self.ctx.settings.enabled_label}=true")]
        try:
            found = await self.ctx.kube.request("GET", core("pods", namespace), query=selector)
        except KubeError as e:
            log.warning("job %s: looking for a target: %s", self.name, e)
            return
        for obj in found["items"]:
            self.ctx.view.put_pod(Pod.of(obj))

    async def _waiting(self, why: str) -> None:
        if self.draft.status.get("message") != why:
            self.draft.say(why)
            await self.write()
            self._note("Waiting", why)
        await self.pause(self.ctx.settings.timeouts.resync_s)

    def _addresses(self, source: Pod) -> list[str]:
        return sorted(str(f["status"]["address"]) for f in self.jobs.fips.on_pod(source.uid))

    def _write_down(self, source: Pod, choice: Choice, addresses: list[str]) -> None:
        """All that another process needs to go on from here."""
        status, target = self.draft.status, choice.pod
        status["epoch"] = self.ctx.epoch()
        status["agentJob"] = self.agent_job
        status["source"] = {"nodeName": source.node, "podUID": source.uid, "addresses": addresses}
        status["target"] = {"nodeName": target.node, "podName": target.name, "podUID": target.uid}
        moved = ", ".join(addresses) or "every floating address of the pod"
        refused = (
            f"; refused: {explain(choice.refused, self.ctx.settings.limits.refusals_told)}" if choice.refused else ""
        )
        plan = f"{moved} to {target.name} on {target.node}, {choice.why}{refused}"
        self._plan = status["plan"] = plan[: self.ctx.settings.limits.message_chars]
        self.draft.say(f"from {source.node} to {target.node}")

    async def reckon(self, source: Pod, target: Pod) -> None:
        """What the planner makes of what both agents tell. The target is written down already: who goes meanwhile
        calls this job back."""
        made = await self.jobs.reckon(self, source, target)
        self._replay = made.replay
        plan = self._plan or f"to {target.name} on {target.node}"
        self.draft.status["plan"] = f"{plan}. {made.words}"[: self.ctx.settings.limits.message_chars]
        self._check_stop()

    async def _label(self, source: Pod) -> None:
        """So that jobs are found by pod and workload; no owner reference, which would take the record along."""
        labels = {
            LABEL_POD: label_value(source.name),
            LABEL_POD_UID: source.uid,
            LABEL_WORKLOAD: label_value(source.workload),
        }
        if labels.items() <= (self.obj["metadata"].get("labels") or {}).items():
            return
        body = {"metadata": {"labels": labels}}
        await self._persist(ours(JOBS, self.namespace, self.name), body)

    def say(self, message: str) -> None:
        """Into the status, soon."""
        if self.draft.status.get("message") != message:
            self.draft.say(message)
            self._dirty.set()

    # -- carried out by the source's agent -----------------------------------------------------------------

    async def _carry_out(self) -> None:
        began, pause_s = now(), self.ctx.settings.timeouts.retry_s
        heard, gone = not self._fresh, ""
        while True:
            try:
                if gone:
                    return await self._agent_done(await self._take_over(gone))
                report = await self._lost_report() if heard else None
                if report is None:
                    async for event in self.ctx.agents.migrate(self.source_node, self._request()):
                        heard, pause_s = True, self.ctx.settings.timeouts.retry_s
                        if event.HasField("report"):
                            report = event.report
                        else:
                            self._happened(event)
                if report is not None:
                    await self._agent_done(report)
                    return
                raise Retryable("agent_unreachable", f"the agent on {self.source_node} ended the call without a report")
            except OperatorError as e:
                if isinstance(e, Final) and not (heard and e.code in _OURS):
                    raise
                self._unanswered(e, heard, began)
                gone = gone or (await self._source_gone() if heard else "")
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, self.ctx.settings.timeouts.retry_max_s)

    def warm_request(self) -> pb.WarmRequest:
        """The same move, as far as it can be undone by forgetting it."""
        move = self._request()
        return pb.WarmRequest(
            job_id=move.job_id,
            epoch=move.epoch,
            pod=move.pod,
            target_pod=move.target_pod,
            target_node=move.target_node,
            addresses=move.addresses,
            kv_mode=move.kv_mode,
            kv_bytes_per_s=move.kv_bytes_per_s,
        )

    def _request(self) -> pb.MigrateRequest:
        status, spec = self.draft.status, self.spec
        source, target = status["source"], status["target"]
        agent = self.ctx.view.agent(target["nodeName"])
        return pb.MigrateRequest(
            job_id=self.agent_job,
            epoch=int(status["epoch"]),
            pod=pb.PodRef(namespace=self.namespace, name=spec.pod, uid=source["podUID"]),
            target_pod=pb.PodRef(namespace=self.namespace, name=target["podName"], uid=target["podUID"]),
            target_node=pb.NodeRef(name=target["nodeName"], endpoint=agent.endpoint if agent else ""),
            addresses=source.get("addresses") or [],
            switchover=SWITCHOVERS[spec.switchover],
            kv_mode=KV_MODES[KvMode.REPLAY if self._replay and spec.kv_mode is KvMode.AUTO else spec.kv_mode],
            kv_bytes_per_s=spec.kv_bytes_per_s,
            deadline_unix_ms=int(self.deadline.timestamp() * 1000) if self.deadline else 0,
        )

    def _happened(self, event: pb.MigrateEvent) -> None:
        before = self.draft.phase
        if event.step == _MOVE_ADDRESS and event.what in ("begin", "undo"):
            self._shall_be(at_target=event.what == "begin")
        self._all_moved = self._all_moved or event.step in _AFTER_LAST_BATCH
        if event.step in _PROVES and event.what == "begin":
            self._proving_since = asyncio.get_running_loop().time()
        self._proved = self._proved or (event.step in _PROVES and event.what == "done")
        if self.draft.step(event, now()):
            self._phase_changed.set()
            self._entered(before)
        self._dirty.set()

    def _entered(self, before: Phase) -> None:
        phase = self.draft.phase
        if before is Phase.PREPARING:
            self.ctx.metrics.freeze.observe((now() - self.created).total_seconds())
        if phase is Phase.SWITCHING:
            self._note("Switching", f"streams change from {self.source_node} to {self.target_node}")
        elif phase is Phase.COMMITTING:
            self._note("Committed", f"{self.target_node} owns the streams: no way back from here")
            self._shall_be(at_target=True)

    async def _lost_report(self) -> pb.JobReport | None:
        """An agent forgets ended jobs when it restarts. Asking it to migrate would begin the job anew; so when it was
        past preparing, the addresses tell how it ended."""
        if self.draft.phase not in (Phase.SWITCHING, Phase.COMMITTING):
            return None
        if await self.ctx.agents.status(self.source_node, self.agent_job) is not None:
            return None
        wanted = set(self.draft.status["source"].get("addresses") or [])
        reply = await self.ctx.agents.describe(self.target_node)
        if wanted and wanted <= set(reply.floating_addresses):
            text = f"the addresses are at {self.target_node}; the agent restarted after the end and its report is lost"
            return pb.JobReport(job_id=self.agent_job, phase=pb.PHASE_SUCCEEDED, message=text)
        text = "the agent restarted after the end and its report is lost; the addresses are not at the target"
        return pb.JobReport(job_id=self.agent_job, phase=pb.PHASE_ROLLED_BACK, reason="report_lost", message=text)

    def _unanswered(self, e: OperatorError, heard: bool, began: datetime) -> None:
        """Silence is no proof: say so and ask again. Ends only what certainly never began, or cannot end."""
        spec = self.spec
        self.draft.say(f"{e.code}: {e.message}; asked again")
        self._dirty.set()
        if not heard:
            if spec.abort or self.deleted:
                raise Aborted
            if self.deadline is not None and now() >= self.deadline:
                raise Final("deadline_passed", f"the deadline passed before the agent was reached: {e.message}")
            if now() - began > timedelta(seconds=self.ctx.settings.timeouts.agent_patience_s):
                raise Final(e.code, e.message)

    async def _source_gone(self) -> str:
        """Proof, or what ends the source's say in Kubernetes: its agent could not be asked any more. Enough for a
        target to take over, since a source that is not dead thaws nothing without that target's word."""
        deleted = self.source_node not in self.ctx.view.nodes and self.source_uid not in self.ctx.view.pods
        return "its Node and its pod were deleted" if deleted else await self._gone(self.source_node)

    async def _gone(self, name: str) -> str:
        """What proves that a node is gone for good; empty: it may come back."""
        node = self.ctx.view.nodes.get(name)
        if node is None or node.ready:
            return ""
        if node.leaving == OUT_OF_SERVICE:
            return f"taint {OUT_OF_SERVICE}"
        witness = self.ctx.witness
        return await witness.gone(node.provider_id) if witness is not None and node.provider_id else ""

    async def _take_over(self, evidence: str) -> pb.JobReport:
        """The target makes live what has come to it whole, and says how much that is."""
        node, target = self.source_node, self.target_node
        request = pb.DeclareGoneRequest(job_id=self.agent_job, node=node, evidence=evidence, epoch=self.ctx.epoch())
        try:
            reply = await self.ctx.agents.declare_gone(target, request)
        except Final as e:
            if e.code != "unknown_job":
                raise
            text = f"node {node} is gone ({evidence}), and nothing of its streams had come to {target}"
            raise Final("source_lost", text) from e
        except Retryable as e:
            if target in self.ctx.view.nodes:
                raise
            text = f"nodes {node} ({evidence}) and {target} are both gone, and with them the streams"
            raise Final("source_lost", text) from e
        self._note("SourceGone", f"{node} is gone for good ({evidence}); {reply.message}", warning=True)
        whole = self._all_moved and not reply.lost
        rest = "" if whole else "; streams that had not come there ended with the node"
        return pb.JobReport(
            job_id=self.agent_job,
            phase=pb.PHASE_SUCCEEDED if whole else pb.PHASE_FAILED,
            reason="" if whole else "source_lost",
            message=f"node {node} is gone ({evidence}): {reply.message}{rest}",
            streams=pb.StreamCounts(total=reply.streams + reply.lost, migrated=reply.streams, lost=reply.lost),
        )

    async def _agent_done(self, report: pb.JobReport) -> None:
        """The agent is through; where anything was committed, network, status and slice follow before the job ends."""
        self.draft.report(report)
        committed = report.phase == pb.PHASE_SUCCEEDED or report.streams.migrated or report.point_of_no_return_ms
        if committed:
            if self.draft.enter(Phase.COMMITTING, now()):
                self._note("Committed", f"{self.target_node} owns the streams: no way back from here")
            await self._follow_by_network()
        elif self._left:  # the agents may be back before the network was asked
            self._at_target = False
            await self._ask_until_answered()
        await self._end(PHASES[report.phase], report.reason, report.message)

    async def _follow_by_network(self) -> None:
        """Until it is so: the tunnel carries the clients meanwhile."""
        target = self.target_pod()
        fips = self.jobs.fips
        uids = self._fips()
        pause_s = self.ctx.settings.timeouts.retry_s
        while uids:
            try:
                await fips.moved(uids, target, self._proved or None)
                return
            except (Retryable, KubeError) as e:
                self.draft.say(f"the streams are at {target.node}; the address is to follow: {e}")
                self._dirty.set()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, self.ctx.settings.timeouts.retry_max_s)

    def _fips(self) -> list[str]:
        """The FloatingIPs whose addresses go along."""
        wanted = set(self.draft.status["source"].get("addresses") or [])
        objects = self.jobs.fips.objects
        return [uid for uid, o in objects.items() if (o.get("status") or {}).get("address") in wanted]

    def _shall_be(self, *, at_target: bool) -> None:
        self._at_target = at_target
        self._left = self._left or at_target
        self._asking.set()

    async def _ask_network(self) -> None:
        """While the agents still work: a cloud takes seconds to move an address, and they only see it move. With Steer
        it is asked right after COMMIT; with Wait before it, and asked back when the agents go back."""
        while True:
            await self._asking.wait()
            self._asking.clear()
            await self._ask_until_answered()
            await self._see_it_move()

    async def _see_it_move(self) -> None:
        """A cloud's yes is at times none: it is asked again until packets take the new path, or until the addresses
        shall be elsewhere. Beside the agents, who wait for those packets and can ask nobody."""
        timeouts, loop = self.ctx.settings.timeouts, asyncio.get_running_loop()
        asked, seen = loop.time(), False
        while self._at_target and not self._proved:
            late = loop.time() - asked > timeouts.address_confirm_s
            denied = late and loop.time() - self._proving_since > timeouts.address_confirm_s
            why = "" if seen and not denied else await self._not_there(denied)
            seen = not why
            if why and late:
                self.say(f"the addresses are asked for at {self.target_node} once more: {why}")
                self._note("AddressNotMoved", f"after {timeouts.address_confirm_s:g} s: {why}", warning=True)
                await self._ask_until_answered()
                asked = loop.time()
            try:
                async with asyncio.timeout(timeouts.address_look_s):
                    await self._asking.wait()
                return
            except TimeoutError:
                pass

    async def _not_there(self, denied: bool) -> str:
        """Why the addresses are not at the target yet. `denied`: the agents have waited long for packets."""
        try:
            return await self.jobs.fips.missing(self._fips(), self.target_pod(), False if denied else None)
        except OperatorError as e:
            return str(e)

    async def _ask_until_answered(self) -> None:
        pause_s = self.ctx.settings.timeouts.retry_s
        while True:
            try:
                await self.jobs.fips.ask(self._fips(), self.target_pod() if self._at_target else self._source_pod())
                return
            except OperatorError as e:
                where = self.target_node if self._at_target else self.source_node
                self.draft.say(f"the addresses cannot be asked for at {where} yet: {e}")
                self._dirty.set()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, self.ctx.settings.timeouts.retry_max_s)

    def _source_pod(self) -> Pod:
        uid, node = self.source_uid, self.source_node
        gone = Pod(self.namespace, self.spec.pod, uid, node, {}, False, None, False, "", "")
        return self.ctx.view.pods.get(uid, gone)

    def target_pod(self) -> Pod:
        """From the view, or from the status when the pod has just gone."""
        target = self.draft.status["target"]
        known = self.ctx.view.pods.get(target["podUID"])
        if known is not None:
            return known
        name, uid, node = target["podName"], target["podUID"], target["nodeName"]
        return Pod(self.namespace, name, uid, node, {}, False, None, False, "", "")

    # -- beside it ---------------------------------------------------------------------------------------

    async def _abort_when_asked(self) -> None:
        """Told to the agent until it answers. After the point of no return it says that it goes on, and so do we."""
        while not (self.spec.abort or self.deleted):
            await self.news.wait()
            self.news.clear()
        while True:
            try:
                accepted, message = await self.ctx.agents.abort(self.source_node, self.agent_job)
            except OperatorError as e:
                log.info("job %s: abort: %s", self.name, e)
                await asyncio.sleep(self.ctx.settings.timeouts.retry_s)
                continue
            self.draft.say(message)
            self._note("Aborting" if accepted else "AbortTooLate", message, warning=not accepted)
            self._dirty.set()
            return

    async def _declare_gone(self) -> None:
        """Tell the source when its target's node is proven gone: nothing else may end its waiting."""
        evidence = ""
        while not evidence:
            await asyncio.sleep(self.ctx.settings.timeouts.gone_poll_s)
            evidence = await self._gone(self.target_node)
        job, node = self.agent_job, self.target_node
        pause_s = self.ctx.settings.timeouts.retry_s
        while True:
            try:
                said = pb.DeclareGoneRequest(job_id=job, node=node, evidence=evidence, epoch=self.ctx.epoch())
                await self.ctx.agents.declare_gone(self.source_node, said)
                break
            except OperatorError as e:
                log.info("job %s: the source has not heard that its target is gone: %s", self.name, e)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, self.ctx.settings.timeouts.retry_max_s)
        self._note("TargetGone", f"{self.target_node} is gone for good ({evidence})", warning=True)

    # -- the end, and writing ------------------------------------------------------------------------------

    async def _end(self, phase: Phase, code: str, message: str) -> None:
        began = self.draft.phase is not Phase.PENDING
        await capacity.give_back(self, phase)
        self.draft.seen_generation(int(self.obj["metadata"].get("generation", 1)))
        self.draft.end(phase, code, message, now())
        await self.write()
        good = phase is Phase.SUCCEEDED
        self._note(self.draft.status["reason"], message or phase.value, warning=not good)
        if began and not self.spec.dry_run:
            about = pod_reference(self.namespace, self.spec.pod, self.source_uid)
            self.ctx.events.note(about, f"Migration{phase.value}", f"job {self.name}: {message}", warning=not good)
        self._measure(phase)

    def _measure(self, phase: Phase) -> None:
        status, metrics = self.draft.status, self.ctx.metrics
        metrics.ended.labels(phase.value, status["reason"]).inc()
        for outcome in ("migrated", "rolledBack", "lost", "unmovable"):
            metrics.streams.labels(outcome).inc((status.get("streams") or {}).get(outcome, 0))
        metrics.kv_bytes.inc((status.get("kv") or {}).get("bytesSent", 0))
        stall = (status.get("stall") or {}).get("max", 0.0)
        if stall:
            metrics.stall.observe(stall / 1000)
        if stall and self.spec.max_stall_ms is not None and stall > self.spec.max_stall_ms:
            text = f"clients waited up to {stall:g} ms, more than maxStall {self.spec.max_stall_ms:g} ms"
            self._note("StallExceeded", text, warning=True)

    def tell(self, reason: str, message: str, warning: bool = False) -> None:
        """An Event, for what is done beside the job."""
        self._note(reason, message, warning)

    def _note(self, reason: str, message: str, warning: bool = False) -> None:
        log.log(logging.WARNING if warning else logging.INFO, "%s: %s", reason, message, extra={"job": self.uid})
        self.ctx.events.note(reference(self.obj, "MigrationJob"), reason, message, warning)

    async def _write_progress(self) -> None:
        """Phases at once, steps within a phase now and then: an API request costs more than a step takes."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self._phase_changed.clear()
            await self.write()
            try:
                async with asyncio.timeout(self.ctx.settings.timeouts.status_every_s):
                    await self._phase_changed.wait()
            except TimeoutError:
                pass

    async def write(self) -> None:
        """Bring the API server's copy up to date, until it is."""
        async with self._write_lock:
            patch = self.draft.patch()
            if patch:
                await self._persist(f"{ours(JOBS, self.namespace, self.name)}/status", {"status": patch})
                self.draft.written(patch)

    async def _persist(self, path: str, body: Json) -> None:
        timeouts = self.ctx.settings.timeouts
        try:
            await until_done(lambda: self.ctx.kube.patch(path, body), timeouts.retry_s, timeouts.retry_max_s)
        except KubeError as e:
            if e.status != NOT_FOUND:
                raise
            self.deleted = True  # the record is gone; what the agents do has to come to its end all the same
            self.news.set()
