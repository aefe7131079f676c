"""Hold and gate: the agent's hands on the BPF maps and TC filters of a node.

    python -m midstream_agent.hold load --bpffs DIR      compile, pin, exit (the only user of bcc)
    python -m midstream_agent.hold unload --bpffs DIR    remove the pins

Programs and maps are pinned by a short-lived loader, so holds outlive this process; `Hold` only opens the
pins. What the maps mean is said in bpf/midstream_maps.h, and by whom a packet is dropped in which state.

Concurrency: the map functions are plain system calls (microseconds, the GIL released) and may be called
from the event loop; BPF programs run on other CPUs at the same time, which is why notes are read twice and
why entries are deleted before their notes. `attach`, `detach` and `attached` use netlink and setns(2): call
them in the agent's netlink thread.
"""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import json
import os
import struct
import sys
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import hold_tc
from midstream_agent.bpf import NOEXIST, Buffer, Map, ProgInfo, obj_get, prog_info
from midstream_agent.hold_layout import (
    ADDR_ARRIVING,
    ADDR_CTL,
    ADDR_LEAVING,
    ADDR_TUNNEL,
    CONF,
    CTL,
    FLOW_FROZEN,
    FLOW_HELD,
    FLOW_HERE,
    FLOW_MOVED,
    KEY,
    MAPS,
    NOTE,
    PROGRAMS,
    REASONS,
)

__all__ = ["ADDR_LEAVING", "FLOW_FROZEN", "FLOW_HELD", "FLOW_HERE", "FLOW_MOVED", "AddrEntry", "Hold"]

# From here on reading the whole map twice is sooner done than looking every key up twice (measured).
SNAPSHOT_MIN = 300
# Kept between reads: room for 1,300 notes twice is 5.5 MB of the agent's 80.
SCRATCH_MAX_BYTES = 1300 * NOTE.size
# A note is written in about a microsecond; a reader that meets a writer this often meets a bug.
READ_TRIES = 1000


@dataclass(frozen=True, slots=True)
class AddrEntry:
    """struct ms_addr_ctl; `peer` and what follows it only with ADDR_TUNNEL."""

    state: int
    flags: int = 0
    vni: int = 0
    peer: str = ""  # underlay address of the other node
    pod_ifindex: int = 0
    pod_mac: bytes = bytes(6)
    epoch: int = 0

    def pack(self) -> bytes:
        peer = _address(self.peer) if self.peer else bytes(16)
        return ADDR_CTL.pack(self.state, self.flags, self.epoch, self.vni, peer, self.pod_ifindex, self.pod_mac, 0, b"")


class Hold:
    """The pinned maps and programs of this node."""

    def __init__(self, bpffs: Path, maps: dict[str, Map], progs: dict[str, int], stack: ExitStack) -> None:
        self.bpffs = bpffs
        self._stack = stack  # closes the descriptors
        self._flows = maps["ms_flows"]
        self._notes = maps["ms_notes"]
        self._addrs = maps["ms_addrs"]
        self._births = maps["ms_births"]
        self._conf = maps["ms_conf"]
        self._counters = maps["ms_counters"]
        self._progs = progs
        self._scratch_lock = threading.Lock()
        self._buffers: tuple[Buffer, Buffer] | None = None

    @classmethod
    def open(cls, bpffs: Path | str) -> Hold:
        """Open what the loader pinned; refuses maps of another layout."""
        where = Path(bpffs)
        with ExitStack() as stack:
            try:
                maps = {spec.name: stack.enter_context(Map.pinned(where / spec.name)) for spec in MAPS}
                progs = {name: obj_get(where / name) for name in PROGRAMS}
            except OSError as e:
                raise Final(
                    "hold_not_loaded",
                    f"no BPF programs under {where} ({e.strerror}): "
                    f"run `python -m midstream_agent.hold load --bpffs {where}`",
                ) from e
            stack.callback(_close_all, progs)
            for spec in MAPS:
                if maps[spec.name].spec != spec:
                    raise Final(
                        "hold_layout",
                        f"{where / spec.name} has another layout than this agent: load its programs",
                    )
            return cls(where, maps, progs, stack.pop_all())

    def close(self) -> None:
        """Close the descriptors; programs, maps and filters stay."""
        self._stack.close()

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- flows and their notes: n keys, n values, one behind the other ---------------------------------

    def set_flows(self, keys: bytes, ctls: bytes, n: int) -> None:
        """Create or change n entries."""
        self._flows.update_many(keys, ctls, n)

    def delete_flows(self, keys: bytes, n: int) -> int:
        """Delete n entries: the flows are live again, on this node. Returns how many there were."""
        return self._flows.delete_many(keys, n)

    def create_notes(self, keys: bytes, n: int) -> int:
        """Create empty notes, before flows are frozen; those that exist stay. Returns how many are new."""
        return self._notes.update_many(keys, bytes(n * NOTE.size), n, NOEXIST)

    def read_notes(self, keys: bytes, n: int) -> bytes:
        """n struct ms_flow_note, none of them torn; zeros where there is none."""
        with self._scratch_lock:
            room = n + n // 4 if n >= SNAPSHOT_MIN else n  # for notes of other batches
            before, after = self._scratch(room * NOTE.size)
            notes = self._read_all(keys, n, before, after)
            return self._read_each(keys, n, before, after) if notes is None else notes

    def _read_each(self, keys: bytes, n: int, before: Buffer, after: Buffer) -> bytes:
        missing = self._notes.lookup_many(keys, n, before) + self._notes.lookup_many(keys, n, after)
        end, step = n * NOTE.size // 4, NOTE.size // 4
        versions = _words(before)[:end:step].tolist()
        if not missing and versions == _words(after)[:end:step].tolist() and not any(v & 1 for v in versions):
            return ctypes.string_at(before, n * NOTE.size)
        return b"".join(self._read_note(key) for key in _split(keys, n))

    def _read_all(self, keys: bytes, n: int, before: Buffer, after: Buffer) -> bytes | None:
        """Read the whole map twice, take what both reads agree on, and the rest one by one."""
        if n < SNAPSHOT_MIN:
            return None
        index, index_again = self._notes.snapshot(before), self._notes.snapshot(after)
        if index is None or index_again is None:
            return None
        words, again, raw, step = _words(before), _words(after), memoryview(before), NOTE.size // 4
        notes: list[bytes | memoryview] = []
        for key in _split(keys, n):
            i, j = index.get(key), index_again.get(key)
            if i is not None and j is not None and _stable(words[i * step], again[j * step]):
                notes.append(raw[i * NOTE.size : (i + 1) * NOTE.size])
            else:
                notes.append(self._read_note(key))
        return b"".join(notes)

    def _scratch(self, size: int) -> tuple[Buffer, Buffer]:
        """Two buffers of at least `size` bytes; fresh ones cost more than the reading (page faults)."""
        if size > SCRATCH_MAX_BYTES:
            return ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
        if self._buffers is None or len(self._buffers[0]) < size:
            self._buffers = ctypes.create_string_buffer(size), ctypes.create_string_buffer(size)
        return self._buffers

    def _read_note(self, key: bytes) -> bytes:
        before = self._notes.lookup(key)
        for _ in range(READ_TRIES):
            after = self._notes.lookup(key)
            if before is None or after is None:
                return bytes(NOTE.size)
            if _stable(before[0], after[0]) and before[:4] == after[:4]:
                return before
            before = after
        raise Retryable(
            "note_busy", "a flow's note changes faster than it can be read: packets flood a held flow"
        )

    def delete_notes(self, keys: bytes, n: int) -> int:
        """Delete n notes, after their flows were deleted. Returns how many there were."""
        return self._notes.delete_many(keys, n)

    # -- addresses -------------------------------------------------------------------------------------

    def set_addr(self, ip: str, state: int, epoch: int = 0) -> None:
        self.put_addr(ip, AddrEntry(state, epoch=epoch))

    def put_addr(self, ip: str, entry: AddrEntry) -> None:
        self._addrs.update(_address(ip), entry.pack())

    def del_addr(self, ip: str) -> bool:
        """False if it was not there."""
        return self._addrs.delete(_address(ip))

    def in_transit(self, ip: str) -> bool:
        """Is the address on its way by the tunnel, in a stage in which flows may live on either node?"""
        value = self._addrs.lookup(_address(ip))
        if value is None:
            return False
        state, flags, *_ = ADDR_CTL.unpack(value)
        return bool(flags & ADDR_TUNNEL) and state in (ADDR_LEAVING, ADDR_ARRIVING)

    def end_births(self, ip: str) -> int:
        """Forget the connections that were made while the address was on its way. Returns how many."""
        wanted = _address(ip)
        every = self._births.keys()
        keys = [key for key in every if key[:16] == wanted]
        return self._births.delete_many(b"".join(keys), len(keys)) if keys else 0

    def configure(
        self, *, nic_ifindex: int, tunnel_ifindex: int, probe_port: int, nic_mac: bytes,
        gateway_mac_v4: bytes, gateway_mac_v6: bytes,
    ) -> None:  # fmt: skip
        """What the programs must know of this node; `tunnel_ifindex` 0: nothing is steered."""
        port = struct.pack("!H", probe_port)
        conf = CONF.pack(nic_ifindex, tunnel_ifindex, port, nic_mac, gateway_mac_v4, gateway_mac_v6, b"")
        self._conf.update(struct.pack("=I", 0), conf)

    # -- what is there ---------------------------------------------------------------------------------

    def flow_keys(self) -> list[bytes]:
        return self._flows.keys()

    def flow_states(self) -> dict[int, int]:
        """How many entries are in each state, at about this moment. Not while clients wait: 28 us a hundred."""
        room = 1024
        while room <= 2 * self._flows.spec.max_entries:
            values = ctypes.create_string_buffer(room * CTL.size)
            found = self._flows.snapshot(values)
            if found is not None:
                return Counter(memoryview(values).cast("B").cast("I")[: len(found) * CTL.size // 4 : CTL.size // 4])
            room *= 4
        # a kernel without the batch command
        every = (self._flows.lookup(key) for key in self.flow_keys())
        return Counter(CTL.unpack(value)[0] for value in every if value is not None)

    def note_keys(self) -> list[bytes]:
        return self._notes.keys()

    def addr_keys(self) -> list[bytes]:
        return self._addrs.keys()

    def birth_keys(self) -> list[bytes]:
        return self._births.keys()

    def counters(self) -> dict[str, int]:
        """Packets by reason, since the maps were made."""
        totals = {}
        for i, reason in enumerate(REASONS):
            value = self._counters.lookup(struct.pack("=I", i)) or b""
            totals[reason] = sum(struct.unpack(f"={len(value) // 8}Q", value))
        return totals

    def programs(self) -> dict[str, ProgInfo]:
        return {name: prog_info(fd) for name, fd in self._progs.items()}

    # -- TC --------------------------------------------------------------------------------------------

    def attach(self, netns_path: str | None, ifname: str, role: str) -> None:
        """Put the role's programs ("pod": hold and gate, "nic": hold) on an interface. Idempotent; after an
        upgrade it exchanges the old programs for the pinned ones in one step."""
        with hold_tc.Interface(netns_path, ifname) as interface:
            for name, direction in hold_tc.ROLES[role]:
                interface.put(name, direction, self._progs[name])

    def detach(self, netns_path: str | None, ifname: str, role: str) -> None:
        """Take them off; the clsact qdisc goes too if it was ours and nothing else is on it. Idempotent."""
        with hold_tc.Interface(netns_path, ifname) as interface:
            interface.remove(hold_tc.ROLES[role])

    def attached(self, netns_path: str | None, ifname: str) -> set[str]:
        """Names of our programs on an interface."""
        with hold_tc.Interface(netns_path, ifname) as interface:
            return interface.programs()


def _close_all(progs: dict[str, int]) -> None:
    for fd in progs.values():
        os.close(fd)


def _stable(before: int, after: int) -> bool:
    """Two reads of a version: nobody was writing during the first read of the note."""
    return before == after and before & 1 == 0


def _words(buffer: Buffer) -> memoryview:
    return memoryview(buffer).cast("B").cast("I")


def _split(keys: bytes, n: int) -> list[bytes]:
    size = KEY.size
    return [keys[i * size : (i + 1) * size] for i in range(n)]


def _address(ip: str) -> bytes:
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv4Address):
        return bytes(10) + b"\xff\xff" + address.packed
    return address.packed


# -- the loader's command line -------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m midstream_agent.hold", description="BPF programs of a node"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser(
        "load", help="compile the programs and pin them with their maps; keeps existing maps"
    )
    load.add_argument(
        "--without-hold", action="store_true", help="programs that pass everything (control for tests)"
    )
    load.add_argument(
        "--sources", type=Path, metavar="DIR", help="compile these instead of the ones that came along"
    )
    commands.add_parser("unload", help="remove the pins; filters that are attached keep their programs")
    commands.add_parser("show", help="counters and programs, as JSON")
    for command in commands.choices.values():
        command.add_argument("--bpffs", type=Path, default=Path("/sys/fs/bpf/midstream"), metavar="DIR")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except MidstreamError as e:
        print(e, file=sys.stderr)
        return 75 if isinstance(e, Retryable) else 1


def _run(args: argparse.Namespace) -> int:
    if args.command == "show":
        with Hold.open(args.bpffs) as hold:
            programs = {name: {"id": p.id, "tag": p.tag} for name, p in hold.programs().items()}
            print(
                json.dumps(
                    {"counters": hold.counters(), "programs": programs, "flows": len(hold.flow_keys())}
                )
            )
        return 0
    from midstream_agent import hold_load  # not in the agent's process: it loads LLVM

    if args.command == "load":
        hold_load.load(args.bpffs, args.sources, args.without_hold)
    else:
        hold_load.unload(args.bpffs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
