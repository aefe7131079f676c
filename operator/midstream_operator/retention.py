"""Which finished jobs go. A pure function.

A job with a ttl of its own goes when that is over. The others keep the five newest of their workload, so that there
is something to look at in the morning, and go after the operator's ttl beyond that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from midstream_operator.model import LABEL_WORKLOAD, JobSpec, Json, parse_time


@dataclass(frozen=True, slots=True)
class Finished:
    """All that is kept in memory of a finished job."""

    namespace: str
    name: str
    uid: str
    workload: str
    at: datetime
    ttl_s: int | None

    @classmethod
    def of(cls, obj: Json) -> Finished:
        meta = obj["metadata"]
        spec = JobSpec.of(obj)
        ended = (obj.get("status") or {}).get("completionTime") or meta["creationTimestamp"]
        workload = (meta.get("labels") or {}).get(LABEL_WORKLOAD, spec.pod)
        return cls(meta["namespace"], meta["name"], meta["uid"], workload, parse_time(ended), spec.ttl_s)


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
