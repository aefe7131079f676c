"""bpf(2) by ctypes: the few commands that the agent and the loader need.

The agent must not hold LLVM (147 MB), so it does not use bcc; pinned maps need no more than this. Map
functions take and return contiguous bytes: n keys and n values in one call, by the kernel's batch commands
where it has them (5.6), else one by one. All calls release the GIL. A `Map` may be used from any thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Buffer: TypeAlias = "ctypes.Array[ctypes.c_char]"

MAP_TYPE_HASH = 1
MAP_TYPE_PERCPU_ARRAY = 6
MAP_TYPE_ARRAY = 2
MAP_TYPE_LRU_HASH = 9

ANY, NOEXIST, EXIST = 0, 1, 2
F_NO_PREALLOC = 1

STATS_RUN_TIME = 0

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT_KEY = 0, 1, 2, 3, 4
_OBJ_PIN, _OBJ_GET, _TEST_RUN, _GET_INFO = 6, 7, 10, 15
_LOOKUP_BATCH, _UPDATE_BATCH, _DELETE_BATCH, _ENABLE_STATS = 24, 26, 27, 32

_NR_BPF = {"x86_64": 321, "aarch64": 280}
# linux/errno.h: what a map type without a batch command answers; not in Python's errno
_ENOTSUPP = 524
_NO_BATCH = {_ENOTSUPP, errno.EINVAL, errno.EOPNOTSUPP}
# bpf_mem_alloc refills its per-CPU cache from an interrupt; a burst of creations may outrun it
_ENOMEM_TRIES = 1000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_long)
_libc.syscall.restype = ctypes.c_long


def _number() -> int:
    try:
        return _NR_BPF[platform.machine()]
    except KeyError:
        raise OSError(errno.ENOSYS, f"no bpf(2) number known for {platform.machine()}") from None


_NUMBER = _number()


def _bpf(command: int, attr: bytes | Buffer) -> int:
    """One bpf(2) call. `attr` is changed in place where the command returns something in it."""
    result: int = _libc.syscall(_NUMBER, command, address_of(attr), len(attr))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def address_of(data: bytes | Buffer) -> int:
    """Address of a bytes object's or buffer's content; the caller keeps it alive."""
    if isinstance(data, bytes):
        return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    return ctypes.addressof(data)


# -- objects -------------------------------------------------------------------------------------------


def obj_get(path: Path) -> int:
    """File descriptor of a pinned map or program."""
    name = os.fsencode(path) + b"\0"
    return _bpf(_OBJ_GET, ctypes.create_string_buffer(struct.pack("<QII", address_of(name), 0, 0), 16))


def obj_pin(fd: int, path: Path) -> None:
    """Pin under `path`, in place of what is pinned there."""
    fresh = path.with_name(path.name + "_new")  # bpffs refuses names with a dot
    fresh.unlink(missing_ok=True)
    name = os.fsencode(fresh) + b"\0"
    _bpf(_OBJ_PIN, ctypes.create_string_buffer(struct.pack("<QII", address_of(name), fd, 0), 16))
    fresh.rename(path)


@dataclass(frozen=True, slots=True)
class MapSpec:
    """What a map is made of; two maps with equal specs hold the same bytes."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0

    def create(self) -> int:
        head = struct.pack(
            "<7I", self.type, self.key_size, self.value_size, self.max_entries, self.flags, 0, 0
        )
        return _bpf(_MAP_CREATE, ctypes.create_string_buffer(head + self.name.encode().ljust(16, b"\0"), 48))


def _info(fd: int) -> bytes:
    info = ctypes.create_string_buffer(256)
    _bpf(_GET_INFO, ctypes.create_string_buffer(struct.pack("<IIQ", fd, len(info), address_of(info)), 16))
    return info.raw


def map_spec(fd: int) -> MapSpec:
    kind, _id, key, value, entries, flags = struct.unpack_from("<6I", _info(fd))
    return MapSpec(_info(fd)[24:40].rstrip(b"\0").decode(), kind, key, value, entries, flags)


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """`runs` and `run_time_ns` are 0 unless somebody holds `enable_stats`."""

    id: int
    name: str
    tag: str
    run_time_ns: int
    runs: int


def prog_info(fd: int) -> ProgInfo:
    raw = _info(fd)
    run_time_ns, runs = struct.unpack_from("<QQ", raw, 192)
    return ProgInfo(
        struct.unpack_from("<I", raw, 4)[0],
        raw[64:80].rstrip(b"\0").decode(),
        raw[8:16].hex(),
        run_time_ns,
        runs,
    )


def enable_stats() -> int:
    """Programs' run times are counted while the returned descriptor is open."""
    return _bpf(_ENABLE_STATS, struct.pack("<I", STATS_RUN_TIME))


@dataclass(frozen=True, slots=True)
class TestRun:
    """Result of one BPF_PROG_TEST_RUN."""

    __test__ = False  # not a pytest class

    retval: int
    data: bytes
    ctx: bytes
    duration_ns: int


def prog_test_run(fd: int, data: bytes, ctx: bytes = b"", repeat: int = 1, flags: int = 0) -> TestRun:
    """Run a TC program on a packet. `ctx` is a struct __sk_buff, of which the kernel takes some fields."""
    out = ctypes.create_string_buffer(len(data) + 4096)
    ctx_out = ctypes.create_string_buffer(max(len(ctx), 1))
    attr = ctypes.create_string_buffer(
        struct.pack(
            "<4I2Q4I2Q3I4x", fd, 0, len(data), len(out), address_of(data), address_of(out), repeat, 0,
            len(ctx), len(ctx), address_of(ctx) if ctx else 0, address_of(ctx_out) if ctx else 0, flags, 0, 0,
        ),
        80,
    )  # fmt: skip
    _bpf(_TEST_RUN, attr)
    _, retval, _, size, _, _, _, duration, _, ctx_size = struct.unpack_from("<4I2Q4I", attr.raw)
    return TestRun(retval, out.raw[:size], ctx_out.raw[:ctx_size] if ctx else b"", duration)


# -- maps ----------------------------------------------------------------------------------------------


class Map:
    """A map by its descriptor. n keys and n values lie one behind the other."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.spec = map_spec(fd)
        per_cpu = self.spec.type == MAP_TYPE_PERCPU_ARRAY
        self._value = -(-self.spec.value_size // 8) * 8 * possible_cpus() if per_cpu else self.spec.value_size

    @classmethod
    def pinned(cls, path: Path) -> Map:
        return cls(obj_get(path))

    def close(self) -> None:
        os.close(self.fd)

    def __enter__(self) -> Map:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lookup(self, key: bytes) -> bytes | None:
        """The value (of a per-CPU map: one a CPU, each padded to 8 bytes), or None."""
        out = ctypes.create_string_buffer(self._value)
        try:
            _bpf(_MAP_LOOKUP, self._elem(address_of(key), address_of(out), ANY))
        except FileNotFoundError:
            return None
        return out.raw

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        _bpf(_MAP_UPDATE, self._elem(address_of(key), address_of(value), flags))

    def delete(self, key: bytes) -> bool:
        """False if it was not there."""
        try:
            _bpf(_MAP_DELETE, self._elem(address_of(key), 0, ANY))
        except FileNotFoundError:
            return False
        return True

    def keys(self) -> list[bytes]:
        """All keys at about this moment."""
        found: list[bytes] = []
        out = ctypes.create_string_buffer(self.spec.key_size)
        last = 0
        while True:
            try:
                _bpf(_MAP_NEXT_KEY, self._elem(last, address_of(out), ANY))
            except FileNotFoundError:
                return found
            found.append(out.raw)
            last = address_of(found[-1])

    def update_many(self, keys: bytes, values: bytes, n: int, flags: int = ANY) -> int:
        """Set n entries; with NOEXIST those that exist stay as they are. Returns how many were set."""
        self._check(keys, n)
        if len(values) != n * self.spec.value_size:
            raise ValueError(
                f"{self.spec.name}: {len(values)} bytes are not {n} values of {self.spec.value_size}"
            )
        base = address_of(values)
        return self._many(_UPDATE_BATCH, _MAP_UPDATE, keys, base, n, flags, errno.EEXIST)

    def delete_many(self, keys: bytes, n: int) -> int:
        """Delete n entries, those of them that exist. Returns how many."""
        self._check(keys, n)
        return self._many(_DELETE_BATCH, _MAP_DELETE, keys, 0, n, ANY, errno.ENOENT)

    def lookup_many(self, keys: bytes, n: int, out: Buffer) -> list[int]:
        """Copy the n keys' values into `out`; returns the indexes of those that are not there.

        One call a key, 2-4 us each: the kernel's batch lookup knows no keys (see `snapshot`).
        """
        self._check(keys, n)
        if len(out) < n * self.spec.value_size:
            raise ValueError("buffer too small")
        missing = []
        attr = self._elem(0, 0, ANY)
        pointers = ctypes.cast(attr, ctypes.POINTER(ctypes.c_uint64))
        where, key, value = address_of(attr), address_of(keys), address_of(out)
        syscall, number, key_size, value_size = (
            _libc.syscall,
            _NUMBER,
            self.spec.key_size,
            self.spec.value_size,
        )
        for i in range(n):
            pointers[1] = key + i * key_size
            pointers[2] = value + i * value_size
            if syscall(number, _MAP_LOOKUP, where, 32) != 0:
                missing.append(self._expect(i, errno.ENOENT))
        return missing

    def snapshot(self, values: Buffer) -> dict[bytes, int] | None:
        """Copy all entries of a hash map into `values`; returns key -> index of its value there.

        A hash map of 65,536 buckets with 1,000 notes takes 1.8 ms, 1,000 single lookups 4 ms. None: there
        are more entries than room, or the kernel has no such command.
        """
        limit = len(values) // self.spec.value_size
        keys = ctypes.create_string_buffer(limit * self.spec.key_size)
        cursor = ctypes.create_string_buffer(8)
        attr = ctypes.create_string_buffer(
            struct.pack(
                "<4Q2I2Q", 0, address_of(cursor), address_of(keys), address_of(values), limit, self.fd, 0, 0
            ),
            56,
        )
        try:
            _bpf(_LOOKUP_BATCH, attr)
        except FileNotFoundError:  # reached the end, which is what is wanted
            count = struct.unpack_from("<I", attr.raw, 32)[0]
            raw, size = keys.raw, self.spec.key_size
            return {raw[i * size : (i + 1) * size]: i for i in range(count)}
        except OSError as e:
            if e.errno not in _NO_BATCH and e.errno != errno.ENOSPC:
                raise
        return None

    def _elem(self, key: int, value: int, flags: int) -> Buffer:
        return ctypes.create_string_buffer(struct.pack("<I4xQQQ", self.fd, key, value, flags), 32)

    def _check(self, keys: bytes, n: int) -> None:
        if len(keys) != n * self.spec.key_size:
            raise ValueError(f"{self.spec.name}: {len(keys)} bytes are not {n} keys of {self.spec.key_size}")

    @staticmethod
    def _expect(index: int, code: int) -> int:
        got = ctypes.get_errno()
        if got != code:
            raise OSError(got, os.strerror(got))
        return index

    def _many(self, batch: int, single: int, keys: bytes, values: int, n: int, flags: int, skip: int) -> int:
        """Apply a command to n entries; an entry that fails with `skip` is left out and not counted."""
        base, done, at, tries = address_of(keys), 0, 0, 0
        if n == 1:
            batch = 0  # half the time of a batch of one
        while at < n:
            if batch:
                count, code = self._batch(batch, base, values, at, n, flags)
            else:
                count, code = self._one(single, base, values, at, flags)
            done, at = done + count, at + count
            if code in _NO_BATCH and count == 0 and batch:
                batch = 0
            elif code == errno.ENOMEM and tries < _ENOMEM_TRIES:
                tries += 1
            elif code == skip:
                at += 1
            elif code:
                raise OSError(code, f"{self.spec.name}, entry {at} of {n}: {os.strerror(code)}")
        return done

    def _batch(self, command: int, keys: int, values: int, at: int, n: int, flags: int) -> tuple[int, int]:
        """(entries done, errno): a batch stops at its first failure."""
        key, value = keys + at * self.spec.key_size, values + at * self.spec.value_size if values else 0
        attr = ctypes.create_string_buffer(
            struct.pack("<4Q2I2Q", 0, 0, key, value, n - at, self.fd, flags, 0), 56
        )
        try:
            _bpf(command, attr)
        except OSError as e:
            # EFAULT leaves count as it was; any other failure reports what was done
            count = 0 if e.errno == errno.EFAULT else struct.unpack_from("<I", attr.raw, 32)[0]
            return (0 if e.errno in _NO_BATCH and count == n - at else count), e.errno or errno.EIO
        return n - at, 0

    def _one(self, command: int, keys: int, values: int, at: int, flags: int) -> tuple[int, int]:
        value = values + at * self.spec.value_size if values else 0
        try:
            _bpf(command, self._elem(keys + at * self.spec.key_size, value, flags))
        except OSError as e:
            return 0, e.errno or errno.EIO
        return 1, 0


def possible_cpus() -> int:
    """CPUs that per-CPU values are stored for (which may be more than are online)."""
    ranges = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip()
    return int(ranges.replace(",", "-").split("-")[-1]) + 1
