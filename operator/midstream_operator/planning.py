"""From what the agents tell to a plan: the planner's situation is put together here, and its words are handed on.

A job asks its source and its target, both at once and not for long; a node's plan (`midstream plan`) asks all its pods
and everybody who could take over. Nothing is invented: a figure that nobody has measured is replaced by a setting
(settings.Planning), and the plan names it as assumed. A pod that tells nothing is planned for by name, not by figures.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime

from midstream_agent.contract import agent_pb2 as pb

from midstream_operator.context import Context
from midstream_operator.errors import OperatorError
from midstream_operator.packing import Stream, Target
from midstream_operator.plan_model import CallBudget, Costs, Plan, Situation, Switchover, Way
from midstream_operator.plan_text import render, size
from midstream_operator.planner import plan
from midstream_operator.providers.ec2 import Ec2Provider
from midstream_operator.settings import Planning
from midstream_operator.view import Pod

_ANNOUNCED_S = 0.05  # until a network that hears announcements delivers: a probe's round trip


@dataclass(frozen=True, slots=True)
class Figures:
    """One pod's answer, or why there is none."""

    pod: Pod
    told: pb.SurveyReply | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Reckoning:
    """A plan in words. `replay`: there is no time to copy any KV that would be worth it."""

    words: str
    replay: bool = False


@dataclass(slots=True)
class Assumed:
    """What is taken for true, each once."""

    settings: Planning
    lines: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)

    def bandwidth(self, node: str, figures: Iterable[Figures]) -> float:
        measured = max((f.told.kv_bytes_per_s for f in figures if f.told), default=0.0)
        if not measured:
            value = self.settings.bandwidth_bytes_per_s
            self.note(f"assumed: {size(value)}/s out of {node}, which has copied no KV yet")
        return measured or self.settings.bandwidth_bytes_per_s

    def kv_free(self, target: Figures) -> int:
        """The smaller of what the pool and the engine have left."""
        told = target.told
        if told is None:
            self.note(f"assumed: no room for KV in {target.pod.name}, which told nothing: {target.why}")
            return 0
        share = told.kv_free_share if told.load_known else 1.0
        return int(min(told.pool_free_bytes, told.pool_bytes * share))

    def target(self, figures: Figures) -> Target:
        self.note(f"assumed: a prefill of {self.settings.prefill_tokens_per_s:g} tokens/s, which nobody measures")
        pod = figures.pod
        prefill = self.settings.prefill_tokens_per_s
        return Target(pod.name, pod.node, self.kv_free(figures), self.settings.streams_free, prefill, _alike(pod))


# -- asking


async def ask(ctx: Context, pods: Sequence[Pod]) -> list[Figures]:
    return list(await asyncio.gather(*(_ask(ctx, pod) for pod in pods)))


async def _ask(ctx: Context, pod: Pod) -> Figures:
    ref = pb.PodRef(namespace=pod.namespace, name=pod.name, uid=pod.uid)
    try:
        return Figures(pod, await ctx.agents.survey(pod.node, ref, ctx.settings.planning.survey_s))
    except OperatorError as e:
        return Figures(pod, None, f"{e.code}: {e.message}")


def streams_of(figures: Figures) -> list[Stream]:
    """Those that can move. How fast they grow, and when they end, nobody tells."""
    pod = figures.pod
    return [
        Stream(f"{pod.namespace}/{pod.name}/{s.id}", pod.name, s.address, s.kv_bytes, s.tokens, workload=_alike(pod))
        for s in (figures.told.streams if figures.told else ())
        if s.movable
    ]


def _alike(pod: Pod) -> str:
    """Pods for which this is equal can take over from each other."""
    return f"{pod.namespace}/{pod.model}"


# -- one job


async def for_job(
    ctx: Context, source: Pod, target: Pod, deadline: datetime | None, switchover: Switchover, by_api: bool,
    sharing: int,
) -> Reckoning:  # fmt: skip
    """`sharing`: jobs that leave this node now, this one included: its way out is theirs together."""
    figures, other = await ask(ctx, (source, target))
    if figures.told is None:
        return Reckoning(f"no figures of {source.name} ({figures.why}): all its KV is copied as far as time allows")
    streams, stuck = streams_of(figures), [s for s in figures.told.streams if not s.movable]
    assumed = Assumed(ctx.settings.planning)
    bandwidth = assumed.bandwidth(source.node, [figures]) / sharing
    tail = [f"{len(stuck)} streams cannot move: {', '.join(sorted({s.reason for s in stuck}))}"] if stuck else []
    if not streams:
        return Reckoning("; ".join(["no streams that could move now", *tail]))
    if deadline is None:
        return Reckoning("; ".join([_without_deadline(streams, bandwidth), *tail, *assumed.lines]))
    try:
        situation = Situation(
            source.node, time.time(), deadline.timestamp(), tuple(streams), (assumed.target(other),), bandwidth,
            _calls(ctx, by_api), _costs(ctx.settings.planning, by_api, 0.0), switchover, by_api,
        )  # fmt: skip
    except ValueError as e:  # a pod may say anything, and its streams are to move all the same
        return Reckoning(f"no plan, the pods' figures make no sense: {e}")
    made = plan(situation)
    return Reckoning("; ".join([*made.words, *tail, *assumed.lines]), _no_copy(made))


def _without_deadline(streams: Sequence[Stream], bandwidth: float) -> str:
    kv_bytes = sum(s.kv_bytes for s in streams)
    long = f"about {kv_bytes / bandwidth:.1f} s at {size(bandwidth)}/s" if bandwidth else "nobody knows how long"
    return f"no deadline: {len(streams)} streams with {size(kv_bytes)} of KV, {long}"


def _no_copy(made: Plan) -> bool:
    """KV is given up, and none is copied."""
    given_up = any(entry.kv_given_up for entry in made.moving)
    return given_up and not any(entry.way is Way.MOVE_KV for entry in made.moving)


def _calls(ctx: Context, by_api: bool) -> CallBudget:
    provider = ctx.providers.get("ec2")
    return provider.budget() if by_api and isinstance(provider, Ec2Provider) else CallBudget()


def _costs(settings: Planning, by_api: bool, margin_s: float) -> Costs:
    """A job's deadline has the margin off already."""
    costs = Costs(margin_s=margin_s, copy_reserve_s=settings.copy_reserve_s)
    return costs if by_api else replace(costs, address_move_s=_ANNOUNCED_S)


# -- a node, at any time


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a node's plan is about, as the operator has it."""

    node: str
    pods: Sequence[Pod]  # that hold floating addresses there
    candidates: Mapping[str, Sequence[Pod]]  # pod's uid -> who could take over
    by_api: bool


async def for_node(ctx: Context, facts: NodeFacts, seconds: float) -> str:
    """As if its notice came now and ended after `seconds`."""
    if not facts.pods:
        return f"nothing to move: no pod with a floating address runs on {facts.node}"
    takers = {p.uid: p for pods in facts.candidates.values() for p in pods[: ctx.settings.planning.targets_asked]}
    figures = await ask(ctx, [*facts.pods, *takers.values()])
    sources, targets = figures[: len(facts.pods)], figures[len(facts.pods) :]
    assumed = Assumed(ctx.settings.planning)
    bandwidth = assumed.bandwidth(facts.node, sources)
    now_s, margin_s = time.time(), ctx.settings.handling.margin_s
    try:
        situation = Situation(
            facts.node, now_s, now_s + seconds, tuple(s for f in sources for s in streams_of(f)),
            tuple(assumed.target(f) for f in targets), bandwidth, _calls(ctx, facts.by_api),
            _costs(ctx.settings.planning, facts.by_api, margin_s), by_api=facts.by_api,
        )  # fmt: skip
    except ValueError as e:
        return f"no plan, the pods' figures make no sense: {e}"
    silent = [f"{f.pod.name} told nothing: {f.why}" for f in sources if f.told is None]
    alone = [f"nobody can take over from {p.name}" for p in facts.pods if not facts.candidates[p.uid]]
    notes = [f"  {line}" for line in (*silent, *alone, *assumed.lines)]
    return "\n".join([render(plan(situation)), *notes])
