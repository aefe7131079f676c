"""Between a GPU and the KV pool: registered memory, a stream beside the model's, pieces that fill the bus.

The pool's mapping is registered with CUDA (`pin`), so that copies go by DMA straight between the device and the slots
that agents read and write: there is no staging copy. `Mover` puts them on streams of its own, in pieces of at most
CHUNK_BYTES, as soon as the model's work before them is done; the model's next work does not wait for them.

Copies and registration are asked of the driver itself (libcuda): it takes a batch of copies with one call (CUDA 12.8),
where torch's calls, one a piece, take longer than the copies of small slots; and a failed registration through the
runtime library would be raised by whatever torch does next.

On a CPU the same calls copy at once, so that everything but the registration runs everywhere.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

log = logging.getLogger(__name__)
CHUNK_BYTES = 4 << 20
"""Between 0.5 and 8 MB: below it a copy's start costs as much as the copy, above it nothing is won, and a chunk is how
long a more urgent copy waits."""
LANES = 2
"""Streams. While one starts its next copy, the other's fills the bus. Slots of 512 KB on an H200, of a plain copy's
rate: 0.56 by torch, 0.80 by one call of the driver a slot, 0.93 in a batch, 0.97 in two."""
BATCH_COPIES = 16
"""Long enough to be told in less time than it takes: about 20 us, for 150 us of copies of 512 KB."""
BATCH_CALLS = {"cuMemcpyBatchAsync_v2": 0, "cuMemcpyBatchAsync": 1}
"""CUDA 13's, and that of 12.8 and 12.9, which tells the index of what failed. A driver without either is asked copy by
copy."""
_IN_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes: order of the source's accesses; hints of location for managed memory alone; flags."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source_hint", ctypes.c_int * 2),
        ("target_hint", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


def pin(memory: torch.Tensor) -> bool:
    """Register host memory for DMA, in this process, until `unpin`. False where it cannot be (no GPU, a limit on locked
    memory): copies then go through a buffer of the driver's, at a fraction of the speed, and nothing else changes."""
    if not torch.cuda.is_available():
        return False
    torch.cuda.synchronize()  # gives the thread the device's context
    size = memory.numel() * memory.element_size()
    failed = driver().cuMemHostRegister_v2(memory.data_ptr(), size, 0)
    if failed:
        log.warning("the KV pool's %d bytes cannot be registered with CUDA (%s): copies are slow; is memlock limited?",
                    size, error_name(failed))  # fmt: skip
    return not failed


def unpin(address: int) -> None:
    """Of what was pinned: `data_ptr()`. Before the memory is unmapped; no copy may be under way."""
    torch.cuda.synchronize()
    _check(driver().cuMemHostUnregister(address), "cuMemHostUnregister")


@functools.cache
def driver() -> Any:
    """The driver API, which every machine with a GPU has under this name, with the types of what is called here: host
    and device addresses, bytes, stream (CUDA Driver API reference, "Memory Management")."""
    library = ctypes.CDLL("libcuda.so.1")
    word = ctypes.c_uint64
    for name, types in {
        "cuMemHostRegister_v2": [word, ctypes.c_size_t, ctypes.c_uint],
        "cuMemHostUnregister": [word],
        "cuMemcpyHtoDAsync_v2": [word, word, ctypes.c_size_t, word],
        "cuMemcpyDtoHAsync_v2": [word, word, ctypes.c_size_t, word],
        "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    }.items():
        getattr(library, name).argtypes = types
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, told in BATCH_CALLS.items():
        if hasattr(library, name):
            types = [pointer, pointer, pointer, size, pointer, pointer, size, *[pointer] * told, word]
            getattr(library, name).argtypes = types
    return library


@functools.cache
def batch_call() -> str | None:
    """The driver's call for many copies at once."""
    return next((name for name in BATCH_CALLS if hasattr(driver(), name)), None)


def error_name(code: int) -> str:
    """CUDA_ERROR_..., of the driver's answer."""
    name = ctypes.c_char_p()
    driver().cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"


def _check(failed: int, call: str) -> None:
    if failed:
        raise RuntimeError(f"{call}: {error_name(failed)}")


_Copy = tuple[int, int, int]
"""Addresses to and from, bytes."""


def _copy_batch(name: str, copies: Sequence[_Copy], stream: int) -> None:
    count = len(copies)
    to, source, sizes = zip(*copies, strict=True)
    words, counts = ctypes.c_uint64 * count, ctypes.c_size_t * count
    attributes, first = _Attributes(order=_IN_STREAM_ORDER), (ctypes.c_size_t * 1)(0)
    index = [ctypes.byref(ctypes.c_size_t())] * BATCH_CALLS[name]
    call = getattr(driver(), name)
    failed = call(words(*to), words(*source), counts(*sizes), count, ctypes.byref(attributes), first, 1, *index, stream)
    _check(failed, name)


def _copy_each(name: str, copies: Sequence[_Copy], stream: int) -> None:
    call = getattr(driver(), name)
    for to, source, size in copies:
        _check(call(to, source, size, stream), name)


class Mover:
    """Copies whole slots. `slots`: [slots, elements] over the pool, pinned if it can be. One thread at a time."""

    def __init__(self, slots: torch.Tensor, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._slots = slots
        self._row_bytes = slots.shape[1] * slots.element_size()
        self._chunk = max(1, chunk_bytes // slots.element_size()) * slots.element_size()
        self._device = device
        self._streams: list[Any] = []
        if device.type == "cuda":
            self._streams = [torch.cuda.Stream(device) for _ in range(LANES)]

    def save(self, blocks: torch.Tensor, slots: Sequence[int]) -> None:
        """`blocks` [n, elements] of the device into these slots. They are there after `wait`; `blocks` may be dropped
        at once, and must not be overwritten before. ValueError for blocks of another dtype or size than the slots."""
        self._need_alike(blocks)
        self._copy(self._slots, blocks, _runs(slots, range(len(slots))))

    def load(self, slots: Sequence[int], blocks: torch.Tensor, places: Sequence[int] | None = None) -> None:
        """These slots into rows `places` of `blocks` (all, in order) on the device. Work that is given to the device
        afterwards sees them; the slots must stay as they are until `wait`. ValueError as for `save`."""
        self._need_alike(blocks)
        self._copy(blocks, self._slots, _runs(range(len(slots)) if places is None else places, slots))
        for stream in self._streams:
            torch.cuda.current_stream(self._device).wait_stream(stream)

    def wait(self) -> None:
        """Until all copies so far are done."""
        for stream in self._streams:
            stream.synchronize()

    def _need_alike(self, blocks: torch.Tensor) -> None:
        if blocks.dtype != self._slots.dtype or blocks.shape[1] != self._slots.shape[1] or not blocks.is_contiguous():
            raise ValueError(
                f"blocks of {blocks.shape[1]} {blocks.dtype}, slots of {self._slots.shape[1]} {self._slots.dtype}: "
                "they are copied as they are, and must be contiguous"
            )

    def _copy(self, to: torch.Tensor, source: torch.Tensor, runs: Iterator[tuple[int, int, int]]) -> None:
        """Runs (row of `to`, row of `source`, rows): beside the model, after what the device has been given so far.
        The first batch is under way while the next is written down."""
        if not self._streams:
            for to_row, row, count in runs:
                to[to_row : to_row + count].copy_(source[row : row + count])
            return
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        batch = batch_call()
        each = "cuMemcpyDtoHAsync_v2" if source.is_cuda else "cuMemcpyHtoDAsync_v2"
        pieces, lanes = self._pieces(to.data_ptr(), source.data_ptr(), runs), itertools.cycle(self._streams)
        while copies := list(itertools.islice(pieces, BATCH_COPIES)):
            lane = next(lanes).cuda_stream
            if batch is not None:
                _copy_batch(batch, copies, lane)
            else:
                _copy_each(each, copies, lane)
        for stream in self._streams:
            (source if source.is_cuda else to).record_stream(stream)

    def _pieces(self, to: int, source: int, runs: Iterator[tuple[int, int, int]]) -> Iterator[_Copy]:
        row_bytes, chunk = self._row_bytes, self._chunk
        for to_row, row, count in runs:
            to_at, source_at, left = to + to_row * row_bytes, source + row * row_bytes, count * row_bytes
            while left > chunk:
                yield to_at, source_at, chunk
                to_at, source_at, left = to_at + chunk, source_at + chunk, left - chunk
            yield to_at, source_at, left


def _runs(first: Sequence[int], second: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first, second, count) for stretches in which both go up by one."""
    at = 0
    while at < len(first):
        count = 1
        while (
            at + count < len(first)
            and first[at + count] == first[at] + count
            and second[at + count] == second[at] + count
        ):
            count += 1
        yield first[at], second[at], count
        at += count
