"""The `l2` address provider's two packets: the announcement of an address, and the proof of its path.

Announcement: gratuitous ARP (request and reply form, RFC 5227 section 3) or unsolicited neighbour
advertisement (RFC 4861 section 7.2.6), from the NIC that carries floating IPs.

Proof: nothing may depend on a client sending a packet, so the agents prove the path themselves. The target's
agent sends a UDP datagram *from the floating IP* through that NIC to the source node's own address; the source's
agent answers to the floating IP; the answer, seen on the target's NIC, proves that the network lets the address
out there and brings it in there. Both ends use a packet socket, since the address itself lives in the pod.
"""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import secrets
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass

from midstream_runtime.contract.errors import Final

from midstream_agent.net import NetWorker
from midstream_agent.settings import Settings

BROADCAST = b"\xff" * 6
ETH_P_IP, ETH_P_ARP, ETH_P_IPV6 = 0x0800, 0x0806, 0x86DD
PROBE_MAGIC = b"MSPROBE1"
PROBE_LEN = len(PROBE_MAGIC) + 16
SO_ATTACH_FILTER = 26


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def arp_announcements(mac: bytes, address: str) -> list[bytes]:
    ip = ipaddress.IPv4Address(address).packed
    frames = []
    for op, target in ((1, b"\0" * 6), (2, BROADCAST)):
        body = struct.pack("!HHBBH6s4s6s4s", 1, ETH_P_IP, 6, 4, op, mac, ip, target, ip)
        frames.append(BROADCAST + mac + struct.pack("!H", ETH_P_ARP) + body)
    return frames


def na_announcement(mac: bytes, address: str) -> bytes:
    ip = ipaddress.IPv6Address(address).packed
    all_nodes = ipaddress.IPv6Address("ff02::1").packed
    override = 0x20000000
    icmp = struct.pack("!BBHI16sBB6s", 136, 0, 0, override, ip, 2, 1, mac)
    pseudo = ip + all_nodes + struct.pack("!II", len(icmp), 58)
    icmp = icmp[:2] + struct.pack("!H", checksum(pseudo + icmp)) + icmp[4:]
    header = struct.pack("!IHBB", 6 << 28, len(icmp), 58, 255) + ip + all_nodes
    return b"\x33\x33\0\0\0\x01" + mac + struct.pack("!H", ETH_P_IPV6) + header + icmp


def announcements(mac: bytes, address: str) -> list[bytes]:
    return [na_announcement(mac, address)] if ":" in address else arp_announcements(mac, address)


def udp_packet(src: str, dst: str, sport: int, dport: int, payload: bytes) -> bytes:
    """An IPv4 or IPv6 packet with a UDP datagram, checksums filled in."""
    s, d = ipaddress.ip_address(src).packed, ipaddress.ip_address(dst).packed
    length = 8 + len(payload)
    pseudo = s + d + (struct.pack("!BBH", 0, 17, length) if len(s) == 4 else struct.pack("!II", length, 17))
    udp = struct.pack("!HHHH", sport, dport, length, 0) + payload
    udp = udp[:6] + struct.pack("!H", checksum(pseudo + udp) or 0xFFFF) + payload
    if len(s) == 16:
        return struct.pack("!IHBB", 6 << 28, length, 17, 64) + s + d + udp
    header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + length, 0, 0x4000, 64, 17, 0, s, d)
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + udp


@dataclass(frozen=True, slots=True)
class Gateway:
    mac_v4: bytes | None
    mac_v6: bytes | None

    def of(self, address: str) -> bytes | None:
        return self.mac_v6 if ":" in address else self.mac_v4


class Nic:
    """Packet socket on the interface of floating IPs: announces, probes, hears the answers."""

    def __init__(self, name: str, mac: str, gateway: Gateway, settings: Settings) -> None:
        self.name = name
        self.mac = _mac(mac)
        self.gateway = gateway
        self._timeouts = settings.timeouts
        self._port = settings.probe_port
        self._waiting: dict[bytes, asyncio.Event] = {}
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        probe_filter(self._sock, self._port)
        self._sock.bind((name, 0x0003))  # ETH_P_ALL, behind the filter above
        self._sock.setblocking(False)

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._on_frame)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._sock.close()

    def announce(self, addresses: list[str]) -> None:
        for address in addresses:
            for frame in announcements(self.mac, address):
                self._sock.send(frame)

    async def prove(self, address: str, responder: str, port: int, timeout_s: float) -> None:
        """Return when packets from and to `address` are proved to pass this NIC; TimeoutError otherwise.

        The address is announced again with every probe: a lost announcement costs one interval.
        """
        nonce = secrets.token_bytes(16)
        heard = self._waiting[nonce] = asyncio.Event()
        packet = udp_packet(address, responder, self._port, port, PROBE_MAGIC + nonce)
        gateway = self.gateway.of(address)
        ethertype = struct.pack("!H", ETH_P_IPV6 if ":" in address else ETH_P_IP)
        if gateway is None:
            raise TimeoutError(f"{self.name} has no neighbour entry for its gateway: cannot prove {address}")
        frame = gateway + self.mac + ethertype + packet
        pause_s, end = self._timeouts.probe_interval_ms / 1000, time.monotonic() + timeout_s
        try:
            while time.monotonic() < end:
                self.announce([address])
                self._sock.send(frame)
                try:
                    await asyncio.wait_for(heard.wait(), min(pause_s, max(end - time.monotonic(), 0.001)))
                    return
                except TimeoutError:
                    pause_s = min(pause_s * 2, self._timeouts.probe_interval_max_ms / 1000)
        finally:
            del self._waiting[nonce]
        raise TimeoutError(f"no probe from {address} came back through {self.name} within {timeout_s:g} s")

    def _on_frame(self) -> None:
        while True:
            try:
                frame = self._sock.recv(2048)
            except BlockingIOError:
                return
            at = frame.find(PROBE_MAGIC)
            if at >= 0 and (event := self._waiting.get(frame[at + len(PROBE_MAGIC) : at + PROBE_LEN])):
                event.set()


class Responder:
    """Answers path probes: UDP on the node's own address, the answer goes to the floating IP.

    Bound to the primary interface, so that the answer leaves the node even while a route to a pod of this
    node exists for that address.
    """

    def __init__(self, address: str, port: int, interface: str | None) -> None:
        self._sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if interface:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        self._sock.bind((address, port))
        self._sock.setblocking(False)
        self.answered = 0

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._sock.fileno(), self._on_probe)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._sock.fileno())
        self._sock.close()

    def _on_probe(self) -> None:
        while True:
            try:
                data, sender = self._sock.recvfrom(2048)
            except BlockingIOError:
                return
            except OSError:
                # an ICMP error of an earlier answer is reported here: not about this datagram
                continue
            if len(data) == PROBE_LEN and data.startswith(PROBE_MAGIC):
                self._sock.sendto(data, sender)
                self.answered += 1


def probe_filter(sock: socket.socket, port: int) -> None:
    """Classic BPF: IPv4/IPv6 UDP to `port` only; client traffic never wakes the agent."""
    code = [
        (0x28, 0, 0, 12),  # ldh [12]: ethertype
        (0x15, 0, 5, ETH_P_IP),
        (0x30, 0, 0, 23),  # ldb [23]: protocol
        (0x15, 0, 8, 17),
        (0xB1, 0, 0, 14),  # ldxb 4*([14]&0xf)
        (0x48, 0, 0, 16),  # ldh [x+16]: destination port
        (0x15, 6, 5, port),
        (0x15, 0, 4, ETH_P_IPV6),
        (0x30, 0, 0, 20),
        (0x15, 0, 2, 17),
        (0x28, 0, 0, 56),
        (0x15, 1, 0, port),
        (0x06, 0, 0, 0),
        (0x06, 0, 0, 0x40000),
    ]
    program = b"".join(struct.pack("HBBI", *insn) for insn in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("HL", len(code), ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, fprog)


async def resolve(net: NetWorker, index: int, name: str, address: str, timeout_s: float = 5.0) -> bytes:
    """MAC of the NIC's gateway. NTF_USE makes the kernel resolve it without a packet of ours."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        await net.run(net.ask_neighbour, index, address)
        await asyncio.sleep(0.02)
        mac = await net.run(net.neighbour_mac, index, address)
        if mac:
            return _mac(mac)
    raise Final("gateway_silent", f"gateway {address} on {name} does not answer: check --nic-gateway and the link")


def responder_for(address: str, candidates: Iterable[str]) -> str:
    """The node address of the same family as the floating IP."""
    for candidate in candidates:
        if (":" in candidate) == (":" in address):
            return str(candidate)
    raise Final("no_probe_address", f"the other node has no address of the family of {address}: path cannot be proved")
