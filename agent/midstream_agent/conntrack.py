"""Conntrack entries of flows that leave or come, deleted by ctnetlink.

A stale entry kills a flow that comes back to a node (measured: dead for good behind "ct state invalid drop"),
so RELEASE deletes the flow's entry at the source, and the target deletes it before the first packet of a
restored flow. The messages are built here because a batch of thousands goes out in one send without waiting
for each answer; a flow without an entry is the usual case and no error.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

NETLINK_NETFILTER = 12
IPCTNL_MSG_CT_DELETE = (1 << 8) | 2  # NFNL_SUBSYS_CTNETLINK
NLM_F_REQUEST, NLM_F_ACK = 1, 4
CTA_TUPLE_ORIG, CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 1, 2
NLA_F_NESTED = 0x8000
V4_MAPPED = b"\0" * 10 + b"\xff\xff"
KEY = struct.Struct("!16s16s2s2s")  # struct ms_flow_key
BATCH = 256


def _attr(kind: int, data: bytes) -> bytes:
    length = 4 + len(data)
    return struct.pack("=HH", length, kind) + data + b"\0" * (-length % 4)


def _delete_message(key: bytes, seq: int) -> bytes:
    local, remote, local_port, remote_port = KEY.unpack(key)
    v4 = local.startswith(V4_MAPPED) and remote.startswith(V4_MAPPED)
    src, dst = (remote[12:], local[12:]) if v4 else (remote, local)
    family, ip_kinds = (socket.AF_INET, (1, 2)) if v4 else (socket.AF_INET6, (3, 4))
    ip = _attr(ip_kinds[0], src) + _attr(ip_kinds[1], dst)
    proto = _attr(1, bytes([socket.IPPROTO_TCP])) + _attr(2, remote_port) + _attr(3, local_port)
    nested = _attr(CTA_TUPLE_IP | NLA_F_NESTED, ip) + _attr(CTA_TUPLE_PROTO | NLA_F_NESTED, proto)
    body = struct.pack("!BBH", family, 0, 0) + _attr(CTA_TUPLE_ORIG | NLA_F_NESTED, nested)
    return struct.pack("=IHHII", 16 + len(body), IPCTNL_MSG_CT_DELETE, NLM_F_REQUEST | NLM_F_ACK, seq, 0) + body


def delete(keys: bytes) -> int:
    """Delete the entries of the flows in `keys` (packed struct ms_flow_key); returns how many there were."""
    flows = [keys[i : i + KEY.size] for i in range(0, len(keys), KEY.size)]
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((0, 0))
        return sum(_delete_batch(sock, flows[i : i + BATCH]) for i in range(0, len(flows), BATCH))


def _delete_batch(sock: socket.socket, flows: list[bytes]) -> int:
    sock.send(b"".join(_delete_message(key, seq) for seq, key in enumerate(flows, 1)))
    deleted = 0
    for error in _acks(sock, len(flows)):
        if error == 0:
            deleted += 1
        elif error not in (errno.ENOENT, errno.EINVAL, errno.ENOPROTOOPT, errno.EOPNOTSUPP):
            raise OSError(error, f"ctnetlink delete: {errno.errorcode.get(error, error)}")
    return deleted


def _acks(sock: socket.socket, wanted: int) -> Iterable[int]:
    got = 0
    while got < wanted:
        data = sock.recv(1 << 16)
        while data:
            length, kind = struct.unpack_from("=IH", data)
            if kind == 2:  # NLMSG_ERROR: also the acknowledgement, with error 0
                yield -struct.unpack_from("=i", data, 16)[0]
                got += 1
            data = data[(length + 3) & ~3 :]
