"""The doctor's question to another node: do full-size packets pass the tunnel there and back?

It is asked as a job asks it in PREPARE (tunnel.py), of an address that is made up for the purpose: link-local, random,
on no wire and no pod. Both ends steer it through the tunnel as long as the session lasts, which is no job's.
"""

from __future__ import annotations

import ipaddress
import secrets

from midstream_runtime.contract.errors import Final, MidstreamError

from midstream_agent import peer
from midstream_agent.contract import agent_pb2 as pb
from midstream_agent.hold import ADDR_LEAVING, AddrEntry
from midstream_agent.hold_layout import ADDR_TUNNEL
from midstream_agent.node import Node
from midstream_agent.tunnel import Tunnel

ADDRESSES = "fe80::77:"  # and 64 random bits
PACKED = bytes.fromhex("fe800000000000000077")
CHECK = "~doctor-"  # no job has such an id
REMEDY = {
    "warning": "as said there; until then clients wait until the network has moved the address (switchover Wait)",
    "error": "as said there; until then nothing can move between the two nodes",
}


def is_check(job_id: str) -> bool:
    return job_id.startswith(CHECK)


async def try_tunnel(node: Node, other: pb.NodeRef) -> pb.Finding:
    """What clients can expect when streams move between this node and another."""
    check = f"tunnel to {other.name}"
    try:
        took_ms = await _round_trip(node, other)
    except MidstreamError as e:
        severity = "warning" if e.code.startswith(("tunnel_", "no_tunnel", "mtu_")) else "error"
        return pb.Finding(check=check, severity=severity, message=f"{e.code}: {e.message}", remedy=REMEDY[severity])
    return pb.Finding(check=check, severity="ok", message=f"a full-size packet there and back in {took_ms:.1f} ms")


async def _round_trip(node: Node, other: pb.NodeRef) -> float:
    tunnel = _tunnel_of(node)
    token = secrets.token_bytes(6).hex()
    address = f"{ADDRESSES}{token[:4]}:{token[4:8]}:{token[8:]}"
    ours = pb.PeerTunnel(address=node.settings.node_addresses[0], vni=secrets.randbelow((1 << 24) - 1) + 1)
    session = peer.PeerSession(node.settings, other.name, other.endpoint, f"{CHECK}{token}", 0, node.boot_id)
    try:
        await session.open()
        reply = await session.ask(pb.PeerRequest(probe=pb.PeerProbe(address=address, tunnel=ours)))
        _check_mtu(node.settings.nic.mtu_bytes, other.name, reply.probed.mtu_bytes)
        _steer(node, tunnel, address, reply.probed.tunnel.address, ours.vni)
        return await tunnel.prove(address, other.name)
    finally:
        node.hold.del_addr(address)
        await session.close()


def _steer(node: Node, tunnel: Tunnel, address: str, far_end: str, vni: int) -> None:
    # the pod's link is our own device: nothing but the agents' probes is ever sent to the address
    node.hold.put_addr(address, AddrEntry(ADDR_LEAVING, ADDR_TUNNEL, vni, far_end, tunnel.routed_index))


def _tunnel_of(node: Node) -> Tunnel:
    if node.tunnel is None:
        raise Final("no_tunnel", f"{node.settings.node} has no VXLAN tunnel")
    return node.tunnel


def _check_mtu(ours_bytes: int, other: str, theirs_bytes: int) -> None:
    if ours_bytes != theirs_bytes:
        raise Final(
            "mtu_differs",
            f"this node's NIC has an MTU of {ours_bytes} bytes, that of {other} {theirs_bytes}: streams move to the "
            "larger one only; give both the same (--mtu)",
        )


class Answerer(peer.Handler):
    """The other end. What it has made ends with the session."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._addresses: list[str] = []

    async def handle(self, request: pb.PeerRequest, reply: pb.PeerReply) -> None:
        if request.WhichOneof("body") != "probe":
            raise Final("peer_protocol", "a doctor's session asks for a probe, and for nothing else")
        address, theirs = request.probe.address, request.probe.tunnel
        if not address.startswith(ADDRESSES):
            raise Final("peer_protocol", f"{address} is no address of a doctor's probe")
        tunnel = _tunnel_of(self._node)
        self._addresses.append(address)
        _steer(self._node, tunnel, address, theirs.address, theirs.vni)
        settings = self._node.settings
        ours = next(a for a in settings.node_addresses if (":" in a) == (":" in theirs.address))
        reply.probed.tunnel.address, reply.probed.tunnel.vni = ours, theirs.vni
        reply.probed.mtu_bytes = settings.nic.mtu_bytes

    def session_ended(self) -> None:
        for address in self._addresses:
            self._node.hold.del_addr(address)


def forget_all(node: Node) -> None:
    """What an earlier process of this agent left when it died in the middle of a check."""
    for key in node.hold.addr_keys():
        if key.startswith(PACKED):
            node.hold.del_addr(str(ipaddress.IPv6Address(key)))
