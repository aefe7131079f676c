"""The planner's words: what it is given, and what it answers.

Units: bytes, seconds, tokens. Times are seconds of one clock, the one that `now_s` and `deadline_s` were read from.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from midstream_operator.packing import Stream, Target


class Way(enum.StrEnum):
    MOVE_KV = "MoveKV"  # blocks are copied while decoding goes on, the connection follows
    REPLAY = "Replay"  # the connection moves; the target computes the KV again
    FINISH = "LetFinish"  # needs no copy since it ends first, or cannot move and stays as long as the node does


class Switchover(enum.StrEnum):
    STEER = "Steer"  # flows commit one by one; the address may come later
    WAIT = "Wait"  # an address's flows commit together, after it has moved


@dataclass(frozen=True, slots=True)
class CallBudget:
    """EC2's token bucket as it looks now: it is the account's, and others drink from it."""

    available: float = 100.0
    refill_per_s: float = 5.0  # assumed: AWS documents no figure for AssignPrivateIpAddresses
    ahead: int = 0  # calls that other plans have been promised

    def __post_init__(self) -> None:
        if self.available < 0 or self.refill_per_s <= 0 or self.ahead < 0:
            raise ValueError(f"a call budget cannot be {self}")

    def wait_s(self, call: int) -> float:
        """Seconds until the `call`th call of this plan (the first is 1) is allowed."""
        return max(0.0, (self.ahead + call - self.available) / self.refill_per_s)


@dataclass(frozen=True, slots=True)
class Costs:
    """What a switch takes, in seconds, with the reason for each value."""

    margin_s: float = 5.0  # before the deadline: clocks differ, and EC2 is early more often than late
    switch_base_s: float = 0.05  # two round trips between agents, a token boundary, restore
    switch_stream_s: float = 0.0005  # a socket's checkpoint, restore and activation, with room to spare
    address_move_s: float = 3.0  # EC2 needs 1-3 s until packets take the new way
    stall_ok_s: float = 0.05  # a prefill that nobody notices is not worth a copy
    copy_reserve_s: float = 0.0  # at least so much is left after the copy, where who copies keeps to such a time
    finish_within_s: float = 1.0  # who ends so soon needs no copy: replayed if it has not ended

    def __post_init__(self) -> None:
        if min(getattr(self, name) for name in self.__slots__) < 0:
            raise ValueError(f"a cost cannot be negative: {self}")

    def switch_s(self, streams: int) -> float:
        """From the freeze to the last COMMIT of so many."""
        return self.switch_base_s + streams * self.switch_stream_s if streams else 0.0


@dataclass(frozen=True, slots=True)
class Situation:
    node: str
    now_s: float
    deadline_s: float
    streams: tuple[Stream, ...]
    targets: tuple[Target, ...]
    bandwidth_bytes_per_s: float  # measured, of the node's way out; all its pods share it
    calls: CallBudget = field(default_factory=CallBudget)
    costs: Costs = field(default_factory=Costs)
    switchover: Switchover = Switchover.STEER
    by_api: bool = True  # addresses move by calls that a cloud counts; else the agents announce them

    def __post_init__(self) -> None:
        if self.bandwidth_bytes_per_s < 0:
            raise ValueError(f"the bandwidth of {self.node} cannot be negative")
        if len({stream.name for stream in self.streams}) != len(self.streams):
            raise ValueError(f"two streams of {self.node} have one name")

    @property
    def available_s(self) -> float:
        return max(0.0, self.deadline_s - self.costs.margin_s - self.now_s)

    @property
    def end_s(self) -> float:
        """Everything is over by then: the deadline minus the margin."""
        return self.now_s + self.available_s

    @property
    def copy_window_s(self) -> float:
        """Seconds for copying that leave room for every connection and address. Not positive: no KV can be copied."""
        movable = sum(1 for stream in self.streams if stream.address)
        tail_s = self.costs.switch_s(movable) + self.costs.address_move_s
        return self.available_s - max(self.costs.copy_reserve_s, tail_s)


@dataclass(frozen=True, slots=True)
class StreamPlan:
    stream: Stream
    way: Way
    makes_it: bool
    why: str
    target: Target | None = None  # None: stays
    order: int = 0  # 1 is the first to commit; 0: does not move
    commit_s: float | None = None
    address_s: float | None = None  # when its address is expected at the target
    kv_given_up: bool = False  # a copy would have been better


@dataclass(frozen=True, slots=True)
class Plan:
    node: str
    now_s: float
    deadline_s: float
    streams: tuple[StreamPlan, ...]  # in the order of committing; those that stay are at the end
    commit_latest_s: float  # at this time copying ends, whatever is missing is replayed
    calls: int  # EC2 calls that the plan needs
    words: tuple[str, ...] = ()

    @property
    def late(self) -> tuple[StreamPlan, ...]:
        """Who will not make it."""
        return tuple(entry for entry in self.streams if not entry.makes_it)

    @property
    def moving(self) -> tuple[StreamPlan, ...]:
        return tuple(entry for entry in self.streams if entry.order)

    @property
    def kv_bytes(self) -> int:
        return sum(entry.stream.kv_bytes for entry in self.streams if entry.way is Way.MOVE_KV)
