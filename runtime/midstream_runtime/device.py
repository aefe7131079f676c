"""Between a GPU and the KV pool: registered memory, a stream beside the model's, pieces that fill the bus.

The pool's mapping is registered with CUDA (`pin`), so that copies go by DMA straight between the device and the slots
that agents read and write: there is no staging copy. `Mover` puts them on streams of its own, in pieces of at most
CHUNK_BYTES, as soon as the model's work before them is done; the model's next work does not wait for them.

Copies and registration are asked of the driver itself (libcuda): a call of torch's takes longer than the copy of a
small slot, and a failed registration through the runtime library would be raised by whatever torch does next.

On a CPU the same calls copy at once, so that everything but the registration runs everywhere.
"""

from __future__ import annotations

import contextlib
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
"""Streams. While one starts its next copy, the other's fills the bus: of slots of 512 KB, a third of the time."""


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
    return library


def error_name(code: int) -> str:
    """CUDA_ERROR_..., of the driver's answer."""
    name = ctypes.c_char_p()
    driver().cuGetErrorName(code, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {code}"


def _check(failed: int, call: str) -> None:
    if failed:
        raise RuntimeError(f"{call}: {error_name(failed)}")


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
            self._lanes = itertools.cycle([stream.cuda_stream for stream in self._streams])

    def save(self, blocks: torch.Tensor, slots: Sequence[int]) -> None:
        """`blocks` [n, elements] of the device into these slots. They are there after `wait`; `blocks` may be dropped
        at once, and must not be overwritten before. ValueError for blocks of another dtype or size than the slots."""
        with self._beside(blocks):
            for block, slot, count in _runs(range(len(slots)), slots):
                self._copy(self._slots, slot, blocks, block, count)

    def load(self, slots: Sequence[int], blocks: torch.Tensor, places: Sequence[int] | None = None) -> None:
        """These slots into rows `places` of `blocks` (all, in order) on the device. Work that is given to the device
        afterwards sees them; the slots must stay as they are until `wait`. ValueError as for `save`."""
        with self._beside(blocks):
            for slot, place, count in _runs(slots, range(len(slots)) if places is None else places):
                self._copy(blocks, place, self._slots, slot, count)
        for stream in self._streams:
            torch.cuda.current_stream(self._device).wait_stream(stream)

    def wait(self) -> None:
        """Until all copies so far are done."""
        for stream in self._streams:
            stream.synchronize()

    @contextlib.contextmanager
    def _beside(self, blocks: torch.Tensor) -> Iterator[None]:
        """On our streams, after what the device has been given so far."""
        if blocks.dtype != self._slots.dtype or blocks.shape[1] != self._slots.shape[1] or not blocks.is_contiguous():
            raise ValueError(
                f"blocks of {blocks.shape[1]} {blocks.dtype}, slots of {self._slots.shape[1]} {self._slots.dtype}: "
                "they are copied as they are, and must be contiguous"
            )
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(self._device))
        yield
        for stream in self._streams:
            blocks.record_stream(stream)

    def _copy(self, to: torch.Tensor, to_row: int, source: torch.Tensor, source_row: int, count: int) -> None:
        """`count` rows, in pieces."""
        if not self._streams:
            to[to_row : to_row + count].copy_(source[source_row : source_row + count])
            return
        name = "cuMemcpyDtoHAsync_v2" if source.is_cuda else "cuMemcpyHtoDAsync_v2"
        call = getattr(driver(), name)
        to_at = to.data_ptr() + to_row * self._row_bytes
        source_at = source.data_ptr() + source_row * self._row_bytes
        total = count * self._row_bytes
        for at in range(0, total, self._chunk):
            _check(call(to_at + at, source_at + at, min(self._chunk, total - at), next(self._lanes)), name)


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
