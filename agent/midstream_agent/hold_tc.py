"""TC filters of hold and gate, by netlink, in any network namespace.

Other parties use clsact too (policy agents, other CNIs). Our filters therefore have a handle of their own,
take the first priority that will have them (a filter before us that says "ok" would end the chain and let a
held flow through), and pass packets on to the next filter. Only ours are ever removed, and the qdisc only
with its last filter and if it was us who made it.

An `Interface` enters the namespace for its lifetime: use it in a thread that may do so.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from midstream_runtime.contract.errors import Final
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from midstream_agent import netns

INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # TC_H_CLSACT with TC_H_MIN_INGRESS, TC_H_MIN_EGRESS
# The handle says whose the filter is, and whether the qdisc was ours too: that outlives an agent.
HANDLE, HANDLE_OWN_QDISC = 0x4D53, 0x4D54
ETH_P_ALL = 3
PRIORITIES = range(1, 17)

ROLES: dict[str, tuple[tuple[str, int], ...]] = {
    # the gate first: a flow whose ingress is held while its egress is open could be answered twice
    "pod": (("ms_gate_egress", EGRESS), ("ms_hold_ingress", INGRESS)),
    "nic": (("ms_nic_ingress", INGRESS), ("ms_nic_egress", EGRESS)),
    "tunnel": (("ms_tunnel_ingress", INGRESS),),
    "route": (("ms_route_egress", EGRESS),),
}


@dataclass(frozen=True, slots=True)
class _Ours:
    """Our filter in one direction."""

    priority: int
    handle: int
    name: str


class Interface:
    """One interface, in its namespace, for the length of a `with` block."""

    def __init__(self, netns_path: str | None, ifname: str) -> None:
        self._netns_path = netns_path
        self._ifname = ifname
        self._stack = ExitStack()

    def __enter__(self) -> Interface:
        with self._stack as stack:
            if self._netns_path is not None:
                fd = os.open(self._netns_path, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                stack.enter_context(netns.inside(fd))
            self._ipr = stack.enter_context(IPRoute())
            found = self._ipr.link_lookup(ifname=self._ifname)
            if not found:
                raise Final(
                    "no_interface", f"no interface {self._ifname} in {self._netns_path or 'this namespace'}"
                )
            self._index = found[0]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def put(self, name: str, direction: int, prog_fd: int) -> None:
        """Attach a program, or exchange the one that is there under our handle, in one step."""
        present = self._ours(direction)
        if present is not None:
            # also when it is this very program: pyroute2 0.9 does not decode which one is there
            return self._filter("replace-filter", name, direction, present.priority, present.handle, prog_fd)
        handle = HANDLE_OWN_QDISC if self._add_clsact() or self._made_qdisc() else HANDLE
        refused: NetlinkError | None = None
        for priority in PRIORITIES:
            try:
                return self._filter("add-filter", name, direction, priority, handle, prog_fd)
            except NetlinkError as e:
                # a filter of another kind or protocol has this priority
                if e.code not in (errno.EINVAL, errno.ENOSPC, errno.EEXIST, errno.EOPNOTSUPP, errno.ENOENT):
                    raise
                refused = e
        raise Final(
            "tc_refused", f"{self._ifname}: the kernel takes no BPF filter at priorities 1-16 ({refused})"
        )

    def remove(self, names: Iterable[tuple[str, int]]) -> None:
        """Take programs off, and the qdisc if we made it and nothing else is on it."""
        made = self._made_qdisc()
        for name, direction in names:
            ours = self._ours(direction)
            if ours is not None and ours.name == name:
                self._ipr.tc(
                    "del-filter", "bpf", self._index, ours.handle, parent=direction, prio=ours.priority,
                    protocol=ETH_P_ALL,
                )  # fmt: skip
        if made and self._has_clsact() and not any(self._filters(d) for d in (INGRESS, EGRESS)):
            self._ipr.tc("del", "clsact", self._index)

    def programs(self) -> set[str]:
        found = (self._ours(d) for d in (INGRESS, EGRESS))
        return {ours.name for ours in found if ours is not None}

    # -- netlink ---------------------------------------------------------------------------------------

    def _filter(
        self, command: str, name: str, direction: int, priority: int, handle: int, prog_fd: int
    ) -> None:
        self._ipr.tc(
            command, "bpf", self._index, handle, parent=direction, prio=priority, protocol=ETH_P_ALL,
            fd=prog_fd, name=name, direct_action=True,
        )  # fmt: skip

    def _add_clsact(self) -> bool:
        """True if it was not there."""
        if self._has_clsact():
            return False
        try:
            self._ipr.tc("add", "clsact", self._index)
        except NetlinkError as e:
            if e.code != errno.EEXIST:
                raise
            return False
        return True

    def _made_qdisc(self) -> bool:
        found = (self._ours(d) for d in (INGRESS, EGRESS))
        return any(ours is not None and ours.handle == HANDLE_OWN_QDISC for ours in found)

    def _has_clsact(self) -> bool:
        return any(q.get_attr("TCA_KIND") == "clsact" for q in self._ipr.get_qdiscs(index=self._index))

    def _filters(self, direction: int) -> list[Any]:
        if not self._has_clsact():
            return []
        found = self._ipr.get_filters(index=self._index, parent=direction)
        return [f for f in found if f.get_attr("TCA_OPTIONS") is not None]

    def _ours(self, direction: int) -> _Ours | None:
        for f in self._filters(direction):
            if f["handle"] not in (HANDLE, HANDLE_OWN_QDISC) or f.get_attr("TCA_KIND") != "bpf":
                continue
            options = f.get_attr("TCA_OPTIONS")
            name = str(options.get_attr("TCA_BPF_NAME") or "")
            if name.startswith("ms_"):
                return _Ours(f["info"] >> 16, f["handle"], name)
        return None
