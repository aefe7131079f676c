"""CRC-32 at the CPU's own speed is zlib's, whatever the length and wherever the bytes begin."""

from __future__ import annotations

import ctypes
import mmap
import os
import zlib
from typing import Any

import pytest
from midstream_agent import tcp
from midstream_runtime.contract.pool import checksum

DATA = os.urandom((2 << 20) + 99)


def fast(data: bytes) -> int:
    """As the library counts it, or a skip where the CPU has nothing for it."""
    found = ctypes.c_uint32()
    result = tcp._lib.ms_tcp_crc32(data, len(data), ctypes.byref(found))
    if result:
        pytest.skip(f"the CPU has no instruction for CRC-32 (probe: ms_tcp_crc32, {result})")
    return found.value


def test_every_short_length_and_every_beginning() -> None:
    for size in range(400):
        for first in (0, 1, 7, 16):
            data = DATA[first : first + size]
            assert fast(data) == zlib.crc32(data), (first, size)


def test_whole_blocks_and_what_is_beside_them() -> None:
    for size in (4095, 4096, 4097, 352_256, 2 << 20, (2 << 20) + 99):
        assert fast(DATA[:size]) == zlib.crc32(DATA[:size]), size
    assert fast(bytes(1 << 20)) == zlib.crc32(bytes(1 << 20))


def test_every_flipped_bit_is_found() -> None:
    data = bytearray(DATA[:8192])
    good = fast(bytes(data))
    for bit in range(0, 8 * len(data), 61):
        data[bit // 8] ^= 1 << bit % 8
        assert fast(bytes(data)) != good, bit
        data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("there", [True, False], ids=["instruction", "zlib"])
def test_an_agents_checksum_is_the_contracts(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """In a writable mapping, which the target's is, and in bytes; and on a CPU that has nothing for it."""
    if not there:
        monkeypatch.setattr(tcp, "_lib", _Without())
    with mmap.mmap(-1, len(DATA)) as memory, memoryview(memory) as view:
        view[:] = DATA
        for size in (1, 4096, 50_000, len(DATA)):
            with view[:size] as part:
                assert checksum(part, tcp.crc32) == checksum(DATA[:size]) == checksum(DATA[:size], tcp.crc32)


class _Without:
    def ms_tcp_crc32(self, *_: Any) -> int:
        return -95
