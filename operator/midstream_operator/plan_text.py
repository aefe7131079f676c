"""A plan in words: for a job's status, and as `midstream plan` prints it. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from midstream_operator.packing import Stream, Target
from midstream_operator.plan_model import Plan, Situation, StreamPlan, Switchover, Way

_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def size(count: float) -> str:
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def why_moves(stream: Stream, target: Target, way: Way, room: bool) -> str:
    if way is Way.MOVE_KV:
        saved_s = stream.tokens / target.prefill_tokens_per_s
        return f"copying {size(stream.kv_bytes)} saves {saved_s:.1f} s of prefill"
    if way is Way.FINISH:
        return f"ends by itself in {stream.remaining_s:.1f} s; if it has not, it moves and its tokens are replayed"
    if not stream.tokens:
        return "idle: nothing to replay"
    stall = f"{stream.tokens} tokens are computed again in {stream.tokens / target.prefill_tokens_per_s:.2f} s"
    return stall if room else f"{target.pod} has no room for its KV: {stall}"


def why_address_late(late_s: float) -> str:
    return f"its address comes {late_s:.1f} s too late: the client waits for it, the connection lives"


def reasoning(situation: Situation, made: Plan) -> tuple[str, ...]:
    """The plan's story, one sentence a line, the bad news last."""
    ways = Counter(entry.way for entry in made.moving)
    stay = len(made.streams) - len(made.moving)
    lines = [
        f"{situation.available_s:.1f} s are left{_margin(situation)}; "
        f"copying must end {max(0.0, made.commit_latest_s - situation.now_s):.1f} s from now",
        f"{ways[Way.MOVE_KV]} streams move with {size(made.kv_bytes)} of KV at "
        f"{size(situation.bandwidth_bytes_per_s)}/s, {ways[Way.REPLAY]} replay their tokens, "
        f"{ways[Way.FINISH]} end first, {stay} stay",
    ]
    return (*lines, *_targets(made), *_calls(situation, made), *_limits(situation, made), *_late(made))


def _margin(situation: Situation) -> str:
    return f" ({situation.costs.margin_s:g} s of margin are off)" if situation.costs.margin_s else ""


def _targets(made: Plan) -> list[str]:
    counts = Counter((entry.target.pod, entry.target.node) for entry in made.moving if entry.target)
    return [f"{count} streams go to {pod} on {node}" for (pod, node), count in sorted(counts.items())]


def _calls(situation: Situation, made: Plan) -> list[str]:
    if not made.calls or not situation.by_api:
        return []
    wait_s = situation.calls.wait_s(made.calls)
    ahead = f", {situation.calls.ahead} others come before" if situation.calls.ahead else ""
    return [f"{made.calls} EC2 calls move the addresses{ahead}: the last is allowed in {wait_s:.1f} s"]


def _limits(situation: Situation, made: Plan) -> list[str]:
    """Why KV that could have been copied is not."""
    given_up = [entry for entry in made.moving if entry.kv_given_up]
    if not given_up:
        return []
    dirty = sum(entry.stream.dirty_bytes_per_s for entry in made.moving)
    return [
        f"KV of {len(given_up)} streams ({size(sum(e.stream.kv_bytes for e in given_up))}) is given up before any "
        f"connection: {max(0.0, situation.copy_window_s):.1f} s are left for copying, decoding adds {size(dirty)}/s"
    ]


def _late(made: Plan) -> list[str]:
    counts = Counter(entry.why for entry in made.late)
    return [f"will not make it: {count} streams, {why}" for why, count in counts.most_common()]


def render(made: Plan, *, switchover: Switchover = Switchover.STEER, limit: int = 40) -> str:
    """What `midstream plan NODE` prints: the words, then one line a stream, at most `limit` of them."""
    head = [f"plan for {made.node} ({switchover}), {made.deadline_s - made.now_s:.0f} s before its deadline"]
    head += [f"  {line}" for line in made.words]
    rows: list[tuple[str, ...]] = [("#", "STREAM", "WAY", "TO", "COMMIT", "ADDRESS", "KV", "WHY")]
    rows += [_row(made, entry) for entry in made.streams[:limit]]
    left = len(made.streams) - limit
    return "\n".join([*head, "", *_table(rows), *([f"  and {left} more"] if left > 0 else [])])


def _row(made: Plan, entry: StreamPlan) -> tuple[str, ...]:
    return (
        str(entry.order or "-"),
        entry.stream.name,
        entry.way if entry.makes_it else f"{entry.way} (late)",
        entry.target.pod if entry.target else "stays",
        _after(made, entry.commit_s),
        _after(made, entry.address_s),
        size(entry.stream.kv_bytes),
        entry.why,
    )


def _after(made: Plan, at_s: float | None) -> str:
    return "-" if at_s is None else f"+{at_s - made.now_s:.2f}s"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
