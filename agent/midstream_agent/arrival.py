"""The addresses of one job at its target: on the pod first, with a route and the world's packets last.

    take --> choose_switchover --> let_syns_in --> move --> end
      |                                             ^
      +--> give_back, unplumb (discard)             +-- take_over: the source's node is gone, by proof

With a tunnel the way between is transit.py's. All batches of a job share this.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import time

from midstream_runtime.contract.errors import Final

from midstream_agent import failpoints, tcp
from midstream_agent.announce import responder_for
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.hold import ADDR_LEAVING
from midstream_agent.node import Attached, Node
from midstream_agent.transit import Transit

log = logging.getLogger(__name__)


class Arrival:
    """It borrows the pod from its job; a job without one (`at` None: the pod has gone) only lets its addresses go."""

    def __init__(self, node: Node, job_id: str) -> None:
        self.at: Attached | None = None
        self.addresses: list[str] = []
        self.added: list[str] = []
        """Those that were not on the pod before."""
        self.transit: Transit | None = None
        """By switchover Steer."""
        self.moved = False
        """The addresses are here, by proof."""
        self._node, self._job_id = node, job_id
        self._opened = False

    # -- PREPARE ---------------------------------------------------------------------------------------

    async def take(self, at: Attached, addresses: list[str]) -> None:
        """Plumb without a route: no packet of this host goes to the pod before the address has moved."""
        self.at = at
        if self.transit is not None:
            return  # asked again, for other streams
        node = self._node
        taken = await node.net.run(node.net.routed_addresses)
        for address in addresses:
            if address in taken:
                raise Final(
                    "address_taken", f"{address} is routed to a pod of {node.settings.node} already: free it first"
                )
        node.address_comes_back(addresses)
        self.addresses = addresses
        for address in addresses:
            if await node.plumb(at, address, route=False):
                self.added.append(address)

    def choose_switchover(self, tunnel: pb.PeerTunnel | None) -> None:
        """The source offers a tunnel, or takes the offer back when no packet came through it."""
        assert self.at is not None
        if tunnel is None or self._node.tunnel is None:
            if self.transit is not None:
                self._end_transit()
            return
        if self.transit is None:
            self.transit = Transit(self._node, self.at, self.addresses, tunnel.address, tunnel.vni)
            self.transit.arrive()

    def _end_transit(self) -> None:
        """Packets of this host for the addresses go to the network again, as before the job."""
        assert self.transit is not None and self.at is not None
        for address in self.addresses:
            self._node.unroute(self.at, address)
        self.transit.retreat()
        self.transit = None

    # -- DISCARD ---------------------------------------------------------------------------------------

    def give_back(self) -> None:
        """This node is no way to the addresses any more."""
        if self.transit is not None:
            return self._end_transit()
        for address in self.addresses:
            if self.at is not None:
                self._node.unroute(self.at, address)
            self._node.hold.del_addr(address)

    async def unplumb(self) -> None:
        """The pod has only what it had before the job."""
        if self.at is not None:
            for address in self.added:
                await self._node.unplumb(self.at, address)

    # -- COMMIT, MOVE_ADDRESS --------------------------------------------------------------------------

    def let_syns_in(self) -> None:
        """New connections are this node's; packets of streams that are still at the source go there."""
        if self._opened:
            return
        self._opened = True
        if self.transit is not None:
            return self.transit.open()
        for address in self.addresses:
            self._node.hold.del_addr(address)

    async def move(self, req: pb.PeerMoveAddress) -> float:
        """Answer for the addresses from now on, and prove that the network agrees. Returns the milliseconds it took."""
        assert self.at is not None
        began = time.perf_counter()
        node = self._node
        if self.transit is not None:
            self.transit.overlap_arriving()
        for address in req.addresses if self.transit is None else ():
            # before COMMIT no connection may be accepted here: a rollback would take its address away
            node.hold.set_addr(address, ADDR_LEAVING)
            node.routes.add(address, self.at.link.index)
        node.nic.announce(list(req.addresses))
        await failpoints.point("target.MOVE_ADDRESS.do.before")
        timeout_s = node.settings.timeouts.address_confirm_s
        try:
            await asyncio.gather(*(self._prove(a, req, timeout_s) for a in req.addresses))
        except TimeoutError as e:
            raise Final("address_not_moved", f"{e}: the network did not move the address") from e
        await failpoints.point("target.MOVE_ADDRESS.do.after")
        if self.transit is not None:
            self.transit.own()
        self.moved = True
        return (time.perf_counter() - began) * 1e3

    async def _prove(self, address: str, req: pb.PeerMoveAddress, timeout_s: float) -> None:
        await self._node.nic.prove(address, responder_for(address, req.probe_addresses), req.probe_port, timeout_s)

    def take_over(self) -> None:
        """Whatever the network still thinks, packets for the addresses are this node's, and this node emits."""
        if self.moved or self.at is None:
            return
        if self.transit is not None:
            self.transit.own()
            self._opened = True
        for address in self.addresses if self.transit is None else ():
            self._node.routes.add(address, self.at.link.index)
        self._node.nic.announce(self.addresses)
        self.moved = True

    # -- the ends --------------------------------------------------------------------------------------

    def settle(self) -> None:
        """The addresses are like any other of this node; their flows need no entries any more."""
        if self.transit is None:
            return
        self.transit.settle()
        self._delete_flows()
        for address in self.addresses:
            self._node.hold.end_births(address)
        self._node.linger_moved(b"", self.addresses)
        self.transit = None

    async def end(self, *, settle: bool) -> None:
        """The job is over; `settle`: its streams are here."""
        gone = self.at is None
        try:
            if settle and not gone:
                self.settle()
        except OSError as e:
            if e.errno not in (errno.ENODEV, errno.EINVAL):
                raise
            log.warning("job %s: its pod has gone before its addresses had settled", self._job_id)
            gone = True
        if gone:
            await self._let_go()

    async def _let_go(self) -> None:
        """Their pod has gone, and with it its link and all that was bound to it."""
        node = self._node
        keys = self._delete_flows()
        node.hold.delete_notes(keys, len(keys) // tcp.KEY_BYTES)
        for address in self.addresses:
            node.hold.del_addr(address)
            node.hold.end_births(address)
            if node.tunnel is not None:
                node.routes.delete(address, node.tunnel.routed_index)
            await node.net.run(node.net.del_rules, address)

    def _delete_flows(self) -> bytes:
        keys = self._node.flows_of(self.addresses)
        self._node.hold.delete_flows(keys, len(keys) // tcp.KEY_BYTES)
        return keys
