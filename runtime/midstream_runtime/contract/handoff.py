"""Frames of the handoff (interim)."""
from __future__ import annotations
import json, struct
from typing import Any
VERSION, MIN_VERSION, MAX_FDS_PER_FRAME = 1, 1, 253
_H = struct.Struct("<II")
def encode(header: dict[str, Any], payload: bytes = b"") -> bytes:
    h = json.dumps(header).encode()
    return _H.pack(len(h), len(payload)) + h + payload
def missing(buf: bytearray) -> int:
    if len(buf) < 8: return 8 - len(buf)
    a, b = _H.unpack_from(buf)
    return max(0, 8 + a + b - len(buf))
def decode(buf: bytearray) -> tuple[dict[str, Any], bytes, int]:
    a, b = _H.unpack_from(buf)
    return json.loads(buf[8:8 + a]), bytes(buf[8 + a:8 + a + b]), 8 + a + b
