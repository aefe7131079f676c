"""State of a job's streams as it travels from one pod to another.

u32 (little-endian): bytes of a JSON list; the list, one object a stream; then, end to end, the unsent bytes and the
handler's state of each stream. `state` in an object is the length of that state in bytes, -1 where there is none.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from midstream_runtime.contract.errors import Final
from midstream_runtime.handoff.connection import Connection

_LENGTH = struct.Struct("<I")


def pack(streams: list[tuple[Connection, bytes | None]]) -> bytes:
    """Of connections, and the state of their handlers, if they have one."""
    heads, bodies = [], []
    for connection, state in streams:
        heads.append({**connection.save(), "state": -1 if state is None else len(state)})
        bodies += [connection.unsent(), state or b""]
    text = json.dumps(heads, separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *bodies])


def unpack(payload: bytes, wanted: int) -> list[tuple[dict[str, Any], bytes, bytes | None]]:
    """For each stream its object, unsent bytes, and handler's state. Final: not the state of `wanted` streams."""
    (length,) = _LENGTH.unpack_from(payload)
    heads = json.loads(payload[_LENGTH.size : _LENGTH.size + length])
    if len(heads) != wanted:
        raise Final("stage_count", f"state of {len(heads)} streams for {wanted} sockets")
    at = _LENGTH.size + length
    found: list[tuple[dict[str, Any], bytes, bytes | None]] = []
    for head in heads:
        unsent, size = int(head["unsent"]), int(head["state"])
        if unsent < 0 or at + unsent + max(size, 0) > len(payload):
            raise Final("handoff_protocol", "the streams' state is shorter than it says")
        body = payload[at + unsent : at + unsent + size] if size >= 0 else None
        found.append((head, payload[at : at + unsent], body))
        at += unsent + max(size, 0)
    return found
