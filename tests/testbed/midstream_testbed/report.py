"""The demo's report as people read it: what happened when, the text with the moment of the switch, the figures."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import Any

WIDTH = 92
MEANING = {
    "CONNECT": "pod found, session with the other agent",
    "PREPARE": "blank sockets, address and KV slots at the target",
    "PAUSE": "gateway stops between two tokens, hands its sockets over",
    "HOLD": "BPF: nothing leaves, the client is answered for",
    "EXPORT": "TCP_REPAIR: both queues and all options",
    "SEND": "checkpoint, request state, KV; restored over there",
    "MOVE_ADDRESS": "announced and proved by a probe",
    "COMMIT": "point of no return; live at the target",
    "BATCHES": "the other streams, batch after batch",
    "FOLLOW": "the address moves to the target, proved by a probe",
    "RELEASE": "sockets closed in silence here",
}
CLIENTS_WAIT = ("PAUSE", "HOLD", "EXPORT", "SEND", "MOVE_ADDRESS", "COMMIT")


def render(result: dict[str, Any], text: str, switch_at: int | None, colour: bool | None = None) -> str:
    """`switch_at`: the number of characters of `text` that came from the source."""
    paint = _Paint(sys.stdout.isatty() and not os.environ.get("NO_COLOR") if colour is None else colour)
    parts = [_rule("the steps"), *_steps(result["steps"], paint), _rule("the text, on one connection")]
    parts += [_text(result, text, switch_at, paint), _rule("the figures"), *_figures(result, paint)]
    return "\n".join(parts)


class _Paint:
    def __init__(self, on: bool) -> None:
        self._on = on

    def __call__(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._on else text


def _rule(title: str) -> str:
    return f"\n-- {title} " + "-" * (WIDTH - len(title) - 4)


def _steps(steps: list[dict[str, Any]], paint: _Paint) -> list[str]:
    longest = max((float(s.get("tookMs", 0)) for s in steps), default=1.0) or 1.0
    lines = []
    for step in steps:
        name, took = step["name"], float(step.get("tookMs", 0))
        bar = "#" * max(1, round(16 * took / longest))
        waits = name in CLIENTS_WAIT
        line = (
            f"  {float(step.get('startMs', 0)):9.2f} ms {took:+9.2f} ms  {name:<12} {bar:<16} {MEANING.get(name, '')}"
        )
        lines.append(paint("1" if waits else "2", line))
    lines.append(f"  clients wait from {CLIENTS_WAIT[0]} to {CLIENTS_WAIT[-1]}")
    return lines


def _text(result: dict[str, Any], text: str, switch_at: int | None, paint: _Paint) -> str:
    if switch_at is None:
        return textwrap.indent(textwrap.fill(text[-800:], WIDTH - 2), "  ")
    before, after = text[max(0, switch_at - 500) : switch_at], text[switch_at : switch_at + 500]
    mark = f" ==[ {result['source_host']} -> {result['target_host']} ]== "
    left = textwrap.indent(textwrap.fill(("..." if switch_at > 500 else "") + before, WIDTH - 2), "  ")
    right = textwrap.indent(textwrap.fill(after + ("..." if switch_at + 500 < len(text) else ""), WIDTH - 2), "  ")
    return "\n".join([paint("36", left), paint("1;7", mark.center(WIDTH, "=")), paint("32", right)])


def _figures(r: dict[str, Any], paint: _Paint) -> list[str]:
    stall = r["stall_ms"]
    good = "IDENTICAL to the answers without a migration" if r["ok"] else "FAILED: " + "; ".join(why_failed(r))
    return [
        *_notice(r),
        f"  clients        {r['streams']}, of which {r['migrated_streams'] - r['uploads']} were moved in mid-answer",
        f"  uploads        {r['uploads_answered']} of {r['uploads']} requests that were still being sent were answered",
        f"  tokens         {r['tokens']} of {r['tokens_expected']}, "
        f"lost {r['tokens_lost']}, doubled {r['tokens_doubled']}",
        f"  network        resets {r['rst_seen']}, unexpected FINs {r['fin_unexpected']}, "
        f"packets the capture missed {r['packets_missed_by_capture']}",
        f"  stall          p50 {stall['p50']} ms, p99 {stall['p99']} ms, max {stall['max']} ms "
        f"(switchover {r['switchover']}, the address took {r['move_seconds']:g} s to move)",
        f"  sockets        checkpoint {r['checkpoint_us']:.0f} us, restore {r['restore_us']:.0f} us each, "
        f"{r['checkpoint_bytes']} bytes in all",
        f"  KV cache       {r['kv_bytes']} bytes moved, {r['kv_tokens_used']:.0f} tokens continued from it, "
        f"{r['target_prefill_tokens']:.0f} computed again",
        f"  source         {r['source_host']} was deleted when {r['source_deleted_at_share']:.0%} "
        "of the answer had come",
        "",
        "  " + paint("1;32" if r["ok"] else "1;31", good),
    ]


def _notice(r: dict[str, Any]) -> list[str]:
    """Who had it begin, where nobody did."""
    notice = r.get("notice")
    if not notice:
        return []
    return [
        f"  notice         {notice['kind']} by {notice['source']} ({notice['action']} in {notice['seconds']:g} s); "
        f"MigrationJobs: {notice['jobs']}",
        f"  in time        from the notice to PAUSE {notice['notice_to_pause_ms']:.0f} ms; "
        f"{notice['left_at_release_s']:.1f} s were left when the source had let go",
        textwrap.fill(notice["plan"], WIDTH, initial_indent="  the plan       ", subsequent_indent=" " * 17),
    ]


def why_failed(r: dict[str, Any]) -> list[str]:
    """Each reason for a failed verdict, in words."""
    reasons = {
        f"{r['tokens_lost']} tokens lost": r["tokens_lost"],
        f"{r['tokens_doubled']} tokens too many": r["tokens_doubled"],
        f"{r['rst_seen']} resets": r["rst_seen"],
        f"{r['fin_unexpected']} connections finished early": r["fin_unexpected"],
        f"{r['packets_missed_by_capture']} packets missed by the capture": r["packets_missed_by_capture"],
        f"{r['tokens']} tokens of {r['tokens_expected']} came": r["tokens"] != r["tokens_expected"],
        "the text differs from the answer without a migration": not r["identical_to_unmigrated"],
        f"{r['uploads'] - r['uploads_answered']} half-sent requests got no answer": (
            r["uploads"] != r["uploads_answered"]
        ),
        f"{r['migrated_streams']} of {r['streams'] + r['uploads']} streams were moved": (
            r["migrated_streams"] != r["streams"] + r["uploads"]
        ),
        "the source was deleted too late to prove anything": r["source_deleted_at_share"] >= 2 / 3,
        **_untimely(r.get("notice")),
    }
    return [words for words, wrong in reasons.items() if wrong]


def _untimely(notice: dict[str, Any] | None) -> dict[str, bool]:
    if notice is None:
        return {}
    return {
        "the source had not let go when it was terminated": notice["left_at_release_s"] <= 0,
        f"the notice made {notice['jobs']} MigrationJobs": notice["jobs"] != 1,
    }
