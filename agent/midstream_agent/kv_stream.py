"""The protocol of the KV streams between two agents: what both ends say, and how a stream begins.

A job has several TCP streams, all opened by the source, inside TLS with the agents' certificates (`Kv.tls`). The
target's ticket, 32 random bytes that the peer session carried, ties each of them to its job; it never crosses a KV
stream itself, so that a stream without TLS gives it to nobody.

    target -> source   MAGIC, u16 version, nonce (32)
    source -> target   MAGIC, u16 version, u16 bytes of the job id, nonce (32), proof (32), job id
    target -> source   proof (32)                                             or the connection ends
    source -> target   any number of frames
    target -> source   an ANSWER for each block or question, in any order: u32 id, u8 verdict

    frame              u8 kind, u32 id, u32 bytes, hash (32), checksum (16), then `bytes` of body; little-endian
      BLOCK            one KV block. The target takes a slot of its reservation for it and answers LANDED once the
                       checksum is right, DAMAGED when it is not, NO_ROOM when it cannot be kept. `hash` is zero for a
                       block that is not full
      OFFER            body: (u32 id, hash) for each block; HAVE or WANT for each
      SETTLE           what has landed may be found in the target's pool from now on; SETTLED
      END              no more comes, by any stream: what was reserved for more is free again; no answer

An id names a block of one job and is never used for another. A block may come again after a stream broke: what has
landed is not written again. A stream has no end mark; either side closes it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import ssl
import struct
import threading
from enum import IntEnum

from midstream_runtime.contract.errors import Final, Retryable

MAGIC, VERSION = b"MSKV", 1
NONCE_BYTES = PROOF_BYTES = TICKET_BYTES = 32
GREETING = struct.Struct("<4sH32s")
HELLO = struct.Struct("<4sHH32s32s")
FRAME = struct.Struct("<BII32s16s")
ANSWER = struct.Struct("<IB")
OFFERED = struct.Struct("<I32s")
NO_HASH = bytes(32)
MAX_JOB_ID_BYTES = 253
MAX_OFFER_BYTES = OFFERED.size << 16
_TIMEVAL = struct.Struct("@ll")


class Kind(IntEnum):
    BLOCK = 1
    OFFER = 2
    SETTLE = 3
    END = 4


class Verdict(IntEnum):
    LANDED = 1
    DAMAGED = 2
    NO_ROOM = 3
    HAVE = 4
    WANT = 5
    SETTLED = 6


class Closed(ConnectionError):
    """The other side ended the stream."""


def proof(ticket: bytes, who: bytes, nonce: bytes, job_id: bytes) -> bytes:
    """Shows the ticket's owner without the ticket; `who` keeps one side's proof from being the other's."""
    return hmac.new(ticket, b"\0".join((who, nonce, job_id)), hashlib.sha256).digest()


def recv_exactly(sock: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    recv_into_exactly(sock, memoryview(data))
    return bytes(data)


def recv_into_exactly(sock: socket.socket, view: memoryview) -> None:
    """Closed when the stream ends before `view` is full."""
    # A plain socket fills the view in one call, without waking this thread for each segment.
    flags = 0 if isinstance(sock, ssl.SSLSocket) else socket.MSG_WAITALL
    at = 0
    while at < len(view):
        count = sock.recv_into(view[at:], 0, flags)
        if count == 0:
            raise Closed("the other agent closed the KV stream")
        at += count


def greet_as_source(sock: socket.socket, job_id: str, ticket: bytes) -> None:
    """Final when the other side cannot be the job's target; OSError when the stream breaks."""
    magic, version, theirs = GREETING.unpack(recv_exactly(sock, GREETING.size))
    if magic != MAGIC or version != VERSION:
        raise Final("kv_protocol", f"the target speaks KV stream version {version}, this agent {VERSION}: upgrade one")
    ours, name = secrets.token_bytes(NONCE_BYTES), job_id.encode()
    sock.sendall(HELLO.pack(MAGIC, VERSION, len(name), ours, proof(ticket, b"source", theirs, name)) + name)
    try:
        answer = recv_exactly(sock, PROOF_BYTES)
    except Closed as e:
        raise Retryable("kv_refused", f"the target does not know job {job_id} or its ticket: no KV is sent") from e
    if not hmac.compare_digest(answer, proof(ticket, b"target", ours, name)):
        raise Final("kv_protocol", "whoever answers at the target's KV port has not the job's ticket: no KV is sent")


def hear_source(sock: socket.socket) -> tuple[str, bytes, bytes, bytes]:
    """Greet a stranger: job id, its proof, the nonce that was proved, and the nonce to prove in turn."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    sock.sendall(GREETING.pack(MAGIC, VERSION, nonce))
    magic, version, length, theirs, shown = HELLO.unpack(recv_exactly(sock, HELLO.size))
    if magic != MAGIC or version != VERSION or not 0 < length <= MAX_JOB_ID_BYTES:
        raise Final("kv_protocol", f"a KV stream begins with version {version}, this agent speaks {VERSION}")
    return recv_exactly(sock, length).decode(errors="replace"), shown, nonce, theirs


def step_back(nice: int) -> None:
    """This thread alone yields to whoever wants the CPU, and preempts nobody when it wakes, whatever policy the agent
    runs under (sched(7): on Linux both are of a thread)."""
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def block_with(sock: socket.socket, read_s: float, write_s: float) -> None:
    """Blocking calls that end after so many seconds without progress (0: never). Python's own timeouts would cost a
    poll a call, and are unknown to sendfile."""
    sock.settimeout(None)
    for option, seconds in ((socket.SO_RCVTIMEO, read_s), (socket.SO_SNDTIMEO, write_s)):
        whole = int(seconds)
        sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, int((seconds - whole) * 1e6)))
