"""Hold and gate: the agent's hands on the BPF maps and TC filters of a node.

    python -m midstream_agent.hold load --bpffs DIR      compile, pin, exit (the only user of bcc)
    python -m midstream_agent.hold unload --bpffs DIR    remove the pins

Programs and maps are pinned by a short-lived loader, so holds outlive this process; `Hold` only opens the
pins. What the maps mean is said in bpf/midstream_maps.h, and by whom a packet is dropped in which state.

Concurrency: the map functions are plain system calls (microseconds, the GIL released) and may be called from
the event loop; BPF programs run on other CPUs at the same time, which is why notes are read twice and why
entries are deleted before their notes. `attach`, `detach` and `attached` use netlink and setns(2): call them in
the agent's netlink thread.
"""

from __future__ import annotations

import argparse
import ctypes
import ipaddress
import json
import struct
import sys
from pathlib import Path

from midstream_runtime.contract.errors import Final, MidstreamError, Retryable

from midstream_agent import hold_tc
from midstream_agent.bpf import NOEXIST, Map, ProgInfo, obj_get, prog_info
from midstream_agent.hold_layout import (
    ADDR_CTL,
    ADDR_LEAVING,
    FLOW_FROZEN,
    FLOW_HELD,
    FLOW_MOVED,
    MAPS,
    NOTE,
    PROGRAMS,
    REASONS,
)

__all__ = ["ADDR_LEAVING", "FLOW_FROZEN", "FLOW_HELD", "FLOW_MOVED", "Hold"]

# A note is written in about a microsecond; a reader that meets a writer this often meets a bug.
READ_TRIES = 1000


class Hold:
    """The pinned maps and programs of this node."""

    def __init__(self, bpffs: Path, maps: dict[str, Map], progs: dict[str, int]) -> None:
        self.bpffs = bpffs
        self._flows = maps["ms_flows"]
        self._notes = maps["ms_notes"]
        self._addrs = maps["ms_addrs"]
        self._counters = maps["ms_counters"]
        self._progs = progs

    @classmethod
    def open(cls, bpffs: Path | str) -> Hold:
        """Open what the loader pinned; refuses maps of another layout."""
        where = Path(bpffs)
        try:
            maps = {spec.name: Map.pinned(where / spec.name) for spec in MAPS}
            progs = {name: obj_get(where / name) for name in PROGRAMS}
        except OSError as e:
            raise Final(
                "hold_not_loaded",
                f"no BPF programs under {where} ({e.strerror}): run `python -m midstream_agent.hold load --bpffs {where}`",
            ) from e
        for spec in MAPS:
            if maps[spec.name].spec != spec:
                raise Final("hold_layout", f"{where / spec.name} has another layout than this agent: load its programs")
        return cls(where, maps, progs)

    def close(self) -> None:
        """Close the descriptors; programs, maps and filters stay."""
        for m in (self._flows, self._notes, self._addrs, self._counters):
            m.close()
        for fd in self._progs.values():
            hold_tc.close_fd(fd)
        self._progs = {}

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
        """Create empty notes, before the flows are frozen; those that exist stay. Returns how many are new."""
        return self._notes.update_many(keys, bytes(n * NOTE.size), n, NOEXIST)

    def read_notes(self, keys: bytes, n: int) -> bytes:
        """n struct ms_flow_note, none of them torn; zeros where there is none."""
        first = ctypes.create_string_buffer(n * NOTE.size)
        second = ctypes.create_string_buffer(n * NOTE.size)
        missing = set(self._notes.lookup_many(keys, n, first))
        missing.update(self._notes.lookup_many(keys, n, second))
        for i in range(n):
            at = i * NOTE.size
            if i in missing:
                first[at : at + NOTE.size] = bytes(NOTE.size)
            elif not _stable(first[at : at + 4], second[at : at + 4]):
                first[at : at + NOTE.size] = self._read_note(keys[i * len(keys) // n : (i + 1) * len(keys) // n])
        return first.raw

    def _read_note(self, key: bytes) -> bytes:
        before = self._notes.lookup(key)
        for _ in range(READ_TRIES):
            after = self._notes.lookup(key)
            if before is None or after is None:
                return bytes(NOTE.size)
            if _stable(before[:4], after[:4]):
                return before
            before = after
        raise Retryable("note_busy", "a flow's note changes faster than it can be read: packets flood a held flow")

    def delete_notes(self, keys: bytes, n: int) -> int:
        """Delete n notes, after their flows were deleted. Returns how many there were."""
        return self._notes.delete_many(keys, n)

    # -- addresses -------------------------------------------------------------------------------------

    def set_addr(self, ip: str, state: int, epoch: int = 0) -> None:
        self._addrs.update(_address(ip), ADDR_CTL.pack(state, 0, epoch, 0))

    def del_addr(self, ip: str) -> bool:
        """False if it was not there."""
        return self._addrs.delete(_address(ip))

    # -- what is there ---------------------------------------------------------------------------------

    def flow_keys(self) -> list[bytes]:
        return self._flows.keys()

    def note_keys(self) -> list[bytes]:
        return self._notes.keys()

    def addr_keys(self) -> list[bytes]:
        return self._addrs.keys()

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
        """Take them off; the clsact qdisc goes too if nothing else uses it. Idempotent."""
        with hold_tc.Interface(netns_path, ifname) as interface:
            for name, direction in hold_tc.ROLES[role]:
                interface.remove(name, direction)
            interface.remove_empty_clsact()

    def attached(self, netns_path: str | None, ifname: str) -> dict[str, int]:
        """Our programs on an interface: name -> program id."""
        with hold_tc.Interface(netns_path, ifname) as interface:
            return interface.programs()


def _stable(before: bytes, after: bytes) -> bool:
    """Two reads of a version: nobody was writing during the first read of the note."""
    return before == after and before[0] & 1 == 0


def _address(ip: str) -> bytes:
    address = ipaddress.ip_address(ip)
    if isinstance(address, ipaddress.IPv4Address):
        return bytes(10) + b"\xff\xff" + address.packed
    return address.packed


# -- the loader's command line -------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m midstream_agent.hold", description="BPF programs of a node")
    commands = parser.add_subparsers(dest="command", required=True)
    load = commands.add_parser("load", help="compile the programs and pin them with their maps; keeps existing maps")
    load.add_argument("--without-hold", action="store_true", help="programs that pass everything (control for tests)")
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
            print(json.dumps({"counters": hold.counters(), "programs": programs, "flows": len(hold.flow_keys())}))
        return 0
    from midstream_agent import hold_load  # not in the agent's process: it loads LLVM

    if args.command == "load":
        hold_load.load(args.bpffs, without_hold=args.without_hold)
    else:
        hold_load.unload(args.bpffs)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
