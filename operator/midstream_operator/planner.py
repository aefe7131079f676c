"""What to do with each stream of a node that is about to go: a pure function of what is known at that moment.

                now                                                   end = deadline - margin
                 |---- copy window ----|-- switch (all) --|-- address moves --|
     KV of the first streams in order  |  freeze .. COMMIT |  EC2's seconds    |

What is short is given up in this order, and never in another:

1. KV, which the target can compute again from token ids (a stall, nothing is lost);
2. the address in time: a flow that has moved keeps its connection, its client waits for the address;
3. the connection itself.

The window always leaves room for 2 and 3, so that more time or more bandwidth never makes a plan worse. Copying happens
while decoding goes on: copying the streams S takes kv(S) / (bandwidth - dirty(S)). Streams are ordered by the seconds
of prefill that a copied byte saves, the KV of the longest prefix that fits is copied, and each stream commits as soon
as its own copy is complete: the two minutes are a promise that has been broken (39 s were seen).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from midstream_operator.packing import Group, Stream, interfaces, pack
from midstream_operator.plan_model import Plan, Situation, StreamPlan, Switchover, Way
from midstream_operator.plan_text import reasoning, size, why_address_late, why_moves

_CLOCK_S = 1e-6  # sums of floats differ in the last place


def plan(situation: Situation) -> Plan:
    groups, homeless = pack(situation.streams, situation.targets)
    movers, shed = _connections(situation, groups)
    entries = _moving(situation, movers, _copied(situation, movers))
    stays = [_stays(situation, mover.stream, _no_time(situation)) for mover in shed]
    stays += [_stays(situation, stream, why) for stream, why in homeless]
    made = Plan(
        situation.node,
        situation.now_s,
        situation.deadline_s,
        (*entries, *stays),
        _commit_latest_s(situation, len(movers)),
        max((mover.call for mover in movers), default=0),
    )
    return replace(made, words=reasoning(situation, made))


def plan_fleet(situations: Iterable[Situation]) -> list[Plan]:
    """Plans of nodes that go at the same time and share one call budget: the nearest deadline is served first, then
    the node with more streams. A node that cannot move a stream takes no call from the others."""
    plans: list[Plan] = []
    ahead = 0
    for situation in sorted(situations, key=lambda s: (s.deadline_s, -len(s.streams), s.node)):
        calls = replace(situation.calls, ahead=situation.calls.ahead + ahead)
        plans.append(plan(replace(situation, calls=calls)))
        ahead += plans[-1].calls
    return plans


# -- whose connection moves


@dataclass(frozen=True, slots=True)
class _Mover:
    stream: Stream
    group: Group
    call: int  # its address moves with the plan's so-and-so-many-th EC2 call

    @property
    def replay_s(self) -> float:
        return self.stream.tokens / self.group.target.prefill_tokens_per_s

    @property
    def has_room(self) -> bool:
        return self.stream.name in self.group.with_room


def _connections(situation: Situation, groups: Sequence[Group]) -> tuple[list[_Mover], list[_Mover]]:
    """Streams that move, and those for whose connection there is no time. What fits into less time is always a part
    of what fits into more, since the order of the groups knows nothing of time."""
    fits: list[_Mover] = []
    shed: list[_Mover] = []
    before = 0
    for call, group in _numbered(groups):
        movers = [_Mover(stream, group, call) for stream in group.streams]
        if situation.switchover is Switchover.WAIT:
            room = len(movers) if not shed and _moves_in_time(situation, call, before + len(movers)) else 0
        else:
            room = _streams_in_time(situation) - before
        fits += movers[: max(0, room)]
        shed += movers[max(0, room) :]
        before += len(movers)
    return fits, shed


def _moves_in_time(situation: Situation, call: int, streams: int) -> bool:
    needs_s = situation.calls.wait_s(call) + situation.costs.switch_s(streams) + situation.costs.address_move_s
    return needs_s <= situation.available_s


def _streams_in_time(situation: Situation) -> int:
    """How many can be switched in what is left."""
    costs, count = situation.costs, len(situation.streams)
    if costs.switch_s(count) <= situation.available_s or costs.switch_stream_s == 0:
        return count if costs.switch_s(count) <= situation.available_s else 0
    return max(0, int((situation.available_s - costs.switch_base_s) / costs.switch_stream_s))


def _numbered(groups: Sequence[Group]) -> Iterator[tuple[int, Group]]:
    """Groups with the number of the call that moves each: IPv4 addresses of one target interface go in one call; IPv6
    has no reassignment, so that each address is taken off there and put on here."""
    calls = 0
    for batch in interfaces(groups):
        fours = [group for group in batch if not group.is_ipv6]
        calls += bool(fours)
        yield from ((calls, group) for group in fours)
        for group in (group for group in batch if group.is_ipv6):
            calls += 2
            yield calls, group


# -- whose KV moves


def _copied(situation: Situation, movers: Sequence[_Mover]) -> dict[str, float]:
    """Streams whose KV is copied, in order, each with the seconds until its copy is complete."""
    candidates = [mover for mover in movers if _wants_copy(situation, mover)]
    candidates.sort(key=lambda m: (-m.replay_s / m.stream.kv_bytes, m.stream.name))
    copied: dict[str, float] = {}
    kv_bytes, dirty = 0, 0.0
    for mover in candidates:
        kv_bytes += mover.stream.kv_bytes
        dirty += mover.stream.dirty_bytes_per_s
        free = situation.bandwidth_bytes_per_s - dirty
        if free <= 0 or kv_bytes / free > situation.copy_window_s:
            break
        copied[mover.stream.name] = kv_bytes / free
    return copied


def _wants_copy(situation: Situation, mover: _Mover) -> bool:
    return (
        mover.has_room
        and mover.stream.kv_bytes > 0
        and mover.replay_s > situation.costs.stall_ok_s
        and not _ends_soon(situation, mover.stream)
    )


def _ends_soon(situation: Situation, stream: Stream) -> bool:
    limit_s = min(situation.costs.finish_within_s, situation.available_s)
    return stream.remaining_s is not None and stream.remaining_s <= limit_s


# -- when


def _moving(situation: Situation, movers: Sequence[_Mover], copied: dict[str, float]) -> list[StreamPlan]:
    """Those without a copy commit first and at once, the others as their copies are complete."""
    places = {name: place for place, name in enumerate(copied, 1)}
    order = sorted(movers, key=lambda mover: places.get(mover.stream.name, 0))
    switched = _switched_s(situation, order, copied)
    firsts: dict[str, float] = {}
    lasts: dict[str, float] = {}
    for mover, at_s in zip(order, switched, strict=True):
        firsts.setdefault(mover.group.address, at_s)
        lasts[mover.group.address] = at_s
    wait = situation.switchover is Switchover.WAIT
    entries = []
    for number, (mover, at_s) in enumerate(zip(order, switched, strict=True), 1):
        asked_s = max((lasts if wait else firsts)[mover.group.address], situation.calls.wait_s(mover.call))
        address_s = asked_s + situation.costs.address_move_s
        commit_s = address_s if wait else at_s
        entries.append(_entry(situation, mover, number, commit_s, address_s, mover.stream.name in copied))
    return entries


def _switched_s(situation: Situation, order: Sequence[_Mover], copied: dict[str, float]) -> list[float]:
    """Seconds from now until each is restored at the target, one after the other."""
    costs, at_s, found = situation.costs, situation.costs.switch_base_s, []
    for mover in order:
        at_s = max(at_s, copied.get(mover.stream.name, 0.0) + costs.switch_base_s) + costs.switch_stream_s
        found.append(at_s)
    return found


def _entry(
    situation: Situation, mover: _Mover, number: int, commit_s: float, address_s: float, copied: bool
) -> StreamPlan:
    way = Way.MOVE_KV if copied else Way.FINISH if _ends_soon(situation, mover.stream) else Way.REPLAY
    why = why_moves(mover.stream, mover.group.target, way, mover.has_room)
    given_up = not copied and _wants_copy(situation, mover)
    if given_up:
        why = f"no time to copy its {size(mover.stream.kv_bytes)}: {why}"
    late_s = address_s - situation.available_s
    if late_s > _CLOCK_S:
        why = f"{why}; {why_address_late(late_s)}"
    return StreamPlan(
        mover.stream, way, late_s <= _CLOCK_S, why, mover.group.target, number,
        situation.now_s + commit_s, situation.now_s + address_s, given_up,
    )  # fmt: skip


def _stays(situation: Situation, stream: Stream, why: str) -> StreamPlan:
    in_time = stream.remaining_s is not None and stream.remaining_s <= situation.available_s
    return StreamPlan(stream, Way.FINISH, in_time, why)


def _no_time(situation: Situation) -> str:
    what = "its address cannot move" if situation.switchover is Switchover.WAIT else "it cannot be switched"
    return f"{what} within the {situation.available_s:.1f} s that are left"


def _commit_latest_s(situation: Situation, moving: int) -> float:
    """Room for the whole where there is time for the whole, else for the connections that move."""
    if situation.copy_window_s >= 0:
        return situation.now_s + situation.copy_window_s
    tail_s = situation.costs.switch_s(moving)
    if situation.switchover is Switchover.WAIT:
        tail_s += situation.costs.address_move_s
    return max(situation.now_s, situation.end_s - tail_s)
