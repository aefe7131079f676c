"""Frames between gateway and engine: the handoff's framing, for both ends of the engine's socket.

    u32 header length | u32 payload length | header, a JSON object with "kind" and "id" | payload

Little-endian. The engine's end is polled between two layers of a step, the gateway's end by its event loop:
so this is a parser that is fed bytes and a function that makes them, and neither waits for anything."""

from __future__ import annotations

import json
import struct
from typing import Any

from midstream_runtime.contract.errors import Final

MAX_HEADER_BYTES = 8 << 20
MAX_PAYLOAD_BYTES = 256 << 20

_PREFIX = struct.Struct("<II")
_encode_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode

Frame = tuple[dict[str, Any], bytes]


def encode_json(value: Any) -> bytes:
    return _encode_json(value).encode("utf-8", errors="surrogatepass")


def encode(header: dict[str, Any], payload: bytes = b"") -> bytes:
    text = encode_json(header)
    if len(text) > MAX_HEADER_BYTES or len(payload) > MAX_PAYLOAD_BYTES:
        raise Final(
            "frame_too_large", f"{header.get('kind')}: {len(text)} + {len(payload)} bytes do not fit a frame"
        )
    return _PREFIX.pack(len(text), len(payload)) + text + payload


class FrameParser:
    """Bytes in, frames out. A frame that breaks the rules raises Final: the connection is then of no use."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        self._buffer += data
        frames: list[Frame] = []
        at = 0
        while (frame := self._next(at)) is not None:
            header, payload, at = frame
            frames.append((header, payload))
        del self._buffer[:at]
        return frames

    def _next(self, at: int) -> tuple[dict[str, Any], bytes, int] | None:
        if len(self._buffer) - at < _PREFIX.size:
            return None
        header_bytes, payload_bytes = _PREFIX.unpack_from(self._buffer, at)
        if header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
            raise Final("bad_frame", "a peer on the engine's socket sent a frame beyond the limits")
        start = at + _PREFIX.size
        middle, end = start + header_bytes, start + header_bytes + payload_bytes
        if len(self._buffer) < end:
            return None
        try:
            header = json.loads(self._buffer[start:middle])
        except ValueError as error:
            raise Final("bad_frame", "a peer on the engine's socket sent a header that is no JSON") from error
        if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
            raise Final("bad_frame", "a peer on the engine's socket sent a header without a kind")
        return header, bytes(self._buffer[middle:end]), end
