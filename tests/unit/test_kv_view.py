"""The agent's view of a pod's KV pool: what a hostile or broken pod can hand over is refused by name."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from midstream_agent.kv import F_SEAL_SHRINK, Geometry, PoolView, digest
from midstream_runtime.contract.errors import Final

F_ADD_SEALS = 1033
POOL = {"fingerprint": "f", "slots": 4, "slot_bytes": 4096, "data_offset": 4096, "block_tokens": 16}


def memfd(size: int = 5 * 4096, seals: int = F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("pool", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, F_ADD_SEALS, seals)
    return fd


def refused(fd: int, pool: dict[str, object] = POOL) -> str:
    with pytest.raises(Final) as e:
        PoolView(fd, Geometry.parse(pool), writable=True)
    return e.value.code


def test_a_block_that_was_written_is_read_back_by_another_mapping() -> None:
    fd = memfd()
    target = PoolView(os.dup(fd), Geometry.parse(POOL), writable=True)
    source = PoolView(fd, Geometry.parse(POOL), writable=False)
    target.write(3, b"kv" * 100, digest(b"kv" * 100))
    assert source.read(3, 200) == b"kv" * 100
    target.close()
    source.close()


def test_a_block_with_one_flipped_byte_is_refused_and_not_written() -> None:
    view = PoolView(memfd(), Geometry.parse(POOL), writable=True)
    with pytest.raises(Final, match="kv_checksum"):
        view.write(0, b"kw", digest(b"kv"))
    assert view.read(0, 2) == b"\0\0"
    view.close()


def test_a_pool_that_is_not_sealed_against_shrinking_is_refused() -> None:
    assert refused(memfd(seals=0)) == "pool_not_sealed"


def test_a_file_is_refused_as_a_pool(tmp_path: Path) -> None:
    path = tmp_path / "pool"
    path.write_bytes(bytes(5 * 4096))
    assert refused(os.open(path, os.O_RDWR)) == "pool_not_sealed"


def test_a_pool_that_is_smaller_than_it_claims_is_refused() -> None:
    assert refused(memfd(size=2 * 4096)) == "pool_truncated"


@pytest.mark.parametrize(
    "bad", [{"slots": 0}, {"slot_bytes": -1}, {"data_offset": -4096}, {"slots": "many"}, {"slots": None}]
)
def test_a_pool_with_impossible_geometry_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(Final, match="pool_malformed"):
        Geometry.parse({**POOL, **bad})


@pytest.mark.parametrize(("slot", "length"), [(4, 1), (-1, 1), (0, 4097), (0, -1)])
def test_a_slot_outside_the_pool_is_refused(slot: int, length: int) -> None:
    view = PoolView(memfd(), Geometry.parse(POOL), writable=False)
    with pytest.raises(Final, match="kv_slot"):
        view.read(slot, length)
    view.close()


def test_a_refused_pool_leaves_no_fd_behind() -> None:
    before = set(os.listdir("/proc/self/fd"))
    refused(memfd(seals=0))
    assert set(os.listdir("/proc/self/fd")) == before
