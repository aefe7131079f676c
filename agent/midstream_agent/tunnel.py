"""The tunnel between nodes, and the device to which a host routes addresses that are on their way.

    msvx0          VXLAN, flow-based (collect_md): one a node, whatever its peers; where a packet goes and whether
                   one is taken is BPF's word, out of ms_addrs (bpf/ms_steer.h)
    msrt0, msrt1   a veth pair without ARP: the host's routing hands packets to msrt0, whose egress program passes
                   them to the pod or into the tunnel; nothing ever arrives at msrt1

Proof: before anything is frozen, the source sends probes through the tunnel, a small one and one as large as the
largest segment of a stream, which must not be fragmented; the target's agent sends them back. The inner packet's
destination is the floating IP, so that a probe proves this job's entries too: it takes the way that steered packets
will take, both ways. Both ends use packet sockets, which see a packet before TC does; a probe's nonce is the source's
own, so that nobody else can have answered.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from collections.abc import Callable, Iterator

from midstream_runtime.contract.errors import Final
from pyroute2 import IPRoute

from midstream_agent.announce import probe_filter, udp_packet
from midstream_agent.net import sysctl, unless_exists
from midstream_agent.settings import Settings, Timeouts

TUNNEL, ROUTED, ROUTED_PEER = "msvx0", "msrt0", "msrt1"
ADDRESS = "169.254.77.2"  # link-local, on no wire: rp_filter wants one on a device that receives
ASK, ANSWER = b"MSTUNASK", b"MSTUNANS"
NONCE_LEN = 16
SMALL_BYTES = 128
RESERVED_BYTES = 100
"""What listeners leave for the tunnel (TCP_MAXSEG, midstream_runtime.handoff): 50 for VXLAN over IPv4, 70 over IPv6."""
_ETHERTYPE = {4: b"\x08\x00", 6: b"\x86\xdd"}
IFF_NOARP = 0x80
PACKET_OUTGOING = 4  # linux/if_packet.h
SENDER4, SENDER6 = "169.254.77.2", "fe80::77:2"


class Tunnel:
    """Owner of the devices of one node and of the two packet sockets on them."""

    def __init__(self, settings: Settings, index: int, routed_index: int) -> None:
        self.index, self.routed_index = index, routed_index
        self._port, self._tunnel_port = settings.probe_port, settings.tunnel_port
        self._timeouts = settings.timeouts
        self._full_bytes = settings.nic.mtu_bytes - RESERVED_BYTES
        self._waiting: dict[bytes, asyncio.Event] = {}
        self._ears = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        probe_filter(self._ears, self._port)
        self._ears.bind((TUNNEL, 0x0003))
        self._ears.setblocking(False)
        self._mouth = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)  # protocol 0: receives nothing
        self._mouth.bind((ROUTED, 0))

    @classmethod
    def create(cls, ipr: IPRoute, settings: Settings, attach: Callable[[str, str], None]) -> Tunnel:
        """Make (or take over) the devices; `attach(ifname, role)` puts the programs on. Runs in the netlink thread.

        OSError or NetlinkError: this kernel has no VXLAN; the node can do without (switchover Wait).
        """
        unless_exists(
            ipr.link, "add", ifname=TUNNEL, kind="vxlan", vxlan_port=settings.tunnel_port,
            vxlan_collect_metadata=True, vxlan_learning=False, vxlan_udp_zero_csum6_rx=True,
        )  # fmt: skip
        unless_exists(ipr.link, "add", ifname=ROUTED, kind="veth", peer={"ifname": ROUTED_PEER})
        mtu = settings.nic.mtu_bytes
        for name in (TUNNEL, ROUTED, ROUTED_PEER):
            _quiet(name)
            index = ipr.link_lookup(ifname=name)[0]
            # the full MTU on the tunnel, too: what does not fit behind its header is fragmented outside and not lost
            ipr.link("set", index=index, mtu=mtu, flags=IFF_NOARP, change=IFF_NOARP)
        attach(TUNNEL, "tunnel")  # before the first packet can arrive
        attach(ROUTED, "route")
        for name in (TUNNEL, ROUTED, ROUTED_PEER):
            ipr.link("set", index=ipr.link_lookup(ifname=name)[0], state="up")
        index = ipr.link_lookup(ifname=TUNNEL)[0]
        unless_exists(ipr.addr, "add", index=index, address=ADDRESS, prefixlen=32)
        return cls(settings, index, ipr.link_lookup(ifname=ROUTED)[0])

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._ears.fileno(), self._on_frame)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._ears.fileno())
        self._ears.close()
        self._mouth.close()

    # -- proof -----------------------------------------------------------------------------------------

    async def prove(self, address: str, peer: str) -> float:
        """Milliseconds of the round trip of a full-size packet for `address`; Final when there is no such way."""
        if await self._round_trip(address, SMALL_BYTES) is None:
            raise Final(
                "tunnel_silent",
                f"no packet comes back through the tunnel from {peer}: allow UDP port {self._tunnel_port} between the "
                "nodes, or use switchover Wait",
            )
        took_ms = await self._round_trip(address, self._full_bytes)
        if took_ms is None:
            raise Final(
                "tunnel_mtu",
                f"small packets pass the tunnel to {peer}, those of {self._full_bytes} bytes do not: give both nodes "
                "the MTU of the path between them (--mtu), or use switchover Wait",
            )
        return took_ms

    async def _round_trip(self, address: str, size: int) -> float | None:
        nonce = secrets.token_bytes(NONCE_LEN)
        heard = self._waiting[nonce] = asyncio.Event()
        began = time.perf_counter()
        try:
            for pause_s in pauses_s(self._timeouts):
                self._say(address, ASK + nonce, size)
                try:
                    await asyncio.wait_for(heard.wait(), pause_s)
                    return (time.perf_counter() - began) * 1e3
                except TimeoutError:
                    continue
        finally:
            del self._waiting[nonce]
        return None

    def _say(self, address: str, text: bytes, size: int) -> None:
        v6 = ":" in address
        padding = bytes(size - (48 if v6 else 28) - len(text))
        sender = SENDER6 if v6 else SENDER4
        packet = udp_packet(sender, address, self._port, self._port, text + padding)
        self._mouth.send(bytes(12) + _ETHERTYPE[packet[0] >> 4] + packet)

    def _on_frame(self) -> None:
        while True:
            try:
                frame, (_, _, direction, *_) = self._ears.recvfrom(65536)
            except BlockingIOError:
                return
            if direction != PACKET_OUTGOING:  # our own probes on their way out would answer themselves
                self._hear(frame)

    def _hear(self, frame: bytes) -> None:
        v6 = frame[12:14] == _ETHERTYPE[6]
        at = 14 + (48 if v6 else 28)
        kind, nonce = frame[at : at + 8], frame[at + 8 : at + 8 + NONCE_LEN]
        if kind == ANSWER and (event := self._waiting.get(nonce)):
            event.set()
        elif kind == ASK:
            to = frame[38:54] if v6 else frame[30:34]
            # back by the entry of that address: only its peer can get it
            self._say(socket.inet_ntop(socket.AF_INET6 if v6 else socket.AF_INET, to), ANSWER + nonce, len(frame) - 14)


def pauses_s(timeouts: Timeouts) -> Iterator[float]:
    """One for each probe of a round trip: how long it is waited for alone. An answer to an earlier one counts as well.

    They are counted, not timed, so that a busy node tries as often as an idle one. A tunnel that loses every third
    packet fails 5 of 9 round trips, and with them all 42 tries of either proof (small, full size) once in 2 * 10^10.
    """
    pause_s, left_s = timeouts.tunnel_probe_interval_ms / 1000, timeouts.tunnel_probe_s
    while left_s > 0:
        yield min(pause_s, left_s)
        left_s -= pause_s
        pause_s = min(pause_s * 2, timeouts.tunnel_probe_interval_max_ms / 1000)


def _quiet(name: str) -> None:
    """No device of ours speaks by itself; packets of this node's own clients have addresses that are local here."""
    for knob, value in (("rp_filter", "2"), ("accept_local", "1"), ("forwarding", "1"), ("send_redirects", "0")):
        sysctl(f"net/ipv4/conf/{name}/{knob}", value)
    for knob, value in (("accept_ra", "0"), ("accept_dad", "0"), ("addr_gen_mode", "1"), ("router_solicitations", "0")):
        sysctl(f"net/ipv6/conf/{name}/{knob}", value)
