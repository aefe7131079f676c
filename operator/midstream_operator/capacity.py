"""Room for streams that nobody can take over yet: a rebalance recommendation comes minutes before the interruption, and
a node, an image and a model take minutes to come up.

    asked       once a job, where no pod can take over: the workload is scaled by one (its autoscaler finds the node).
                What it was scaled to is on the job before it is done: a restart neither forgets nor repeats it
    given back  at the job's end. After a move the source pod is the one that shall go, and Deployments are told so by
                its deletion cost; a StatefulSet would remove its newest pod, which has the streams: it is left as it is

By setting (handling.capacity), since who scales workloads otherwise (GitOps, an HPA) must know of it: a workload that
somebody has scaled down meanwhile is not touched again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from midstream_operator.errors import Final
from midstream_operator.handling import Capacity
from midstream_operator.kube import KubeError, apps, core, ours
from midstream_operator.model import ANNOTATION_CAPACITY, JOBS, Json, Phase, Reason
from midstream_operator.view import Pod

if TYPE_CHECKING:
    from midstream_operator.run import Run

log = logging.getLogger(__name__)
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"  # of Deployments' and ReplicaSets' pods; least goes first
_PLURALS = {"Deployment": "deployments", "ReplicaSet": "replicasets", "StatefulSet": "statefulsets"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for, as it is on the job: `deployments/llm=3`."""

    plural: str
    name: str
    to: int

    def __str__(self) -> str:
        return f"{self.plural}/{self.name}={self.to}"

    @classmethod
    def of(cls, run: Run) -> Asked | None:
        said = str((run.obj["metadata"].get("annotations") or {}).get(ANNOTATION_CAPACITY, ""))
        workload, _, to = said.rpartition("=")
        plural, _, name = workload.partition("/")
        return cls(plural, name, int(to)) if plural in _PLURALS.values() and name and to.isdigit() else None


async def ask(run: Run, source: Pod) -> None:
    """Idempotent. What keeps it from being asked is said once, and keeps nothing else."""
    wanted = run.ctx.settings.handling.capacity == Capacity.SCALE and run.spec.reason is Reason.REBALANCE
    if not wanted or run.asked_capacity:
        return
    run.asked_capacity = True
    try:
        asked = Asked.of(run) or await _decide(run, source)
        if await _replicas(run, asked) < asked.to:
            await run.ctx.kube.patch(_scale(run, asked), {"spec": {"replicas": asked.to}})
            run.tell("CapacityAsked", f"{asked.plural}/{asked.name} is scaled to {asked.to}: nobody can take over yet")
    except (KubeError, Final) as e:
        run.tell("NoCapacity", f"more pods cannot be asked for: {e}", warning=True)


async def give_back(run: Run, end: Phase) -> None:
    asked = Asked.of(run)
    if asked is None:
        return
    try:
        now = await _replicas(run, asked)
        if now < asked.to:
            return run.tell("CapacityGone", f"{asked.plural}/{asked.name} has {now} replicas by somebody else's word")
        if end is Phase.SUCCEEDED and asked.plural == "statefulsets":
            text = f"statefulsets/{asked.name} keeps {now} replicas: scaled down it would lose its newest pod"
            return run.tell("CapacityKept", text, warning=True)
        if end is Phase.SUCCEEDED:
            await _goes_first(run)
        await run.ctx.kube.patch(_scale(run, asked), {"spec": {"replicas": now - 1}})
        run.tell("CapacityGivenBack", f"{asked.plural}/{asked.name} is scaled to {now - 1} again")
        await _lower(run, asked)
    except KubeError as e:
        run.tell("NoCapacity", f"{asked.plural}/{asked.name} is not scaled down: {e}", warning=True)


async def _decide(run: Run, source: Pod) -> Asked:
    plural, name = await _workload(run, source)
    asked = Asked(plural, name, await _replicas(run, Asked(plural, name, 0)) + 1)
    await _write(run, asked)
    return asked


async def _workload(run: Run, source: Pod) -> tuple[str, str]:
    """What keeps the number of such pods: the pod's controller, or the Deployment above its ReplicaSet."""
    kind, name = _controller(await run.ctx.kube.get(core("pods", source.namespace, source.name)))
    if kind == "ReplicaSet":
        above = _controller(await run.ctx.kube.get(apps("replicasets", source.namespace, name)))
        kind, name = above if above[0] == "Deployment" else (kind, name)
    if kind not in _PLURALS:
        raise Final("no_capacity", f"{source.name} is of {kind or 'no controller'}, which cannot be scaled")
    return _PLURALS[kind], name


def _controller(obj: Json) -> tuple[str, str]:
    owners = obj["metadata"].get("ownerReferences") or []
    found: Json = next((o for o in owners if o.get("controller")), {})
    return str(found.get("kind", "")), str(found.get("name", ""))


async def _replicas(run: Run, asked: Asked) -> int:
    return int((await run.ctx.kube.get(_scale(run, asked)))["spec"].get("replicas", 0))


def _scale(run: Run, asked: Asked) -> str:
    return f"{apps(asked.plural, run.namespace, asked.name)}/scale"


async def _goes_first(run: Run) -> None:
    """The source pod, which has no streams any more, and a node at risk."""
    body = {"metadata": {"annotations": {DELETION_COST: "-1000"}}}
    try:
        await run.ctx.kube.patch(core("pods", run.namespace, run.spec.pod), body)
    except KubeError as e:
        if e.status != 404:
            raise


async def _lower(run: Run, given: Asked) -> None:
    """Other jobs of the workload counted on top of what this one has given back."""
    for other in run.jobs.runs.values():
        theirs = Asked.of(other) if other.namespace == run.namespace and other is not run else None
        if theirs and (theirs.plural, theirs.name) == (given.plural, given.name) and theirs.to > given.to:
            await _write(other, Asked(theirs.plural, theirs.name, theirs.to - 1))


async def _write(run: Run, asked: Asked) -> None:
    body = {"metadata": {"annotations": {ANNOTATION_CAPACITY: str(asked)}}}
    await run.ctx.kube.patch(ours(JOBS, run.namespace, run.name), body)
    run.obj["metadata"].setdefault("annotations", {})[ANNOTATION_CAPACITY] = str(asked)
