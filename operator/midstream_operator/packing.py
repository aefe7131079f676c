"""Which floating IP goes to which surviving pod.

An address moves as a whole, so its streams are packed as a group; a pod that holds several addresses can be spread over
several survivors. Groups with the most KV are placed first, each on the survivor of its workload with the most free KV
(so that survivors stay evenly loaded); what does not fit there keeps its connection and loses its KV. Packing looks at
capacity alone, never at time or bandwidth: a plan with more of those must not be another plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Stream:
    name: str
    pod: str
    address: str  # floating IP; empty: on the pod's own address, which cannot move
    kv_bytes: int = 0  # full blocks, what a copy would send
    tokens: int = 0  # prompt and generated: what a replay would compute
    dirty_bytes_per_s: float = 0.0  # new KV while decoding goes on
    remaining_s: float | None = None  # until it ends by itself, where max_tokens tells; None: unknown
    workload: str = ""  # only pods of the same workload can go on with it

    def __post_init__(self) -> None:
        if self.kv_bytes < 0 or self.tokens < 0 or self.dirty_bytes_per_s < 0:
            raise ValueError(f"stream {self.name}: bytes, tokens and rates cannot be negative")


@dataclass(frozen=True, slots=True)
class Target:
    pod: str
    node: str
    kv_free_bytes: int
    streams_free: int  # connections and sequences that it takes on top of its own
    prefill_tokens_per_s: float  # measured
    workload: str = ""

    def __post_init__(self) -> None:
        if self.kv_free_bytes < 0 or self.streams_free < 0 or self.prefill_tokens_per_s <= 0:
            raise ValueError(f"target {self.pod}: capacity cannot be negative, a prefill speed must be positive")


@dataclass(frozen=True, slots=True)
class Group:
    """The streams of one address, and where it goes. `with_room`: streams whose KV has room there."""

    address: str
    streams: tuple[Stream, ...]
    target: Target
    with_room: frozenset[str] = frozenset()

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.address


@dataclass(slots=True)
class _Room:
    target: Target
    kv_bytes: int = field(init=False)
    streams: int = field(init=False)

    def __post_init__(self) -> None:
        self.kv_bytes, self.streams = self.target.kv_free_bytes, self.target.streams_free


def pack(streams: Iterable[Stream], targets: Sequence[Target]) -> tuple[list[Group], list[tuple[Stream, str]]]:
    """Groups in the order in which they are served, and the streams that must stay, each with the reason. Where KV
    takes the place of connections, it is not looked at."""
    by_address: dict[str, list[Stream]] = {}
    for stream in streams:
        by_address.setdefault(stream.address, []).append(stream)
    stays = [(stream, "on the pod's own address, which cannot move") for stream in by_address.pop("", [])]
    by_kv, blind = (_seat(by_address, targets, use_kv) for use_kv in (True, False))
    groups, homeless = by_kv if len(by_kv[1]) <= len(blind[1]) else blind
    return [group for batch in interfaces(groups) for group in batch], [*stays, *homeless]


def _seat(
    by_address: Mapping[str, list[Stream]], targets: Sequence[Target], use_kv: bool
) -> tuple[list[Group], list[tuple[Stream, str]]]:
    def order(item: tuple[str, list[Stream]]) -> tuple[int, int, str]:
        address, members = item
        return -_kv(members) if use_kv else 0, -len(members), address

    rooms = [_Room(target) for target in sorted(targets, key=lambda t: t.pod)]
    groups: list[Group] = []
    homeless: list[tuple[Stream, str]] = []
    for address, members in sorted(by_address.items(), key=order):
        room = _roomiest(rooms, members, use_kv)
        if room is None:
            homeless += [(stream, _no_room(rooms, members)) for stream in members]
        else:
            groups.append(_place(address, members, room))
    return groups, homeless


def _kv(streams: Iterable[Stream]) -> int:
    return sum(stream.kv_bytes for stream in streams)


def _roomiest(rooms: Iterable[_Room], members: Sequence[Stream], use_kv: bool) -> _Room | None:
    fitting = [room for room in rooms if room.target.workload == members[0].workload and room.streams >= len(members)]
    return max(fitting, key=lambda r: (r.kv_bytes if use_kv else r.target.kv_free_bytes, r.streams), default=None)


def _no_room(rooms: Iterable[_Room], members: Sequence[Stream]) -> str:
    free = [room.streams for room in rooms if room.target.workload == members[0].workload]
    if not free:
        return "no target: no other Ready pod of its workload"
    return f"no target has room for the {len(members)} connections of its address; the roomiest takes {max(free)}"


def _place(address: str, members: Sequence[Stream], room: _Room) -> Group:
    """Seat a group: KV of the streams with the most tokens a byte first, as long as there is room."""
    room.streams -= len(members)
    seated = []
    for stream in sorted(members, key=lambda s: (-s.tokens / max(1, s.kv_bytes), s.name)):
        if stream.kv_bytes <= room.kv_bytes:
            room.kv_bytes -= stream.kv_bytes
            seated.append(stream.name)
    return Group(address, tuple(sorted(members, key=lambda s: s.name)), room.target, frozenset(seated))


def interfaces(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups by target node, since one EC2 call moves all that goes to one interface: the call that frees the most
    clients comes first."""
    by_node: dict[str, list[Group]] = {}
    for group in groups:
        by_node.setdefault(group.target.node, []).append(group)
    batches = [sorted(batch, key=lambda g: (-len(g.streams), g.address)) for batch in by_node.values()]
    return sorted(batches, key=lambda batch: (-sum(len(g.streams) for g in batch), batch[0].target.node))
