"""The handoff: how a serving process and its node's agent exchange sockets and request state.

A unix stream socket in the pod carries frames in both directions. Each request of the agent has an id and gets one
reply; requests are answered in order.

    frame    u32 header_bytes, u32 payload_bytes (both little-endian), header (JSON object, UTF-8), payload
    request  header {kind, id, ...}
    reply    header {kind: as asked, id, ...}  or  {kind: "error", id, code, message, retryable}

File descriptors ride with a frame's first byte as SCM_RIGHTS; the header's `fds` says how many belong to the frame.
Linux takes at most 253 a message (SCM_MAX_FD), so a reply with more is several frames: all but the last have
`more: true`, and the payload is in the last.

| kind | fields | reply | what the pod does |
|---|---|---|---|
| hello | version, min_version, node | the same, pod_kind, model, pool, listeners, load; fd of the pool | nothing |
| prepare | job, addresses | | nothing is closed any more while bytes of it are queued |
| settle | job, addresses | accepted | accepts until the kernel has no more |
| streams | addresses | streams: id, local, remote, movable, reason, tokens, kv_bytes | nothing |
| kv | job, addresses, known (pairs of stream id, blocks) | streams (id, count); payload: BLOCKs | names full blocks \
(those not known) of streams that go on, some thousands at most; they stay until the job's next `kv`, or `kv_end` |
| pause | job, addresses, exclude, streams | streams, kv; payload: state; fds | freezes them at a token boundary |
| resume | job | | goes on as if nothing had happened; also ends `prepare` |
| release | job | | closes its copies and forgets the requests |
| blank | job, families (4 or 6) | fds: sockets, unbound | makes them; asked again it replaces them |
| reserve | job, slots | slots | hands KV slots to the agent |
| kv_reserve | job, slots | slots | hands the agent more KV slots |
| kv_have | job; payload: hashes | slots (-1: not here) | keeps these blocks until `kv_end` |
| kv_land | job, slots; payload: BLOCKs | | what the agent wrote there is whole: it can be found and shared |
| kv_end | job | | frees what `kv_reserve` gave and nobody took, and lets go of what the other three kept |
| stage | job, slots (-1: did not come), count; payload: state | | puts the streams on its blank sockets, silent |
| activate | job | | serves them |
| discard | job | | closes blanks, frees slots |
| fds | job | fds | the sockets of a paused or staged job again, for an agent that restarted |
| status | | connections, jobs | nothing |

`load` is null or {kv_free (share of the KV cache), running, waiting (requests)}, for whoever chooses a target.

The `kv` requests came with version 3; to an older pod the agent brings KV at the pause only. They belong to
the agent's connection and end with it. A BLOCK is u32 slot (0 in `kv_land`, whose header names them), 32 bytes of hash,
16 of checksum. In the reply to `pause`, `kv` is a list of {slot, bytes, checksum, hash}, hash empty for a block that
is not full.

`resume`, `release`, `activate`, `discard` and `kv_end` are idempotent: an agent that restarted asks again. Whatever
comes from a pod is hostile until checked: sizes are refused here before anything is allocated.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from midstream_runtime.contract.errors import Final

VERSION = 3
"""2: `pause` takes some of the streams, so that a pod's streams move in batches. 3: KV while streams go on."""
MIN_VERSION = 1
"""The oldest version that this side still understands."""

MAX_FDS_PER_FRAME = 253
MAX_HEADER_BYTES = 8 << 20
MAX_PAYLOAD_BYTES = 256 << 20
MAX_KV_BLOCKS = 2048
"""Named in one reply to `kv`: reading their entries takes the pod a few milliseconds."""
BLOCK = struct.Struct("<I32s16s")
KV_VERSION = 3
"""The first version with the `kv` requests."""
DEFAULT_PATH = "/run/midstream/handoff.sock"

_LENGTHS = struct.Struct("<II")


def encode(header: dict[str, Any], payload: bytes = b"") -> bytes:
    """One frame; Final("handoff_size") when it is larger than the other side would take."""
    text = json.dumps(header, separators=(",", ":")).encode()
    _check_sizes(len(text), len(payload))
    return _LENGTHS.pack(len(text), len(payload)) + text + payload


def missing(buffer: bytearray) -> int:
    """Bytes that the frame at the front of `buffer` still needs; 0 when it is whole."""
    if len(buffer) < _LENGTHS.size:
        return _LENGTHS.size - len(buffer)
    header_bytes: int
    payload_bytes: int
    header_bytes, payload_bytes = _LENGTHS.unpack_from(buffer)
    _check_sizes(header_bytes, payload_bytes)
    return max(0, _LENGTHS.size + header_bytes + payload_bytes - len(buffer))


def decode(buffer: bytearray) -> tuple[dict[str, Any], bytes, int]:
    """Header, payload and length of the whole frame at the front of `buffer`."""
    header_bytes, payload_bytes = _LENGTHS.unpack_from(buffer)
    start = _LENGTHS.size + header_bytes
    try:
        header = json.loads(buffer[_LENGTHS.size : start])
    except (ValueError, RecursionError) as e:
        raise Final("handoff_protocol", f"a frame's header is no JSON: {e}") from e
    if not isinstance(header, dict):
        raise Final("handoff_protocol", "a frame's header is no JSON object")
    return header, bytes(buffer[start : start + payload_bytes]), start + payload_bytes


def _check_sizes(header_bytes: int, payload_bytes: int) -> None:
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
        raise Final(
            "handoff_size",
            f"a frame of {header_bytes} + {payload_bytes} bytes exceeds {MAX_HEADER_BYTES} + {MAX_PAYLOAD_BYTES}",
        )
