"""A rebalance recommendation's job until it is told to go: what can be made ready and costs nobody anything.

    its target      is looked at again and again; another one is found when it goes
    KV              is copied ahead by the source's agent, now and then (handling.warm_s): cache at the target, kept by
                    nobody, so that no restart and no change of mind leaves anything behind
    streams         stay where they are, and so do the job's turn and the limits: those that stand by do not count

It goes when its node is interrupted, which also says until when, or by a person's annotation.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from midstream_operator.errors import Final, OperatorError
from midstream_operator.model import ANNOTATION_COMMIT, KvMode
from midstream_operator.plan_text import size
from midstream_operator.tasks import Tasks

if TYPE_CHECKING:
    from midstream_operator.run import Run

log = logging.getLogger(__name__)
_GO = f"moves when annotated {ANNOTATION_COMMIT}=true, or when the node is interrupted"


async def until_told(run: Run) -> None:
    """Returns with a target that is still good, and a plan that knows the deadline. A job that had been told when this
    process began may be at its agent already: nothing of it is changed."""
    if run.told:
        return
    run.jobs.stands_by(run, True)
    tasks = Tasks()
    run.say(f"prepared; {_GO}")
    await run.write()
    tasks.start(f"KV of {run.name} ahead", _copy_ahead(run))
    try:
        while not await _ready(run):
            await run.pause(run.ctx.settings.timeouts.resync_s)
    finally:
        await tasks.stop()
        run.jobs.stands_by(run, False)
    source = run.ctx.view.pods.get(run.source_uid)
    if source is not None:
        await run.reckon(source, run.target_pod())
        await run.write()


async def _ready(run: Run) -> bool:
    """Whether it was told; its target can take over, then as before."""
    source = run.ctx.view.pods.get(run.source_uid)
    if source is None:
        raise Final("unknown_pod", f"{run.spec.pod} has gone while its job was prepared: nothing is left to move")
    if why := run.jobs.unfit(run, source):
        log.warning("job %s: %s %s: another target is needed", run.name, run.target_pod().name, why)
        await run.aim(source)
        run.jobs.stands_by(run, True)
        run.say(f"prepared anew; {_GO}")
        await run.write()
    return run.told


async def _copy_ahead(run: Run) -> None:
    """Until cancelled. KV is a cache: what keeps it from going ahead is said, and keeps nothing else."""
    pause_s = run.ctx.settings.handling.warm_s
    while pause_s and run.spec.kv_mode is not KvMode.REPLAY:
        to = run.target_node
        try:
            reply = await run.ctx.agents.warm(run.source_node, run.warm_request())
            why = f", not all: {reply.kv.reason}" if reply.kv.reason else ""
            there = size(reply.kv.bytes_sent + reply.kv.bytes_shared)
            run.say(f"prepared, with {there} of KV of {reply.streams} streams at {to}{why}; {_GO}")
        except OperatorError as e:
            run.say(f"prepared, without KV ahead ({e.code}: {e.message}); {_GO}")
        await asyncio.sleep(pause_s)
