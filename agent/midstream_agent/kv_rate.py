"""A bandwidth limit that several threads share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class TokenBucket:
    """Lets `bytes_per_s` through (0: everything), after a burst of at most `burst_bytes`. Thread-safe."""

    def __init__(
        self,
        bytes_per_s: int,
        burst_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._clock, self._sleep = bytes_per_s, clock, sleep
        self._burst_s = burst_bytes / bytes_per_s if bytes_per_s else 0.0
        self._paid_until = clock() - self._burst_s
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Return when `count` more bytes may go: in the order of the calls, and never more than one burst early."""
        if not self._rate:
            return
        with self._lock:
            now = self._clock()
            begin = max(self._paid_until, now - self._burst_s)
            self._paid_until = begin + count / self._rate
            wait_s = self._paid_until - now
        if wait_s > 0:
            self._sleep(wait_s)
