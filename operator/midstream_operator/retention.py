"""Which finished jobs go. A pure function.

A job with a ttl of its own goes when that is over. The others keep the five newest of their workload, so that there
is something to look at in the morning, and go after the operator's ttl beyond that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from midstream_operator.model import (
    ANNOTATION_CALLED_BACK,
    LABEL_NOTICE,
    LABEL_POD_UID,
    LABEL_WORKLOAD,
    JobSpec,
    Json,
    Phase,
    parse_time,
    phase_of,
)


@dataclass(frozen=True, slots=True)
class Finished:
    """All that is kept in memory of a finished job."""

    namespace: str
    name: str
    uid: str
    workload: str
    at: datetime
    ttl_s: int | None
    phase: Phase = Phase.FAILED
    notice: str = ""  # id of the notice that it answered
    pod_uid: str = ""
    called_back: bool = False  # aborted by the operator and not by a person

    @classmethod
    def of(cls, obj: Json) -> Finished:
        meta = obj["metadata"]
        spec = JobSpec.of(obj)
        ended = (obj.get("status") or {}).get("completionTime") or meta["creationTimestamp"]
        labels = meta.get("labels") or {}
        return cls(
            meta["namespace"],
            meta["name"],
            meta["uid"],
            labels.get(LABEL_WORKLOAD, spec.pod),
            parse_time(ended),
            spec.ttl_s,
            phase_of(obj),
            labels.get(LABEL_NOTICE, ""),
            labels.get(LABEL_POD_UID, ""),
            ANNOTATION_CALLED_BACK in (meta.get("annotations") or {}),
        )


def expired(finished: Iterable[Finished], now: datetime, kept: int, default_ttl_s: int) -> list[Finished]:
    gone: list[Finished] = []
    by_workload: dict[tuple[str, str], list[Finished]] = defaultdict(list)
    for job in finished:
        if job.ttl_s is None:
            by_workload[job.namespace, job.workload].append(job)
        elif now - job.at >= timedelta(seconds=job.ttl_s):
            gone.append(job)
    for jobs in by_workload.values():
        jobs.sort(key=lambda j: (j.at, j.name), reverse=True)
        gone += [j for j in jobs[kept:] if now - j.at >= timedelta(seconds=default_ttl_s)]
    return gone
