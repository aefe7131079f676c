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
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from midstream_testbed import pcap

if TYPE_CHECKING:
    from midstream_testbed.namespace import Namespace

START_PATIENCE_S = 10.0
HEADERS_SNAPLEN = 160


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

    def _wait(self, ready: Callable[[], bool]) -> None:
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

    def stop(self) -> list[pcap.Packet]:
        """End the capture and hand back its TCP packets."""
        if self.dropped is None:
            self._process.send_signal(signal.SIGINT)
            self._stderr += self._process.communicate(timeout=60)[1] or b""
            self.captured = self._count(r"(\d+) packets? captured")
            self.dropped = self._count(r"(\d+) packets? dropped by kernel")
        return self.packets

    def _count(self, pattern: str) -> int:
        found = re.search(pattern, self._text())
        if not found:
            raise RuntimeError(f"tcpdump left no statistics: {self._text()}")
        return int(found[1])

    @property
    def packets(self) -> list[pcap.Packet]:
        """TCP packets of the capture so far; cached once it was stopped."""
        if self.dropped is None:
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
