"""Which pod takes over. A pure function of what is known; every refused candidate is told why.

The order of preference among those that are left: fewest floating addresses (it serves least), fewest migrations
that go to its node, name. What only the pod's own agent can tell (free KV, listeners, weights) is asked for by the
source's agent before anything is frozen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from midstream_operator.errors import Final, Retryable
from midstream_operator.model import Target, matches
from midstream_operator.view import Node, Pod


@dataclass(frozen=True, slots=True)
class Scene:
    """All that a choice depends on."""

    pods: Iterable[Pod]  # of the source's namespace
    nodes: Mapping[str, Node]
    agents: frozenset[str]  # nodes whose agent is ready
    zone: str = ""  # the addresses' pools are of this zone; empty: any
    interrupted: frozenset[str] = frozenset()  # nodes that a running job leaves
    taking: frozenset[str] = frozenset()  # uids of pods that another job is moving away from
    addresses: Mapping[str, int] = field(default_factory=dict)  # pod uid -> floating addresses on it
    incoming: Mapping[str, int] = field(default_factory=dict)  # node -> jobs that go there


@dataclass(frozen=True, slots=True)
class Choice:
    pod: Pod
    why: str
    refused: tuple[tuple[str, str], ...]  # (pod, why not)


def pick(source: Pod, target: Target, scene: Scene, told: int) -> Choice:
    """The pod that takes over, or Retryable("no_target") / Final when a named one cannot."""
    named = [p for p in scene.pods if p.uid != source.uid and _is_named(p, target)]
    if target.pod and not named:
        raise Final("unknown_target", _unknown(source, target))
    judged = [(p, refusal(source, p, scene)) for p in sorted(named, key=lambda p: p.name)]
    good = [p for p, why in judged if not why]
    refused = tuple((p.name, why) for p, why in judged if why)
    if not good:
        raise _none(source, target, refused, told)
    best = min(good, key=lambda p: (scene.addresses.get(p.uid, 0), scene.incoming.get(p.node, 0), p.name))
    return Choice(best, _why(best, len(good), target, scene), refused)


def _is_named(pod: Pod, target: Target) -> bool:
    if target.pod:
        return pod.name == target.pod
    if target.node:
        return pod.node == target.node
    return matches(target.selector, pod.labels) if target.selector is not None else True


def refusal(source: Pod, pod: Pod, scene: Scene) -> str:
    """Why this pod cannot take over; empty: it can."""
    if pod.uid in scene.taking:  # first, as it is the reason of most when a thousand jobs begin at once
        return "another job moves its streams away"
    return _unlike(source, pod) or _unfit(source, pod) or _misplaced(pod, scene)


def _unlike(source: Pod, pod: Pod) -> str:
    if pod.model != source.model:
        return f"serves {pod.model}, the source {source.model}"
    if pod.runtime != source.runtime:
        return f"runtime version {pod.runtime or 'unset'}, not {source.runtime or 'unset'}"
    return "hostNetwork: it has no interface of its own" if pod.host_network else ""


def _unfit(source: Pod, pod: Pod) -> str:
    if pod.deletion is not None:
        return "is being deleted"
    if not pod.ready:
        return "is not Ready"
    return f"runs on {source.node} like the source" if pod.node == source.node else ""


def _misplaced(pod: Pod, scene: Scene) -> str:
    node = scene.nodes.get(pod.node)
    if node is None or not node.ready:
        return f"node {pod.node or 'none'} is not Ready"
    if node.leaving:
        return f"node {pod.node} is leaving ({node.leaving})"
    if pod.node in scene.interrupted:
        return f"node {pod.node} is being interrupted"
    if pod.node not in scene.agents:
        return f"no agent is ready on node {pod.node}"
    return f"node {pod.node} is not in zone {scene.zone}" if scene.zone not in ("", node.zone) else ""


def _why(pod: Pod, good: int, target: Target, scene: Scene) -> str:
    if target.pod:
        return "named by the job"
    if good == 1:
        return "the only one that can take over"
    held = scene.addresses.get(pod.uid, 0)
    return f"of {good} that can take over it serves least: {held} floating addresses"


def _unknown(source: Pod, target: Target) -> str:
    return (
        f"no pod {target.pod} with the label for migrations in namespace {source.namespace}: "
        "a target has to be of the source's namespace and to be enabled"
    )


def _none(source: Pod, target: Target, refused: tuple[tuple[str, str], ...], told: int) -> Final | Retryable:
    if target.pod:
        return Final("bad_target", f"{target.pod} cannot take over: {refused[0][1]}")
    if not refused:
        where = f" on node {target.node}" if target.node else ""
        return Retryable("no_target", f"no other enabled pod in namespace {source.namespace}{where}")
    return Retryable("no_target", f"no pod can take over: {explain(refused, told)}")


def explain(refused: tuple[tuple[str, str], ...], told: int) -> str:
    """The first few by name, the others counted by reason."""
    parts = [f"{name}: {why}" for name, why in refused[:told]]
    rest = Counter(why for _, why in refused[told:])
    return "; ".join([*parts, *(f"{n} more: {why}" for why, n in rest.most_common(3))])
