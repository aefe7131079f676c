"""The whole migration on one screen: which step follows which, what it does and how it is undone.

What the steps mean is said in saga.py, what they do in source_*.py and batches.py, whom they ask in target.py.
"""

from __future__ import annotations

from midstream_agent import batches
from midstream_agent.saga import Step
from midstream_agent.source import SourceJob, steers, waits
from midstream_agent.source_commit import (
    commit,
    follow_address,
    move_address,
    release,
    send,
    unmove_address,
    unsend,
)
from midstream_agent.source_freeze import export, hold, pause, thaw, unhold, unpause
from midstream_agent.source_prepare import connect, disconnect, prepare, unprepare

STEPS: tuple[Step[SourceJob], ...] = (
    Step("CONNECT", connect, disconnect),
    Step("PREPARE", prepare, unprepare),
    Step("PAUSE", pause, unpause),
    Step("HOLD", hold, unhold),
    Step("EXPORT", export, thaw),
    Step("SEND", send, unsend),
    Step("MOVE_ADDRESS", move_address, unmove_address, when=waits),
    Step("COMMIT", commit, None),
    Step("BATCHES", batches.move_rest, None, when=steers),
    Step("FOLLOW", follow_address, None, when=steers),
    Step("RELEASE", release, None),
)

BATCH_STEPS: tuple[Step[SourceJob], ...] = (
    Step("OPEN", batches.open_batch, batches.close_batch),
    Step("PAUSE", pause, unpause),
    Step("HOLD", hold, unhold),
    Step("EXPORT", export, thaw),
    Step("SEND", send, unsend),
    Step("COMMIT", commit, None),
    Step("LET_GO", batches.finish_batch, None),
)
