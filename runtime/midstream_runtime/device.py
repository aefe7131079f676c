"""Between a GPU and the KV pool: registered memory, a stream beside the model's, pieces that fill the bus.

The pool's mapping is registered with CUDA (`pin`), so that copies go by DMA straight between the device and the slots
that agents read and write: there is no staging copy. `Mover` puts them on a stream of its own, in pieces of at most
CHUNK_BYTES, each as soon as the model's work before it is done; the model's next work does not wait for them.

On a CPU the same calls copy at once, so that everything but the registration runs everywhere.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

log = logging.getLogger(__name__)
CHUNK_BYTES = 4 << 20
"""Between 0.5 and 8 MB: below it a copy's start costs as much as the copy, above it nothing is won, and a chunk is how
long a more urgent copy waits."""


def pin(memory: torch.Tensor) -> bool:
    """Register host memory for DMA, in this process, until `unpin`. False where it cannot be (no GPU, a limit on locked
    memory): copies then go through a buffer of the driver's, at a fraction of the speed, and nothing else changes."""
    if not torch.cuda.is_available():
        return False
    size = memory.numel() * memory.element_size()
    failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0))
    if failed:
        log.warning("the KV pool's %d bytes cannot be registered with CUDA (error %d): copies are slow; is memlock "
                    "limited?", size, failed)  # fmt: skip
    return not failed


def unpin(memory: torch.Tensor) -> None:
    """Before memory that was pinned is unmapped; no copy may be under way."""
    failed = int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr()))
    if failed:
        raise RuntimeError(f"cudaHostUnregister: error {failed}")


class Mover:
    """Copies whole slots. `slots`: [slots, elements] over the pool, pinned if it can be. One thread at a time."""

    def __init__(self, slots: torch.Tensor, device: torch.device, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._slots = slots
        self._chunk = max(1, chunk_bytes // slots.element_size())
        cuda = device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(device) if cuda else None
        self._device = device

    def save(self, blocks: torch.Tensor, slots: Sequence[int]) -> None:
        """`blocks` [n, elements] of the device into these slots. They are there after `wait`; `blocks` may be dropped
        at once, and must not be overwritten before."""
        with self._beside(blocks):
            for block, slot, count in _runs(range(len(slots)), slots):
                self._copy(self._slots[slot : slot + count], blocks[block : block + count])

    def load(self, slots: Sequence[int], blocks: torch.Tensor, places: Sequence[int] | None = None) -> None:
        """These slots into rows `places` of `blocks` (all, in order) on the device. Work that is given to the device
        afterwards sees them; the slots must stay as they are until `wait`."""
        with self._beside(blocks):
            for slot, place, count in _runs(slots, range(len(slots)) if places is None else places):
                self._copy(blocks[place : place + count], self._slots[slot : slot + count])
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def wait(self) -> None:
        """Until all copies so far are done."""
        if self._stream is not None:
            self._stream.synchronize()

    @contextlib.contextmanager
    def _beside(self, blocks: torch.Tensor) -> Iterator[None]:
        """On our stream, after what the device has been given so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield
        blocks.record_stream(self._stream)

    def _copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        to, source = to.view(-1), source.view(-1)
        for at in range(0, len(to), self._chunk):
            to[at : at + self._chunk].copy_(source[at : at + self._chunk], non_blocking=True)


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
