"""Captures: tcpdump in its own process writes, the test reads after `stop`.

tcpdump stamps and counts in the kernel, so neither Python nor a busy test loses or delays a packet; what the
kernel itself had to drop is in `dropped`, and a test that judges by a capture asserts that it is 0. Offloads
stay on as on a real host: a capture then holds super-packets before segmentation.
"""

from __future__ import annotations

import re
import select
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from midstream_testbed import pcap

if TYPE_CHECKING:
    from midstream_testbed.namespace import Namespace

START_PATIENCE_S = 10.0
HEADERS_SNAPLEN = 160
REPORT = re.compile(
    rb"(\d+) packets? captured,?\s+(\d+) packets? received by filter,?\s+(\d+) packets? dropped by kernel"
)


class Capture:
    """A running capture; `stop` ends it. Also a context manager."""

    def __init__(
        self,
        where: Namespace,
        interface: str,
        path: Path,
        *,
        expression: str = "",
        snaplen: int = 0,
        buffer_kib: int = 65536,
    ) -> None:
        self.path = path
        self.captured: int | None = None
        self.dropped: int | None = None
        self._packets: list[pcap.Packet] | None = None
        self._stderr = b""
        argv = [
            "tcpdump",
            "-i",
            interface,
            "-n",
            "-p",
            "-w",
            str(path),
            "-U",
            "--immediate-mode",
            "-Z",
            "root",
            "-B",
            str(buffer_kib),
            "-s",
            str(snaplen),
            "--time-stamp-precision=nano",
        ]
        self._process = where.popen(
            argv + ([expression] if expression else []),
            name="tcpdump",
            stderr=subprocess.PIPE,
            privileged=True,
            private_mounts=False,
        )
        self._wait(lambda: b"listening on" in self._stderr)

    def _wait(self, ready: Callable[[], object]) -> None:
        """Read stderr until `ready`."""
        assert self._process.stderr is not None
        deadline = time.monotonic() + START_PATIENCE_S
        while not ready():
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stderr], [], [], left)[0]:
                raise TimeoutError(f"tcpdump did not start within {START_PATIENCE_S} s: {self._text()}")
            chunk = self._process.stderr.read1(65536)  # type: ignore[attr-defined]
            if not chunk:
                raise RuntimeError(f"tcpdump ended early: {self._text()}")
            self._stderr += chunk

    def _text(self) -> str:
        return self._stderr.decode(errors="replace").strip()

    def sync(self) -> None:
        """Return when the file holds every packet that the kernel had seen when this was called.

        SIGUSR1 makes tcpdump report. "Received by filter" counts what the kernel put in the ring, "captured"
        what tcpdump took out of it; ending it between the two would lose the difference without a word.
        """
        goal: int | None = None
        while True:
            seen = len(self._stderr)
            self._process.send_signal(signal.SIGUSR1)
            self._wait(partial(self._report, seen))
            report = self._report(seen)
            assert report is not None
            captured, received, dropped = report
            goal = received - dropped if goal is None else goal
            if captured >= goal:
                return

    def _report(self, start: int) -> tuple[int, int, int] | None:
        """(captured, received by filter, dropped) of the first report after `start`."""
        found = REPORT.search(self._stderr[start:])
        return (int(found[1]), int(found[2]), int(found[3])) if found else None

    def stop(self) -> list[pcap.Packet]:
        """End the capture and hand back its TCP packets."""
        if self.dropped is None:
            self.sync()
            start = len(self._stderr)
            self._process.send_signal(signal.SIGINT)
            self._stderr += self._process.communicate(timeout=60)[1] or b""
            report = self._report(start)
            if report is None:
                raise RuntimeError(f"tcpdump left no statistics: {self._text()}")
            self.captured, _, self.dropped = report
        return self.packets

    @property
    def packets(self) -> list[pcap.Packet]:
        """TCP packets of the capture so far; cached once it was stopped."""
        if self.dropped is None:
            self.sync()
            return pcap.read(self.path)
        if self._packets is None:
            self._packets = pcap.read(self.path)
        return self._packets

    def __enter__(self) -> Capture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self.stop()
