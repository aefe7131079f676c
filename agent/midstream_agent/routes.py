"""Routes that are switched while clients wait, set and removed without a thread or a parser.

A floating IP's host route decides whether this node takes its packets to a pod. pyroute2 does the same in 0.5-1 ms and
in another thread (`net.NetWorker`, for everything that has time); here it is one message and one acknowledgement of the
kernel on a socket of the event loop's thread, 20-50 us (include/uapi/linux/rtnetlink.h).
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct

RTM_NEWADDR, RTM_NEWROUTE, RTM_DELROUTE = 20, 24, 25
IFA_LOCAL = 2
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_CREATE = 0x1, 0x4, 0x100, 0x400
RTA_DST, RTA_OIF = 1, 4
RT_TABLE_MAIN, RTPROT_STATIC, RTN_UNICAST = 254, 4, 1
SCOPE_UNIVERSE, SCOPE_LINK, SCOPE_NOWHERE = 0, 253, 255


class RouteSocket:
    """An AF_NETLINK socket of the namespace in which it was made. Calls block for the kernel's answer only."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._sock.bind((0, 0))
        self._seq = 0

    def close(self) -> None:
        self._sock.close()

    def add(self, address: str, ifindex: int) -> None:
        """Route `address`/32 or /128 to the interface, in place of any other route to it."""
        scope = SCOPE_UNIVERSE if ":" in address else SCOPE_LINK
        self._ask(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, address, ifindex, scope, RTPROT_STATIC)

    def delete(self, address: str, ifindex: int) -> None:
        """Remove that route; one that is not there is no error."""
        try:
            self._ask(RTM_DELROUTE, 0, address, ifindex, SCOPE_NOWHERE, 0)
        except OSError as e:
            if e.errno not in (errno.ESRCH, errno.ENOENT, errno.ENODEV):
                raise

    def add_local(self, address: str, ifindex: int) -> None:
        """Put `address`/32 on an interface of the host; one that is there is no error."""
        packed = ipaddress.IPv4Address(address).packed
        body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, SCOPE_LINK, ifindex)
        body += struct.pack("=HH", 4 + len(packed), IFA_LOCAL) + packed
        self._send(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, body, address)

    def _ask(self, kind: int, flags: int, address: str, ifindex: int, scope: int, protocol: int) -> None:
        dst = ipaddress.ip_address(address).packed
        family = socket.AF_INET if len(dst) == 4 else socket.AF_INET6
        body = struct.pack(
            "=BBBBBBBBI", family, len(dst) * 8, 0, 0, RT_TABLE_MAIN, protocol, scope, RTN_UNICAST if protocol else 0, 0
        )
        body += struct.pack("=HH", 4 + len(dst), RTA_DST) + dst + struct.pack("=HHI", 8, RTA_OIF, ifindex)
        self._send(kind, flags, body, address)

    def _send(self, kind: int, flags: int, body: bytes, address: str) -> None:
        self._seq += 1
        header = struct.pack("=IHHII", 16 + len(body), kind, flags | NLM_F_REQUEST | NLM_F_ACK, self._seq, 0)
        self._sock.send(header + body)
        self._read_ack(address)

    def _read_ack(self, address: str) -> None:
        reply = self._sock.recv(4096)
        error = -struct.unpack_from("=i", reply, 16)[0]
        if error:
            raise OSError(error, f"route of {address}: {os.strerror(error)}")
