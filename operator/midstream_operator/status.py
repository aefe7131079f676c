"""A job's status, as a pure function of what was there and what happened. Nothing here asks anybody.

`Draft` collects changes; `patch()` is the JSON merge patch that brings the API server's copy up to date, or {}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from datetime import datetime
from typing import Any

from midstream_agent.contract import agent_pb2 as pb

from midstream_operator.errors import reason_of
from midstream_operator.model import Json, Phase, format_time

PHASES: Mapping[int, Phase] = {
    pb.PHASE_PENDING: Phase.PREPARING,  # the agent has the job, so it is planned
    pb.PHASE_PREPARING: Phase.PREPARING,
    pb.PHASE_SWITCHING: Phase.SWITCHING,
    pb.PHASE_COMMITTING: Phase.COMMITTING,
    pb.PHASE_SUCCEEDED: Phase.SUCCEEDED,
    pb.PHASE_ROLLED_BACK: Phase.ROLLED_BACK,
    pb.PHASE_FAILED: Phase.FAILED,
    pb.PHASE_ABORTED: Phase.ABORTED,
}


class Draft:
    """The status that shall be, beside the one that was written last."""

    def __init__(self, obj: Json, message_chars: int) -> None:
        self._generation = int(obj["metadata"].get("generation", 1))
        self._written: Json = deepcopy(obj.get("status") or {})
        self.status: Json = deepcopy(self._written)
        self._message_chars = message_chars

    @property
    def phase(self) -> Phase:
        return Phase(self.status.get("phase", Phase.PENDING))

    @property
    def as_written(self) -> Json:
        """What the API server has."""
        return deepcopy(self._written)

    def patch(self) -> Json:
        """A copy of what differs from what was written; lists whole, as a merge patch wants them."""
        return {k: deepcopy(v) for k, v in self.status.items() if self._written.get(k) != v}

    def written(self, patch: Json) -> None:
        """The API server has taken this patch; what changed meanwhile is in the next one."""
        self._written |= patch

    # -- changes ---------------------------------------------------------------------------------------

    def enter(self, phase: Phase, at: datetime) -> bool:
        """Whether it is a new one. Phases only go forward: a replayed event of the past changes nothing."""
        if "phase" in self.status and (self.phase is phase or _ORDER[phase] < _ORDER[self.phase]):
            return False
        self.status["phase"] = phase.value
        self.status["observedGeneration"] = self._generation
        stamps = self.status.setdefault("phaseTransitionTimestamps", [])
        stamps.append({"phase": phase.value, "time": format_time(at)})
        if phase is Phase.COMMITTING:
            self.status.setdefault("pointOfNoReturn", format_time(at))
        return True

    def say(self, message: str) -> None:
        self.status["message"] = message[: self._message_chars]

    def seen_generation(self, generation: int) -> None:
        self._generation = generation
        self.status["observedGeneration"] = generation

    def step(self, event: pb.MigrateEvent, at: datetime) -> bool:
        """One event of the agent's stream; whether the phase changed."""
        source = self.status.setdefault("source", {})
        if event.step:
            source["step"] = event.step
        if event.what == "retry" and event.message:
            self.say(f"{event.step}: {event.message}")
        phase = PHASES.get(event.phase)
        return phase is not None and not phase.ended and self.enter(phase, at)

    def report(self, report: pb.JobReport) -> None:
        """Figures of the agent's report, also of one that has not ended."""
        counts = report.streams
        self.status["streams"] = {
            "total": counts.total,
            "migrated": counts.migrated,
            "rolledBack": counts.rolled_back,
            "lost": counts.lost,
            "unmovable": counts.unmovable,
            "unmovableReasons": sorted(set(report.unmovable_reasons)),
        }
        kv = report.kv
        self.status["kv"] = {
            "bytesTotal": kv.bytes_total,
            "bytesSent": kv.bytes_sent,
            "bytesShared": kv.bytes_shared,
            "rounds": kv.rounds,
            "blocksRecomputed": kv.blocks_recomputed,
            "reason": reason_of(kv.reason) if kv.reason else "",
        }
        self.status["timings"] = {**_timings(report.steps), "hold": round(report.hold_ms, 3)}
        self.status["stall"] = _stall(report)

    def end(self, phase: Phase, code: str, message: str, at: datetime) -> None:
        """The last word. `code` is the error's; empty for a success."""
        self.enter(phase, at)
        reason = reason_of(code) if code else phase.value
        self.status["reason"] = reason
        self.say(message)
        self.status["completionTime"] = format_time(at)
        good = phase is Phase.SUCCEEDED
        kind, other = ("Complete", "Failed") if good else ("Failed", "Complete")
        for name, status in ((kind, "True"), (other, "False")):
            condition = new_condition(name, status, reason, self.status["message"], self._generation)
            self.status["conditions"] = with_condition(self.status.get("conditions", []), condition, at)


_ORDER = {p: i for i, p in enumerate((Phase.PENDING, Phase.PREPARING, Phase.SWITCHING, Phase.COMMITTING))}
_ORDER |= dict.fromkeys((Phase.SUCCEEDED, Phase.ROLLED_BACK, Phase.FAILED, Phase.ABORTED), len(_ORDER))


def new_condition(kind: str, status: str, reason: str, message: str, generation: int) -> Json:
    return {"type": kind, "status": status, "reason": reason, "message": message, "observedGeneration": generation}


def with_condition(conditions: Sequence[Json], new: Json, at: datetime) -> list[Json]:
    """The list with `new` in its place; the transition time changes only when the status does."""
    old = next((c for c in conditions if c["type"] == new["type"]), None)
    since = old["lastTransitionTime"] if old and old["status"] == new["status"] else format_time(at)
    others = [c for c in conditions if c["type"] != new["type"]]
    return [*others, {**new, "lastTransitionTime": since}]


def _timings(steps: Sequence[pb.StepTiming]) -> dict[str, float]:
    """Each step's time, summed over its attempts; what was undone apart from what was done."""
    found: dict[str, float] = {}
    for step in steps:
        head, *rest = step.name.lower().split("_")
        name = head + "".join(word.capitalize() for word in rest)
        name = f"{name}Undo" if step.outcome == "undone" else name
        found[name] = round(found.get(name, 0.0) + step.took_ms, 3)
    return found


def _stall(report: pb.JobReport) -> dict[str, Any]:
    """All streams of a batch wait alike, from the pause to their activation."""
    waited = round(report.hold_ms, 3)
    return {"p50": waited, "p99": waited, "max": waited}
