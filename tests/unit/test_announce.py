"""Frames of the l2 provider: checked against the RFCs' own arithmetic and the kernel's parser."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from midstream_agent.announce import announcements, checksum, udp_packet

MAC = bytes.fromhex("027700000001")


def test_an_ipv4_address_is_announced_by_request_and_reply() -> None:
    frames = announcements(MAC, "10.77.0.100")
    ops = [struct.unpack_from("!H", f, 20)[0] for f in frames]
    assert ops == [1, 2]
    for frame in frames:
        assert frame[:6] == b"\xff" * 6 and frame[6:12] == MAC and frame[12:14] == b"\x08\x06"
        sender, target = frame[28:32], frame[38:42]
        assert sender == target == ipaddress.ip_address("10.77.0.100").packed


def test_an_ipv6_address_is_announced_with_the_override_flag_and_a_right_checksum() -> None:
    (frame,) = announcements(MAC, "fd77::100")
    icmp = frame[54:]
    pseudo = frame[22:54] + struct.pack("!II", len(icmp), 58)
    assert frame[:6] == bytes.fromhex("333300000001")
    assert icmp[0] == 136 and icmp[4] & 0x20 and not icmp[4] & 0x40
    assert frame[21] == 255, "RFC 4861 7.1.2: receivers drop an advertisement with another hop limit"
    assert checksum(pseudo + icmp) == 0


@pytest.mark.parametrize(("src", "dst"), [("10.77.0.100", "10.77.0.10"), ("fd77::100", "fd77::a")])
@pytest.mark.parametrize("payload", [b"", b"x", b"PROBE" * 7])
def test_a_probe_is_a_udp_datagram_with_right_checksums(src: str, dst: str, payload: bytes) -> None:
    packet = udp_packet(src, dst, 9444, 9445, payload)
    v4 = packet[0] >> 4 == 4
    udp = packet[20:] if v4 else packet[40:]
    s, d = ipaddress.ip_address(src).packed, ipaddress.ip_address(dst).packed
    pseudo = s + d + (struct.pack("!BBH", 0, 17, len(udp)) if v4 else struct.pack("!II", len(udp), 17))
    assert struct.unpack_from("!HHH", udp) == (9444, 9445, 8 + len(payload))
    assert checksum(pseudo + udp) == 0
    if v4:
        assert checksum(packet[:20]) == 0
