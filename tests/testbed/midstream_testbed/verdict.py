"""What a demo's clients and the client host's capture say about a migration, as numbers.

Pure functions over what was recorded, so that they can be shown to notice a lost token, a reset, a stall.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from midstream_testbed.pcap import Packet

EVENT = b"data: "


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed completion as a client has it: the text of each event, and whether it ended as it should."""

    pieces: list[str] = field(default_factory=list)
    done: bool = False
    finish_reason: str = ""

    @classmethod
    def parse(cls, raw: str) -> Answer:
        """From the bytes of a (perhaps unfinished) SSE body; an event that is not complete is not counted."""
        pieces, done, reason = [], False, ""
        for block in raw.split("\n\n")[:-1]:
            body = block.removeprefix(EVENT.decode())
            if body == "[DONE]":
                done = True
                continue
            for choice in json.loads(body).get("choices", []):
                if choice.get("text"):
                    pieces.append(choice["text"])
                reason = choice.get("finish_reason") or reason
        return cls(pieces, done, reason)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def identical_to(self, other: Answer) -> bool:
        return self.done and self.pieces == other.pieces and self.finish_reason == other.finish_reason


def lost_and_doubled(got: Sequence[str], wanted: Sequence[str]) -> tuple[int, int]:
    """Tokens of `wanted` that did not come, and tokens that came and do not belong there: the fewest that explain
    the difference."""
    first = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted)))
    got, wanted = got[first:], wanted[first:]
    common = _longest_common(got, wanted)
    return len(wanted) - common, len(got) - common


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for i, y in enumerate(b, 1):
            before, row[i] = row[i], before + 1 if x == y else max(row[i], row[i - 1])
    return row[-1]


@dataclass(slots=True)
class Flow:
    """One connection's packets from the server, as the client host's capture saw them."""

    times: list[float] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    """Events that began before each of `times`, so that a moment can be found in the text."""
    seen_events: int = 0
    fin_at: float = 0.0
    data_after_fin: bool = False
    next_seq: int | None = None

    def add(self, packet: Packet) -> None:
        at = packet.ts_ns / 1e9
        if packet.length:
            if (
                self.next_seq is not None
                and not 0 < (packet.seq + packet.length - self.next_seq) & 0xFFFFFFFF < 1 << 31
            ):
                return  # a retransmission: the client has these bytes
            self.next_seq = (packet.seq + packet.length) & 0xFFFFFFFF
            self.data_after_fin |= bool(self.fin_at)
            self.times.append(at)
            self.events.append(self.seen_events)
            self.seen_events += packet.payload.count(EVENT)
        if packet.fin and not self.fin_at:
            self.fin_at = at

    def stall(self, began: float, ended: float) -> tuple[float, int] | None:
        """Longest gap between payload packets that overlaps [began, ended], minus the median gap, in ms; and the
        number of events before the packet that ended it."""
        gaps = [(b - a, i + 1) for i, (a, b) in enumerate(pairwise(self.times))]
        around = [(gap, i) for gap, i in gaps if self.times[i] >= began and self.times[i - 1] <= ended]
        if len(gaps) < 10 or not around:
            return None
        longest, at = max(around)
        return (longest - statistics.median(g for g, _ in gaps)) * 1000, self.events[at]


@dataclass(slots=True)
class Network:
    """What the capture saw of all flows of one server address and port."""

    flows: dict[tuple[str, int], Flow] = field(default_factory=dict)
    rst_seen: int = 0

    @classmethod
    def read(cls, packets: Iterable[Packet], address: str, port: int) -> Network:
        seen = cls()
        for p in packets:
            if (p.src, p.sport) == (address, port):
                seen.flows.setdefault((p.dst, p.dport), Flow()).add(p)
                seen.rst_seen += p.rst
            elif (p.dst, p.dport) == (address, port):
                seen.rst_seen += p.rst
        return seen

    @property
    def fin_unexpected(self) -> int:
        """Flows that were finished before their last byte."""
        return sum(f.data_after_fin for f in self.flows.values())


def summary_ms(values: Iterable[float]) -> dict[str, float]:
    """p50, p99 and max; -1 when there is nothing to say."""
    ordered = sorted(values)
    if not ordered:
        return {"p50": -1.0, "p99": -1.0, "max": -1.0}
    at = {"p50": len(ordered) // 2, "p99": min(len(ordered) - 1, int(0.99 * len(ordered))), "max": len(ordered) - 1}
    return {name: round(ordered[i], 2) for name, i in at.items()}


def nothing_lost(result: dict[str, Any]) -> bool:
    """The demo's verdict over its own figures."""
    harm = ("tokens_lost", "tokens_doubled", "rst_seen", "fin_unexpected", "packets_missed_by_capture")
    return bool(
        not any(result[name] for name in harm)
        and result["identical_to_unmigrated"]
        and result["tokens"] == result["tokens_expected"]
        and result["uploads_answered"] == result["uploads"]
        and result["migrated_streams"] == result["streams"] + result["uploads"]
        and result["source_deleted_at_share"] < 2 / 3
        and ("notice" not in result or (result["notice"]["left_at_release_s"] > 0 and result["notice"]["jobs"] == 1))
    )
