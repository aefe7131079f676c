"""Checkpoint and restore of TCP sockets: the binding of libmidstream_tcp.

The library's header, csrc/include/midstream_tcp.h, is the manual: what each call does, in which order, and
why. This module only carries whole batches across: one C call a batch, no Python a socket. That matters
between PAUSE and ACTIVATE, when every client of the batch waits. ctypes lets go of the GIL during a call; the
calls never block, so they are made from the event loop's own thread.

A batch and its fds belong to one job, which never works on them from two threads.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
import sys
import zlib
from array import array
from collections.abc import Iterator, Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint8, c_uint16, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midstream_runtime.contract.errors import Final

SONAME = "libmidstream_tcp.so.1"
KEY_BYTES = 36
CTL_BYTES = 32
NOTE_BYTES = 2096
PRIME, PLAY = 0, 1
_PACKETS_MAX = 8
_PACKET_BYTES_MAX = 2048 + _PACKETS_MAX * 80

STATES = {1: "ESTABLISHED", 4: "FIN_WAIT1", 5: "FIN_WAIT2", 8: "CLOSE_WAIT", 9: "LAST_ACK", 11: "CLOSING"}


FAST_CRC_BYTES = 4096
"""Below that the call costs more than it wins."""


class Summary(ctypes.Structure):
    """struct ms_tcp_summary"""

    _fields_ = (
        ("local", c_uint8 * 16),
        ("remote", c_uint8 * 16),
        ("local_port", c_uint16),
        ("remote_port", c_uint16),
        ("family", c_uint8),
        ("state", c_uint8),
        ("options", c_uint8),
        ("wscale", c_uint8),
        ("snd_una", c_uint32),
        ("snd_nxt", c_uint32),
        ("write_seq", c_uint32),
        ("rcv_nxt", c_uint32),
        ("tsval", c_uint32),
        ("send_bytes", c_uint32),
        ("unsent_bytes", c_uint32),
        ("recv_bytes", c_uint32),
        ("mss", c_uint32),
        ("snd_wnd", c_uint32),
        ("rcv_wnd", c_uint32),
        ("min_rtt_us", c_uint32),
        ("rounds", c_uint32),
    )


@dataclass(frozen=True, slots=True)
class Info:
    """One checkpoint, for people: journal, status, tests. Lengths are bytes."""

    local: tuple[str, int]
    remote: tuple[str, int]
    family: int
    state: str
    send_bytes: int
    unsent_bytes: int
    recv_bytes: int
    snd_una: int
    snd_nxt: int
    write_seq: int
    rcv_nxt: int
    tsval: int
    mss: int
    snd_wnd: int
    rcv_wnd: int
    min_rtt_us: int
    rounds: int


def _folders() -> Iterator[Path]:
    """Where the library may lie: what the user says, the image, the checkout."""
    named = os.environ.get("MIDSTREAM_LIB_DIR")
    if named:
        yield Path(named)
    yield Path("/usr/lib/midstream")
    yield Path(__file__).resolve().parents[2] / "build" / "csrc"


def _load() -> ctypes.CDLL:
    looked = []
    for folder in _folders():
        path = folder / SONAME
        if path.exists():
            return ctypes.CDLL(str(path))
        looked.append(str(path))
    raise Final("no_tcp_library", f"{' and '.join(looked)} do not exist: run make build, or set MIDSTREAM_LIB_DIR")


_PROTOTYPES: dict[str, tuple[Any, list[Any]]] = {
    "ms_tcp_probe": (c_int, [c_void_p, c_size_t, c_void_p]),
    "ms_tcp_flow_keys": (c_int, [c_void_p, c_size_t, c_void_p, c_void_p]),
    "ms_tcp_checkpoint": (c_int, [c_void_p, c_size_t, POINTER(c_void_p), c_void_p]),
    "ms_tcp_thaw_begin": (c_int, [c_void_p, c_size_t, c_void_p, c_void_p, c_void_p]),
    "ms_tcp_thaw_finish": (c_int, [c_void_p, c_size_t, c_void_p, c_void_p, c_void_p]),
    "ms_tcp_encode": (c_int, [c_void_p, c_void_p, c_size_t, POINTER(c_size_t)]),
    "ms_tcp_decode": (c_int, [c_char_p, c_size_t, POINTER(c_void_p)]),
    "ms_tcp_batch_free": (None, [c_void_p]),
    "ms_tcp_batch_len": (c_size_t, [c_void_p]),
    "ms_tcp_families": (c_int, [c_void_p, c_void_p]),
    "ms_tcp_flow_ctl": (c_int, [c_void_p, c_uint32, c_void_p, c_void_p]),
    "ms_tcp_summaries": (c_int, [c_void_p, c_void_p]),
    "ms_tcp_restore": (c_int, [c_void_p, c_size_t, c_void_p, c_void_p]),
    "ms_tcp_activate_begin": (c_int, [c_void_p, c_size_t, c_void_p, c_void_p, c_void_p]),
    "ms_tcp_activate_finish": (c_int, [c_void_p, c_size_t, c_void_p, c_void_p, c_void_p]),
    "ms_tcp_client_packets": (
        c_int,
        [c_void_p, c_void_p, c_int, c_void_p, c_size_t, c_void_p, c_size_t, POINTER(c_size_t)],
    ),
    "ms_tcp_crc32": (c_int, [c_void_p, c_size_t, POINTER(c_uint32)]),
    "ms_tcp_strerror": (c_char_p, [c_int]),
    "ms_tcp_refusal": (c_char_p, [c_int]),
}


class _Library:
    """Loaded at the first call, so that importing this module needs nothing but Python."""

    def __init__(self) -> None:
        self._dll: ctypes.CDLL | None = None

    def __getattr__(self, name: str) -> Any:
        if self._dll is None:
            self._dll = _load()
        function = getattr(self._dll, name)
        function.restype, function.argtypes = _PROTOTYPES[name]
        setattr(self, name, function)
        return function


_lib = _Library()


def strerror(error: int) -> str:
    """What an error of a socket means and what to do about it."""
    name, text = refusal(error), _lib.ms_tcp_strerror(error).decode()
    return f"{name}: {text}" if name else text


def refusal(error: int) -> str:
    """The name under which a socket is refused ("Mptcp", "UrgentData"...); "" for 0."""
    if not error:
        return ""
    name: str = _lib.ms_tcp_refusal(error).decode()
    return name or errno.errorcode.get(abs(error), str(error))


def mapped(address: str) -> bytes:
    """An address as it stands in flow keys: 16 bytes, IPv4 as ::ffff:a.b.c.d."""
    ip = ipaddress.ip_address(address)
    return ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed


def _ints(fds: Sequence[int]) -> array[int]:
    return array("i", fds)


def _check(result: int, what: str) -> None:
    if result < 0:
        raise Final(f"tcp_{refusal(result).lower()}", f"{what}: {strerror(result)}")


def crc32(data: memoryview) -> int:
    """zlib's, several times as fast where the CPU has an instruction for it and the memory is writable (ctypes gives
    the address of no other). Lets go of the GIL."""
    if data.readonly or len(data) < FAST_CRC_BYTES:
        return zlib.crc32(data)
    first, found = ctypes.c_char.from_buffer(data), c_uint32()
    if _lib.ms_tcp_crc32(ctypes.addressof(first), len(data), ctypes.byref(found)):
        return zlib.crc32(data)
    return found.value


def probe(fds: Sequence[int]) -> list[int]:
    """For each socket 0, or the -errno for which it cannot be moved. Touches nothing."""
    handles, errors = _ints(fds), array("i", bytes(4 * len(fds)))
    _check(_lib.ms_tcp_probe(_at(handles), len(fds), _at(errors)), "probe")
    return errors.tolist()


def flow_keys(fds: Sequence[int]) -> bytes:
    """n struct ms_flow_key. Final: a connection is not there any more."""
    keys, errors = _flow_keys(fds)
    for i, error in enumerate(errors):
        if error:
            raise Final("tcp_flow_gone", f"socket {i} has no flow: {strerror(error)}")
    return keys


def connected(fds: Sequence[int]) -> list[bool]:
    """For each socket whether it has a flow still: a peer, that is."""
    return [not error for error in _flow_keys(fds)[1]]


def _flow_keys(fds: Sequence[int]) -> tuple[bytes, list[int]]:
    count = len(fds)
    handles, errors, keys = _ints(fds), array("i", bytes(4 * count)), bytearray(KEY_BYTES * count)
    _check(_lib.ms_tcp_flow_keys(_at(handles), count, _at(keys), _at(errors)), "flow keys")
    return bytes(keys), errors.tolist()


def _at(buffer: array[int] | bytearray) -> int | Any:
    """Address of a buffer for the time of one call; its owner must stay alive meanwhile."""
    if isinstance(buffer, array):
        return buffer.buffer_info()[0]
    return ctypes.addressof(c_uint8.from_buffer(buffer)) if buffer else None


class Batch:
    """n checkpoints in the order of their fds. Owns C memory, no fd."""

    def __init__(self, handle: c_void_p, errors: list[int]) -> None:
        self._handle = handle
        self.errors = errors  # of the checkpoint, one a socket

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), c_void_p()
        if handle:
            _lib.ms_tcp_batch_free(handle)

    def __len__(self) -> int:
        return int(_lib.ms_tcp_batch_len(self._handle))

    @classmethod
    def checkpoint(cls, fds: Sequence[int]) -> Batch:
        """Freeze the sockets and read them; `errors` says which could not be."""
        handle, handles, errors = c_void_p(), _ints(fds), array("i", bytes(4 * len(fds)))
        _check(_lib.ms_tcp_checkpoint(_at(handles), len(fds), ctypes.byref(handle), _at(errors)), "checkpoint")
        return cls(handle, errors.tolist())

    @classmethod
    def decode(cls, data: bytes) -> Batch:
        """Checkpoints from bytes that are not trusted."""
        handle = c_void_p()
        _check(_lib.ms_tcp_decode(data, len(data), ctypes.byref(handle)), "checkpoints refused")
        batch = cls(handle, [])
        batch.errors = [0] * len(batch)
        return batch

    def encode(self) -> bytes:
        length = c_size_t()
        _check(_lib.ms_tcp_encode(self._handle, None, 0, ctypes.byref(length)), "encode")
        buffer = bytearray(length.value)
        _check(_lib.ms_tcp_encode(self._handle, _at(buffer), len(buffer), ctypes.byref(length)), "encode")
        return bytes(buffer)

    def families(self) -> list[int]:
        """4 or 6 for each: what its blank socket must be (6 for v4-mapped)."""
        families = bytearray(len(self))
        _lib.ms_tcp_families(self._handle, _at(families))
        return list(families)

    def flow_entries(self, state: int) -> tuple[bytes, bytes]:
        """Keys and values for the hold's map of flows."""
        count = len(self)
        keys, ctls = bytearray(KEY_BYTES * count), bytearray(CTL_BYTES * count)
        _lib.ms_tcp_flow_ctl(self._handle, state, _at(keys), _at(ctls))
        return bytes(keys), bytes(ctls)

    def infos(self) -> list[Info]:
        out = (Summary * len(self))()
        _lib.ms_tcp_summaries(self._handle, ctypes.addressof(out))
        return [_info(s) for s in out]

    def restore(self, fds: Sequence[int]) -> list[int]:
        """Into blank sockets; they stay frozen. -errno for each."""
        handles, errors = _ints(fds), array("i", bytes(4 * len(fds)))
        _check(_lib.ms_tcp_restore(_at(handles), len(fds), self._handle, _at(errors)), "restore")
        return errors.tolist()

    def activate_begin(self, fds: Sequence[int], notes: bytes) -> list[int]:
        return self._with_notes(_lib.ms_tcp_activate_begin, fds, notes)

    def activate_finish(self, fds: Sequence[int], notes: bytes) -> list[int]:
        return self._with_notes(_lib.ms_tcp_activate_finish, fds, notes)

    def thaw_begin(self, fds: Sequence[int], notes: bytes) -> list[int]:
        return self._with_notes(_lib.ms_tcp_thaw_begin, fds, notes)

    def thaw_finish(self, fds: Sequence[int], notes: bytes) -> list[int]:
        return self._with_notes(_lib.ms_tcp_thaw_finish, fds, notes)

    def client_packets(self, notes: bytes, what: int) -> list[bytes]:
        """Layer 3 packets to be played to the server: PRIME first, then PLAY, between begin and finish."""
        count = len(self)
        self._check_notes(notes)
        buffer, lengths = bytearray(_PACKET_BYTES_MAX * count), array("I", bytes(4 * _PACKETS_MAX * count))
        made = c_size_t()
        result = _lib.ms_tcp_client_packets(
            self._handle, notes, what, _at(buffer), len(buffer), _at(lengths), len(lengths), ctypes.byref(made)
        )
        _check(result, "client packets")
        view, packets, at = memoryview(buffer), [], 0
        for length in lengths[: made.value]:
            packets.append(bytes(view[at : at + length]))
            at += length
        return packets

    def _with_notes(self, function: Any, fds: Sequence[int], notes: bytes) -> list[int]:
        self._check_notes(notes)
        handles, errors = _ints(fds), array("i", bytes(4 * len(fds)))
        _check(function(_at(handles), len(fds), self._handle, notes, _at(errors)), "activate")
        return errors.tolist()

    def _check_notes(self, notes: bytes) -> None:
        if len(notes) != NOTE_BYTES * len(self):
            why = f"{len(notes)} bytes of notes for {len(self)} flows: pass zeroed ones where none are"
            raise Final("tcp_notes", why)


def _info(s: Summary) -> Info:
    return Info(
        local=_end(s.local, s.local_port),
        remote=_end(s.remote, s.remote_port),
        family=s.family,
        state=STATES.get(s.state, str(s.state)),
        **{name: getattr(s, name) for name in _NUMBERS},
    )


_NUMBERS = (
    "send_bytes",
    "unsent_bytes",
    "recv_bytes",
    "snd_una",
    "snd_nxt",
    "write_seq",
    "rcv_nxt",
    "tsval",
    "mss",
    "snd_wnd",
    "rcv_wnd",
    "min_rtt_us",
    "rounds",
)


def _end(address: Any, port: int) -> tuple[str, int]:
    ip = ipaddress.IPv6Address(bytes(address))
    return str(ip.ipv4_mapped or ip), int.from_bytes(port.to_bytes(2, sys.byteorder), "big")
