"""The demo's verdict notices what it is there to notice."""

from __future__ import annotations

import json
from typing import Any

import pytest
from midstream_testbed import report
from midstream_testbed.pcap import ACK, FIN, RST, Packet
from midstream_testbed.verdict import Answer, Network, lost_and_doubled, nothing_lost, summary_ms

SERVER, CLIENT = ("10.77.0.100", 8000), ("198.18.0.10", 40000)


def packet(at_ms: float, payload: bytes = b"", seq: int = 0, flags: int = ACK, to_server: bool = False) -> Packet:
    (src, sport), (dst, dport) = (CLIENT, SERVER) if to_server else (SERVER, CLIENT)
    return Packet(
        ts_ns=int(at_ms * 1e6), version=4, src=src, sport=sport, dst=dst, dport=dport, flags=flags, seq=seq, ack=0,
        win=0, length=len(payload), payload=payload, tsval=None, tsecr=None, mss=None, frame_length=0,
    )  # fmt: skip


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": text, "finish_reason": None}]}).encode() + b"\n\n"


def stream(gaps_ms: list[float]) -> list[Packet]:
    at, seq, found = 0.0, 4_294_967_200, []  # the sequence numbers wrap
    for i, gap in enumerate([0.0, *gaps_ms]):
        at += gap
        data = event(f"t{i}")
        found.append(packet(at, data, seq & 0xFFFFFFFF))
        seq += len(data)
    return found


def good() -> dict[str, Any]:
    return {
        "streams": 2, "uploads": 1, "uploads_answered": 1, "migrated_streams": 3,
        "tokens": 10, "tokens_expected": 10, "tokens_lost": 0,
        "tokens_doubled": 0, "identical_to_unmigrated": True, "rst_seen": 0, "fin_unexpected": 0,
        "packets_missed_by_capture": 0, "source_deleted_at_share": 0.5,
    }  # fmt: skip


def test_a_clean_run_is_a_success() -> None:
    assert nothing_lost(good())
    assert report.why_failed(good()) == []


@pytest.mark.parametrize(
    "harm",
    [
        {"tokens_lost": 1},
        {"tokens_doubled": 1},
        {"rst_seen": 1},
        {"fin_unexpected": 1},
        {"packets_missed_by_capture": 1},
        {"identical_to_unmigrated": False},
        {"tokens": 9},
        {"migrated_streams": 2},
        {"uploads_answered": 0},
        {"source_deleted_at_share": 0.7},
    ],
    ids=lambda harm: next(iter(harm)),
)
def test_each_harm_fails_the_demo_and_is_named(harm: dict[str, Any]) -> None:
    result = {**good(), **harm}
    assert not nothing_lost(result)
    assert len(report.why_failed(result)) == 1


def test_lost_and_doubled_tokens_are_counted() -> None:
    wanted = [f"w{i % 50}" for i in range(200)]
    assert lost_and_doubled(wanted, wanted) == (0, 0)
    assert lost_and_doubled(wanted[:90] + wanted[93:], wanted) == (3, 0)
    assert lost_and_doubled(wanted[:90] + wanted[88:], wanted) == (0, 2)
    assert lost_and_doubled(wanted[:150], wanted) == (50, 0)


def test_an_unfinished_event_is_not_a_token() -> None:
    whole = event("one") + event("two")
    assert Answer.parse(whole.decode()).pieces == ["one", "two"]
    assert Answer.parse(whole[:-3].decode()).pieces == ["one"]
    assert not Answer.parse(whole.decode()).done
    assert Answer.parse(whole.decode() + "data: [DONE]\n\n").done


def test_the_stall_is_the_longest_gap_around_the_migration() -> None:
    gaps = [4.0] * 100
    gaps[20], gaps[60] = 50.0, 30.0
    flow = next(iter(Network.read(stream(gaps), *SERVER).flows.values()))
    stall = flow.stall(began=flow.times[55], ended=flow.times[70])
    assert stall is not None
    assert stall[0] == pytest.approx(26.0)
    assert stall[1] == 61  # t0..t60 had come before it


def test_a_stall_that_spans_the_whole_migration_is_seen() -> None:
    gaps = [4.0] * 100
    gaps[60] = 500.0
    flow = next(iter(Network.read(stream(gaps), *SERVER).flows.values()))
    stall = flow.stall(began=flow.times[60] + 0.1, ended=flow.times[60] + 0.2)
    assert stall is not None
    assert stall[0] == pytest.approx(496.0)


def test_a_retransmission_does_not_hide_a_stall() -> None:
    packets = stream([4.0] * 40 + [400.0] + [4.0] * 40)
    again = packets[40]
    packets.insert(41, packet(again.ts_ns / 1e6 + 200, again.payload, again.seq))
    flow = next(iter(Network.read(packets, *SERVER).flows.values()))
    stall = flow.stall(began=0, ended=1000)
    assert stall is not None
    assert stall[0] == pytest.approx(396.0)


def test_resets_of_either_side_and_early_fins_are_seen() -> None:
    packets = stream([4.0] * 20)
    assert Network.read(packets, *SERVER).rst_seen == 0
    assert Network.read([*packets, packet(99, flags=RST)], *SERVER).rst_seen == 1
    assert Network.read([*packets, packet(99, flags=RST, to_server=True)], *SERVER).rst_seen == 1
    end = packets[-1].end
    assert Network.read([*packets, packet(99, seq=end, flags=FIN | ACK)], *SERVER).fin_unexpected == 0
    early = [*packets, packet(99, seq=end, flags=FIN | ACK), packet(100, b"x", end)]
    assert Network.read(early, *SERVER).fin_unexpected == 1


def test_a_summary_of_nothing_says_so() -> None:
    assert summary_ms([]) == {"p50": -1.0, "p99": -1.0, "max": -1.0}
    assert summary_ms(range(1, 201)) == {"p50": 101, "p99": 199, "max": 200}


def test_the_report_marks_the_switch_and_names_a_failure() -> None:
    result = {
        **good(), "steps": [{"name": "PAUSE", "startMs": 1.0, "tookMs": 2.0}], "source_host": "node-a",
        "target_host": "node-b", "stall_ms": summary_ms([1.5]), "switchover": "WAIT", "move_seconds": 0.0,
        "checkpoint_us": 12.0, "restore_us": 17.0, "checkpoint_bytes": 800, "kv_bytes": 4096, "kv_tokens_used": 7,
        "target_prefill_tokens": 0, "ok": True,
    }  # fmt: skip
    text = report.render(result, "before the switch and after it", 17, colour=False)
    assert text.index("before the switch") < text.index("node-a -> node-b") < text.index("and after it")
    assert "IDENTICAL" in text
    failed = report.render({**result, "ok": False, "rst_seen": 3}, "x", None, colour=False)
    assert "FAILED: 3 resets" in failed
