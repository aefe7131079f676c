"""The planner: what it may never do, for any situation, and what it says in a few known ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from midstream_operator.packing import Stream, Target, pack
from midstream_operator.plan_model import CallBudget, Costs, Plan, Situation, Switchover, Way
from midstream_operator.plan_text import render
from midstream_operator.planner import plan, plan_fleet

MIB, GIB = 1 << 20, 1 << 30
NOW = 1_000_000.0
TOLERANCE_S = 1e-5

ADDRESSES = ["", "10.0.0.100", "10.0.0.101", "10.0.0.102", "fd00::100"]
addresses = st.sampled_from(ADDRESSES)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Stream, ...]:
    count = draw(st.integers(0, 12))
    workloads = {address: draw(st.sampled_from(["llm", "llm", "other"])) for address in ADDRESSES}
    found = []
    for number in range(count):
        address = draw(addresses)
        found.append(
            Stream(
                f"s{number:02}", f"pod-{address}", address,
                kv_bytes=draw(st.sampled_from([0, 1, 40 * MIB, 700 * MIB, 9 * GIB])),
                tokens=draw(st.integers(0, 60_000)),
                dirty_bytes_per_s=draw(st.sampled_from([0.0, 1e4, 5e6, 4e8])),
                remaining_s=draw(st.sampled_from([None, None, 0.3, 20.0, 300.0])),
                workload=workloads[address],
            )
        )  # fmt: skip
    return tuple(found)


targets = st.lists(
    st.builds(
        Target,
        pod=st.sampled_from(["t1", "t2", "t3"]),
        node=st.sampled_from(["node-b", "node-c"]),
        kv_free_bytes=st.sampled_from([0, 100 * MIB, 20 * GIB]),
        streams_free=st.integers(0, 12),
        prefill_tokens_per_s=st.sampled_from([200.0, 8000.0]),
        workload=st.sampled_from(["llm", "llm", "other"]),
    ),
    max_size=3,
    unique_by=lambda target: target.pod,
)
situations = st.builds(
    Situation,
    node=st.just("node-a"),
    now_s=st.just(NOW),
    deadline_s=st.floats(-5, 130).map(lambda left: NOW + left),
    streams=streams(),
    targets=targets.map(tuple),
    bandwidth_bytes_per_s=st.sampled_from([0.0, 1e6, 1e8, 6e8, 3e9]),
    calls=st.builds(CallBudget, st.sampled_from([0.0, 1.0, 100.0]), st.sampled_from([0.1, 5.0]), st.integers(0, 40)),
    costs=st.builds(Costs, switch_stream_s=st.sampled_from([0.0005, 0.5])),
    switchover=st.sampled_from(Switchover),
)


def kv_of(made: Plan) -> set[str]:
    return {entry.stream.name for entry in made.streams if entry.way is Way.MOVE_KV}


def moves(made: Plan) -> set[str]:
    return {entry.stream.name for entry in made.moving}


def good(made: Plan) -> set[str]:
    return {entry.stream.name for entry in made.streams if entry.makes_it}


@given(situations)
def test_each_stream_has_one_plan_and_each_mover_its_own_place(situation: Situation) -> None:
    made = plan(situation)
    assert sorted(entry.stream.name for entry in made.streams) == [s.name for s in situation.streams]
    assert [entry.order for entry in made.moving] == list(range(1, len(made.moving) + 1))
    assert all(entry.why for entry in made.streams) and made.words
    assert all(entry.stream.address and entry.target for entry in made.moving)


@given(situations)
def test_nothing_is_planned_past_the_deadline(situation: Situation) -> None:
    made = plan(situation)
    end_s = max(NOW, situation.deadline_s - situation.costs.margin_s) + TOLERANCE_S
    assert made.commit_latest_s <= end_s
    for entry in made.moving:
        assert entry.commit_s is not None and entry.address_s is not None
        assert NOW <= entry.commit_s <= end_s
        assert entry.makes_it == (entry.address_s <= end_s), "a late address is said, an early one is not"


@given(situations, st.floats(1.0, 1000.0))
def test_more_bandwidth_never_makes_a_plan_worse(situation: Situation, factor: float) -> None:
    less = plan(situation)
    more = plan(replace(situation, bandwidth_bytes_per_s=situation.bandwidth_bytes_per_s * factor + 1))
    assert kv_of(less) <= kv_of(more)
    assert moves(less) == moves(more), "a connection does not depend on bandwidth"
    assert good(less) <= good(more)


@given(situations, st.floats(0.0, 200.0))
def test_more_time_never_makes_a_plan_worse(situation: Situation, extra_s: float) -> None:
    less, more = plan(situation), plan(replace(situation, deadline_s=situation.deadline_s + extra_s))
    ending = {s.name for s in situation.streams if s.remaining_s is not None and s.remaining_s <= 1.0}
    assert kv_of(less) <= kv_of(more) | ending, "who ends by itself needs no copy"
    assert moves(less) <= moves(more)
    assert good(less) <= good(more)


@given(situations)
def test_kv_is_given_up_before_any_connection(situation: Situation) -> None:
    made = plan(situation)
    light = plan(replace(situation, streams=tuple(replace(s, kv_bytes=0) for s in situation.streams)))
    assert len(moves(light)) == len(moves(made)), "without any KV not one more connection would move"
    room = {s.name for group in pack(situation.streams, situation.targets)[0] for s in group.streams}
    if situation.switchover is Switchover.STEER and room - moves(made):
        assert not kv_of(made)


@given(situations)
def test_no_target_gets_more_than_it_holds_or_what_it_cannot_serve(situation: Situation) -> None:
    made = plan(situation)
    for target in situation.targets:
        entries = [entry for entry in made.moving if entry.target == target]
        copied = sum(entry.stream.kv_bytes for entry in entries if entry.way is Way.MOVE_KV)
        assert copied <= target.kv_free_bytes and len(entries) <= target.streams_free
        assert all(entry.stream.workload == target.workload for entry in entries)


@given(situations)
def test_an_address_goes_to_one_target(situation: Situation) -> None:
    homes: dict[str, set[str]] = {}
    for entry in plan(situation).moving:
        assert entry.target is not None
        homes.setdefault(entry.stream.address, set()).add(entry.target.pod)
    assert all(len(home) == 1 for home in homes.values())


@given(situations)
def test_who_will_not_make_it_is_named_with_the_reason(situation: Situation) -> None:
    made = plan(situation)
    text = render(made, switchover=situation.switchover)
    for entry in made.late:
        assert entry.why in text and any(entry.why in line for line in made.words if "will not make it" in line)


# -- known situations


def situation(*given_streams: Stream, left_s: float = 120.0, **other: object) -> Situation:
    base = Situation(
        "node-a", NOW, NOW + left_s, given_streams or tuple(stream(n) for n in range(3)),
        (Target("t1", "node-b", 40 * GIB, 500, 4000.0),), 600e6,
    )  # fmt: skip
    return replace(base, **other)  # type: ignore[arg-type]


def stream(number: int, **other: object) -> Stream:
    base = Stream(f"s{number}", "llm-0", "10.0.0.100", 2 * GIB, 8000, 1e6)
    return replace(base, **other)  # type: ignore[arg-type]


def test_with_time_everything_moves_with_its_kv_and_commits_as_it_is_copied() -> None:
    made = plan(situation())
    assert [entry.way for entry in made.streams] == [Way.MOVE_KV] * 3
    commits = [entry.commit_s for entry in made.streams if entry.commit_s]
    assert commits == sorted(commits) and commits[0] - NOW == pytest.approx(2 * GIB / 599e6 + 0.0505)
    assert made.calls == 1, "one call moves what goes to one interface"


def test_with_little_time_kv_goes_first() -> None:
    made = plan(situation(left_s=14.0))
    assert len(kv_of(made)) == 1 and len(good(made)) == 3
    assert any("given up before any connection" in line for line in made.words)


def test_with_no_time_for_the_address_the_connection_moves_all_the_same() -> None:
    made = plan(situation(left_s=6.0))
    assert moves(made) == {"s0", "s1", "s2"} and not good(made)
    assert "the client waits for it, the connection lives" in made.streams[0].why
    assert not moves(plan(situation(left_s=6.0, switchover=Switchover.WAIT))), "Wait needs the address first"


def test_decoding_faster_than_the_wire_is_never_copied() -> None:
    made = plan(situation(stream(0, dirty_bytes_per_s=7e8)))
    assert made.streams[0].way is Way.REPLAY and made.streams[0].makes_it


def test_a_stream_on_the_pods_own_address_stays_and_is_named() -> None:
    made = plan(situation(stream(0, address="")))
    assert made.streams[0].way is Way.FINISH and not made.streams[0].makes_it
    assert made.late[0].why == "on the pod's own address, which cannot move"
    assert plan(situation(stream(0, address="", remaining_s=30.0))).late == ()


@pytest.mark.parametrize(
    ("given_targets", "reason"),
    [
        ((), "no target: no other Ready pod of its workload"),
        ((Target("t1", "node-b", GIB, 500, 4000.0, "other"),), "no target: no other Ready pod of its workload"),
        ((Target("t1", "node-b", GIB, 2, 4000.0),), "no target has room for the 3 connections of its address"),
    ],
)
def test_without_a_target_all_stay_and_the_plan_says_why(given_targets: tuple[Target, ...], reason: str) -> None:
    made = plan(situation(targets=given_targets))
    assert not made.moving and made.calls == 0
    assert any(reason in line for line in made.words)


def test_who_ends_at_once_is_not_copied() -> None:
    made = plan(situation(stream(0, remaining_s=0.4)))
    assert made.streams[0].way is Way.FINISH and made.streams[0].order == 1
    assert "if it has not, it moves" in made.streams[0].why


def test_pods_are_spread_over_fewer_survivors_by_free_kv() -> None:
    pods = tuple(
        Stream(f"p{pod}-{n}", f"llm-{pod}", f"10.0.0.{100 + pod}", GIB, 8000) for pod in range(3) for n in range(4)
    )
    survivors = (Target("t1", "node-b", 9 * GIB, 8, 4000.0), Target("t2", "node-c", 6 * GIB, 8, 4000.0))
    made = plan(situation(*pods, targets=survivors))
    homes = {entry.stream.pod: entry.target.pod for entry in made.moving if entry.target}
    assert homes == {"llm-0": "t1", "llm-1": "t2", "llm-2": "t1"}
    ways = [entry.way for entry in made.moving]
    assert ways.count(Way.MOVE_KV) == 12, "9 GiB hold two pods of 4"
    assert made.calls == 2


def test_an_ipv6_address_costs_two_calls() -> None:
    assert plan(situation(stream(0, address="fd00::1"), stream(1))).calls == 3


def test_a_fleet_shares_one_bucket_and_the_last_are_told() -> None:
    nodes = [replace(situation(stream(0)), node=f"node-{n:04}", calls=CallBudget(100.0, 5.0)) for n in range(1000)]
    plans = plan_fleet(nodes)
    late = [made for made in plans if made.late]
    in_time = 100 + (120 - 5 - 3) * 5
    assert len(late) == 1000 - in_time, "burst 100 and 5/s move 660 of 1,000 interfaces within the notice"
    assert all(made.moving for made in late), "their connections move; their clients wait for the address"
    assert "999 others come before" in " ".join(plans[-1].words)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Stream("s", "p", "a", kv_bytes=-1),
        lambda: Target("t", "n", 1, 1, 0.0),
        lambda: CallBudget(refill_per_s=0.0),
        lambda: Costs(margin_s=-1.0),
        lambda: situation(bandwidth_bytes_per_s=-1.0),
        lambda: situation(stream(0), stream(0)),
    ],
)
def test_impossible_figures_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError):
        wrong()  # type: ignore[operator]


def test_the_plan_as_text() -> None:
    text = render(plan(situation(stream(0), stream(1, address=""))))
    assert text.splitlines()[0] == "plan for node-a (Steer), 120 s before its deadline"
    assert "s0      MoveKV            t1     +3.64s  +6.64s   2.0 GiB  copying 2.0 GiB saves 2.0 s of prefill" in text
    assert "s1      LetFinish (late)  stays  -" in text
    assert render(plan(situation()), limit=1).endswith("and 2 more")
