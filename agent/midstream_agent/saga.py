"""The saga: a tuple of steps, each with `do` and `undo`, and the one loop that runs them.

    step          do (source_*.py)                                   undo
    CONNECT       pod, handoff, peer session                         close them
    PREPARE       hold attached, tunnel proved, SYNs silenced,       let SYNs in again
                  accept queue empty; target has blanks, the
                  address plumbed, and most of the KV
    PAUSE         gateway stops at a token boundary, hands fds over  gateway goes on
    HOLD          gate shut, hold absorbs in silence                 entries deleted
    EXPORT        checkpoint; the hold answers zero window           thaw
    SEND          last KV; journal SENT; checkpoint, state; restored target discards, confirmed
    MOVE_ADDRESS  (Wait) route off, target announces, path proved    address back, proved
    COMMIT        journal COMMIT; sent until ACTIVATED               -- never: roll forward
    BATCHES       (Steer) PAUSE .. COMMIT of all further streams     -- never; each batch by itself as above
    FOLLOW        (Steer) the address moves to the target, proved    -- never
    RELEASE       sockets closed in repair; conntrack, address gone  -- never

Before each `do` and `undo` its intent is journalled, and a named failpoint stands before and after each. A
failure before COMMIT undoes the failed step and all before it, in reverse; undo is idempotent and may find its
step half done. From COMMIT on a failure is retried until it passes: nobody decides any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import failpoints
from midstream_agent.journal import Journal


class Context(Protocol):
    """What the loop needs of a job."""

    side: str

    @property
    def journal(self) -> Journal: ...
    def note(self, step: str, what: str, message: str = "") -> None: ...
    def check_abort(self) -> None: ...


C = TypeVar("C", bound=Context)
log = logging.getLogger(__name__)


def _always(_: object) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Step(Generic[C]):
    """One step. `undo` None: there is no way back from here on. `when`: jobs that have this step."""

    name: str
    do: Callable[[C], Awaitable[None]]
    undo: Callable[[C], Awaitable[None]] | None
    when: Callable[[C], bool] = _always


@dataclass(slots=True)
class Timing:
    name: str
    start_ms: float
    took_ms: float
    outcome: str


@dataclass(slots=True)
class Clock:
    """Milliseconds since the job began, and what each step took."""

    began: float = field(default_factory=time.monotonic)
    steps: list[Timing] = field(default_factory=list)

    def fork(self) -> Clock:
        """The same time, with steps of its own."""
        return Clock(self.began)

    def now_ms(self) -> float:
        return (time.monotonic() - self.began) * 1000

    def record(self, name: str, start_ms: float, outcome: str) -> None:
        self.steps.append(Timing(name, start_ms, self.now_ms() - start_ms, outcome))


class Failed(Exception):
    """A step failed before the point of no return; everything was undone. `cause` says why."""

    def __init__(self, step: str, cause: MidstreamError) -> None:
        super().__init__(f"{step}: {cause}")
        self.step = step
        self.cause = cause


async def run(steps: tuple[Step[C], ...], ctx: C, clock: Clock) -> None:
    """Run all steps, or raise Failed after having undone those that were begun."""
    for i, step in enumerate(steps):
        if not step.when(ctx):
            continue
        if step.undo is None:
            await _forward(step, ctx, clock)
            continue
        try:
            ctx.check_abort()
            await _act(step, "do", step.do, ctx, clock)
        except Exception as e:
            # also what nobody foresaw must be undone: clients would stay held otherwise
            cause = _named(e)
            ctx.note(step.name, "failed", str(cause))
            await roll_back(steps[: i + 1], ctx, clock)
            raise Failed(step.name, cause) from e


def _named(e: Exception) -> MidstreamError:
    if isinstance(e, MidstreamError):
        return e
    log.error("unforeseen failure", exc_info=e)
    return Final("os_error" if isinstance(e, OSError) else "internal", f"{type(e).__name__}: {e}")


async def roll_back(steps: tuple[Step[C], ...], ctx: C, clock: Clock) -> None:
    """Undo in reverse, each until it passes: a half-undone job would keep clients held."""
    ctx.journal.decide("ABORT")
    for step in reversed(steps):
        if step.undo is None or not step.when(ctx):
            continue
        try:
            await _until_done(step, "undo", step.undo, ctx, clock)
        except Exception as e:
            # the other undos matter as much: clients wait behind each of them
            log.exception("undo of %s failed", step.name)
            ctx.note(step.name, "undo failed", str(e))


async def roll_forward(steps: tuple[Step[C], ...], ctx: C, clock: Clock) -> None:
    """The steps from the point of no return on, after a restart of the agent."""
    for step in steps:
        if step.undo is None and step.when(ctx):
            await _forward(step, ctx, clock)


async def _forward(step: Step[C], ctx: C, clock: Clock) -> None:
    await _until_done(step, "do", step.do, ctx, clock)


async def _until_done(
    step: Step[C], action: str, call: Callable[[C], Awaitable[None]], ctx: C, clock: Clock, pause_s: float = 0.1
) -> None:
    while True:
        try:
            return await _act(step, action, call, ctx, clock)
        except (Retryable, OSError) as e:
            ctx.note(step.name, "retry", f"{action}: {e}")
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 2.0)


async def _act(step: Step[C], action: str, call: Callable[[C], Awaitable[None]], ctx: C, clock: Clock) -> None:
    where = f"{ctx.side}.{step.name}.{action}"
    start_ms = clock.now_ms()
    ctx.journal.intent(step.name, action)
    ctx.note(step.name, "begin" if action == "do" else "undo")
    try:
        await failpoints.point(f"{where}.before")
        await call(ctx)
        await failpoints.point(f"{where}.after")
    except BaseException:
        clock.record(step.name, start_ms, "failed")
        raise
    ctx.journal.done(step.name, action)
    clock.record(step.name, start_ms, "done" if action == "do" else "undone")
    ctx.note(step.name, "done" if action == "do" else "undone")
