"""Addresses on their way, by switchover Steer: what each node does with their packets in which stage.

    source   leave  ------------> overlap --> follow --> go     --> end
    target   arrive --> open  --> overlap --> own    --> settle --> end

Packets of LIVE flows stay, those of MOVED ones go through the tunnel; what a stage changes is a flag of ms_addrs
(bpf/midstream_maps.h).

    leave, arrive   PREPARE   the host routes the address to our device; the tunnel can be proved
    open            COMMIT    new connections are the target's from now on
    overlap         then      the network may take packets from either node: both emit; new connections go to the target
    follow, own     proved    the target emits; the source's remaining flows speak through it
    go, settle      RELEASE   nothing of the address is left at the source
    end             after the time in which late packets may come

Every stage is set as a whole and may be set again, so that an agent that restarted just says where it is. Nothing
here waits: a stage is one map update and at most one route.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from midstream_agent.hold import AddrEntry
from midstream_agent.hold_layout import (
    ADDR_ARRIVING,
    ADDR_GONE,
    ADDR_LEAVING,
    ADDR_OUT_DIRECT,
    ADDR_OUT_TUNNEL,
    ADDR_SETTLED,
    ADDR_SYN_HERE,
    ADDR_SYN_PEER,
    ADDR_TUNNEL,
)
from midstream_agent.net import sysctl_file

if TYPE_CHECKING:
    from midstream_agent.node import Attached, Node

log = logging.getLogger(__name__)
LINK_ADDRESS = "169.254.77.3"  # on no wire
BOTH = ADDR_OUT_TUNNEL | ADDR_OUT_DIRECT


@dataclass(slots=True)
class Transit:
    """All addresses of one job on one node; `peer` and `vni` are the tunnel's other end and its number."""

    node: Node
    at: Attached
    addresses: list[str]
    peer: str
    vni: int
    _rp_filter: str = ""

    # -- source ----------------------------------------------------------------------------------------

    def leave(self) -> None:
        self._put(ADDR_LEAVING, ADDR_OUT_DIRECT)
        self._route_to_us()

    def overlap_leaving(self) -> None:
        self._put(ADDR_LEAVING, BOTH | ADDR_SYN_PEER)

    def follow(self) -> None:
        self._put(ADDR_LEAVING, ADDR_OUT_TUNNEL | ADDR_SYN_PEER)

    def go(self) -> None:
        self._put(ADDR_GONE, ADDR_OUT_TUNNEL)
        self._restore_link()

    def stay(self) -> None:
        """Back to the time before `leave`: the host routes the address to the pod, and nothing is steered."""
        self._route(self.at.link.index)
        self._restore_link()
        self.end()

    # -- target ----------------------------------------------------------------------------------------

    def arrive(self) -> None:
        self._put(ADDR_ARRIVING, ADDR_OUT_TUNNEL)
        self._route_to_us()

    def open(self) -> None:
        self._put(ADDR_ARRIVING, ADDR_OUT_TUNNEL | ADDR_SYN_HERE)

    def overlap_arriving(self) -> None:
        self._put(ADDR_ARRIVING, BOTH | ADDR_SYN_HERE)

    def own(self) -> None:
        self._put(ADDR_ARRIVING, ADDR_OUT_DIRECT | ADDR_SYN_HERE)

    def settle(self) -> None:
        """The address is like any other of this node, but for late packets that the source still steers here."""
        self._put(ADDR_SETTLED, ADDR_OUT_DIRECT)
        self._route(self.at.link.index)
        self._restore_link()

    def retreat(self) -> None:
        """Back to the time before `arrive`; the route is the caller's."""
        self._restore_link()
        self.end()

    # -- either ----------------------------------------------------------------------------------------

    def end(self) -> None:
        for address in self.addresses:
            self.node.hold.del_addr(address)
            self.node.hold.end_births(address)

    def _route_to_us(self) -> None:
        """No rp_filter on the pod's link, which would drop what the pod says: the way back leads to our device.

        Where the node's `all` forbids that, a loose one, which passes only on a link that has an address
        (fib_validate_source). The address stays: the kernel takes a link's routes away with its last one.
        """
        assert self.node.tunnel is not None
        self._rp_filter = self._rp_filter or self._knob.read_text(encoding="ascii").strip()
        everywhere = self._knob.parents[1].joinpath("all/rp_filter").read_text(encoding="ascii").strip()
        if everywhere == "0":
            self._knob.write_text("0", encoding="ascii")
        else:
            self.node.routes.add_local(LINK_ADDRESS, self.at.link.index)
            self._knob.write_text("2", encoding="ascii")
        self._route(self.node.tunnel.routed_index)

    def _restore_link(self) -> None:
        """What it was; what new interfaces get when an earlier process of this agent has changed it."""
        default = self._knob.parents[1] / "default/rp_filter"
        value = self._rp_filter or default.read_text(encoding="ascii").strip()
        try:
            self._knob.write_text(value, encoding="ascii")
        except FileNotFoundError:
            log.info("%s is gone, and its rp_filter with it", self.at.link.name)

    @property
    def _knob(self) -> Path:
        return sysctl_file(f"net/ipv4/conf/{self.at.link.name}/rp_filter")

    def _put(self, state: int, flags: int) -> None:
        link = self.at.link
        mac = bytes.fromhex(link.pod_mac.replace(":", ""))
        entry = AddrEntry(state, flags | ADDR_TUNNEL, self.vni, self.peer, link.index, mac)
        for address in self.addresses:
            self.node.hold.put_addr(address, entry)

    def _route(self, ifindex: int) -> None:
        for address in self.addresses:
            self.node.routes.add(address, ifindex)
