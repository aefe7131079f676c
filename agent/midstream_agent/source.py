"""What a job is at its source: the facts that its steps share, and how they are let go.

The steps are in source_prepare.py, source_freeze.py and source_commit.py; which follows which is in steps.py.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from midstream_runtime.contract.errors import Final

from midstream_agent import tcp
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.handoff import HandoffClient
from midstream_agent.journal import Journal
from midstream_agent.kv import PoolView
from midstream_agent.kv_source import KvSource
from midstream_agent.node import Attached, Node
from midstream_agent.peer import PeerSession
from midstream_agent.saga import Clock
from midstream_agent.transit import Transit


class Aborted(Final):
    """The user's word, before the point of no return."""

    def __init__(self) -> None:
        super().__init__("aborted", "the job was aborted before the point of no return: the source goes on serving")


@dataclass(slots=True)
class SourceJob:
    """One job at the source, or one further batch of a job. Owns its fds, its handoff connection, its peer session."""

    node: Node
    request: pb.MigrateRequest
    journal: Journal
    notify: Callable[[pb.MigrateEvent], None]
    side: str = "source"
    clock: Clock = field(default_factory=Clock)
    report: pb.JobReport = field(default_factory=pb.JobReport)
    at: Attached | None = None
    handoff: HandoffClient | None = None
    hello: dict[str, Any] = field(default_factory=dict)
    pool: PoolView | None = None
    copy: KvSource | None = None
    """A batch has its job's; None: nothing is copied."""
    peer: PeerSession | None = None
    addresses: list[str] = field(default_factory=list)
    target_addresses: list[str] = field(default_factory=list)
    excluded: set[int] = field(default_factory=set)
    only: list[int] | None = None
    """The streams of this batch, by their ids in the pod; None: all."""
    parent: SourceJob | None = None
    transit: Transit | None = None
    """Set when streams are steered (switchover Steer); a batch has its job's."""
    no_steer: bool = False
    moved_keys: bytes = b""
    """Of all batches."""
    reserved_slots: int = 0
    """KV slots that the target was asked to keep for the pause."""
    listed: list[dict[str, Any]] = field(default_factory=list)
    """A further batch's streams, as the pod listed them."""
    tries: dict[int, int] = field(default_factory=dict)
    """How often a stream was in a further batch that went back, by its id in the pod."""
    batch_numbers: Iterator[int] = field(default_factory=lambda: itertools.count(2))
    paused_ms: float = 0.0
    stopped: bool = False
    """No further batch begins."""
    failed: Final | None = None
    """Why the first batch that went back to the source did so."""
    fds: list[int] = field(default_factory=list)
    kv: list[dict[str, Any]] = field(default_factory=list)
    state: bytes = b""
    keys: bytes = b""
    batch: tcp.Batch | None = None
    moving: bool = False
    discarded: bool = False
    peer_gone: str = ""
    pod_gone: bool = False
    """The process that served the streams at the source has ended, and those that it still had are lost."""
    abort_asked: bool = False
    frozen_at: float = 0.0
    clients_wait: bool = False
    lost: Final | None = None

    # -- what the saga's loop asks ---------------------------------------------------------------------

    @property
    def steers(self) -> bool:
        return self.transit is not None

    def note(self, step: str, what: str, message: str = "") -> None:
        event = pb.MigrateEvent(
            at_ms=self.clock.now_ms(), phase=self.report.phase, step=step, what=what, message=message
        )
        self.notify(event)

    def check_abort(self) -> None:
        if self.abort_asked or (self.parent is not None and self.parent.abort_asked):
            raise Aborted
        deadline = self.request.deadline_unix_ms
        if deadline and time.time() * 1000 > deadline:
            raise Final(
                "deadline_passed", "the job's deadline passed before the point of no return: the source goes on"
            )

    def phase(self, phase: pb.Phase.ValueType) -> None:
        self.report.phase = phase

    @property
    def streams(self) -> int:
        return len(self.fds)

    def leave_out_ended(self) -> None:
        """Connections that ended while no agent watched have nothing to be held; the pod sees their end by itself."""
        alive = tcp.connected(self.fds)
        for fd, is_alive in zip(self.fds, alive, strict=True):
            if not is_alive:
                os.close(fd)
        self.fds = [fd for fd, is_alive in zip(self.fds, alive, strict=True) if is_alive]

    def live_pod(self) -> tuple[Attached, HandoffClient]:
        if self.at is None or self.handoff is None:
            raise Final("job_state", "the job has no pod yet")
        return self.at, self.handoff

    def close(self) -> None:
        self._close_fds()
        owners = (self.handoff, self.pool, self.at) if self.parent is None else (self.handoff,)
        for owner in owners:
            if owner is not None:
                owner.close()
        self.handoff = self.pool = self.at = None

    def _close_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def gone(self) -> bool:
        return bool(self.peer_gone) or (self.parent is not None and self.parent.gone())

    async def insist(self, request: pb.PeerRequest) -> pb.PeerReply | None:
        assert self.peer is not None
        step = {"commit": "COMMIT", "discard": "SEND"}[str(request.WhichOneof("body"))]
        return await self.peer.insist(request, self.gone, lambda why: self.note(step, "retry", why))


def waits(job: SourceJob) -> bool:
    return not job.steers


def steers(job: SourceJob) -> bool:
    return job.steers


def count_broken(report: pb.JobReport, step: str, broken: Sequence[str], note: Callable[[str, str, str], None]) -> None:
    """Streams that could not be made live are lost, and the job's status says why."""
    report.streams.lost += len(broken)
    for why in sorted(set(broken)):
        note(step, "stream lost", why)
