"""ACTIVATE: held flows become live, at the target or, by a thaw, at the source again. The order decides between half a
millisecond and seconds (docs/architecture.md, Activation)."""

from __future__ import annotations

import logging
import struct
from typing import Any

from midstream_agent import tcp
from midstream_agent.hold import FLOW_HERE
from midstream_agent.hold_layout import NOTE, NOTE_DATA, NOTE_FIN, NOTE_RST, NOTE_RST_SEEN, NOTE_SEG, NOTE_TS
from midstream_agent.node import Node

log = logging.getLogger(__name__)


NOTE_PAYLOAD = NOTE_DATA | NOTE_FIN


def bring_up(
    node: Node, batch: tcp.Batch, fds: list[int], keys: bytes, notes: bytes, *, thaw: bool, here: bool = False
) -> list[str]:
    """Make held flows live: places in the streams first, then the gate, the clients' kept segments, then the rest.
    Returns what failed, for each flow that is lost with it. `here`: their address is still on its way, so an entry
    must say that they live on this node.

    The gate opens only when no socket is in repair any more: a restored one would take a client's packet like any
    other, acknowledge it with a timestamp of this host's own clock, and lose its bytes when it is seated again.
    """
    count = len(fds)
    begin, finish = (batch.thaw_begin, batch.thaw_finish) if thaw else (batch.activate_begin, batch.activate_finish)
    problems = [begin(fds, notes)]
    if here:
        node.set_state(keys, FLOW_HERE)
    else:
        node.hold.delete_flows(keys, count)
    notes = with_late_payloads(notes, node.hold.read_notes(keys, count))
    node.injector.play(batch.client_packets(notes, tcp.PRIME))
    node.injector.play(batch.client_packets(notes, tcp.PLAY))
    problems.append(finish(fds, notes))
    broken = {i: tcp.strerror(error) for errors in reversed(problems) for i, error in enumerate(errors) if error}
    for i, why in broken.items():
        log.error("flow %d of the batch: %s", i, why)
    return [why for _, why in sorted(broken.items())]


def with_late_payloads(notes: bytes, late: bytes) -> bytes:
    """Add what clients sent while their sockets were being seated; acks and windows stay those of the seats."""
    merged = bytearray(notes)
    for at in range(0, len(late), NOTE.size):
        came, have = (struct.unpack_from("=I", x, at + 4)[0] for x in (late, notes))
        if came & NOTE_PAYLOAD and not have & (NOTE_PAYLOAD | NOTE_RST | NOTE_RST_SEEN):
            ours, theirs = list(NOTE.unpack_from(notes, at)), NOTE.unpack_from(late, at)
            ours[1] |= came & NOTE_PAYLOAD
            ours[7:9], ours[12] = theirs[7:9], theirs[12]  # data_seq, data_len, data
            NOTE.pack_into(merged, at, *ours)
    return bytes(merged)


def merge_notes(ours: bytes, theirs: bytes, count: int) -> bytes:
    """For each flow what both nodes heard, `theirs` later: the newest segment, the payload of either, any RST.

    A flow's packets reach the source's hold first and the target's once the address has moved. What the client sends
    there may be newer and carry no payload that continues the stream; the payload kept at the source still does.
    """
    size = tcp.NOTE_BYTES
    if len(ours) != count * size:
        ours = bytes(count * size)
    return b"".join(_merge_note(ours[at : at + size], theirs[at : at + size]) for at in range(0, count * size, size))


def _merge_note(ours: bytes, theirs: bytes) -> bytes:
    a, b = NOTE.unpack(ours), NOTE.unpack(theirs)
    segment = b if b[1] & NOTE_SEG and not (a[1] & NOTE_SEG and _before(b[3], a[3])) else a
    payload = b if _has_more(b, a) else a
    reset = b if b[1] & (NOTE_RST | NOTE_RST_SEEN) else a
    flags = segment[1] & (NOTE_SEG | NOTE_TS) | payload[1] & NOTE_PAYLOAD | (a[1] | b[1]) & (NOTE_RST | NOTE_RST_SEEN)
    absorbed, answered = (a[i] + b[i] & 0xFFFFFFFF for i in (9, 10))
    return NOTE.pack(b[0], flags, *segment[2:7], *payload[7:9], absorbed, answered, reset[11], payload[12])


def _has_more(b: tuple[Any, ...], a: tuple[Any, ...]) -> bool:
    """Take b's payload? It begins where the stream goes on; a's may be a guess (see midstream_maps.h)."""
    if not b[1] & NOTE_PAYLOAD:
        return False
    if not a[1] & NOTE_PAYLOAD or _before(b[7], a[7]):
        return True
    ends = [n[7] + n[8] + bool(n[1] & NOTE_FIN) for n in (a, b)]
    return _before(ends[0], ends[1])


def _before(a: int, b: int) -> bool:
    """Sequence numbers compare by signed distance."""
    return (a - b) & 0xFFFFFFFF >= 0x80000000
