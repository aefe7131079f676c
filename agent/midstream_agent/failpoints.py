"""Named places at which a test can make the agent die, fail, hang or wait.

Every step of the saga passes `point("<side>.<STEP>.<do|undo>.<before|after>")`. The environment arms them:

    MIDSTREAM_FAILPOINTS="source.EXPORT.do.before=kill,target.RESTORE.do.after=error"

Actions: `kill` (SIGKILL to this process), `error` (a retryable failure), `hang` (wait until cancelled),
`delay:<ms>`, `wait` (until the agent is armed again; then the same failpoint is passed anew, so that it can
be armed with what shall come of it). A failpoint fires once, unless its action ends in `*`. Before it acts it appends
its name to the file $MIDSTREAM_FAILPOINT_LOG, so that a test can assert where it killed. Nothing is armed by default.

A running agent can be armed too: where $MIDSTREAM_FAILPOINT_FILE is set, each failpoint takes up what that file says
and removes it.
"""

from __future__ import annotations

import asyncio
import os
import signal

from midstream_runtime.contract.errors import Retryable

WAIT_POLL_S = 0.005
_armed: dict[str, str] = {}


def arm(spec: str) -> None:
    """Arm failpoints from a comma-separated list of name=action."""
    for item in filter(None, (part.strip() for part in spec.split(","))):
        name, _, action = item.partition("=")
        if action.rstrip("*").split(":")[0] not in ("kill", "error", "hang", "wait", "delay"):
            raise ValueError(f"failpoint {item!r}: the action must be kill, error, hang, wait or delay:<ms>")
        _armed[name] = action


def names() -> list[str]:
    return sorted(_armed)


async def point(name: str) -> None:
    """Act on the failpoint `name` if it is armed."""
    _take_up_file()
    action = _armed.get(name)
    if action is None:
        return
    if not action.endswith("*"):
        del _armed[name]
    _log(name)
    kind, _, value = action.rstrip("*").partition(":")
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "error":
        raise Retryable("failpoint", f"failpoint {name} made this step fail")
    if kind == "hang":
        await asyncio.Event().wait()
    if kind == "wait":
        while not _take_up_file():  # noqa: ASYNC110 - a test's file, which no event announces
            await asyncio.sleep(WAIT_POLL_S)
        return await point(name)
    await asyncio.sleep(float(value) / 1000)


def _take_up_file() -> bool:
    path = os.environ.get("MIDSTREAM_FAILPOINT_FILE")
    if not path or not os.path.exists(path):
        return False
    with open(path, encoding="ascii") as f:
        arm(f.read())
    os.unlink(path)
    return True


def _log(name: str) -> None:
    path = os.environ.get("MIDSTREAM_FAILPOINT_LOG")
    if path:
        with open(path, "a", encoding="ascii") as log:
            log.write(name + "\n")
            log.flush()
            os.fsync(log.fileno())


arm(os.environ.get("MIDSTREAM_FAILPOINTS", ""))
