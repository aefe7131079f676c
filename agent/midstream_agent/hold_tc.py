"""TC filters of hold and gate, by netlink, in any network namespace.

Other parties use clsact too (policy agents, other CNIs). Our filters therefore have a handle of their own,
take the first priority that will have them (a filter before us that says "ok" would end the chain and let a
held flow through), and pass packets on to the next filter. Only ours are ever removed, and the qdisc only when
its last filter is gone and it was us who made it.

An `Interface` enters the namespace for its lifetime: use it in a thread that may do so.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from typing import Any

from midstream_runtime.contract.errors import Final
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from midstream_agent import netns
from midstream_agent.bpf import prog_info

INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # TC_H_CLSACT with TC_H_MIN_INGRESS, TC_H_MIN_EGRESS
CLSACT = 0xFFFF0000
HANDLE = 0x4D53
ETH_P_ALL = 3
PRIORITIES = range(1, 17)

ROLES: dict[str, tuple[tuple[str, int], ...]] = {
    # the gate first: a flow whose ingress is held while its egress is open could be answered twice
    "pod": (("ms_gate_egress", EGRESS), ("ms_hold_ingress", INGRESS)),
    "nic": (("ms_nic_ingress", INGRESS),),
}

close_fd = os.close


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
                raise Final("no_interface", f"no interface {self._ifname} in {self._netns_path or 'this namespace'}")
            self._index = found[0]
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def put(self, name: str, direction: int, prog_fd: int) -> None:
        """Attach a program, or exchange the one that is there under our handle."""
        present = self._ours(direction)
        if present is not None:
            priority, _, prog_id = present
            if prog_id != prog_info(prog_fd).id:
                self._filter("replace-filter", name, direction, priority, prog_fd)
            return
        self._add_clsact()
        refused: NetlinkError | None = None
        for priority in PRIORITIES:
            try:
                return self._filter("add-filter", name, direction, priority, prog_fd)
            except NetlinkError as e:
                # a filter of another kind or protocol has this priority
                if e.code not in (errno.EINVAL, errno.ENOSPC, errno.EEXIST, errno.EOPNOTSUPP, errno.ENOENT):
                    raise
                refused = e
        raise Final("tc_refused", f"{self._ifname}: the kernel takes no BPF filter at priorities 1-16 ({refused})")

    def remove(self, name: str, direction: int) -> None:
        present = self._ours(direction)
        if present is not None and present[1] == name:
            self._ipr.tc(
                "del-filter", "bpf", self._index, HANDLE, parent=direction, prio=present[0], protocol=ETH_P_ALL
            )

    def remove_empty_clsact(self) -> None:
        if not self._has_clsact() or any(self._filters(d) for d in (INGRESS, EGRESS)):
            return
        self._ipr.tc("del", "clsact", self._index)

    def programs(self) -> dict[str, int]:
        found = (self._ours(d) for d in (INGRESS, EGRESS))
        return {name: prog_id for _, name, prog_id in filter(None, found)}

    # -- netlink ---------------------------------------------------------------------------------------

    def _filter(self, command: str, name: str, direction: int, priority: int, prog_fd: int) -> None:
        self._ipr.tc(
            command, "bpf", self._index, HANDLE, parent=direction, prio=priority, protocol=ETH_P_ALL,
            fd=prog_fd, name=name, direct_action=True,
        )  # fmt: skip

    def _add_clsact(self) -> None:
        if self._has_clsact():
            return
        try:
            self._ipr.tc("add", "clsact", self._index)
        except NetlinkError as e:
            if e.code != errno.EEXIST:
                raise

    def _has_clsact(self) -> bool:
        return any(q.get_attr("TCA_KIND") == "clsact" for q in self._ipr.get_qdiscs(index=self._index))

    def _filters(self, direction: int) -> list[Any]:
        if not self._has_clsact():
            return []
        found = self._ipr.get_filters(index=self._index, parent=direction)
        return [f for f in found if f.get_attr("TCA_OPTIONS") is not None]

    def _ours(self, direction: int) -> tuple[int, str, int] | None:
        """(priority, program name, program id) of our filter in a direction."""
        for f in self._filters(direction):
            if f["handle"] != HANDLE or f.get_attr("TCA_KIND") != "bpf":
                continue
            options = dict(f.get_attr("TCA_OPTIONS")["attrs"])
            name = str(options.get("TCA_BPF_NAME", ""))
            if name.startswith("ms_"):
                return f["info"] >> 16, name, _program_id(options)
        return None


def _program_id(options: dict[str, Any]) -> int:
    """TCA_BPF_ID (11) is newer than pyroute2's table, which hands it over as unknown bytes."""
    for key in ("TCA_BPF_ID", "UNKNOWN", 11):
        value = options.get(key)
        if isinstance(value, int):
            return value
    return 0
